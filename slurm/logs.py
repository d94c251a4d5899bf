"""Print what a rank of a run's newest attempt says, or its job's script; and go on while it does.

The same for runs of `kiln train`, whose rank 0 wrote to the terminal.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from slurm import client
from slurm.attempts import FINAL, attempt_folders, read_attempt
from slurm.config import LogsConfig
from slurm.log_files import attempt_folder, find, scripts, start_of_last
from slurm.runfile import read_spec
from slurm.seen import find_run, is_trained
from trainer.command import run_command
from trainer.errors import BadInput

log = logging.getLogger(__name__)

_POLL_S = 0.3
_ASK_S = 5.0
"""Slurm is not asked more often."""
_CHUNK_BYTES = 1 << 20
_SWITCHES = {"-f": "follow=true", "--follow": "follow=true"}
_TAKE_A_NUMBER = {"--rank": "rank", "--attempt": "attempt", "--lines": "lines", "-n": "lines"}


def long_options(argv: Sequence[str]) -> list[str]:
    """Write `-f --rank 3` as follow=true rank=3.

    Raises:
        BadInput: The number after an option is missing.
    """
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        option, is_pair, value = word.partition("=")
        if word in _SWITCHES:
            words.append(_SWITCHES[word])
        elif option not in _TAKE_A_NUMBER:
            words.append(word)
        elif is_pair or rest:
            words.append(f"{_TAKE_A_NUMBER[option]}={value if is_pair else rest.pop(0)}")
        else:
            raise BadInput(f"{word} needs a number after it, as in `{word} 3`.")
    return words


class Follower:
    """Prints what is added to the log of a run, whichever it is."""

    def __init__(self, run: Path, cfg: LogsConfig) -> None:
        """Begin with what is there."""
        self._run, self._cfg = run, cfg
        self._current: Path | None = None
        self._offsets = {path: path.stat().st_size for path in scripts(run)}
        self._asked_s = 0.0

    def show(self) -> bool:
        """Print what is new, and say whether anything was."""
        path = find(self._run, self._cfg)
        if path is None:
            return False
        is_new = self._drain()
        if path != self._current:
            log.info("==> %s", path)
            if self._current is None:
                self._offsets[path] = start_of_last(path, self._cfg.lines)
            self._current = path
            is_new = self._drain() or is_new
        return is_new

    def _drain(self) -> bool:
        """Print what was added to the current log."""
        if self._current is None:
            return False
        before = self._offsets.get(self._current, 0)
        with self._current.open("rb") as file:
            file.seek(before)
            while chunk := file.read(_CHUNK_BYTES):
                sys.stdout.buffer.write(chunk)
            self._offsets[self._current] = file.tell()
        sys.stdout.buffer.flush()
        return self._offsets[self._current] > before

    def is_over(self) -> bool:
        """Whether nothing more can come."""
        folder = attempt_folder(self._run, self._cfg.attempt)
        attempt = read_attempt(folder) if folder else None
        if folder is not None and attempt is None and read_spec(self._run) is None:
            return not is_trained(self._run)
        end = attempt.end if attempt else None
        if end is not None and (end.cause in FINAL or self._cfg.attempt is not None):
            log.info("the attempt has ended, %s: %s", end.cause, end.why)
            return True
        now_s = time.monotonic()
        if now_s - self._asked_s >= _ASK_S:
            self._asked_s = now_s
            with suppress(client.SlurmError):  # then its files alone tell
                return not any(job.folder == self._run for job in client.queue())
        return False


def run(cfg: LogsConfig) -> int:
    """Print the log, and follow it if asked to."""
    folder = find_run(cfg.run).resolve()
    follower = Follower(folder, cfg)
    try:
        if not follower.show() and not cfg.follow and find(folder, cfg) is None:
            raise BadInput(_nothing(folder, cfg))
        if cfg.follow:
            with suppress(KeyboardInterrupt):
                _follow(follower)
    except BrokenPipeError:  # of `kiln logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _follow(follower: Follower) -> None:
    while True:
        if not follower.show() and follower.is_over():
            follower.show()
            return
        time.sleep(_POLL_S)


def _nothing(run: Path, cfg: LogsConfig) -> str:
    folders = attempt_folders(run)
    if not folders:
        return (
            f"no attempt of {run} has begun yet. `kiln status {cfg.run}` says what its job waits "
            "for; with -f its log is printed when it begins."
        )
    whose = "the job's script" if cfg.rank == "batch" else f"rank {cfg.rank or 0}"
    return (
        f"there is no log of {whose} in {cfg.attempt if cfg.attempt is not None else folders[-1]}. "
        "Give rank=batch for what the job's script said, or another attempt=."
    )


def main(argv: Sequence[str]) -> int:
    """`kiln logs RUN [-f] [--rank N] [attempt=N]`."""
    return run_command(run, LogsConfig, "logs", long_options(argv), positional="run")
