import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.observe.energy import (
    MEASURED,
    CounterMeter,
    LimitMeter,
    PowerMeter,
    TdpMeter,
    gpu_meters,
    open_meters,
    read_by_provenance,
    tree_busy_core_s,
)
from trainer.observe.nvml import LimitRefused, NvmlReader


class RecordedGpus:
    """Plays NVML: energy in millijoules per GPU, settable; None where a GPU has no counter."""

    def __init__(self, energy_mj, power_w=None, limit_w=None, names=None):
        self.mj = energy_mj
        self.w, self.limits, self.names = power_w or {}, limit_w or {}, names or {}

    def limit_w(self, uuid):
        if uuid not in self.limits:
            raise LimitRefused("Not Supported")
        return self.limits[uuid]

    def name(self, uuid):
        return self.names.get(uuid, "")

    def uuids(self):
        return list(self.mj)

    def energy_mj(self, uuid):
        return self.mj[uuid]

    def power_w(self, uuid):
        return self.w.get(uuid)


def rapl_zone(root, name, *, zone, uj=0, wraps_at=1_000_000):
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "energy_uj").write_text(f"{uj}\n")
    return folder / "energy_uj"


@given(st.integers(0, 999), st.lists(st.integers(0, 999), max_size=50))
def test_a_wrapping_counter_gives_the_true_sum(start, deltas):
    true = start
    meter = CounterMeter(
        lambda: true % 1000, unit_j=0.5, provenance="rapl", device="package-0", wraps_at=1000
    )
    for delta in deltas:
        true += delta
        assert meter.read_j() == (true - start) * 0.5


def test_a_reset_counter_goes_on_from_zero():
    replay = iter([5000, 6000, 400, 900])
    meter = CounterMeter(lambda: next(replay), unit_j=1e-3, provenance="counter", device="gpu")
    assert [meter.read_j() for _ in range(3)] == pytest.approx([1.0, 1.4, 1.9])


def test_a_failed_read_counts_nothing_and_loses_nothing():
    replay = iter([5000, 6000, None, 7000])
    meter = CounterMeter(lambda: next(replay), unit_j=1e-3, provenance="counter", device="gpu")
    assert [meter.read_j() for _ in range(3)] == pytest.approx([1.0, 1.0, 2.0])


def test_power_that_is_linear_in_time_integrates_exactly():
    now = [0.0]
    meter = PowerMeter(lambda: 100 + 7 * now[0], device="gpu", clock_s=lambda: now[0])
    for now[0] in (0.5, 0.7, 3.0, 10.0):
        assert meter.read_j() == pytest.approx(100 * now[0] + 3.5 * now[0] ** 2)


def test_power_that_cannot_be_read_is_taken_as_before():
    now, watts = [0.0], [50.0]
    meter = PowerMeter(lambda: watts[0], device="gpu", clock_s=lambda: now[0])
    now[0], watts[0] = 2.0, None
    assert meter.read_j() == 100.0


def test_the_model_never_runs_backwards():
    busy = iter([1.0, 4.0, 3.5, 5.0])
    meter = TdpMeter(w_per_core=10.0, busy_core_s=lambda: next(busy))
    assert [meter.read_j() for _ in range(4)] == [10.0, 40.0, 40.0, 50.0]


def test_busy_core_seconds_hold_living_and_dead_children():
    burn = "import time\nwhile time.process_time() < {s}: pass\n"
    before_s = tree_busy_core_s(psutil.Process())
    subprocess.run([sys.executable, "-c", burn.format(s=0.2)], check=True)
    dead_s = tree_busy_core_s(psutil.Process()) - before_s
    assert dead_s >= 0.18  # the kernel counts in ticks of 10 ms
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    child.stdout.readline()
    living_s = tree_busy_core_s(psutil.Process())
    assert living_s >= before_s + dead_s + sum(psutil.Process(child.pid).cpu_times()[:2]) - 0.04
    child.communicate(b"\n")
    assert tree_busy_core_s(psutil.Process()) >= living_s - 0.04


def test_a_process_that_is_gone_counts_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    child.wait()
    assert tree_busy_core_s(process) == 0.0


def test_rapl_counts_packages_and_dram_and_nothing_inside_them(tmp_path):
    files = {
        zone: rapl_zone(tmp_path, name, zone=zone)
        for zone, name in {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",
            "intel-rapl:0:1": "dram",
            "intel-rapl:1": "package-1",
            "intel-rapl:2": "psys",
            "intel-rapl-mmio:0": "package-0",
        }.items()
    }
    meters = open_meters(tdp_w_per_core=5.0, gpu_reader=RecordedGpus({}), powercap=tmp_path)
    for file in files.values():
        file.write_text("300000\n")
    assert read_by_provenance(meters) == pytest.approx({"rapl": 3 * 0.3})


