"""Models of Hugging Face into run folders and back out, piece by piece (`matching`), bit for bit.

A run folder that was imported holds, beside what any run does, `huggingface/`: config.json and the tokenizer's files as
they came, which an export gives back. Its checkpoint 0 has parameters alone: training initialises the rest.
"""

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint import conventions, manifest, safetensors
from jaxlm.checkpoint.matching import Match, leaves, matches
from jaxlm.checkpoint.slices import SliceReader, SliceWriter
from jaxlm.config import checks, mesh_spec
from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited, write_atomically
from jaxlm.config.load import IMPORTED, dump, read_file
from jaxlm.config.schema import DataConfig, ModelConfig, PrecisionConfig, RunConfig
from jaxlm.config.values import shown
from jaxlm.data import tokenizer as tokenizers
from jaxlm.models import families
from jaxlm.models.build import build
from jaxlm.models.families.family import TRAINING, Family, unlike

Say = Callable[[str], None]

CONFIG = "config.json"
TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"
"""A folder of further templates, NAME.jinja. Like TEXT_FILES they travel with the weights as they are."""

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
STORED = {code: name for name, code in DTYPES.items()}
ASIDE = "aside"
"""Folder in that of the files as they came: tensors that the model does not compute with (`Family.aside`)."""


def import_(source: Path, run: Path, mesh: str, params: str | None, say: Say) -> None:
    """Make the run folder `run` from the model in the folder `source`.

    Args:
        mesh: what its config.yaml says; the arrays know of none.
        params: float32 or bfloat16, what the arrays are stored as; None: as they are, or float32 where bfloat16 and
            float32 do not hold all of them.

    Raises:
        UserError: the model is not one of ours, or a file is not what it says. Nothing is left that counts as a run.
    """
    if not source.is_dir():
        raise UserError(f"--from={shown(str(source))}: no such folder; download the model first")
    if (run / "config.yaml").exists() or manifest.steps(run / "checkpoints"):
        raise UserError(f"--run={shown(str(run))} holds a run already; use another --run")
    given = safetensors.read_json(safetensors.inside(source, CONFIG))
    family = families.of_config(given)
    config = family.read(given)
    stored = _renamed(family, safetensors.open_folder(source))
    text = _tokenizer(source, config, say)
    conventions.check_ids(source, config.vocabulary or 0)
    _check_start(config, given.get("decoder_start_token_id"), text)
    dtypes = {STORED[tensor.dtype] for tensor in stored.values() if tensor.dtype in STORED}
    dtype = params or ("bfloat16" if dtypes == {"bfloat16"} else "float32")
    settings = _settings(config, run, mesh, dtype, has_text=text is not None)
    model = build(config, None)
    found = matches(family, model)
    names, aside = _names(family, found, stored)
    added = [match.name for match in found if match.name not in names]
    if added:
        say(f"the files have no output layer ({' '.join(added)}): it begins untrained")
    if aside:
        say(f"kept aside, neither computed with nor trained: {' '.join(sorted(aside))}")
    ignored = {name: given[name] for name in sorted(TRAINING & given.keys()) if given[name]}
    if ignored:
        say(f"of training alone, and not taken over: {' '.join(f'{n}={shown(v)}' for n, v in ignored.items())}")
    if dtype == "bfloat16" and dtypes != {"bfloat16"}:
        say(f"tensors of {' '.join(sorted(dtypes))} are rounded to bfloat16 (--params)")
    came = dtypes.pop() if len(dtypes) == 1 else dtype
    meta = {"step": 0, "position": 0, "seen_tokens": 0, "mesh": mesh, "config": dump(settings)}
    meta["imported"] = {"family": family.name, "dtype": dtype, "came": came, "added": added}
    _make(run / "checkpoints", f"--run={shown(str(run))}")
    try:
        writer = SliceWriter((run / "checkpoints").absolute(), 0, leaves(found, model, dtype))
        for match in found:
            read = stored[names[match.name]].read if match.name in names else _untrained(match)
            _fill(writer, match, read, dtype)
        writer.commit(meta)
        _keep_texts(source, run, text)
        _keep_aside(run, aside, DTYPES[came])
        write_atomically(run / "config.yaml", dump(settings))
    except BaseException:
        shutil.rmtree(run / "checkpoints" / "0", ignore_errors=True)
        raise
    count = sum(math.prod(match.shape) for match in found)
    say(f"{family.name}: {len(found)} tensors, {count:,} parameters in {dtype} -> {run}")


