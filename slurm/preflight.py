"""Ask every node of a job whether it can be worked with, before its ranks start.

The batch script runs this module on each node, as `python -m slurm.preflight FOLDER`, and reads the
answers from a folder that all must see.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from slurm.runfile import read_json, write_json
from slurm.spec import Checks
from trainer.runtime.signals import EXIT_REQUEUE

QUESTION = "question.json"
_GB = 1e9
_CONNECT_S = 20
_NVIDIA_SMI_S = 60


@dataclass(frozen=True)
class Answer:
    """What a node found."""

    node: str
    unix_s: float
    """By its own clock."""
    problems: tuple[str, ...]


def judge_answers(
    nodes: Sequence[str],
    answers: Mapping[str, Answer],
    *,
    asked_unix_s: float,
    heard_unix_s: float,
    max_clock_skew_s: float,
) -> dict[str, str]:
    """Return the bad nodes, with what is wrong with each.

    Args:
        nodes: Of the job.
        answers: By node.
        asked_unix_s: By the batch script's clock, before the first node could be asked.
        heard_unix_s: By that clock, after the last answer; a right clock lies between them.
        max_clock_skew_s: How far outside it may lie.
    """
    bad = {}
    for node in nodes:
        answer = answers.get(node)
        if answer is None:
            bad[node] = "gave no answer: it starts no tasks, or does not see the run's folder"
            continue
        skew_s = max(asked_unix_s - answer.unix_s, answer.unix_s - heard_unix_s, 0.0)
        problems = list(answer.problems)
        if skew_s > max_clock_skew_s:
            problems.append(f"its clock is {skew_s:.0f} s off")
        if problems:
            bad[node] = "; ".join(problems)
    return bad


@contextmanager
def asking(folder: Path, checks: Checks, address: str) -> Iterator[None]:
    """Write down what nodes are asked, and listen for them meanwhile.

    Args:
        folder: For the question and the answers; on a file system that all nodes share.
        checks: What is asked.
        address: By which other nodes reach this one.
    """
    # Nobody accepts: that the kernel answers is what a node wants to know.
    with socket.create_server(("", 0), backlog=4096) as listener:
        folder.mkdir()
        port = listener.getsockname()[1]
        write_json(folder / QUESTION, {"checks": asdict(checks), "address": address, "port": port})
        yield


def read_answers(folder: Path) -> dict[str, Answer]:
    """Read what nodes have answered so far."""
    found = (read_json(path) for path in folder.glob("node_*.json"))
    return {each["node"]: Answer(**each) for each in found}


def problems_here(checks: Checks, address: str, port: int) -> Iterator[str]:
    """Look at this node, and say what is wrong with it."""
    for folder in checks.folders:
        yield from _disk(Path(folder), checks.min_free_gb)
    if checks.gpus:
        yield from _gpus(checks.gpus)
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
    except OSError as error:
        yield f"it cannot reach the first node at {address}:{port} ({error})"


def _disk(folder: Path, min_free_gb: float) -> Iterator[str]:
    try:
        free_gb = shutil.disk_usage(folder).free / _GB
    except OSError as error:
        yield f"{folder} cannot be looked at ({error.strerror})"
        return
    if free_gb < min_free_gb:
        yield (
            f"{folder} has {free_gb:.1f} GB left, "
            f"cluster.slurm.preflight.min_free_gb={min_free_gb:g}"
        )


def _gpus(expected: int) -> Iterator[str]:
    """Compare nvidia-smi's GPUs, and who computes on them, with what Slurm has lent."""
    try:
        there = _nvidia_smi("--query-gpu=uuid")
        busy = _nvidia_smi("--query-compute-apps=pid,gpu_uuid")
    except (OSError, subprocess.SubprocessError) as error:
        yield f"nvidia-smi does not work ({error})"
        return
    if len(there) < expected:
        yield f"{len(there)} GPUs are there, need {expected}"
    if busy:
        yield f"its GPUs are not idle: process {busy[0].split(',')[0]} computes on one"


def _nvidia_smi(query: str) -> list[str]:
    done = subprocess.run(  # noqa: S603 - no shell
        ["nvidia-smi", query, "--format=csv,noheader"],  # noqa: S607 - found on PATH
        capture_output=True,
        text=True,
        check=True,
        timeout=_NVIDIA_SMI_S,
    )
    return [line for line in done.stdout.splitlines() if line.strip()]


def main(argv: Sequence[str]) -> int:
    """Answer for this node; told to stop, it leaves without an answer."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: os._exit(EXIT_REQUEUE))
    folder = Path(argv[0])
    question = read_json(folder / QUESTION)
    checks = question["checks"]
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    unix_s = time.time()
    found = problems_here(
        Checks(**{**checks, "folders": tuple(checks["folders"])}),
        question["address"],
        question["port"],
    )
    answer = Answer(node, unix_s, tuple(found))
    write_json(folder / f"node_{node}.json", asdict(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
