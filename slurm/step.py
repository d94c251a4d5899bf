"""Run srun from the batch script, and pass on to its tasks what Slurm tells the script alone."""

import re
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

TOO_LONG = 124
_GRACE_S = 10
_DIED = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")
"""As srun says it: `srun: error: node2: task 1: Killed`."""


@dataclass(frozen=True)
class Died:
    """Tasks of one node that ended badly."""

    node: str
    tasks: str
    how: str

    def __str__(self) -> str:
        return f"rank {self.tasks} on {self.node}: {self.how}"


@dataclass(frozen=True)
class Ended:
    """How a step of the job ended."""

    code: int
    """The highest of its tasks', as srun has it; 124 when it took too long."""
    died: tuple[Died, ...]
    """In the order in which srun heard of it."""


class Steps:
    """Starts steps of the job, one after the other."""

    def __init__(self, stop_signal: str) -> None:
        """Install the handlers.

        Args:
            stop_signal: What tasks are sent: USR1 or USR2.
        """
        self.heard: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._stop = signal.Signals[f"SIG{stop_signal}"]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.heard.append(signal.Signals(number).name)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(self._stop)

    def srun(
        self, *words: str, env: Mapping[str, str], log: Path, timeout_s: float | None = None
    ) -> Ended:
        """Run srun and wait for its tasks, which are ended when they take too long.

        Args:
            words: What srun is told.
            env: Of srun and of the tasks.
            log: Gets what srun itself has to say.
            timeout_s: The longest that they may take.
        """
        with log.open("wb") as file:
            self._process = subprocess.Popen(("srun", *words), env=dict(env), stderr=file)  # noqa: S603, S607 - as users do, no shell
            try:
                code = self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._end()
                code = TOO_LONG
            self._process = None
        told = log.read_text(encoding="utf-8", errors="replace")
        return Ended(code, tuple(Died(*match) for match in _DIED.findall(told)))

    def _end(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
