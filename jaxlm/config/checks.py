"""What a configuration must satisfy before anything is built: ranges, and keys that must fit together."""

import math
from collections.abc import Callable, Iterator
from itertools import chain

from jaxlm.config import effects
from jaxlm.config.errors import UserError
from jaxlm.config.load import items
from jaxlm.config.mesh_spec import MeshSpec
from jaxlm.config.schema import VOCABULARY_MULTIPLE, ModelConfig, RunConfig, padded
from jaxlm.config.values import option, shown

LARGEST = 2**31 - 1

BATCH = ("rep", "dp", "fsdp", "ep")
"""Axes that each take their own rows of a batch."""

RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "1 or more": (
        lambda x: x >= 1,
        (
            *("model.layers", "model.embed", "model.heads", "model.kv_heads", "model.head_size", "model.mlp"),
            *("model.vocabulary", "model.max_positions", "model.rope_factor", "model.rope_original_length"),
            *("data.sequence_length", "data.batch_size"),
            *("model.experts_per_token", "pipeline.microbatches", "pipeline.chunks"),
            *("train.steps", "train.log_every", "train.microbatches", "train.max_skipped", "eval.batches"),
        ),
    ),
    "257 or more (256 bytes and the end of a document)": (lambda x: x >= 257, ("data.vocabulary",)),
    "0 or more": (
        lambda x: x >= 0,
        (
            *("model.experts", "model.shared_experts", "model.capacity_factor", "model.balance_loss"),
            *("model.balance_rate", "model.router_z_loss"),
            *(
                "model.token_types",
                "model.windows",
                "data.seed",
                "train.seed",
                "optimizer.learning_rate",
                "optimizer.warmup_steps",
            ),
            *("optimizer.weight_decay", "optimizer.clip_norm", "train.z_loss", "train.loss_chunk"),
            *(
                "checkpoint.every",
                "checkpoint.keep",
                "checkpoint.keep_every",
                "eval.every",
                "eval.sample_tokens",
                "train.max_rewinds",
            ),
        ),
    ),
    "more than 0": (
        lambda x: x > 0,
        (
            *("model.norm_epsilon", "model.rope_theta", "model.rope_local_theta", "model.rope_frequencies"),
            *("model.attention_softcap", "model.logit_softcap", "model.query_scale"),
            *("data.weights", "optimizer.epsilon", "model.router_scale"),
        ),
    ),
    "0 or more and below 1": (
        lambda x: 0 <= x < 1,
        (
            "model.dropout",
            "data.validation",
            "data.noise",
            "optimizer.beta1",
            "optimizer.beta2",
            "train.label_smoothing",
        ),
    ),
    "from 0 to 1": (lambda x: 0 <= x <= 1, ("optimizer.decay_fraction", "optimizer.final_fraction")),
}
"""What a number must be, in words and as a test -> the keys it holds for; the items of a list, where it is one."""


def check(config: RunConfig, spec: MeshSpec, announce: Callable[[str], None] = lambda line: None) -> None:
    """Raise UserError for the first thing in `config` that cannot work on the mesh `spec`.

    A size that is still to be inferred counts as 1, so that most mistakes show before any device is asked for.
    `announce` is told of each key that is set, has no effect on this mesh and yet is no mistake.
    """
    spec = MeshSpec(sizes={axis: max(size, 1) for axis, size in spec.sizes.items()})
    one_run = (_ranges(config), _model(config.model), _data(config), _training(config), effects.mistakes(config))
    # Each looks only once those before it found nothing: a size that is 0 is never divided by.
    for problem in chain(*one_run, _pipeline(config, spec), _mesh(config, spec)):
        raise UserError(problem)
    for line in effects.idle(config, spec):
        announce(line)


