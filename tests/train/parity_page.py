"""docs/parity.md from the results of the parity battery."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxlm.config.mesh_spec import parse
from tests.train.battery import GRADIENT, LOSS, PARAMETER

PROMISED = {"loss": LOSS, "gradient": GRADIENT, "parameter": PARAMETER}

HEAD = """# Every mesh equals one device

Each row trains a small decoder in float32 on a mesh of simulated CPU devices and on one device, from the same seed and
on the same packed batches, and compares all numbers:

| column | error of | promised |
|---|---|---|
| loss | the worst of three losses, relative | {LOSS:.0e} |
| gradient | the worst leaf of the first step's gradient: norm of the difference over the norm | {GRADIENT:.0e} |
| parameter | the worst leaf after three AdamW steps: the same, or the largest difference of an element if that is \
less (a bias begins at zero) | {PARAMETER:.0e} |

One device computes plainly: no accumulation, nothing recomputed, nothing sharded, attention by its definition.
`besides` is what else the row was told. [`tests/train/rows.py`](../tests/train/rows.py) lists the rows, and the default
test suite runs some of them. All of them, and this page:

```sh
make parity
```
"""


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page of these results, which `matrix.write` has in order."""
    return "\n".join([HEAD.format(**globals()), *_summary(results), "", *_tables(results)]) + "\n"


def _summary(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    measured = [result for result in results if "failed" not in result]
    meshes = {result["mesh"] for result in results}
    yield f"**{len(results)} rows on {len(meshes)} meshes.** The largest errors:"
    yield ""
    yield "| | error | of what is promised | row |"
    yield "|---|---|---|---|"
    for column, most in PROMISED.items():
        worst = max(measured, key=lambda result: _error(result, column))
        name = " ".join(part for part in (worst["mesh"], worst["style"], worst["schedule"]) if part)
        yield f"| {column} | {_error(worst, column):.1e} | {_error(worst, column) / most:.0%} | {name} |"
    for result in results:
        if "failed" in result:
            yield f"\nFailed: {result['mesh']} {result['style']} {result['schedule'] or ''}: {result['failed']}"
    yield ""
    for label, key in (("with", "software"), ("at", "revision"), ("on", "date")):
        yield f"- measured {label} {'; '.join(sorted({str(result[key]) for result in results}))}"
    yield f"- in {sum(result['seconds'] for result in results) / 3600:.1f} hours of processes, compiling included"


def _tables(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    for devices in sorted({parse(result["mesh"]).device_count for result in results}):
        yield f"## {devices} device{'s' if devices > 1 else ''}"
        yield ""
        yield "| mesh | decoder | schedule | besides | loss | gradient | parameter |"
        yield "|---|---|---|---|---|---|---|"
        for result in results:
            if parse(result["mesh"]).device_count == devices and "failed" not in result:
                besides = " ".join(f"{key}={value}" for key, value in result["keys"].items())
                errors = [f"{result['loss']:.1e}", *(f"{e:.1e} {leaf}" for e, leaf in map(result.get, LEAVES))]
                yield f"| {' | '.join([result['mesh'], result['style'], result['schedule'] or '', besides, *errors])} |"
        yield ""


LEAVES = ("gradient", "parameter")


def _error(result: dict[str, Any], column: str) -> float:
    return result[column][0] if column in LEAVES else result[column]
