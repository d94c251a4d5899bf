"""Power limits of GPUs: refused before anything changes, and set back whatever happens."""

import os
import random
import signal
import subprocess
import sys
import time

import pynvml
import pytest

from tests.recorded_gpus import DEFAULT_W, FORBIDDEN, UNSUPPORTED, RecordedGpus, SharedGpus
from trainer.errors import BadInput, BadWorld
from trainer.observe.nvml import LimitForbidden, LimitRefused, NvmlReader
from trainer.observe.power_limit import Stopped, check_limits, gpus_of, restored, unusual

GPUS = ("GPU-a", "GPU-b", "GPU-c")


def test_ranks_use_the_first_gpus_of_those_that_the_job_may_use():
    assert gpus_of(GPUS, None, num_ranks=2) == ["GPU-a", "GPU-b"]
    assert gpus_of(GPUS, ("2", "GPU-a"), num_ranks=2) == ["GPU-c", "GPU-a"]
    assert gpus_of(GPUS, ("1", "2"), num_ranks=1) == ["GPU-b"]


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (("0", "2"), r"ranks_per_node=3, and this job has 2 GPUs\. Try cluster\.ranks_per_node=2"),
        ((), r"ranks_per_node=3, and this job has 0 GPUs\. Ask for more"),
        (("0", "MIG-x", "7"), r"has MIG-x, 7, which NVML does not show as a GPU .*shows GPU-a, "),
    ],
)  # fmt: skip
def test_gpus_that_are_not_there_are_refused(visible, message):
    with pytest.raises(BadInput, match=message):
        gpus_of(GPUS, visible, num_ranks=3)


def test_what_can_be_measured_is_left_as_it_is():
    gpus = RecordedGpus("GPU-a", "GPU-b", limits={"GPU-b": 300.0})
    check_limits(gpus, ["GPU-a", "GPU-b"], [100, 500])
    assert gpus.limits == {"GPU-a": DEFAULT_W, "GPU-b": 300.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refuses": {"GPU-b": FORBIDDEN}},
         r"may not set the power limit of GPU GPU-b \(Insufficient Permissions\).*lets root alone.*"
         r"ask the site to run it, or to allow it"),
        ({"refuses": {"GPU-b": UNSUPPORTED}}, r"GPU-b has no power limit .*\(Not Supported\)"),
        ({"has_counter": False}, r"GPU-a has no energy counter \(GPUs from Volta on have one\)"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_measured_is_refused_with_why(change, message):
    gpus = RecordedGpus("GPU-a", "GPU-b")
    for name, value in change.items():
        setattr(gpus, name, value)
    with pytest.raises(BadInput, match=message):
        check_limits(gpus, ["GPU-a", "GPU-b"], [300])


def test_limits_that_a_gpu_does_not_take_are_refused_with_those_it_takes():
    with pytest.raises(BadInput, match=r"watts has 99, 501, and GPU GPU-a takes .* 100 to 500 W"):
        check_limits(RecordedGpus("GPU-a"), ["GPU-a"], [99, 300, 501])


def test_a_limit_that_is_not_the_default_is_told_with_what_sets_it_back():
    gpus = RecordedGpus("GPU-a", "GPU-b", limits={"GPU-b": 250.0})
    (line,) = unusual(gpus, ["GPU-a", "GPU-b"])
    assert line.startswith("GPU GPU-b is limited to 250 W, and its default is 400 W: ")
    assert "`nvidia-smi -i GPU-b -pl 400` sets the default" in line


def test_limits_are_set_back_to_what_was_found():
    gpus = RecordedGpus("GPU-a", "GPU-b", "GPU-c", limits={"GPU-b": 300.0})
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with restored(gpus, ["GPU-a", "GPU-b"]):
        for uuid in GPUS:
            gpus.set_limit_w(uuid, 200.0)
    assert gpus.limits == {"GPU-a": DEFAULT_W, "GPU-b": 300.0, "GPU-c": 200.0}
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit()]
)
def test_limits_are_set_back_after_an_error(error):
    gpus = RecordedGpus("GPU-a")

    def fail():
        with restored(gpus, ["GPU-a"]):
            gpus.set_limit_w("GPU-a", 200.0)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert gpus.limits == {"GPU-a": DEFAULT_W}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_limits_are_set_back_after_a_signal(name):
    gpus = RecordedGpus("GPU-a")

    def be_told():
        with restored(gpus, ["GPU-a"]):
            gpus.set_limit_w("GPU-a", 200.0)
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(10)

    with pytest.raises(Stopped, match=name):
        be_told()
    assert gpus.limits == {"GPU-a": DEFAULT_W}


