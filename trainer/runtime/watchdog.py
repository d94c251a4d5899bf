"""Notice that training is stuck, say who holds it up, and end this rank so that the job returns.

A thread of every rank writes heartbeats; when its own rank is late it reads those of all others.
Nothing goes through a collective, nor through rank 0, which may be the one that is stuck.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from trainer.config_engine import WatchdogConfig
from trainer.runtime.beats import Beat, beat_path, read_beat, write_beat
from trainer.runtime.ending import clear, node_name, write_stuck
from trainer.runtime.env import RankEnv
from trainer.runtime.exit_timer import ExitTimer
from trainer.runtime.pulse import PATIENT, Pulse
from trainer.runtime.rundir import is_superseded
from trainer.runtime.signals import EXIT_FINAL, EXIT_REQUEUE
from trainer.runtime.verdict import Verdict, judge
from trainer.runtime.waiting import waits_in

_SILENT_BEATS = 3
"""A rank that gave no new beat while another one looked on for so many is silent."""


class Watchdog:
    """Watches over one rank from its start to its end."""

    def __init__(self, folder: Path, env: RankEnv, cfg: WatchdogConfig, pulse: Pulse) -> None:
        """Take what is watched; nothing happens before it is entered.

        Args:
            folder: Of the attempt; all ranks see it.
            env: Which rank this is.
            cfg: How long a step may take.
            pulse: What the training thread says of itself.
        """
        self._folder, self._env, self._cfg, self._pulse = folder, env, cfg, pulse
        self._period_s = min(max(cfg.timeout_s / 20, 0.1), 10.0)
        self._path = beat_path(folder, env.rank)
        self._node = node_name()
        self._count = 0
        self._seen: dict[int, tuple[Beat | None, float]] = {}
        self._late_since_s: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._exit = ExitTimer(EXIT_REQUEUE)

    def __enter__(self) -> "Watchdog":
        clear(self._folder, self._env.rank)
        self._path.parent.mkdir(exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join(self._period_s)
        faulthandler.cancel_dump_traceback_later()
        self._exit.disarm()
        self._pulse.enter("end")
        self._beat()

    def _watch(self) -> None:
        while not self._closing.wait(self._period_s):
            if is_superseded(self._folder.parents[1], self._env.attempt):
                self._leave("another attempt of the run has begun", EXIT_FINAL)
            beat = self._beat()
            self._arm(beat)
            if not beat.is_late:
                self._seen, self._late_since_s = {}, None
            elif (verdict := self._look_around(beat)) is not None:
                self._end(verdict)

    def _beat(self) -> Beat:
        pulse, cfg = self._pulse, self._cfg
        patient = pulse.phase in PATIENT or not pulse.steps_done
        limit_s = cfg.first_step_timeout_s if patient else cfg.timeout_s
        elapsed_s = time.monotonic() - pulse.began_s
        waiting, begun = waits_in() if elapsed_s > limit_s else (None, 0)
        self._count += 1
        beat = Beat(
            self._count, self._node, pulse.step, pulse.phase, elapsed_s, limit_s, waiting, begun
        )
        with suppress(OSError):  # a full disk is for those to tell who need it
            write_beat(self._path, beat)
        return beat

    def _arm(self, beat: Beat) -> None:
        """Should this thread never run again, because a C call keeps the interpreter lock."""
        left_s = max(0.0, beat.limit_s - beat.elapsed_s)
        faulthandler.dump_traceback_later(left_s + 3 * self._period_s, file=sys.stderr)
        self._exit.arm(left_s + 10 * self._period_s)

    def _look_around(self, mine: Beat) -> Verdict | None:
        """Read the beats of all; judge them once it is clear whose heart has stopped."""
        now_s, patience_s = time.monotonic(), _SILENT_BEATS * self._period_s
        for rank in range(self._env.world):
            is_me = rank == self._env.rank
            beat = mine if is_me else read_beat(beat_path(self._folder, rank))
            before = self._seen.get(rank)
            if before is None or (beat is not None and beat != before[0]):
                self._seen[rank] = (beat, now_s)
        self._late_since_s = self._late_since_s or now_s
        if now_s - self._late_since_s <= patience_s:
            return None
        silent_s = {
            rank: now_s - since_s
            for rank, (_, since_s) in self._seen.items()
            if now_s - since_s > patience_s
        }
        return judge({rank: beat for rank, (beat, _) in self._seen.items()}, silent_s)

    def _end(self, verdict: Verdict) -> None:
        """Say it and go; not through `logging`, whose lock a stuck thread may hold."""
        write_stuck(self._folder, verdict.message, verdict.ranks)
        faulthandler.dump_traceback(file=sys.stderr)
        time.sleep(2 * self._period_s)  # others may be a beat behind, and have stacks to show
        self._leave(verdict.message, EXIT_REQUEUE)

    def _leave(self, why: str, code: int) -> NoReturn:
        os.write(sys.stderr.fileno(), f"rank {self._env.rank}: {why}\n".encode())
        os._exit(code)
