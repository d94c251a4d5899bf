"""Keep a W&B run equal to a run's metrics.jsonl, from a thread that training never waits for."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from trainer.observe.evaluations import METRICS
from trainer.observe.wandb_session import (
    Level,
    Session,
    Target,
    end_service,
    open_session,
    run_id,
)

log = logging.getLogger(__name__)

_CLOSE_S = 20.0
_FINISH_S = 10.0
_LOOK_EVERY_S = 0.5
_PICTURES_EVERY_S = 30.0
_PAUSES_S = (60.0, 3600.0)
"""Between two tries to reach W&B: the first pause, which doubles, and the longest."""


class WandbSink:
    """Follows metrics.jsonl in a thread; training never waits for W&B, and never ends by it."""

    def __init__(
        self,
        target: Target,
        *,
        attempt: int | None = None,
        stuck: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Begin to follow.

        Args:
            target: The W&B run.
            attempt: Follow no further than this attempt: another one may have begun, and send
                the rest itself.
            stuck: Says who holds training up, if it is stuck; asked twice a second.
        """
        logging.getLogger("wandb").propagate = False  # it has its own files
        with suppress(Exception):  # which the thread will meet again, and tell
            # Not first in the thread: of two that import the same, one may see half of it.
            import wandb  # noqa: F401, PLC0415

            run_id(target)
        self._target, self._attempt, self._stuck = target, attempt, stuck
        self._alerts: SimpleQueue[tuple[str, str, Level]] = SimpleQueue()
        self._alerted: set[str] = set()
        self._exit_code = 0
        self._has_news, self._closing = threading.Event(), threading.Event()
        self._is_warned = self._is_done = False
        self._thread = threading.Thread(target=self._follow, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Hear that metrics.jsonl has a new row."""
        self._has_news.set()

    def alert(self, kind: str, text: str, *, level: Level) -> None:
        """Have W&B tell the user; of each kind once."""
        if kind not in self._alerted:
            self._alerted.add(kind)
            self._alerts.put((kind, text, level))
            self._has_news.set()

    def close(self, *, exit_code: int = 0) -> None:
        """Send what is left, within seconds, and end; a code other than 0 means that it failed."""
        self._exit_code = exit_code
        self._closing.set()
        self._has_news.set()
        self._thread.join(_CLOSE_S)
        if not self._is_done:
            self._warn("no answer")

    def _follow(self) -> None:
        pause_s, longest_s = _PAUSES_S
        while not self._is_done:
            try:
                self._follow_once()
                self._is_done = True
            except Exception as error:  # whatever W&B does, training goes on
                self._warn(error)
                end_service()
                if self._target.mode == "offline" or self._closing.wait(pause_s):
                    self._is_done = True
                pause_s = min(2 * pause_s, longest_s)

    def _follow_once(self) -> None:
        session = open_session(self._target, finish_s=_FINISH_S)
        if session is None:
            return
        looked_s = time.monotonic()
        while not self._closing.is_set():
            self._has_news.wait(_LOOK_EVERY_S)
            self._has_news.clear()
            session.send_rows(self._attempt)
            self._send_alerts(session)
            if time.monotonic() - looked_s >= _PICTURES_EVERY_S:
                looked_s = time.monotonic()
                session.send_pictures()
        session.send_rows(self._attempt)
        session.send_pictures()
        self._send_alerts(session)
        session.finish(self._exit_code)

    def _send_alerts(self, session: Session) -> None:
        if (held_up_by := self._stuck()) is not None:
            self.alert("stuck", held_up_by, level="ERROR")
        while not self._alerts.empty():
            kind, text, level = self._alerts.get()
            session.alert(kind, text, level)

    def _warn(self, error: object) -> None:
        if self._is_warned:
            return
        self._is_warned = True
        run = self._target.run_dir
        log.warning(
            "W&B does not take the metrics (%s). Work goes on, and %s has everything. Check "
            "WANDB_API_KEY, WANDB_BASE_URL and the network; `kiln sync %s`, or the next "
            "attempt, sends what is missing.",
            " ".join(str(error).split())[:300] or type(error).__name__,
            run / METRICS,
            run,
        )