def _settings(config: ModelConfig, run: Path, mesh: str, dtype: str, *, has_text: bool) -> RunConfig:
    """The recipe that an imported run begins with, checked."""
    data = DataConfig(noise=0.0 if config.architecture == "decoder" else 0.15)
    data = replace(data, tokenizer=str(run / "tokenizer")) if has_text else data
    if config.positions == "learned":
        data = replace(data, sequence_length=min(data.sequence_length, config.max_positions))
    precision = PrecisionConfig(params="bfloat16" if dtype == "bfloat16" else "float32")
    settings = RunConfig(model=config, mesh=mesh, run=str(run), data=data, precision=precision)
    checks.check(settings, mesh_spec.parse(mesh))
    return settings


def export(run: Path, to: Path, step: int, dtype: str | None, say: Say) -> None:
    """Write checkpoint `step` of `run` as a model of Hugging Face into the new folder `to`.

    Args:
        dtype: of the tensors, a key of DTYPES; None: as they are stored, and those of an import as they came.

    Raises:
        UserError: no family has all of the model, or `to` holds something.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to={shown(str(to))} holds something already; name a new folder")
    settings = read_file(RunConfig, run / "config.yaml")
    text = tokenizers.load(run / "tokenizer") if (run / "tokenizer").is_dir() else None
    config = settings.model
    config = replace(config, vocabulary=config.vocabulary or (text.vocabulary_size if text else None))
    model = build(config, None)
    original = run / IMPORTED / CONFIG
    given = safetensors.read_json(original) if original.is_file() else None
    family = families.of_config(given) if given else families.of_model(config)
    reader = SliceReader((run / "checkpoints").absolute(), step)
    found, aside = matches(family, model), _read_aside(run)
    held = reader.leaves[f"params.{found[0].row.ours[0]}"]["dtype"]
    imported = reader.meta.get("imported", {})
    came, added = imported.get("came"), imported.get("added", [])
    found = [match for match in found if match.name not in added]  # which are no more than a beginning for training
    chosen = dtype or came or held
    if chosen not in (held, came) and (chosen, held) != ("float32", "bfloat16"):
        say(f"tensors are rounded from {held} to {chosen} (--dtype)")
    _make(to.parent, f"--to={shown(str(to))}")
    work = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        shapes = {match.name: match.shape for match in found} | {name: there.shape for name, there in aside.items()}
        written = safetensors.Writer(work, shapes, DTYPES[chosen])
        for row, group in itertools.groupby(found, key=lambda match: match.row):
            for match in group:
                _empty(written, match, reader, np.dtype(held).itemsize)
            for name in row.ours:
                reader.close(f"params.{name}")
        for name, there in aside.items():
            written.write(name, 0, there.read(0, there.shape[0]))
        written.flush()
        _write_texts(work, run, text, say, answers=config.architecture == "encoder_decoder")
        if given is None or unlike(config, family.read(given)):
            (work / CONFIG).write_text(_json(_config(family, config, settings, text) | {"torch_dtype": chosen}))
        elif chosen in (came, given.get("dtype"), given.get("torch_dtype")):
            shutil.copyfile(original, work / CONFIG)
        else:
            (work / CONFIG).write_text(_json({**given, "dtype" if "dtype" in given else "torch_dtype": chosen}))
        work.chmod(0o755)
        if to.exists():
            to.rmdir()
        work.rename(to)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    say(f"{family.name}: {len(found) + len(aside)} tensors in {chosen}, step {step} of {run} -> {to}")


def _make(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} cannot be made: {error.strerror}; name a folder elsewhere") from None


def _renamed(family: Family, stored: dict[str, safetensors.Stored]) -> dict[str, safetensors.Stored]:
    """Tensors by the names that they have in files of today."""
    made = {}
    for name, tensor in stored.items():
        old = next((end for end in family.renamed if name.endswith(end)), "")
        made[name.removesuffix(old) + family.renamed.get(old, "")] = tensor
    return made


def _names(
    family: Family, found: list[Match], stored: dict[str, safetensors.Stored]
) -> tuple[dict[str, str], dict[str, safetensors.Stored]]:
    """Our name for each tensor -> the one it has in the files; and by our names those that are kept aside.

    No other tensor is left over, and none has another shape. Those of the output layer may be missing all together.
    """
    bare = not any(name.startswith(family.prefix) for name in stored)
    names = {m.name: m.name.removeprefix(family.prefix) if bare else m.name for m in found}
    head = [m for m in found if m.row.ours[0].startswith(family.head)]
    if not any(names[match.name] in stored for match in head):
        names = {name: there for name, there in names.items() if name not in {match.name for match in head}}
    for match in (match for match in found if match.name in names):
        there = stored.get(names[match.name])
        if there is None:
            raise UserError(f"the files have no tensor {names[match.name]}, which config.json asks for")
        if there.shape != match.shape or there.dtype not in safetensors.DTYPES:
            here = f"{there.dtype}{list(there.shape)}"
            raise UserError(f"tensor {names[match.name]} is {here}; config.json asks for {list(match.shape)} of floats")
    repeats = {"lm_head.weight": found[0].name, **family.repeats}  # a family's first row is its embedding
    aside = {}
    for name in sorted(stored.keys() - set(names.values())):
        own = family.prefix + name if bare else name
        if name in repeats:
            _check_same(name, stored[name], stored[names[repeats[name]]])
        elif own.startswith(family.aside) and stored[name].dtype in safetensors.DTYPES:
            aside[own] = stored[name]
        elif not name.endswith(family.buffers):
            raise UserError(f"tensor {shown(name)} of the files is none of {family.name}: what it is for is not known")
    return names, aside


def _check_same(name: str, head: safetensors.Stored, table: safetensors.Stored) -> None:
    """That a tensor of the output layer is one of the embedding, as config.json says."""
    same = (head.dtype, head.shape) == (table.dtype, table.shape)
    rows = 1 + 2**24 // max(1, head.shape[-1])
    same = same and all(
        np.array_equal(head.read(i, j).view(np.uint8), table.read(i, j).view(np.uint8))
        for i, j in _ranges(head.shape[0], rows)
    )
    if not same:
        raise UserError(f"{name} is not the embedding, and config.json says tie_word_embeddings=true")


def _ranges(size: int, each: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + each, size)) for i in range(0, size, each))


def _untrained(match: Match) -> Callable[[int, int], np.ndarray]:
    """Rows of an output layer that is not there: as if nothing stood before the table, and no bias."""
    value = np.eye(*match.shape) if len(match.shape) == 2 else np.zeros(match.shape)
    value = np.ones(match.shape) if match.row.ours[0].endswith(".scale") else value
    return lambda first, last: value[first:last]


def _fill(writer: SliceWriter, match: Match, read: Callable[[int, int], np.ndarray], dtype: str) -> None:
    """One tensor of theirs, whose rows `read` gives, into our parameters."""
    for piece in match.pieces(np.dtype(dtype).itemsize):
        rows = read(piece.first, piece.last).astype(dtype, copy=False)
        for name, part in zip(match.row.ours, match.to_ours(rows, piece), strict=True):
            writer.write(f"params.{name}", (*match.at, *piece.where), part)


def _empty(writer: safetensors.Writer, match: Match, reader: SliceReader, itemsize: int) -> None:
    """Our parameters, stored in elements of `itemsize` bytes, into one tensor of theirs."""
    names = [f"params.{name}" for name in match.row.ours]
    for piece in match.pieces(itemsize):
        parts = [reader.read(name, match.at, piece.where) for name in names]
        writer.write(match.name, piece.first, match.to_theirs(parts, piece))


def _tokenizer(source: Path, config: ModelConfig, say: Say) -> tokenizers.Tokenizer | None:
    """The tokenizer beside the weights, which must be one of this model's."""
    if not (source / "tokenizer.json").exists():
        say("no tokenizer.json beside the weights: text needs one, in the run's folder tokenizer/")
        return None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            safetensors.inside(source, name)
    text = tokenizers.load(source / "tokenizer.json")
    if text.vocabulary_size > (config.vocabulary or 0):
        raise UserError(
            f"{source}: tokenizer.json has ids up to {text.vocabulary_size - 1} and the model rows for "
            f"{config.vocabulary}; they are not of one model"
        )
    return text


