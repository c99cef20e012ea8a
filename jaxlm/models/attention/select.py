"""Which attention backend runs, and why: decided once, before anything compiles, and never silently."""

from typing import NamedTuple

from jaxlm.config.errors import UserError
from jaxlm.config.schema import AttentionBackend
from jaxlm.models.attention.kernels import SPLASH_LANES

CUDNN_DTYPES = ("bfloat16", "float16")


class Choice(NamedTuple):
    """A backend's name ("reference", "xla", "cudnn" or "splash") and the reason it was chosen, for the log."""

    name: str
    reason: str


def choose(
    backend: AttentionBackend,
    *,
    platform: str,
    compute_dtype: str,
    head_size: int,
    sequence_length: int,
    softcap: float | None = None,
    compute_capability: str | None = None,
    cached: bool = False,
    context: str | None = None,
    biased: bool = False,
) -> Choice:
    """Resolve "auto" to the fastest backend that can run, and check one that was asked for by name.

    `platform` is "cpu", "gpu" or "tpu"; `compute_capability` is the GPU's, as JAX gives it ("9.0"; unknown: None);
    `cached` is decoding, where queries meet the keys of a cache; `context` the method by which attention reaches across
    a sequence that is cut over devices; `biased` whether relative positions are added to the logits. Raises UserError
    with the reason and the cure.
    """
    obstacles: dict[str, str | None] = {
        "cudnn": _cudnn_obstacle(platform, compute_capability, compute_dtype, head_size, sequence_length, softcap),
        "splash": _splash_obstacle(platform, sequence_length),
    }
    if biased:
        none = "it has no bias for relative positions (--model.positions)"
        obstacles = {name: obstacle or none for name, obstacle in obstacles.items()}
    elif cached:
        obstacles = {name: obstacle or "it cannot read a key-value cache" for name, obstacle in obstacles.items()}
    elif context is not None:
        for name in ("reference",) if context == "ulysses" else ("reference", "cudnn", "splash"):
            whole = f"it computes whole sequences, and on a mesh with cp they are cut (--context.method={context})"
            obstacles[name] = obstacles.get(name) or whole
    if backend != "auto":
        if obstacle := obstacles.get(backend):
            raise UserError(f"attention {backend}: {obstacle}; use --attention=auto")
        return Choice(backend, "asked for")
    fused = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if fused and obstacles[fused]:
        return Choice("xla", f"{fused} cannot run: {obstacles[fused]}")
    return Choice(fused or "xla", f"the fastest on {platform}")


def _cudnn_obstacle(platform, compute_capability, compute_dtype, head_size, sequence_length, softcap) -> str | None:
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, this is {platform}"
    if compute_capability is not None and not compute_capability.replace(".", "").isdigit():
        return f"it needs an NVIDIA GPU, this is {compute_capability}"
    capability = tuple(int(part) for part in (compute_capability or "8.0").split("."))
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {compute_capability}"
    widest = 256 if capability >= (9, 0) else 128
    if compute_dtype not in CUDNN_DTYPES:
        return f"it computes in {' or '.join(CUDNN_DTYPES)}, not {compute_dtype} (--precision.compute)"
    if head_size % 8 or head_size > widest:
        return f"it needs a head size up to {widest} that divides by 8, not {head_size} (--model.head-size)"
    if sequence_length % 2:
        return f"it needs an even sequence length, not {sequence_length} (--data.sequence-length)"
    if softcap is not None:
        return f"it has no soft cap, the model has {softcap} (--model.attention-softcap)"
    return None


def _splash_obstacle(platform, sequence_length) -> str | None:
    if platform != "tpu":
        return f"it needs a TPU, this is {platform}"
    if sequence_length % SPLASH_LANES:
        return f"its blocks of {SPLASH_LANES} do not divide the sequence of {sequence_length} (--data.sequence-length)"
    return None
