"""A checkpoint knows nothing of meshes: saved on any, it goes on on any other."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxlm.checkpoint.store import Store
from jaxlm.train.assemble import Assembly
from tests.train.battery import LOSS, batch, born_on_one_device, build, configuration, place

MESHES = (
    "dp1",
    "dp2",
    "fsdp2",
    "tp2",
    "dp4",
    "fsdp2,tp2",
    "pp2,dp2",
    "dp4,tp2",
    "fsdp4,tp2",
    "pp2,fsdp2,tp2",
    "cp2,dp4",
)
DEFAULT = ("dp1", "fsdp2,tp2", "pp2,dp2")


class Saved(NamedTuple):
    """What a mesh made of the first step, and of the next."""

    assembly: Assembly
    compiled: Any
    state: dict[str, np.ndarray]
    loss: float


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Mesh -> what it saved as step 1 into the store of that name; made once each."""
    folder, config, made = tmp_path_factory.mktemp("meshes"), configuration("gpt"), {}

    def get(mesh: str) -> tuple[Path, Saved]:
        where = folder / mesh.replace(",", "-")
        if mesh not in made:
            assembly = build(config, mesh)
            compiled = assembly.compile()
            state = jax.device_put(born_on_one_device(config), assembly.plan.shardings)
            state, _ = compiled(state, place(assembly, batch(config, 0)))
            with Store(where) as store:
                store.save(1, state, {"position": config.data.batch_size})
            values = plain(state)
            loss = compiled(state, place(assembly, batch(config, 1)))[1]["loss"]
            made[mesh] = Saved(assembly, compiled, values, float(loss))
        return where, made[mesh]

    return get


def plain(state: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def check(saved, source: str, target: str) -> None:
    where, before = saved(source)
    _, after = saved(target)
    with Store(where) as store:
        state = store.restore(1, after.assembly.plan.abstract)
        assert store.meta(1)["position"] == after.assembly.config.data.batch_size
    for name, values in plain(state).items():
        assert values.tobytes() == before.state[name].tobytes(), name
    loss = after.compiled(state, place(after.assembly, batch(after.assembly.config, 1)))[1]["loss"]
    assert abs(float(loss) - before.loss) <= LOSS * abs(before.loss)


@pytest.mark.parametrize("target", DEFAULT)
def test_some_meshes_to_some(saved, target: str) -> None:
    for source in DEFAULT:
        check(saved, source, target)


@pytest.mark.slow
def test_any_mesh_to_any(saved) -> None:
    for source in MESHES:
        for target in MESHES:
            check(saved, source, target)
