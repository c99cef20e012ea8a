"""How fast a run is, by its own clock."""

import time

from jaxlm.config.schema import RunConfig
from jaxlm.data.spans import target_length
from jaxlm.metrics import flops
from jaxlm.train.assemble import Assembly


def written_share(config: RunConfig) -> float:
    """Tokens that a decoder writes for each that its encoder reads."""
    length = config.data.sequence_length
    return target_length(length, config.data.noise) / length if config.objective == "spans" else 1.0


class Meter:
    """Speed over the steps since the last reading, pauses for saves and evaluations left out."""

    def __init__(self, assembly: Assembly):
        config, model = assembly.config, assembly.model
        device = assembly.runtime.layout.mesh.devices.flat[0]
        dtype = str(assembly.runtime.dtype)
        length = config.data.sequence_length
        arguments = (config.model, model.vocabulary, length)
        share = written_share(config)
        self.formula = flops.explain(*arguments, device.device_kind, dtype, share)
        self._flops = flops.flops_per_token(*arguments, share)
        self._peak = flops.peak_flops(device.device_kind, dtype)
        self._devices = assembly.runtime.layout.mesh.size
        self._tokens = config.data.batch_size * length
        self.restart()

    def restart(self) -> None:
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def count(self, waited: float) -> None:
        """A step is done that waited so many seconds for its data."""
        self._steps += 1
        self._waited += waited

    def pause(self, seconds: float) -> None:
        self._began += seconds

    def read(self) -> dict[str, float | None]:
        """Means over the steps since the last reading."""
        steps = max(self._steps, 1)
        seconds = max(time.perf_counter() - self._began, 1e-9) / steps
        speed = self._tokens / seconds
        values = {
            "step_seconds": seconds,
            "data_wait_seconds": self._waited / steps,
            "tokens_per_second": speed,
            "tflops_per_device": self._flops * speed / self._devices / 1e12,
            "mfu": flops.mfu(self._flops, speed, self._devices, self._peak),
        }
        self.restart()
        return values
