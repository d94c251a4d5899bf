"""Readers of a dataset as processes: taken through it step by step, killed, and begun again."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trainer.data.loader import Pace
from trainer.errors import BadWorld
from trainer.observe.jsonl import read_rows
from trainer.verify_resume_rank import Job, iterate

Seen = Counter[tuple[int, int]]
"""(sample id, how often it was seen before) -> times."""


@dataclass(frozen=True, slots=True)
class Step:
    """What all ranks got in one step."""

    first: int
    """The step's place, in steps of `global_batch_images`."""
    size: int
    """How many of them it is."""
    seen: Seen
    saved: dict[str, Any]
    """The state behind it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of processes that were begun and ended together."""

    world: int
    """How many they were."""
    steps: list[Step]
    """Those that all of them finished."""


def read_whole(
    job: Job, global_batch_images: int, num_steps: int, progress: Callable[[int], None]
) -> list[Step]:
    """Read in one process that nobody kills, without reading ahead."""
    pace = Pace(0, 1, global_batch_images, global_batch_images, threads=1, prefetch_batches=0)
    job = replace(job, folder=f"{job.folder}/whole")
    with _ranks(job, pace) as gates:
        for done in range(1, num_steps + 1):
            _take_step(gates)
            progress(done)
    return _finished(job, pace, first=0, size=1)


def read_killed(
    job: Job,
    global_batch_images: int,
    num_steps: int,
    *,
    kills: int,
    worlds: Sequence[int],
    sizes: Sequence[int],
    progress: Callable[[int], None],
) -> list[Attempt]:
    """Read in processes that are killed again and again, each time in the middle of a step.

    Args:
        job: Of all attempts; they go on where the last step stands that all ranks finished.
        global_batch_images: Samples of a step of size 1.
        num_steps: How many of these to read.
        kills: How often; less if nothing is left to read.
        worlds: Of attempts; none is twice in a row unless it is the only one.
        sizes: Of the steps of an attempt; 1 is among them.
        progress: Called with the steps that are done.
    """
    # Only what is tried depends on these draws.
    chance = random.Random(job.layout.seed)  # noqa: S311
    attempts: list[Attempt] = []
    first, saved, world = 0, job.saved, 0
    while first < num_steps and len(attempts) <= kills:
        left, kills_left = num_steps - first, kills - len(attempts)
        # The last attempt takes all that is left, and so steps of size 1.
        size = chance.choice([n for n in sizes if n == 1 or (n <= left and kills_left)])
        world = chance.choice([n for n in worlds if n != world] or list(worlds))
        pace = _pace(chance, world, global_batch_images * size)
        even = left // size // (kills_left + 1)
        whole_steps = min(left // size - 1, chance.randint(0, 2 * even)) if kills_left else left
        mine = replace(job, saved=saved, folder=f"{job.folder}/attempt_{len(attempts)}")
        with _ranks(mine, pace) as gates:
            for done in range(1, whole_steps + 1):
                _take_step(gates)
                progress(first + done * size)
            if kills_left:
                _open(gates)
                time.sleep(chance.random() * 0.01)
        attempts.append(Attempt(world, _finished(mine, pace, first=first, size=size)))
        if attempts[-1].steps:
            last = attempts[-1].steps[-1]
            first, saved = last.first + last.size, last.saved
    return attempts


def _pace(chance: random.Random, world: int, global_batch_images: int) -> Pace:
    own = global_batch_images // world
    return Pace(
        rank=0,
        world=world,
        global_batch_images=global_batch_images,
        micro_batch_images=chance.choice([n for n in range(1, own + 1) if own % n == 0]),
        threads=chance.choice([1, 2, 3]),
        prefetch_batches=chance.choice([0, 1, 4]),
    )


@contextmanager
def _ranks(job: Job, pace: Pace) -> Iterator[list[Connection]]:
    """Start a process for each rank; kill all of them at the end."""
    Path(job.folder).mkdir(exist_ok=True)
    context, gates, processes = get_context("spawn"), list[Connection](), []
    try:
        for rank in range(pace.world):
            here, there = context.Pipe()
            process = context.Process(
                target=iterate, args=(job, replace(pace, rank=rank), there), daemon=True
            )
            process.start()
            there.close()
            processes.append(process)
            gates.append(here)
        yield gates
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for gate in gates:
            gate.close()


def _open(gates: Sequence[Connection]) -> None:
    for rank, gate in enumerate(gates):
        try:
            gate.send(True)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _ended(rank) from error


def _take_step(gates: Sequence[Connection]) -> None:
    """Let all ranks take one step, and wait for them."""
    _open(gates)
    for rank, gate in enumerate(gates):
        try:
            problem = gate.recv()
        except (EOFError, ConnectionResetError) as error:
            raise _ended(rank) from error
        if problem:
            raise problem


def _ended(rank: int) -> BadWorld:
    return BadWorld(
        f"the process of rank {rank} ended by itself. If it says nothing above, the machine has "
        "run out of memory: try smaller worlds= or a smaller global_batch_images=."
    )


def _finished(job: Job, pace: Pace, *, first: int, size: int) -> list[Step]:
    """Read what the ranks wrote, up to the last step that all of them finished."""
    ranks = [read_rows(Path(job.folder) / f"rank_{rank}.jsonl") for rank in range(pace.world)]
    return [
        Step(
            first=first + number * size,
            size=size,
            seen=Seen((id_, visit) for row in rows for id_, visit in row["samples"]),
            saved=rows[0]["state"],
        )
        for number, rows in enumerate(zip(*ranks, strict=False))
    ]
