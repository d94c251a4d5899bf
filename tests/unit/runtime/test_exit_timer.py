"""A timer that ends a process whose interpreter is held."""

import subprocess
import sys
import time

HELD = """
import ctypes, time
from trainer.runtime.exit_timer import ExitTimer
timer = ExitTimer(85)
timer.arm(0.2)
timer.disarm()
time.sleep(0.4)
timer.arm(600)
timer.arm(0.2)
ctypes.PyDLL(None).sleep(20)
"""


def test_it_ends_a_process_in_which_no_python_can_run_and_no_other():
    started_s = time.monotonic()
    assert subprocess.run([sys.executable, "-c", HELD], check=False).returncode == 85
    assert 0.6 <= time.monotonic() - started_s < 10
