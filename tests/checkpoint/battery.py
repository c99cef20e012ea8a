"""One model of random weights in transformers and in jaxlm: logits, loss, every gradient, an AdamW step, greedy text.

Transformers computes on torch's CPU in float32, attention by its definition. What it computes comes to us as it comes
to anybody: `save_pretrained`, `jaxlm.checkpoint import`.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.__main__ import main
from jaxlm.checkpoint.matching import flat, matches
from jaxlm.checkpoint.store import Store
from jaxlm.config import mesh_spec
from jaxlm.config.load import IMPORTED, read_file
from jaxlm.config.schema import ModelConfig, OptimizerConfig, RunConfig
from jaxlm.generate.decode import generate
from jaxlm.models import families
from jaxlm.models.build import Model, Params, build
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import rules
from jaxlm.train import optimizer as optimizers
from jaxlm.train.loss import token_losses
from tests.checkpoint.shapes import config_json

LOGIT, GRADIENT, LOSS, PARAMETER = 1e-4, 1e-4, 1e-5, 1e-5
"""Promised: logits absolute, each gradient leaf over its norm, the loss relative, parameters as after steps of ours."""

ADAMW = OptimizerConfig(
    **{"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.1, "clip_norm": 0.0},
    epsilon=1e-5,
)
"""With an epsilon above rounding: softmax hardly sees the slow channels of rotated key biases, whose gradients of 1e-9
are what rounding left, and of which Adam's first step would make learning_rate x sign."""
LENGTHS = (24, 17, 9)
"""Tokens of the rows of a batch; the rest is padding."""
SOURCE_LENGTHS = (11, 160, 90)
"""And of what an encoder-decoder has read, longer than the distances that it tells apart."""
PROMPTS, NEW_TOKENS = 20, 12
START = 0
"""What an encoder-decoder begins its text behind."""


