"""End this process at a set time from C, even when no Python code can run any more."""

import ctypes

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux; timer_create(2), sigevent(7)."""

    _fields_ = (
        ("value", ctypes.c_ssize_t),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class ExitTimer:
    """A timer of the kernel at whose end libc calls `_exit(code)` in a thread of its own.

    That thread is none of Python's: it needs no interpreter lock, which a C call that is stuck may
    hold. (`faulthandler.dump_traceback_later(exit=True)` is as strong, but exits with 1 only.)
    """

    def __init__(self, code: int) -> None:
        """Make the timer, unarmed."""
        libc = ctypes.CDLL(None)
        self._lib = libc if hasattr(libc, "timer_create") else ctypes.CDLL("librt.so.1")
        event = _Event(
            value=code,
            notify=_SIGEV_THREAD,
            function=ctypes.cast(libc._exit, ctypes.c_void_p).value,
        )
        self._timer = ctypes.c_void_p()
        # It may fail at a limit on timers; whoever uses it has other ways to end the process.
        self._lib.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer))

    def arm(self, after_s: float) -> None:
        """End the process after so many seconds, and not when it was armed for before."""
        spec = (ctypes.c_long * 4)(0, 0, int(after_s), int(after_s % 1 * 1e9))
        self._lib.timer_settime(self._timer, 0, ctypes.byref(spec), None)

    def disarm(self) -> None:
        """Do not end the process."""
        self.arm(0)
