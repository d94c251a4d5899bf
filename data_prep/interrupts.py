"""Start worker processes that no Ctrl-C reaches, while the one who starts them still hears it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sheltered() -> Iterator[None]:
    """Let processes that are started inside never see SIGINT, from their first instruction on.

    A terminal sends it to all of them, and one that is still importing would print a traceback.
    Here it is held back until the block ends, so that no process is left half started. For the
    main thread only.
    """
    held: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        held.append(number)

    before = signal.signal(signal.SIGINT, hold)  # another thread may be the one that gets it
    # What is started inherits this.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)
