"""Read GPU energy counters through NVIDIA's management library."""

from collections.abc import Sequence

import pynvml


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