def profile_window(steps: str) -> tuple[int, int]:
    """First and last step to record, from the text of profile.steps."""
    first, colon, last = steps.partition(":")
    digits = all(part.isascii() and part.isdigit() and len(part) < 10 for part in (first, last))
    if not (colon and digits and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile.steps={shown(steps)} is not a window of steps; write it first:last, like 10:13")
    return int(first), int(last)


def data_ways(spec: MeshSpec) -> int:
    """Parts the rows of a batch are split into, over the replica, data, fsdp and expert axes."""
    return math.prod(spec.sizes[axis] for axis in BATCH)


def vocabulary(size: int, tp: int) -> Iterator[str]:
    """What is wrong with a vocabulary of `size`, the model's or its tokenizer's, on `tp` devices."""
    if (rows := padded(size)) % tp:
        both = math.lcm(VOCABULARY_MULTIPLE, tp)
        yield (
            f"a vocabulary of {size} tokens is padded to {rows}, which does not divide by tp {tp}; "
            f"use --model.vocabulary={-(-size // both) * both} or tp{_nearest_divisor(VOCABULARY_MULTIPLE, tp)}"
        )


def pipeline_chunks(schedule: str, chunks: int) -> int:
    """Pieces of the model that each stage holds."""
    return chunks if schedule == "interleaved" else 1


def pipeline_microbatches(asked: int | None, batch_size: int, stages: int, ways: int) -> int:
    """Microbatches of a pipeline of `stages`, where the rows of a batch are split into `ways`.

    Where `asked` leaves it open: 4, 2 or 1 a stage, the most that the batch divides by."""
    if asked is not None:
        return asked
    fitting = (stages * each for each in (4, 2, 1) if batch_size % (ways * stages * each) == 0)
    return next(fitting, stages)


def _pipeline(config: RunConfig, spec: MeshSpec) -> Iterator[str]:
    stages, chunks, layers = (
        spec.sizes["pp"],
        pipeline_chunks(config.pipeline.schedule, config.pipeline.chunks),
        config.model.layers,
    )
    if stages == 1:
        return
    if layers < stages * chunks:
        of = f" x --pipeline.chunks={chunks}" if chunks > 1 else ""
        yield (
            f"--model.layers={layers} does not fill pp {stages}{of} = {stages * chunks} parts of the model; "
            f"use pp{_nearest_divisor(layers, stages)} or --model.layers={stages * chunks}"
        )
    if chunks == 1 and config.pipeline.schedule == "interleaved":
        yield "--pipeline.chunks=1 leaves nothing to interleave; use --pipeline.chunks=2 or --pipeline.schedule=1f1b"
    if config.train.microbatches > 1:
        yield (
            f"--train.microbatches={config.train.microbatches} with pp: a pipeline accumulates over its own; "
            f"use --train.microbatches=1 and --pipeline.microbatches={config.train.microbatches}"
        )
    if config.pipeline.microbatches is not None and config.pipeline.microbatches < stages:
        yield (
            f"--pipeline.microbatches={config.pipeline.microbatches} is fewer than pp {stages}: stages would stay "
            f"empty; use --pipeline.microbatches={stages} or more"
        )


def _ranges(config: RunConfig) -> Iterator[str]:
    rules = {key: (words, test) for words, (test, keys) in RANGES.items() for key in keys}
    for key, value in items(config):
        for number in value if isinstance(value, tuple) else (value,):
            if key in rules and number is not None and not rules[key][1](number):
                yield f"{option(key)}={number}: must be {rules[key][0]}"
            if isinstance(number, int) and number > LARGEST:
                yield f"{option(key)}={shown(number)}: must be {LARGEST} or less"
        if value == "" and key not in ("eval.prompt",):
            yield f"{option(key)} is empty; give it a value, or leave it out for its default"


def _model(m: ModelConfig) -> Iterator[str]:
    kv_heads, head_size = m.key_value_heads, m.head_width
    if m.head_size is None and m.embed % m.heads:
        near = _nearest_multiple(m.embed, m.heads)
        yield (
            f"--model.embed={m.embed} does not divide by --model.heads={m.heads}; "
            f"use --model.embed={near}, or set --model.head-size"
        )
    if m.heads % kv_heads:
        yield (
            f"--model.heads={m.heads} does not divide by --model.kv-heads={kv_heads}; "
            f"use --model.kv-heads={_nearest_divisor(m.heads, kv_heads)}"
        )
    if m.positions == "rotary" and head_size % 2:
        yield (
            f"--model.head-size={head_size} is odd, and rotary positions turn pairs; "
            f"use --model.head-size={head_size + 1}"
        )
    if len(m.rope_frequencies) != 2 or m.rope_frequencies[0] >= m.rope_frequencies[1]:
        yield (
            f"--model.rope-frequencies={','.join(f'{f:g}' for f in m.rope_frequencies)}: give two, the first below the "
            "second, like 1,4"
        )
    if len(m.windows) > m.layers:
        yield f"--model.windows has {len(m.windows)} lengths for --model.layers={m.layers}; give {m.layers} or fewer"
    yield from _encoder_decoder(m)
    if 0 < m.experts < m.experts_per_token:
        yield (
            f"--model.experts-per-token={m.experts_per_token} is more than --model.experts={m.experts}; "
            f"use --model.experts-per-token={m.experts} or --model.experts={m.experts_per_token}"
        )


def _encoder_decoder(m: ModelConfig) -> Iterator[str]:
    pair, relative = m.architecture == "encoder_decoder", m.positions == "relative"
    if pair and not relative:
        yield (
            f"--model.positions={m.positions} is not what an encoder_decoder has, which is a bias of attention; "
            "use --model.positions=relative"
        )
    if relative and not pair:
        yield (
            f"--model.positions=relative is of an encoder_decoder alone, and --model.architecture={m.architecture}; "
            "use --model.positions=rotary"
        )
    if pair and m.norm_placement == "sum":
        yield "--model.norm-placement=sum is of encoders and decoders alone; use --model.norm-placement=pre"
    for key in ("experts", "token_types"):
        if pair and getattr(m, key):
            yield f"{option('model.' + key)}={getattr(m, key)}: an encoder_decoder has none; leave it at 0"


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.path or "" in data.path:
        yield "--data.path is empty; name a corpus, such as --data.path=stdlib"
    if data.weights and len(data.weights) != len(data.path):
        yield (
            f"--data.weights has {len(data.weights)} numbers and --data.path {len(data.path)} corpora; "
            "give one weight to each corpus"
        )
    if config.eval.every and not data.validation:
        yield (
            f"--data.validation=0 leaves nothing for --eval.every={config.eval.every}; "
            "use --data.validation=0.05 or --eval.every=0"
        )
    if config.model.architecture != "decoder" and not data.noise:
        yield (
            f"--model.architecture={config.model.architecture} predicts tokens that are hidden, and --data.noise=0 "
            "hides none; use --data.noise=0.15"
        )
    if config.model.architecture == "decoder" and data.noise:
        yield (
            f"--data.noise={data.noise} hides tokens, and --model.architecture=decoder predicts the next ones; "
            "use --data.noise=0 or --model.architecture=encoder"
        )
    if config.model.positions == "learned" and data.sequence_length > config.model.max_positions:
        yield (
            f"--data.sequence-length={data.sequence_length} is more than the {config.model.max_positions} learned "
            f"positions; use --model.max-positions={data.sequence_length} or a shorter sequence"
        )


def _training(config: RunConfig) -> Iterator[str]:
    if config.precision.compute == "float16" and config.precision.params != "float32":
        yield (
            f"--precision.params={config.precision.params} is too coarse to scale float16 gradients into; "
            "use --precision.params=float32 or --precision.compute=bfloat16"
        )
    if config.profile.steps is not None and profile_window(config.profile.steps)[1] > config.train.steps:
        yield (
            f"--profile.steps={config.profile.steps} ends after the run (--train.steps={config.train.steps}); "
            "choose an earlier window or more steps"
        )


def _mesh(config: RunConfig, spec: MeshSpec) -> Iterator[str]:
    # optimizer.shard=data on a mesh without a data axis is no mistake: a run may continue on fewer devices.
    m, tp = config.model, spec.sizes["tp"]
    kv_heads = m.key_value_heads
    for key, size in (("model.heads", m.heads), ("model.mlp", m.mlp)):
        if size % tp:
            yield (
                f"{option(key)}={size} does not divide by tp {tp} of mesh {spec}; "
                f"use {option(key)}={_nearest_multiple(size, tp)} or tp{_nearest_divisor(size, tp)}"
            )
    if kv_heads % tp and tp % kv_heads:
        yield (
            f"--model.kv-heads={kv_heads} neither divides by tp {tp} of mesh {spec} nor divides it; "
            f"use tp{_nearest_divisor(kv_heads, tp)}"
        )
    if m.vocabulary is not None:
        yield from vocabulary(m.vocabulary, tp)
    yield from _not_cut(config, spec)
    yield from _embed(m, spec)
    yield from _context(config, spec)
    yield from _experts(m, spec)
    ways, parts, kind = data_ways(spec), config.train.microbatches, "microbatches"
    if spec.sizes["pp"] > 1:
        parts, kind = (
            pipeline_microbatches(config.pipeline.microbatches, config.data.batch_size, spec.sizes["pp"], ways),
            "pipeline microbatches",
        )
    if config.data.batch_size % (ways * parts):
        names = " x ".join(f"{axis} {spec.sizes[axis]}" for axis in BATCH if spec.sizes[axis] > 1)
        product = f"{names} x {kind} {parts}" if names else f"{kind} {parts}"
        yield (
            f"--data.batch-size={config.data.batch_size} does not divide by {product} = {ways * parts}; "
            f"use --data.batch-size={_nearest_multiple(config.data.batch_size, ways * parts)}"
        )


def _not_cut(config: RunConfig, spec: MeshSpec) -> Iterator[str]:
    """Of an encoder_decoder: two stacks and two sequences, which nothing here cuts."""
    if config.model.architecture != "encoder_decoder":
        return
    for axis, what in (("pp", "layers into stages"), ("cp", "sequences")):
        if spec.sizes[axis] > 1:
            yield (
                f"{axis} {spec.sizes[axis]} of mesh {spec} cuts {what}, and those of "
                f"--model.architecture=encoder_decoder stay whole; use fsdp{spec.sizes[axis]} in its place"
            )
    if config.context.sequence_parallel == "on" and spec.sizes["tp"] > 1:
        yield (
            "--context.sequence-parallel=on cuts norms by sequence, and those of --model.architecture=encoder_decoder "
            "stay whole; use --context.sequence-parallel=auto"
        )


def _embed(m: ModelConfig, spec: MeshSpec) -> Iterator[str]:
    fsdp, stages = spec.sizes["fsdp"], spec.sizes["pp"]
    ways = fsdp * stages
    if m.embed % ways:
        product = f"fsdp {fsdp} of mesh {spec}"
        if stages > 1:
            product = f"fsdp {fsdp} x pp {stages} = {ways}, by which evaluation cuts parameters"
        near = _nearest_multiple(m.embed, math.lcm(ways, 1 if m.head_size else m.heads))
        yield f"--model.embed={m.embed} does not divide by {product}; use --model.embed={near}"


def _context(config: RunConfig, spec: MeshSpec) -> Iterator[str]:
    length, method, cp = config.data.sequence_length, config.context.method, spec.sizes["cp"]
    parts = cp * spec.sizes["tp"]
    if config.context.sequence_parallel == "on" and spec.sizes["tp"] > 1 and length % parts:
        yield (
            f"--data.sequence-length={length} does not divide by cp {cp} x tp {spec.sizes['tp']} = {parts}, the parts "
            f"of --context.sequence-parallel=on; use --data.sequence-length={_nearest_multiple(length, parts)} or "
            "--context.sequence-parallel=auto"
        )
    if cp == 1:
        return
    # Zigzag: each device has an early and a late piece of the sequence.
    pieces, product = (cp, f"cp {cp}") if method == "ulysses" else (2 * cp, f"2 x cp {cp} = {2 * cp}")
    if length % pieces:
        yield (
            f"--data.sequence-length={length} does not divide by {product}, the pieces of --context.method={method} "
            f"on mesh {spec}; use --data.sequence-length={_nearest_multiple(length, pieces)}"
        )
    heads, ways = config.model.heads, cp * spec.sizes["tp"]
    if method == "ulysses" and heads % ways:
        yield (
            f"--context.method=ulysses exchanges heads: --model.heads={heads} does not divide by cp {cp} x tp "
            f"{spec.sizes['tp']} = {ways}; use --context.method=ring or --model.heads={_nearest_multiple(heads, ways)}"
        )


def _experts(m: ModelConfig, spec: MeshSpec) -> Iterator[str]:
    ep, cp = spec.sizes["ep"], spec.sizes["cp"]
    if ep > 1 and not m.experts:
        yield (
            f"ep {ep} of mesh {spec} deals out experts, and --model.experts=0 has none; "
            f"use --model.experts={_nearest_multiple(8, ep)}, or dp{ep} in its place"
        )
    elif m.experts % ep:
        yield (
            f"--model.experts={m.experts} does not divide by ep {ep} of mesh {spec}; "
            f"use --model.experts={_nearest_multiple(m.experts, ep)} or ep{_nearest_divisor(m.experts, ep)}"
        )
    if m.capacity_factor and cp > 1:
        yield (
            f"--model.capacity-factor={m.capacity_factor:g} takes the tokens of a sequence in their order, and cp {cp} "
            f"of mesh {spec} cuts sequences; use --model.capacity-factor=0, or dp{cp} in its place"
        )


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)


def _nearest_divisor(value: int, near: int) -> int:
    """The divisor of `value` that stands nearest, in ratio, to `near`."""
    return min((d for d in range(1, min(value, 4096) + 1) if value % d == 0), key=lambda d: abs(math.log(d / near)))