class Pair:
    """The same model twice."""

    def __init__(self, family: str, shape: str, folder: Path, seed: int = 0):
        self.folder, self.their_folder, self.run = folder, folder / "theirs", folder / "run"
        self.theirs = _random(config_json(family, shape), seed)
        self.theirs.save_pretrained(self.their_folder)
        assert main(["import", f"--from={self.their_folder}", f"--run={self.run}"]) == 0
        self.config = read_file(RunConfig, self.run / "config.yaml")
        self.family = families.FAMILIES[family]
        self.model = build(self.config.model, None)
        mesh = meshes.from_devices(mesh_spec.parse("dp1"), jax.devices()[:1])
        layout = rules.layout(mesh, kv_heads=self.config.model.key_value_heads)
        self.runtime = Runtime(layout=layout)
        self.params = _restored(self.run, self.model)
        self.batch = _batch(self.config.model, seed)

    def outputs(self) -> dict[str, float]:
        """Errors of logits, loss and gradients, and the leaf whose gradient is worst."""
        batch = {name: jnp.asarray(value) for name, value in self.batch.items()}

        def run(params: Params) -> Any:
            x_BTD = self.model.hidden(params, batch, self.runtime)
            total, count = token_losses(self.model, params, x_BTD, batch, self.runtime, self.config)
            return total / count, self.model.logits(params, x_BTD, self.runtime)

        (loss, logits), self.gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(self.params)
        out = self._run(self.theirs)
        out.loss.backward()
        real = self.batch["segment_ids"] > 0
        their_logits = out.logits.detach().numpy()[real]
        their_gradients = self._as_ours({name: p.grad for name, p in self.theirs.named_parameters()}, "gradients")
        errors = _relative(self.gradients, their_gradients, self._without_gradient)
        worst = max(errors, key=lambda name: errors[name])
        return {
            "logits": float(np.abs(np.asarray(logits)[real] - their_logits).max()),
            "largest_logit": float(np.abs(their_logits).max()),
            "loss": abs(float(loss) - out.loss.item()) / out.loss.item(),
            "gradient": errors[worst],
            "gradient_leaf": worst,
        }

    def stepped(self) -> dict[str, Any]:
        """Error of the parameters after one AdamW step from the gradients of `outputs`; decay of matrices alone."""
        import torch

        rule = optimizers.build(ADAMW, 1)
        updates, _ = rule.update(self.gradients, rule.init(self.params), self.params)
        ours = jax.tree.map(lambda p, u: p + u, self.params, updates)
        named = dict(self.theirs.named_parameters())
        for name in self._without_gradient_theirs:  # what rounding leaves there Adam would make a step of
            size = named[name].grad.shape[0] // 3
            named[name].grad[slice(size, 2 * size) if name.endswith("c_attn.bias") else ...] = 0
        places = ("wpe", "position_embeddings", "relative_attention_bias")
        decayed = [p for name, p in named.items() if p.ndim > 1 and not any(word in name for word in places)]
        others = [p for name, p in named.items() if p.ndim < 2 or any(word in name for word in places)]
        groups = [{"params": decayed, "weight_decay": ADAMW.weight_decay}, {"params": others, "weight_decay": 0.0}]
        settings = {"lr": ADAMW.learning_rate, "betas": (ADAMW.beta1, ADAMW.beta2), "eps": ADAMW.epsilon}
        torch.optim.AdamW(groups, **settings).step()
        theirs = self._as_ours({name: p.detach() for name, p in named.items()}, "stepped")
        moved = _relative(ours, theirs, ())
        there = _host(theirs)
        largest = {name: float(np.abs(leaf - there[name]).max()) for name, leaf in _host(ours).items()}
        errors = {name: min(moved[name], largest[name]) for name in moved}
        worst = max(errors, key=lambda name: errors[name])
        return {"parameter": errors[worst], "parameter_leaf": worst}

    def greedy(self) -> dict[str, Any]:
        """Prompts that transformers continues from our export as we do, token for token, left-padded together; of an
        encoder, rows in which it finds the same token the likeliest at each place."""
        loaded = self._exported("export")
        if not self.config.model.causal:
            return self._likeliest(loaded)
        theirs = self._continued(loaded, eos_token_id=-1)
        ours = self._written()
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return {"prompts": PROMPTS, "same_prompts": same, "different_words": len({tuple(row) for row in ours})}

    def searched(self, beams: int, length_penalty: float) -> dict[str, int]:
        """As of `greedy`, of beam searches: without an id that ends a text, with one, and with two."""

        def ours(*ends: int) -> list[list[int]]:
            return self._written(beams=beams, length_penalty=length_penalty, stop_ids=ends)

        words = [token for row in ours() for token in row[2:]]
        common = sorted(set(words), key=lambda token: (-words.count(token), token))[:2]
        settings = {"num_beams": beams, "length_penalty": length_penalty, "early_stopping": False}
        found = {"prompts": 0, "same_prompts": 0, "ended": 0}
        for ends in ([], common[:1], common):
            theirs = self._continued(self.theirs, eos_token_id=ends or -1, **settings)
            cut = [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in theirs]
            found["prompts"] += PROMPTS
            found["same_prompts"] += sum(a == b for a, b in zip(ours(*ends), cut, strict=True))
            found["ended"] += sum(len(row) < NEW_TOKENS for row in cut)
        return found

    def _prompts(self) -> list[list[int]]:
        rng = np.random.default_rng(1)
        return [rng.integers(2, self.model.vocabulary, n).tolist() for n in rng.integers(1, 24, PROMPTS)]

    def _written(self, **asked: Any) -> list[list[int]]:
        """What we make of the prompts."""
        arguments = (self.model, self.params, self.runtime, self._prompts())
        return generate(*arguments, max_new_tokens=NEW_TOKENS, start_id=START, **asked)

    def _continued(self, loaded: Any, **settings: Any) -> list[list[int]]:
        """What transformers makes of the prompts, left-padded together."""
        import torch

        prompts = self._prompts()
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | settings
        begun = longest
        if self.config.model.architecture == "encoder_decoder":
            settings, begun = settings | {"decoder_start_token_id": START}, 1
        with torch.no_grad():
            return loaded.generate(ids, attention_mask=mask, **settings)[:, begun:].tolist()

    def _likeliest(self, loaded: Any) -> dict[str, Any]:
        import torch

        rng = np.random.default_rng(1)
        lengths = rng.integers(1, 24, PROMPTS)
        tokens = rng.integers(2, self.model.vocabulary, (PROMPTS, 24)).astype(np.int32)
        places = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
        real = (places < lengths[:, None]).astype(np.int32)
        batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(real), "positions": jnp.asarray(places)}

        @jax.jit
        def likeliest(params: Params) -> jax.Array:
            logits = self.model.logits(params, self.model.hidden(params, batch, self.runtime), self.runtime)
            return logits.argmax(-1)

        together = np.asarray(likeliest(self.params))
        ours, theirs = [row[:n].tolist() for row, n in zip(together, lengths, strict=True)], []
        for row, n in zip(tokens, lengths, strict=True):
            with torch.no_grad():
                theirs.append(loaded(torch.tensor(row[None, :n]).long()).logits[0].argmax(-1).tolist())
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        return {"prompts": PROMPTS, "same_prompts": same, "different_words": len({str(row) for row in ours})}

    def as_our_own(self) -> dict[str, Any]:
        """The same of an export whose config.json we write, as of a run that did not come from Hugging Face."""
        import torch

        shutil.rmtree(self.run / IMPORTED)
        loaded = self._exported("own")
        with torch.no_grad():
            difference = (self._run(loaded).logits - self._run(self.theirs).logits).abs().max().item()
        return {"own_config": difference, "own_family": loaded.config.model_type}

    def _exported(self, name: str) -> Any:
        import torch

        to = self.folder / name
        assert main(["export", f"--run={self.run}", f"--to={to}"]) == 0
        auto = _auto_class(self.family.architecture)
        return auto.from_pretrained(to, dtype=torch.float32, attn_implementation="eager").eval()

    @property
    def _without_gradient(self) -> tuple[str, ...]:
        """Leaves whose gradient is zero in truth and rounding in torch: without rotation softmax does not see biases of
        keys."""
        return ("blocks.attention.key.bias",) if self.config.model.positions == "learned" else ()

    @property
    def _without_gradient_theirs(self) -> list[str]:
        named = (name for name, _ in self.theirs.named_parameters())
        return [name for name in named if name.endswith(("c_attn.bias", "self.key.bias"))]

    def _run(self, model: Any) -> Any:
        import torch

        ids, mask = torch.tensor(self.batch["tokens"]).long(), torch.tensor(self.batch["segment_ids"])
        if self.config.model.architecture == "decoder":
            return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        labels = torch.tensor(np.where(self.batch["loss_mask"] > 0, self.batch["targets"], -100)).long()
        if "source_tokens" in self.batch:
            source = torch.tensor(self.batch["source_tokens"]).long()
            seen = torch.tensor(self.batch["source_segment_ids"])
            return model(input_ids=source, attention_mask=seen, decoder_input_ids=ids, labels=labels)
        types = torch.tensor(self.batch["types"]).long()
        return model(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels)

    def _as_ours(self, values: dict[str, Any], name: str) -> Params:
        """Tensors of their parameters' names, by way of files, which is where experts stand one by one."""
        import copy

        import torch

        other = copy.deepcopy(self.theirs)
        with torch.no_grad():
            for key, parameter in other.named_parameters():
                parameter.copy_(values[key])
        other.save_pretrained(self.folder / name)
        return read_tree(self.folder / name, self.model, self.family)


