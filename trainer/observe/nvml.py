"""Read energy counters of GPUs and set their power limits, by NVIDIA's management library."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pynvml

from trainer.errors import BadWorld


class LimitRefused(BadWorld):
    """The driver does not tell or set a power limit; the message is its own word."""


class LimitForbidden(LimitRefused):
    """It would, for somebody with more rights."""


class NvmlReader:
    """NVML's energy and power of each GPU, by UUID: an index means different GPUs to a job."""

    def __init__(self) -> None:
        """Start NVML; raises pynvml.NVMLError where there is no driver."""
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(idx) for idx in range(count)]
        self._handles = {str(pynvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}

    @classmethod
    def open(cls) -> "NvmlReader | None":
        """Open NVML, or return None where there is no NVIDIA driver."""
        try:
            return cls()
        except pynvml.NVMLError:
            return None

    def uuids(self) -> Sequence[str]:
        """Return the GPUs' unique ids, in NVML order."""
        return list(self._handles)

    def energy_mj(self, uuid: str) -> int | None:
        """Return millijoules since the driver was loaded (Volta and later), else None."""
        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handles[uuid]))
        except pynvml.NVMLError:
            return None

    def power_w(self, uuid: str) -> float | None:
        """Return the power drawn now, else None."""
        try:
            return float(pynvml.nvmlDeviceGetPowerUsage(self._handles[uuid])) / 1e3
        except pynvml.NVMLError:
            return None

    def name(self, uuid: str) -> str:
        """Return what the driver calls the GPU; empty where it does not say."""
        try:
            return str(pynvml.nvmlDeviceGetName(self._handles[uuid]))
        except pynvml.NVMLError:
            return ""

    def limit_w(self, uuid: str) -> float:
        """Return the power limit in force; raises LimitRefused."""
        with _refusals():
            return float(pynvml.nvmlDeviceGetPowerManagementLimit(self._handles[uuid])) / 1e3

    def default_limit_w(self, uuid: str) -> float:
        """Return the limit that the GPU has when nobody sets one; raises LimitRefused."""
        with _refusals():
            handle = self._handles[uuid]
            return float(pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)) / 1e3

    def limit_range_w(self, uuid: str) -> tuple[float, float]:
        """Return the least and the largest limit that can be set; raises LimitRefused."""
        with _refusals():
            handle = self._handles[uuid]
            least_mw, most_mw = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
            return float(least_mw) / 1e3, float(most_mw) / 1e3

    def set_limit_w(self, uuid: str, watts: float) -> None:
        """Set the limit; raises LimitRefused."""
        with _refusals():
            pynvml.nvmlDeviceSetPowerManagementLimit(self._handles[uuid], round(watts * 1e3))


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except pynvml.NVMLError as error:
        is_forbidden = error.value == pynvml.NVML_ERROR_NO_PERMISSION
        raise (LimitForbidden if is_forbidden else LimitRefused)(str(error)) from error
