"""Compiler options: by platform, with a reason each, and the environment above them."""

import jax
import pytest
from rich.console import Console

from jaxlm.parallel import flags
from jaxlm.train.explain import compiler_options

ADD = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "float32"))


def names(platform: str, kind: str = "") -> list[str]:
    return [option.name for option in flags.options(platform, kind)]


@pytest.mark.parametrize("platform", flags.OPTIONS)
def test_each_option_is_named_once_and_says_why(platform):
    chosen = flags.OPTIONS[platform]
    assert len({option.name for option in chosen}) == len(chosen)
    assert all(option.why and "\n" not in option.why and len(option.why) < 80 for option in chosen)
    assert bool(chosen) == (platform != "cpu")


def test_only_the_tpu_that_can_carries_collectives_on_inside_products():
    v5e, v5p = names("tpu", "TPU v5 lite"), names("tpu", "TPU v5")
    assert v5e == [option.name for option in flags.OPTIONS["tpu"]]
    assert v5p and v5p == [name for name in v5e if "async_collective_fusion" not in name]


@pytest.mark.parametrize("variable", flags.ENVIRONMENT)
def test_an_option_that_the_environment_names_is_left_to_it(variable, monkeypatch):
    for key in flags.ENVIRONMENT:
        monkeypatch.delenv(key, raising=False)
    every = names("gpu")
    assert every == [option.name for option in flags.OPTIONS["gpu"]]
    option = flags.OPTIONS["gpu"][1]
    assert option.older
    for name in (option.name, option.older[0]):
        monkeypatch.setenv(variable, f"--xla_dump_to=/tmp/x --{name}=false")
        assert names("gpu") == [every[0], *every[2:]]


def test_the_program_of_a_fresh_state_is_compiled_lightly_unless_the_environment_decides(monkeypatch):
    for key in flags.ENVIRONMENT:
        monkeypatch.delenv(key, raising=False)
    chosen = flags.initialisation("cpu")
    assert {option.name: option.value for option in chosen}["xla_backend_optimization_level"] == 1
    assert flags.initialisation("gpu") == ()
    assert float(flags.compile_with(ADD, chosen, lambda line: None)(jax.numpy.float32(1))) == 2
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{option.name}=3" for option in chosen))
    assert flags.initialisation("cpu") == ()


def test_options_of_gpu_are_known_to_xla():
    """They are fields of XLA's own options, which its compiler for CPU knows too, by a new name or an old; those of TPU
    only libtpu knows."""
    said = []
    flags.compile_with(ADD, flags.OPTIONS["gpu"], said.append)
    assert said == []


def test_an_option_that_the_compiler_lacks_is_left_out_aloud():
    invented = flags.Option(name="xla_gpu_invented", value=True, why="to be refused")
    said = []
    compiled = flags.compile_with(ADD, (*flags.OPTIONS["gpu"], invented), said.append)
    assert said == ["this compiler has no option xla_gpu_invented: compiling without it"]
    assert float(compiled(jax.numpy.float32(1))) == 2


def test_other_errors_of_the_compiler_stay_errors():
    bad = flags.Option(name="xla_gpu_enable_latency_hiding_scheduler", value=7, why="not a truth value")
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_latency_hiding_scheduler"):
        flags.compile_with(ADD, (bad,), print)


def test_explain_lists_option_value_and_reason():
    console = Console(record=True, width=160)
    console.print(compiler_options(flags.OPTIONS["tpu"]))
    text = console.export_text()
    for option in flags.OPTIONS["tpu"]:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [option.name]]
        assert line.split()[1] == str(option.value).lower() and option.why in line
