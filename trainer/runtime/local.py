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
from trainer.runtime.ending import Failure, cause, read_failures, read_stuck
from trainer.runtime.signals import EXIT_REQUEUE

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_SETTLE_S = 1.0
_GRACE_S = 5.0
_TAIL_LINES = 15

ALLOCATOR_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Makes glibc keep what a step freed for the next one. By default it gives large blocks back to the
kernel, which then zeroes their pages again, every step."""


def run_ranks(
    module: str,
    args: Sequence[str],
    *,
    num_ranks: int,
    log_dir: Path,
    env: Mapping[str, str],
    forwards_signals: bool = True,
) -> int:
    """Run `python -m module args` once per rank and wait for all.

    Rank 0 shares this terminal; the others write to `log_dir/rank_00001.log` and so on.

    Args:
        module: What a rank is.
        args: Of each.
        num_ranks: How many.
        log_dir: Of the attempt.
        env: Set for them.
        forwards_signals: Ranks hear what this process is told, and end in order. Otherwise
            the signals are the caller's: what its handlers raise ends the ranks within seconds.

    Returns:
        The exit code that all ranks agree on; 85 when they were stuck, of which `read_stuck` tells.

    Raises:
        BadWorld: A rank died; the others were ended, and the message ends with the error of the
            rank that did so first.
    """
    port = _free_port()
    with ExitStack() as stack:
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, ranks)
        stack.callback(_drop_shared_memory, port)
        # Installed before the first rank starts, so that no Ctrl-C falls between.
        if forwards_signals:
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
    ended_s: dict[int, float] = {}
    trouble_s = None
    while len(ended_s) < len(ranks):
        now_s = time.time()
        for rank, process in enumerate(ranks):
            if process.poll() is not None:
                ended_s.setdefault(rank, now_s)
        if trouble_s is None and _is_trouble(ranks, log_dir):
            trouble_s = now_s
        # Other ranks may follow of themselves, or say an earlier error, at which this one ended.
        if trouble_s is not None and now_s - trouble_s > _SETTLE_S:
            break
        time.sleep(_POLL_S)
    return _outcome(ranks, ended_s, log_dir)


def _outcome(ranks: list[subprocess.Popen[bytes]], ended_s: dict[int, float], log_dir: Path) -> int:
    if read_stuck(log_dir) is not None:
        return EXIT_REQUEUE
    codes = {process.returncode for process in ranks}
    failures = read_failures(log_dir)
    # Of a failure that all ranks agree on each has said why; on a full disk they could not.
    agreed = len(failures) == len(ranks) and len({f.error for f in failures.values()}) == 1
    code = ranks[0].returncode
    is_quiet = agreed or (not failures and code not in {1, 2})
    if len(codes) == 1 and code is not None and code >= 0 and is_quiet:
        return code
    for rank, time_s in ended_s.items():
        if (code := ranks[rank].returncode) and rank not in failures:
            failures[rank] = Failure(rank, "", time_s, _how(code), is_echo=False)
    first = cause(failures.values())
    assert first is not None
    how = _how(ranks[first.rank].returncode)
    words = ["above."] if first.rank == 0 else _tail(log_dir / f"rank_{first.rank:05d}.log")
    if first.error not in {how, words[-1]}:
        words.append(first.error)
    raise BadWorld(
        f"rank {first.rank} of {len(ranks)} {how}; the others were stopped. What was saved stands "
        "and the same command continues from it. Its log: " + "\n".join(words)
    )


def _is_trouble(ranks: list[subprocess.Popen[bytes]], log_dir: Path) -> bool:
    """Say whether a rank has ended so that the others cannot go on."""
    codes = [process.returncode for process in ranks if process.returncode is not None]
    return any(code < 0 or code in {1, 2} for code in codes) or (
        any(codes) and read_stuck(log_dir) is not None
    )


def _how(code: int | None) -> str:
    if code is None:
        return "failed"
    return f"ended with {f'signal {signal.Signals(-code).name}' if code < 0 else f'code {code}'}"


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


def _tail(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [str(path), *lines[-_TAIL_LINES:]]
