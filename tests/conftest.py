"""Every test runs on 8 simulated CPU devices, with strict array rules, shapes and dtypes checked at each call."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# jax reads these as it is imported; commands that tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is what the suite's time goes into: LLVM's optimisations, and the emitters of kernels made for them, cost
# more of it than they save in runs this small. Later versions have no other emitters.
CHEAP = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    CHEAP.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *CHEAP]).strip()
# Workers, reruns and those commands share what they compile.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"jaxlm-tests-{os.getuid()}"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("jaxlm", "beartype.beartype")

import jax  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.devices()  # whose number stands from here on, whatever mesh a command asks for that a test runs in this process

settings.register_profile(
    "jaxlm", derandomize=True, max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("jaxlm")


def pytest_collection_finish() -> None:
    """What is there by now stays: looking through it again and again slows tracing down."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_sessionfinish() -> None:
    """pytest looks for garbage as it ends: a worker that takes more than five seconds over that is interrupted."""
    gc.freeze()
