"""Run the stages of a pipeline on this machine, as the commands that a user would type."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from rich.console import Console
from rich.markup import escape

from slurm.render import ranges
from trainer.config_pipeline import StageConfig
from trainer.errors import BadInput, BadWorld
from trainer.observe.countdown import Countdown
from trainer.pipeline_stages import PIPELINE, Stage

_INTERRUPTED = {128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM}
_REFUSED = 2
_POLL_S = 0.1
_TAIL_LINES = 15
NO_ESTIMATES: Mapping[str, float] = {}


class Here:
    """Starts Kiln's commands in processes, and shows them."""

    def __init__(self, folder: Path, *, code: Path | None = None) -> None:
        """Take the place of logs, and of the code.

        Args:
            folder: Of the run.
            code: Where Kiln is imported from; None is the code that runs already.
        """
        self._folder = folder
        frozen = {} if code is None else {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
        self._env = {**os.environ, **frozen}
        self.console = Console(stderr=True, highlight=False)

    def run_stages(
        self, stages: Sequence[Stage], *, about_s: Mapping[str, float] = NO_ESTIMATES
    ) -> None:
        """Run stages one after the other; what is finished says so and is not repeated.

        Args:
            stages: What to do.
            about_s: Roughly how long each takes; only for the estimate of the time left.

        Raises:
            BadWorld: One failed; the message names its command.
            KeyboardInterrupt: It was interrupted, and has ended in order.
        """
        for number, stage in enumerate(stages):
            left_s = sum(about_s.get(each.name, 0.0) for each in stages[number:])
            width, tasks = 1, [0]
            if stage.has_gates or stage.is_counted:
                width, tasks = self._ask_coordinator(stage)
            if len(tasks) == 1:
                self.run(stage.name, stage.part(str(tasks[0]), width), left_s=left_s)
            elif tasks:
                self._share(stage, tasks, width)
            else:
                self.console.print(f"\n{stage.name}: nothing to do")

    def run(self, name: str, words: Sequence[str], *, left_s: float = 0) -> None:
        """Run one command in this terminal."""
        line = self._show(name, words, left_s=left_s)
        with _Processes(self._env) as processes:
            code = processes.start("trainer.cli", name, *words).wait()
        _judge(code, line, "its message is above.")

    @contextmanager
    def meanwhile(self, name: str, words: Sequence[str]) -> Iterator[None]:
        """Run a command for as long as the block lasts."""
        self._show(name, (*words, "&"))
        process = _start(("trainer.cli", name, *words), self._env)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()

    def _ask_coordinator(self, stage: Stage) -> tuple[int, list[int]]:
        words = ("trainer.coordinator", str(self._folder), stage.name)
        with _Processes(self._env) as processes:
            process = processes.start(*words, output=subprocess.PIPE)
            told, _ = process.communicate()
        if process.returncode == _REFUSED:
            raise BadInput(f"{stage.name} was not begun, and why is above.")
        _judge(process.returncode, f"the count before {stage.name}", "its message is above.")
        turn = json.loads(told.splitlines()[-1])
        return turn["width"], turn["tasks"]

    def _share(self, stage: Stage, tasks: Sequence[int], width: int) -> None:
        """Run a stage's tasks, as many at once as there are cores for; each has a log."""
        line = self._show(stage.name, stage.part(ranges(tasks), width))
        logs = self._folder / PIPELINE / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        left, running, failed = list(tasks), dict[int, subprocess.Popen[bytes]](), dict[int, int]()
        with (
            _Processes(self._env) as processes,
            ExitStack() as files,
            Countdown(stage.name, len(tasks), unit="tasks") as progress,
        ):
            while left or running:
                while left and len(running) < _at_once(stage):
                    task = left.pop(0)
                    output = files.enter_context((logs / f"{stage.name}_{task}.log").open("wb"))
                    words = ("trainer.cli", stage.name, *stage.part(str(task), width))
                    running[task] = processes.start(*words, output=output)
                time.sleep(_POLL_S)
                for task in [task for task, each in running.items() if each.poll() is not None]:
                    code = running.pop(task).returncode
                    failed |= {task: code} if code else {}
                    progress.advance(1)
                if failed or processes.is_interrupted:
                    left = []
                    processes.stop()
            progress.finish()
        if processes.is_interrupted:
            raise KeyboardInterrupt
        for task, code in failed.items():
            _judge(code, line, f"task {task}: {_tail(logs / f'{stage.name}_{task}.log')}")

    def _show(self, name: str, words: Sequence[str], *, left_s: float = 0) -> str:
        line = " ".join(["kiln", name, *words])
        left = f"   [dim]about {max(1, round(left_s / 60))} min left[/]" if left_s else ""
        self.console.print(f"\n[bold]$ {escape(line)}[/]{left}", soft_wrap=True)
        return line


class _Processes:
    """Processes that hear the signals of this one, each of them once."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self._running: list[subprocess.Popen[bytes]] = []
        self._before: dict[int, Any] = {}
        self.is_interrupted = False
        self._is_stopped = False

    def __enter__(self) -> "_Processes":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, *words: str, output: int | BinaryIO | None = None) -> subprocess.Popen[bytes]:
        """Start `python -m WORDS`."""
        process = _start(words, self._env, output)
        self._running.append(process)
        if self.is_interrupted:
            process.send_signal(signal.SIGINT)
        return process

    def stop(self) -> None:
        """End all, if they were not told to by a signal."""
        if not (self._is_stopped or self.is_interrupted):
            self._is_stopped = True
            self._send(signal.SIGINT)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.is_interrupted = True
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)


def _start(
    words: Sequence[str], env: Mapping[str, str], output: int | BinaryIO | None = None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own commands, no shell
        [sys.executable, "-m", *words],
        env=env,
        stdout=output,
        stderr=None if output == subprocess.PIPE else output,
        # Ctrl-C reaches a terminal's whole group: commands hear it once, from us.
        start_new_session=True,
    )


def _at_once(stage: Stage) -> int:
    """Return how many tasks this machine runs at the same time; networks on its GPU one by one."""
    section = stage.config
    assert isinstance(section, StageConfig)
    if section.gpus:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // (section.cpus or 1))


def _judge(code: int, line: str, why: str) -> None:
    if code in _INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise BadWorld(
            f"`{line}` ended with code {code}; {why} What was finished stands: the same command "
            "continues."
        )


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the end of {path}:", *lines[-_TAIL_LINES:], ""])