def _check_start(config: ModelConfig, given: Any, text: tokenizers.Tokenizer | None) -> None:
    """That an encoder-decoder's text begins behind the id that the tokenizer has for that."""
    if config.architecture == "encoder_decoder" and text is not None and given not in (None, text.start_id):
        raise UserError(
            f"config.json: decoder_start_token_id={shown(given)} is not {text.start_id}, which our texts begin behind: "
            "the <pad> of tokenizer.json, or else its end of a document"
        )


def _keep_texts(source: Path, run: Path, text: tokenizers.Tokenizer | None) -> None:
    kept = run / IMPORTED
    kept.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, *_texts_in(source)):
        folder = source / TEMPLATES if name.startswith(TEMPLATES) else source
        if folder.is_symlink() and folder != source:
            raise UserError(f"{folder} is a link and not followed; copy the folder itself there")
        content = _content(safetensors.inside(folder, Path(name).name))
        (kept / name).parent.mkdir(exist_ok=True)
        (kept / name).write_bytes(content)
    if text:
        text.save(run / "tokenizer")


def _texts_in(folder: Path) -> list[str]:
    templates = sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))
    return [name for name in (*TEXT_FILES, *templates) if (folder / name).exists()]


def _keep_aside(run: Path, tensors: dict[str, safetensors.Stored], dtype: str) -> None:
    if tensors:
        (run / IMPORTED / ASIDE).mkdir(exist_ok=True)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        writer = safetensors.Writer(run / IMPORTED / ASIDE, shapes, dtype)
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor.read(0, tensor.shape[0]))
        writer.flush()


