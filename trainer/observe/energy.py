"""Energy meters that say how they know: hardware counters where there are any, else a model."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import psutil

from trainer.hardware import by_device_name
from trainer.observe.nvml import LimitRefused, NvmlReader

log = logging.getLogger(__name__)

Provenance = Literal["counter", "rapl", "power_integral", "tdp_model", "limit_model", "none"]
MEASURED: frozenset[Provenance] = frozenset({"counter", "rapl", "power_integral"})
POWERCAP = Path("/sys/class/powercap")
# Below these the package zone already counts; psys counts the package again.
_RAPL_ZONES = ("package", "dram")


class Meter(Protocol):
    """Joules of one thing since the meter was opened, and how they are known."""

    @property
    def provenance(self) -> Provenance:
        """How the joules are known."""

    @property
    def device(self) -> str | None:
        """What is metered, by a name that the node has once; None for one's own processes."""

    def read_j(self) -> float:
        """Return joules so far; never less than the call before."""


class GpuReader(Protocol):
    """What a meter needs of NVML; tests hand in a recording."""

    def uuids(self) -> Sequence[str]:
        """Return the GPUs' unique ids, in NVML order."""

    def energy_mj(self, uuid: str) -> int | None:
        """Return millijoules since the driver was loaded; None where the GPU has no counter."""

    def power_w(self, uuid: str) -> float | None:
        """Return the power drawn now; None where it is not readable."""

    def limit_w(self, uuid: str) -> float:
        """Return the power limit in force; raises LimitRefused."""

    def name(self, uuid: str) -> str:
        """Return what the driver calls the GPU."""


class CounterMeter:
    """Accumulates a hardware counter that may wrap around or be reset to zero."""

    def __init__(
        self,
        read_units: Callable[[], int | None],
        *,
        unit_j: float,
        provenance: Provenance,
        device: str,
        wraps_at: int | None = None,
    ) -> None:
        """Start at the counter's present value.

        Args:
            read_units: Reads the counter; None when that fails, which counts nothing until the
                next read.
            unit_j: Joules per count.
            provenance: What the counter is.
            device: What it counts.
            wraps_at: Largest value before it starts at 0 again. None: it never wraps, so that a
                smaller value means a reset (the driver was loaded anew).
        """
        self.provenance, self.device = provenance, device
        self._read_units = read_units
        self._unit_j = unit_j
        self._wraps_at = wraps_at
        self._last = read_units() or 0
        self._total = 0

    def read_j(self) -> float:
        """Return joules since opening. Read more often than the counter wraps (RAPL: minutes)."""
        now, before = self._read_units(), self._last
        if now is None:
            return self._total * self._unit_j
        if now < before:
            before = 0 if self._wraps_at is None else before - self._wraps_at
        self._total += now - before
        self._last = now
        return self._total * self._unit_j