def read_tree(folder: Path, model: Model, family: families.Family) -> Params:
    """The tensors of a folder as a tree of parameters."""
    stored = safetensors.open_folder(folder)
    made = {name: np.zeros(leaf.shape, np.float32) for name, leaf in flat(model.abstract).items()}
    for match in matches(family, model):
        for piece in match.pieces(4):
            parts = match.to_ours(stored[match.name].read(piece.first, piece.last), piece)
            for name, part in zip(match.row.ours, parts, strict=True):
                made[name][(*match.at, *piece.where)] = part
    return jax.tree.unflatten(jax.tree.structure(model.abstract), [jnp.asarray(leaf) for leaf in made.values()])


def _random(given: dict[str, Any], seed: int) -> Any:
    """A model of transformers whose logits are of the size of 1, with norms and biases that are not trivial."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": given.get("pad_token_id")}
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if given["model_type"] == "gpt2" else {}
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps({**given, **ids, **dropouts})))
    torch.manual_seed(seed)
    auto = _auto_class(families.of_config(given).architecture)
    model = auto.from_config(config, attn_implementation="eager").eval()
    if given.get("tie_word_embeddings") is False and "lm_head.weight" in (
        getattr(model, "_tied_weights_keys", None) or {}
    ):
        # What transformers 5 makes anew of a T5 is tied whatever its config.json says; what it reads is not.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for name, parameter in model.named_parameters():
            if name.endswith(
                "Attention.q.weight"
            ):  # of T5, whose logits are scaled by this alone, as in its own beginning
                parameter.mul_(config.d_kv**-0.5)
        if getattr(config, "scale_decoder_outputs", False):
            model.shared.weight.mul_(config.d_model**0.2)  # of the size of 1, and yet not each token its own successor
    return model


def _auto_class(architecture: str) -> Any:
    import transformers

    if "ConditionalGeneration" in architecture:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForMaskedLM if "MaskedLM" in architecture else transformers.AutoModelForCausalLM


def _restored(run: Path, model: Model) -> Params:
    with Store(run / "checkpoints") as store:
        return store.restore(0, {"params": model.abstract})["params"]


def _batch(model: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Rows of LENGTHS tokens, and padding behind them; the targets are the tokens one on, or where tokens are of types,
    any at some places. An encoder-decoder has read a source of another length."""
    rng, vocabulary, token_types = np.random.default_rng(seed), model.vocabulary, model.token_types
    tokens = rng.integers(0, vocabulary, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    places = np.broadcast_to(np.arange(max(LENGTHS), dtype=np.int32), tokens.shape)
    real = (places < np.asarray(LENGTHS)[:, None]).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    mask = (places < np.asarray(LENGTHS)[:, None] - 1).astype(np.float32)
    batch = {"tokens": tokens, "segment_ids": real, "positions": places * real, "targets": targets, "loss_mask": mask}
    if model.architecture == "encoder_decoder":
        source = rng.integers(0, vocabulary, (len(SOURCE_LENGTHS), max(SOURCE_LENGTHS))).astype(np.int32)
        places = np.broadcast_to(np.arange(source.shape[1], dtype=np.int32), source.shape)
        real = (places < np.asarray(SOURCE_LENGTHS)[:, None]).astype(np.int32)
        return batch | {"source_tokens": source, "source_segment_ids": real, "source_positions": places * real}
    if not token_types:
        return batch
    hidden = ((rng.random(tokens.shape) < 0.3) & (real > 0)).astype(np.float32)
    types = rng.integers(0, token_types, tokens.shape).astype(np.int32)
    return batch | {"tokens": np.maximum(tokens, 2), "loss_mask": hidden, "types": types}  # 1 is RoBERTa's padding


def _host(tree: Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in flat(tree).items()}


def _relative(ours: Params, theirs: Params, zero: tuple[str, ...]) -> dict[str, float]:
    """Norm of the difference over the norm of theirs, by leaf; of those in `zero`, which ours must be, over all."""
    a, b = _host(ours), _host(theirs)
    total = float(np.sqrt(sum((leaf**2).sum() for leaf in b.values())))
    errors = {}
    for name in a:
        assert name not in zero or not a[name].any()
        errors[name] = float(np.linalg.norm(a[name] - b[name]) / (total if name in zero else np.linalg.norm(b[name])))
    return errors
