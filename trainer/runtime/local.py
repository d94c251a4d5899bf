"""Start the ranks of one machine, pass signals on to them, and end all when one fails."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from trainer.errors import BadWorld

CPU_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Makes glibc keep what a step freed for the next one. By default it gives large blocks back to the
kernel, which then zeroes their pages again, every step."""

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_GRACE_S = 10.0
_TAIL_LINES = 15


def run_ranks(
    module: str,
    args: Sequence[str],
    *,
    num_ranks: int,
    log_dir: Path,
    env: Mapping[str, str],
) -> int:
    """Run `python -m module args` once per rank and wait for all.

    Rank 0 shares this terminal; the others write to `log_dir/rank_00001.log` and so on.

    Returns:
        The exit code that all ranks agree on.

    Raises:
        BadWorld: A rank died; the others were ended, and the message holds that rank's last lines.
    """
    port = _free_port()
    with ExitStack() as stack:
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, ranks)
        stack.callback(_drop_shared_memory, port)
        # Installed before the first rank starts, so that no Ctrl-C falls between.
        _forward_signals(stack, ranks)
        for rank in range(num_ranks):
            output = None
            if rank:
                output = stack.enter_context((log_dir / f"rank_{rank:05d}.log").open("wb"))
            ranks.append(
                subprocess.Popen(  # noqa: S603 - our own module, no shell
                    [sys.executable, "-m", module, *args],
                    env={
                        **os.environ,
                        **env,
                        "KILN_PARENT": str(os.getpid()),
                        "RANK": str(rank),
                        "WORLD_SIZE": str(num_ranks),
                        "LOCAL_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C reaches a terminal's whole group: ranks hear it once, from us.
                    start_new_session=True,
                )
            )
        return _wait(ranks, log_dir)


def die_with_parent() -> None:
    """Ask the kernel to kill this rank when the process that started it dies, even by kill -9.

    Otherwise orphans would go on training and write beside the run's next attempt.
    """
    parent = launcher_pid()
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def launcher_pid() -> int | None:
    """Process id of the `kiln train` that started this rank; None when something else did."""
    parent = os.environ.get("KILN_PARENT")
    return int(parent) if parent else None


def _wait(ranks: list[subprocess.Popen[bytes]], log_dir: Path) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        if all(code is not None for code in codes):
            if len(set(codes)) == 1:
                assert codes[0] is not None
                if codes[0] >= 0:
                    return codes[0]
            break
        if any(code is not None and (code < 0 or code in {1, 2}) for code in codes):
            break
        time.sleep(_POLL_S)
    # A failing rank often takes others with it; the first with its own error speaks for all.
    failed = next(rank for rank, code in enumerate(codes) if code)
    log_file = log_dir / f"rank_{failed:05d}.log"
    tail = _tail(log_file) if failed else "see above"
    code = codes[failed]
    how = (
        f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"code {code}"
    )
    raise BadWorld(
        f"rank {failed} of {len(ranks)} ended with {how}; the others were stopped. What "
        f"was saved stands and the same command continues from it. Its log: {tail}"
    )


def _forward_signals(stack: ExitStack, ranks: list[subprocess.Popen[bytes]]) -> None:
    def forward(number: int, _frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        stack.callback(signal.signal, number, signal.signal(number, forward))


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline_s = time.monotonic() + _GRACE_S
    for process in ranks:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline_s - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def _drop_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's CPU backend leaves in /dev/shm when its processes are killed."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}*"):  # noqa: S108
        path.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([str(path), *lines[-_TAIL_LINES:]])
