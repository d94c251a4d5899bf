"""Stop signals only set a flag; the loop asks for it at step boundaries."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

EXIT_REQUEUE = 85
"""Exit code of a run that saved and wants to be started again."""

EXIT_FINAL = 93
"""Exit code of an attempt that must not be started again: another one has taken its place."""


class StopFlag:
    """Remembers the first stop signal of this process."""

    def __init__(self) -> None:
        """Install the handlers; a second Ctrl-C changes nothing, so a save is never torn."""
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