def _read_aside(run: Path) -> dict[str, safetensors.Stored]:
    folder = run / IMPORTED / ASIDE
    return safetensors.open_folder(folder) if folder.is_dir() else {}


def _content(path: Path) -> bytes:
    return read_limited(path, tokenizers.MAX_FILE_BYTES, str(path), unreadable="copy it again", too_large="is it text?")


def _write_texts(folder: Path, run: Path, text: tokenizers.Tokenizer | None, say: Say, *, answers: bool) -> None:
    """The tokenizer as it came, where the run still has that one; else the run's. An encoder-decoder `answers`."""
    kept = run / IMPORTED
    if text is None or conventions.same_tokenizer(run, text):
        for name in _texts_in(kept):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(kept / name, folder / name)
        return
    content = text.files().get("tokenizer.json")
    if content is None:
        say("no tokenizer files: transformers reads a tokenizer.json, which this run's tokenizer has none of")
        return
    (folder / "tokenizer.json").write_bytes(content)
    eos = json.loads(text.files()[tokenizers.INFO])["eos"]
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(_json(described))
    ids = {"eos_token_id": text.eos_id} | ({"decoder_start_token_id": text.start_id} if answers else {})
    (folder / "generation_config.json").write_text(_json(ids))


def _config(
    family: Family, config: ModelConfig, settings: RunConfig, text: tokenizers.Tokenizer | None
) -> dict[str, Any]:
    """config.json of a model that did not come from Hugging Face."""
    written = family.write(config)
    if config.positions != "learned":
        written["max_position_embeddings"] = settings.data.sequence_length
    if text is not None:
        written["eos_token_id"] = text.eos_id
        if config.architecture == "encoder_decoder":
            written |= {"decoder_start_token_id": text.start_id, "pad_token_id": text.start_id}
    return written


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