def test_a_limit_is_set_back_at_the_second_try():
    gpus = RecordedGpus("GPU-a", "GPU-b")
    with restored(gpus, ["GPU-a", "GPU-b"]):
        gpus.set_limit_w("GPU-a", 200.0)
        gpus.set_limit_w("GPU-b", 200.0)
        gpus.refuses = Once({"GPU-a": UNSUPPORTED})
    assert gpus.limits == {"GPU-a": DEFAULT_W, "GPU-b": DEFAULT_W}


class Once(dict):
    """Forgets what it was asked for."""

    def __getitem__(self, key):
        return self.pop(key)


def test_a_limit_that_cannot_be_set_back_is_told_with_the_command_and_the_others_are():
    gpus = RecordedGpus("GPU-a", "GPU-b")

    def lose():
        with restored(gpus, ["GPU-a", "GPU-b"]):
            gpus.set_limit_w("GPU-a", 200.0)
            gpus.set_limit_w("GPU-b", 200.0)
            gpus.refuses = {"GPU-a": FORBIDDEN}

    with pytest.raises(BadWorld, match=r"of GPU-a could not .*: nvidia-smi -i GPU-a -pl 400$"):
        lose()
    assert gpus.limits == {"GPU-a": 200.0, "GPU-b": DEFAULT_W}


SWEEP = """
import sys, time
from tests.recorded_gpus import SharedGpus
from trainer.observe.power_limit import restored
gpus = SharedGpus(sys.argv[1])
with restored(gpus, ["GPU-a", "GPU-b"]):
    print("begun", flush=True)
    while True:
        for watts in (200.0, 300.0):
            for uuid in ("GPU-a", "GPU-b"):
                gpus.set_limit_w(uuid, watts)
"""


@pytest.mark.parametrize("seed", range(4))
def test_signals_at_any_moment_and_more_of_them_leave_no_limit(tmp_path, seed):
    gpus, draw = SharedGpus(tmp_path, "GPU-a", "GPU-b"), random.Random(seed)
    command = [sys.executable, "-c", SWEEP, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"begun\n"
        time.sleep(draw.uniform(0, 0.1))
        for _ in range(3):
            process.send_signal(draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))
            time.sleep(draw.choice((0, 0.001)))
            if process.poll() is not None:
                break
        process.communicate()
    assert process.returncode != 0
    assert gpus.history()[-2:] == [("GPU-a", DEFAULT_W), ("GPU-b", DEFAULT_W)]


def test_nvml_s_milliwatts_are_watts_and_its_refusals_are_ours(monkeypatch):
    given = []

    def set_limit(handle, limit_mw):
        given.append((handle, limit_mw))
        if limit_mw > 500_000:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if limit_mw < 100_000:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda idx: f"handle {idx}",
        "nvmlDeviceGetUUID": lambda handle: "GPU-a",
        "nvmlDeviceGetPowerManagementLimit": lambda handle: 349_999,
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda handle: 400_000,
        "nvmlDeviceGetPowerManagementLimitConstraints": lambda handle: [100_000, 500_000],
        "nvmlDeviceSetPowerManagementLimit": set_limit,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    gpus = NvmlReader.open()
    assert gpus.limit_range_w("GPU-a") == (100.0, 500.0)
    assert gpus.default_limit_w("GPU-a") == 400.0
    gpus.set_limit_w("GPU-a", gpus.limit_w("GPU-a"))
    assert given == [("handle 0", 349_999)]
    with pytest.raises(LimitForbidden, match="Insufficient Permissions"):
        gpus.set_limit_w("GPU-a", 99.0)
    with pytest.raises(LimitRefused, match="Invalid Argument"):
        gpus.set_limit_w("GPU-a", 501.0)
