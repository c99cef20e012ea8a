"""The parity battery in full: which meshes, models and pipeline schedules are compared with one device."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import PipelineConfig, RunConfig
from jaxlm.config.values import text
from tests.train.battery import STYLES, Errors, compare, configuration, measure, on_one_device

Keys = dict[str, Any]
"""Dotted keys, with double underscores for the dots."""

ROUNDED: Keys = {"optimizer__epsilon": 1e-6}
"""With 8 heads, and in Llama-style decoders of DEEP layers, some elements of a gradient are 1e-8, the rounding of the
sums that they are. AdamW's default epsilon would divide them by themselves: at 9 layers one device, with and without
rematerialisation, gives parameters 1.4e-5 apart."""

DEEP = 6

ONE_AXIS: dict[str, Keys] = {
    "dp1": {"train__microbatches": 4, "remat": "full", "train__loss_chunk": 100},
    "rep2": {},
    "rep8": {},
    "dp2": {"train__microbatches": 8},
    "dp4": {"optimizer__shard": "data", "train__microbatches": 4},
    "dp8": {},
    "fsdp2": {"train__microbatches": 2, "train__loss_chunk": 100},
    "fsdp4": {"remat": "selective"},
    "fsdp8": {},
    "tp2": {},
    "tp4": {"train__loss_chunk": 60, "context__sequence_parallel": "on"},
    "tp8": {"model__heads": 8, "remat": "dots", **ROUNDED},
    "cp2": {},
    "cp4": {"context__method": "ulysses"},
    "cp8": {"context__method": "allgather", "remat": "full"},
    "pp2": {},
    "pp4": {"remat": "selective"},
    "pp8": {},
    "ep2": {},
    "ep4": {"train__microbatches": 4},
    "ep8": {"remat": "full"},
}
"""Mesh -> how the same computation is cut besides."""

TWO_AXES: dict[str, Keys] = {
    "rep2,dp2": {"optimizer__shard": "data"},
    "rep2,dp4": {"optimizer__shard": "data"},
    "rep2,fsdp4": {"remat": "full"},
    "dp2,fsdp2": {},
    "dp4,fsdp2": {"optimizer__shard": "data", "remat": "dots"},
    "dp2,tp2": {"optimizer__shard": "data"},
    "dp4,tp2": {"context__sequence_parallel": "on"},
    "dp2,tp4": {"train__microbatches": 2, "optimizer__shard": "data", "remat": "selective"},
    "fsdp2,tp2": {},
    "fsdp4,tp2": {"train__microbatches": 4},
    "fsdp2,tp4": {"remat": "dots", "context__sequence_parallel": "on"},
    "dp2,cp2": {},
    "dp4,cp2": {"train__microbatches": 2, "context__method": "ulysses"},
    "dp2,cp4": {"context__method": "allgather"},
    "fsdp2,cp2": {"context__method": "allgather"},
    "fsdp4,cp2": {},
    "fsdp2,cp4": {"remat": "full"},
    "cp2,tp2": {"remat": "selective"},
    "cp4,tp2": {"context__sequence_parallel": "on"},
    "cp2,tp4": {"context__method": "allgather"},
    "pp2,dp2": {"optimizer__shard": "data"},
    "pp2,dp4": {"optimizer__shard": "data"},
    "pp4,dp2": {"remat": "full"},
    "pp2,fsdp2": {"model__layers": 5},
    "pp2,fsdp4": {},
    "pp4,fsdp2": {"model__layers": 9},
    "pp2,tp2": {},
    "pp2,tp4": {"remat": "full", "context__sequence_parallel": "on"},
    "pp4,tp2": {"model__layers": 10},
    "pp2,cp2": {},
    "pp4,cp2": {"context__method": "allgather"},
    "pp2,cp4": {"context__method": "ulysses"},
    "dp2,ep2": {"optimizer__shard": "data"},
    "dp2,ep4": {"train__microbatches": 2},
    "fsdp2,ep2": {},
    "fsdp2,ep4": {"remat": "selective"},
    "ep2,tp2": {"remat": "dots"},
    "ep4,tp2": {"context__sequence_parallel": "on"},
    "ep2,cp2": {},
    "ep4,cp2": {"remat": "full"},
    "pp2,ep2": {},
    "pp2,ep4": {},
    "pp4,ep2": {"remat": "full"},
    "rep2,ep4": {},
}

THREE_AXES: dict[str, Keys] = {
    "rep2,dp2,tp2": {"optimizer__shard": "data", "remat": "selective"},
    "rep2,fsdp2,tp2": {"context__sequence_parallel": "on"},
    "rep2,dp2,fsdp2": {"train__microbatches": 2},
    "dp2,fsdp2,tp2": {"train__microbatches": 2, "remat": "full"},
    "dp2,cp2,tp2": {"train__microbatches": 2, "remat": "selective"},
    "fsdp2,cp2,tp2": {"context__sequence_parallel": "on"},
    "rep2,fsdp2,cp2": {"context__method": "allgather"},
    "pp2,dp2,tp2": {"remat": "selective"},
    "pp2,fsdp2,tp2": {"train__loss_chunk": 100, "context__sequence_parallel": "on"},
    "pp2,dp2,fsdp2": {"optimizer__shard": "data"},
    "rep2,pp2,dp2": {},
    "rep2,pp2,tp2": {"model__layers": 5},
    "pp2,dp2,cp2": {"optimizer__shard": "data"},
    "pp2,fsdp2,cp2": {},
    "pp2,cp2,tp2": {"context__sequence_parallel": "on"},
    "dp2,ep2,tp2": {"train__microbatches": 2, "remat": "full"},
    "fsdp2,ep2,tp2": {},
    "ep2,cp2,tp2": {},
    "dp2,fsdp2,ep2": {"optimizer__shard": "data"},
    "pp2,dp2,ep2": {},
    "pp2,fsdp2,ep2": {},
    "pp2,ep2,tp2": {},
    "pp2,ep2,cp2": {},
}

MESHES = ONE_AXIS | TWO_AXES | THREE_AXES
SCHEDULES = get_args(get_type_hints(PipelineConfig)["schedule"])
DENSE = ("gpt", "llama")
OTHER_EXPERTS = {"moe_shared": ("ep8", "fsdp2,ep4", "ep2,cp2,tp2"), "moe_capped": ("ep2", "ep2,tp2", "pp2,ep2")}
ENCODED = (
    *("rep2", "dp4", "fsdp4", "tp2", "tp4", "cp2", "cp4", "cp8", "pp2", "fsdp2,tp2", "dp4,tp2", "cp2,tp2", "pp2,cp2"),
    *("dp2,fsdp2,tp2", "fsdp2,cp2,tp2", "pp2,dp2,tp2", "pp2,fsdp2,tp2"),
)
"""Meshes on which an encoder is compared too."""
ENCODED_AND_DECODED = (
    *("dp1", "rep2", "dp4", "fsdp8", "dp2,fsdp2", "fsdp4,tp2", "dp2,tp4", "rep2,dp2,tp2", "dp2,fsdp2,tp2"),
)
"""And an encoder-decoder: those without sequence parallelism, pp, cp and ep."""
EXPERTS_WHOLE = ("dp4", "fsdp2,tp2", "cp2", "pp2", "pp2,dp2,tp2")
"""Meshes without ep on which mixtures of experts train too."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison."""

    mesh: str
    style: str
    schedule: str | None
    """Of the pipeline, where there is one."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.mesh, self.style, self.schedule) if part)

    @property
    def keys(self) -> Keys:
        """What is set besides the style's own keys: a decoder of one layer a part of the pipeline, at the least."""
        keys = dict(MESHES[self.mesh])
        if self.schedule is None:
            return keys
        parts = parse(self.mesh).sizes["pp"] * (PipelineConfig().chunks if self.schedule == "interleaved" else 1)
        layers = max(parts, keys.get("model__layers", STYLES[self.style].layers))
        rounded = ROUNDED if layers >= DEEP and self.style != "gpt" else {}
        return keys | {"model__layers": layers, "pipeline__schedule": self.schedule} | rounded

    @property
    def spelled(self) -> dict[str, str]:
        """`keys` as in a recipe, without the schedule."""
        own = {key.replace("__", "."): text(value) for key, value in self.keys.items()}
        return {key: value for key, value in own.items() if key != "pipeline.schedule"}

    @property
    def config(self) -> RunConfig:
        return configuration(self.style, **self.keys)

    def errors(self) -> Errors:
        """Measure the row on this process's devices."""
        run = {key: value for key, value in self.keys.items() if key.startswith("model__") or key in ROUNDED}
        return compare(
            measure(self.config, self.mesh, born_there=True), on_one_device(configuration(self.style, **run))
        )


def _rows() -> Iterator[Row]:
    for mesh in MESHES:
        sizes = parse(mesh).sizes
        styles = ["moe"] if sizes["ep"] > 1 else [*DENSE, *(["moe"] if mesh in EXPERTS_WHOLE else [])]
        styles += [style for style, meshes in OTHER_EXPERTS.items() if mesh in meshes]
        styles += ["bert"] if mesh in ENCODED else []
        styles += ["t5"] if mesh in ENCODED_AND_DECODED else []
        for style in styles:
            if style in STYLES:
                yield from (Row(mesh, style, schedule) for schedule in (SCHEDULES if sizes["pp"] > 1 else (None,)))


ROWS = list(_rows())
"""Every comparison."""