def test_rapl_that_goes_away_counts_what_it_saw(tmp_path):
    file = rapl_zone(tmp_path, "package-0", zone="intel-rapl:0")
    (meter,) = open_meters(tdp_w_per_core=5.0, gpu_reader=RecordedGpus({}), powercap=tmp_path)
    file.write_text("500000\n")
    assert meter.read_j() == 0.5
    file.unlink()
    assert meter.read_j() == 0.5


def test_rapl_without_permission_leaves_the_model(tmp_path):
    rapl_zone(tmp_path, "package-0", zone="intel-rapl:0").unlink()
    meters = open_meters(tdp_w_per_core=5.0, gpu_reader=RecordedGpus({}), powercap=tmp_path)
    assert [meter.provenance for meter in meters] == ["tdp_model"]


def test_each_gpu_is_counted_once_however_it_is_named(tmp_path):
    gpus = RecordedGpus({"GPU-a": 1000, "GPU-b": 5000})
    named = ["0", "GPU-a", "1", "GPU-b", "0"]
    meters = open_meters(tdp_w_per_core=0, gpus=named, gpu_reader=gpus, powercap=tmp_path)
    gpus.mj = {"GPU-a": 3000, "GPU-b": 6000}
    assert read_by_provenance(meters) == pytest.approx({"counter": 3.0})


def test_a_gpu_of_another_job_is_not_counted(tmp_path):
    gpus = RecordedGpus({"GPU-a": 0, "GPU-b": 0})
    meters = open_meters(tdp_w_per_core=0, gpus=["1"], gpu_reader=gpus, powercap=tmp_path)
    gpus.mj = {"GPU-a": 9000, "GPU-b": 1000}
    assert read_by_provenance(meters) == {"counter": 1.0}


def test_an_old_gpu_is_integrated_and_a_blind_or_unknown_one_is_a_warning(tmp_path, caplog):
    gpus = RecordedGpus({"GPU-a": None, "GPU-b": None}, power_w={"GPU-a": 200.0})
    named = ["0", "1", "MIG-x"]
    meters = open_meters(tdp_w_per_core=0, gpus=named, gpu_reader=gpus, powercap=tmp_path)
    assert [meter.provenance for meter in meters] == ["power_integral"]
    assert [record.args[0] for record in caplog.records] == ["GPU-b", "MIG-x"]


@pytest.mark.parametrize(
    ("known", "drawn_w"),
    [({"limit_w": {"GPU-a": 250.0}, "names": {"GPU-a": "NVIDIA H100 80GB HBM3"}}, 250.0),
     ({"names": {"GPU-a": "NVIDIA H100 80GB HBM3"}}, 700.0)],
    ids=["limit", "its maker's"],
)  # fmt: skip
def test_a_gpu_that_shows_nothing_is_modelled_by_the_most_that_it_may_draw(known, drawn_w, caplog):
    (meter,) = gpu_meters(RecordedGpus({"GPU-a": None}, **known), None)
    assert f"GPU-a shows neither energy nor power: it is taken to draw {drawn_w:g} W" in caplog.text
    assert (meter.provenance, meter.device) == ("limit_model", "GPU-a")
    assert "limit_model" not in MEASURED


def test_the_model_of_a_gpu_is_its_limit_times_time():
    now = [100.0]
    meter = LimitMeter(250.0, device="gpu", clock_s=lambda: now[0])
    for now[0] in (100.0, 101.5, 160.0):
        assert meter.read_j() == pytest.approx(250 * (now[0] - 100))


def test_where_nothing_is_known_there_is_no_joule(tmp_path):
    meters = open_meters(tdp_w_per_core=0, gpu_reader=RecordedGpus({}), powercap=tmp_path)
    assert read_by_provenance(meters) == {"none": 0.0}


def test_the_model_on_this_machine_counts_work(tmp_path):
    (meter,) = open_meters(tdp_w_per_core=5.0, gpu_reader=RecordedGpus({}), powercap=tmp_path)
    before_j, started_s = meter.read_j(), time.process_time()
    while time.process_time() < started_s + 0.2:
        pass
    assert meter.read_j() - before_j >= 0.9


def test_nvml_opens_or_says_that_there_is_none():
    reader = NvmlReader.open()
    assert reader is None or len(reader.uuids()) > 0
