"""Perplexity and bits per byte of text, by the evaluation that training does."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.opened import devices, kind_of, read_tokenizer, restore
from jaxlm.config.checks import check
from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import MeshSpec
from jaxlm.config.schema import DataConfig, ProfileConfig, RunConfig
from jaxlm.config.values import shown
from jaxlm.data.corpus import Corpora, Split, SplitName, open_corpora
from jaxlm.data.loader import Loader
from jaxlm.data.spans import sentinels
from jaxlm.data.store import TokenFolder, is_token_folder
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.evaluate.options import Options
from jaxlm.evaluate.output import Advance, Say
from jaxlm.train.assemble import assemble
from jaxlm.train.evaluate import Evaluator, summary

EVERY = 2**31 - 1


def measure(
    options: Options, folder: Path, config: RunConfig, spec: MeshSpec, say: Say, advance: Advance
) -> dict[str, Any]:
    """The result as JSON has it: what was measured on what, loss, perplexity, bits_per_byte.

    Args:
        config: of the run in `folder`.
        advance: hears how many of how many batches are done.

    Raises:
        UserError: the text cannot be read, was encoded by another tokenizer, or does not fit the model or the mesh.
    """
    tokenizer = read_tokenizer(folder)
    split = options.data.split or ("all" if options.data.path else "validation")
    config = _asked(options, config, folder, split)
    check(config, spec)
    mesh = devices(spec)
    corpora = _open(config, tokenizer, folder)
    part: SplitName = "validation" if split == "validation" else "train"
    if split == "validation" and not corpora.documents(part):
        raise UserError("--data.split=validation: a corpus of one document leaves nothing to hold out; use all")
    corpora = _first(corpora, part, options.documents)
    loader = Loader(corpora, config.data, part)
    say(f"{split}: {corpora.documents(part):,} documents, {corpora.tokens(part):,} tokens")
    assembly = assemble(config, mesh, tokenizer.vocabulary_size, lambda line: None)
    params, step = restore(folder, config, assembly.model, assembly.plan.shardings["params"], options.step, say)
    say(f"{folder} step {step} on {kind_of(mesh)}, {assembly.runtime.dtype}, attention {assembly.runtime.attention}")
    evaluator, began = Evaluator(assembly, loader), time.perf_counter()
    sums = evaluator.sums(params, advance)
    of = {"path": list(config.data.path), "split": split, "documents": corpora.documents(part)}
    of |= {"sequences": min(config.eval.batches * config.data.batch_size, loader.samples_per_epoch)}
    of |= {"sequence_length": config.data.sequence_length, "text_bytes": int(sums.text_bytes)}
    seconds = time.perf_counter() - began
    return {"run": str(folder), "step": step, "mesh": str(spec), **of, **summary(sums), "seconds": round(seconds, 3)}


def line(found: dict[str, Any]) -> str:
    """The result for a person."""
    return (
        f"{found['run']} step {found['step']} on {', '.join(found['path'])} ({found['split']}): "
        f"loss {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.2f}, "
        f"{found['bits_per_byte']:.4f} bits per byte; {found['tokens']:,} tokens predicted, "
        f"{found['text_bytes']:,} bytes of text, {found['documents']:,} documents"
    )


def _asked(options: Options, config: RunConfig, folder: Path, split: str) -> RunConfig:
    """The run's configuration for this measurement: nothing that the model computes is another."""
    data, asked = config.data, options.data
    if asked.path:
        # The vocabulary and the weights are of the corpora that the run was trained on.
        bring = any(is_token_folder(path) for path in asked.path)  # their own, which `_open` looks at
        data = replace(data, path=asked.path, weights=(), vocabulary=DataConfig().vocabulary)
        data = replace(data, tokenizer=DataConfig().tokenizer if bring else str(folder / "tokenizer"))
    given = {name: getattr(asked, name) for name in ("text_key", "sequence_length", "batch_size")}
    data = replace(data, **{name: value for name, value in given.items() if value is not None})
    if split == "all":
        data = replace(data, validation=0.0)
    return replace(
        config,
        data=data,
        train=replace(config.train, microbatches=1),
        pipeline=replace(config.pipeline, microbatches=None),
        eval=replace(config.eval, every=0, batches=options.batches or EVERY),
        profile=ProfileConfig(),
        mesh=options.mesh,
    )


def _open(config: RunConfig, tokenizer: Tokenizer, folder: Path) -> Corpora:
    """The corpora, which the run's tokenizer encoded."""
    data, own, known = config.data, tokenizer.digest(), len(tokenizer.sentinel_ids)
    if config.objective == "spans" and sentinels(data.sequence_length, data.noise) > known:
        raise UserError(
            f"--data.sequence-length={data.sequence_length} may hide {sentinels(data.sequence_length, data.noise)} "
            f"spans of a row, and {folder} has learned {known}; leave it out"
        )
    for path in filter(is_token_folder, data.path):
        theirs = TokenFolder(path).tokenizer
        if _hiding_as(tokenizer, theirs).digest() != own:
            raise UserError(
                f"{path} was prepared with another tokenizer than that of {folder}; give the text itself, or prepare "
                f"it again (python -m jaxlm.data prepare --tokenizer={folder / 'tokenizer'})"
            )
    corpora = open_corpora(data, config.objective)
    if _hiding_as(tokenizer, corpora.tokenizer).digest() != own:
        paths = ",".join(data.path)
        raise UserError(
            f"the corpora of {folder} have changed: they now give another tokenizer than the run's; "
            f"use --data.path={shown(paths)[1:-1]} to encode them with the run's own"
        )
    return Corpora(corpora.corpora, tokenizer, corpora.objective, corpora.notes)


def _hiding_as(own: Tokenizer, other: Tokenizer) -> Tokenizer:
    """`other` with the ids for hidden text that `own` has: a sequence length of its own asks for others."""
    other = other.with_sentinels(len(own.sentinel_ids))
    return other if own.mask_id is None else other.with_mask()


def _first(corpora: Corpora, part: SplitName, count: int | None) -> Corpora:
    """The first `count` documents of the split, in the order of the corpora."""
    if count is None:
        return corpora
    kept = []
    for corpus in corpora.corpora:
        own: Split = corpus.split(part)
        taken = Split(own.folder, own.documents[:count])
        count -= len(taken.documents)
        kept.append(replace(corpus, validation=taken) if part == "validation" else replace(corpus, train=taken))
    return Corpora(kept, corpora.tokenizer, corpora.objective, corpora.notes)