class PowerMeter:
    """Integrates power readings over time by the trapezoid rule, for GPUs without a counter."""

    provenance: Provenance = "power_integral"

    def __init__(
        self,
        read_w: Callable[[], float | None],
        *,
        device: str,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start at zero, with a first reading."""
        self.device = device
        self._read_w = read_w
        self._clock_s = clock_s
        self._at_s, self._last_w, self._total_j = clock_s(), read_w() or 0.0, 0.0

    def read_j(self) -> float:
        """Return joules since opening; exact for power that is linear between two reads."""
        now_s, now_w = self._clock_s(), self._read_w()
        now_w = self._last_w if now_w is None else now_w
        self._total_j += (now_s - self._at_s) * (now_w + self._last_w) / 2
        self._at_s, self._last_w = now_s, now_w
        return self._total_j


class TdpMeter:
    """Models CPU energy: busy core-seconds of a process tree times stated watts per core.

    Idle power, memory and the board are not in it. It counts from the process's birth, so that
    the imports before the meter was opened are in.
    """

    provenance: Provenance = "tdp_model"
    device = None

    def __init__(
        self, *, w_per_core: float, busy_core_s: Callable[[], float] | None = None
    ) -> None:
        """Take the watts of one busy core, and what counts core-seconds (default: this tree)."""
        self._w_per_core = w_per_core
        self._busy_core_s = busy_core_s or (lambda: tree_busy_core_s(psutil.Process()))
        self._most_core_s = 0.0

    def read_j(self) -> float:
        """Return modelled joules so far."""
        # A child that dies unawaited takes its count along: hold the total until it is passed.
        self._most_core_s = max(self._most_core_s, self._busy_core_s())
        return self._most_core_s * self._w_per_core


class LimitMeter:
    """Models a GPU that shows nothing: all the time it draws the most that it may."""

    provenance: Provenance = "limit_model"

    def __init__(
        self, limit_w: float, *, device: str, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Start now."""
        self.device = device
        self._limit_w, self._clock_s, self._opened_s = limit_w, clock_s, clock_s()

    def read_j(self) -> float:
        """Return modelled joules so far."""
        return (self._clock_s() - self._opened_s) * self._limit_w


def open_meters(
    *,
    tdp_w_per_core: float,
    root_pid: int | None = None,
    gpus: Sequence[str] | None = None,
    gpu_reader: GpuReader | None = None,
    powercap: Path = POWERCAP,
) -> tuple[Meter, ...]:
    """Open the best meter for each part of this machine, each part once.

    Call it in one process per node: RAPL and NVML count the node, not a rank.

    Args:
        tdp_w_per_core: Watts of one busy core where there is no counter; 0 for no model.
        root_pid: The process whose tree the model counts (a launcher's, to include all its
            ranks). None: this process.
        gpus: NVML indices or UUIDs of the GPUs this job may use; None: all that NVML shows.
        gpu_reader: Reads NVML; None: the NVIDIA driver, if there is one.
        powercap: Where Linux shows RAPL.

    Returns:
        Meters that overlap nowhere; empty when nothing is known.
    """
    reader = gpu_reader if gpu_reader is not None else NvmlReader.open()
    meters = [] if reader is None else gpu_meters(reader, gpus)
    rapl = _rapl_meters(powercap)
    if rapl:
        return (*meters, *rapl)
    if tdp_w_per_core > 0:
        count = partial(tree_busy_core_s, psutil.Process(root_pid))
        meters.append(TdpMeter(w_per_core=tdp_w_per_core, busy_core_s=count))
    return tuple(meters)


def read_by_provenance(meters: Sequence[Meter]) -> Mapping[Provenance, float]:
    """Sum the meters' joules per provenance; `none` alone when there are no meters."""
    totals: dict[Provenance, float] = {}
    for meter in meters:
        totals[meter.provenance] = totals.get(meter.provenance, 0.0) + meter.read_j()
    return totals or {"none": 0.0}


def tree_busy_core_s(root: psutil.Process) -> float:
    """Return user and system core-seconds of a process and all its descendants, dead ones too."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0.0
    total_s = 0.0
    for process in processes:
        try:
            # children_*: the descendants already waited for; the living are counted themselves.
            total_s += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total_s


def gpu_meters(reader: GpuReader, gpus: Sequence[str] | None) -> list[Meter]:
    """Open the best meter for each GPU; a warning names those of which nothing is known.

    Args:
        reader: Reads NVML.
        gpus: NVML indices or UUIDs; None: all that NVML shows.
    """
    known = list(reader.uuids())
    by_name = {str(idx): uuid for idx, uuid in enumerate(known)} | {uuid: uuid for uuid in known}
    wanted = known if gpus is None else [by_name.get(gpu, gpu) for gpu in gpus]
    meters: list[Meter] = []
    for uuid in dict.fromkeys(wanted):
        if uuid in by_name and reader.energy_mj(uuid) is not None:
            read_mj = partial(reader.energy_mj, uuid)
            meters.append(CounterMeter(read_mj, unit_j=1e-3, provenance="counter", device=uuid))
        elif uuid in by_name and reader.power_w(uuid) is not None:
            meters.append(PowerMeter(partial(reader.power_w, uuid), device=uuid))
        elif uuid in by_name and (limit_w := _limit_w(reader, uuid)) is not None:
            log.warning(
                "GPU %s shows neither energy nor power: it is taken to draw %g W all the time",
                uuid,
                limit_w,
            )
            meters.append(LimitMeter(limit_w, device=uuid))
        else:
            log.warning("GPU %s shows neither energy nor power: its joules are not counted", uuid)
    return meters


def _limit_w(reader: GpuReader, uuid: str) -> float | None:
    """Return the limit in force, or its maker's; None where neither is known."""
    with suppress(LimitRefused):
        return reader.limit_w(uuid)
    device = by_device_name(reader.name(uuid))
    return device.tdp_w if device else None


def _rapl_meters(powercap: Path) -> list[Meter]:
    meters: list[Meter] = []
    # Only intel-rapl (AMD's too): intel-rapl-mmio shows the same packages a second time.
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            if not (zone / "name").read_text().startswith(_RAPL_ZONES):
                continue
            wraps_at = int((zone / "max_energy_range_uj").read_text())
            (zone / "energy_uj").read_text()
        except OSError as error:
            # Since CVE-2020-8694 only root may read it.
            log.info("RAPL at %s is not readable (%s)", zone, error.strerror)
            continue
        read_uj = partial(_read_int, zone / "energy_uj")
        meters.append(
            CounterMeter(
                read_uj, unit_j=1e-6, provenance="rapl", device=zone.name, wraps_at=wraps_at
            )
        )
    return meters


def _read_int(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except OSError:
        return None
