"""Prove on a dataset that its stream resumes exactly: kill real readers, resume, and compare.

Processes, one for each rank, go through the dataset as training does: real tars, threads, reading
ahead, a cache if there is one. At random moments all are killed with SIGKILL, and new ones go on
from the state behind the last step that all had finished: in another number, with other
micro-batches, threads and prefetch, and, where the dataset has one bucket only, with a global batch
two or three times as large. What they got is compared, step by step, with what one process got that
nobody killed; and in every whole epoch each sample must come once. The last line says `identical`,
or names the first step that differs, with the samples that are missing there or too many. Nothing
of the dataset is changed.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from trainer.command import run_command
from trainer.data.loader import Pace
from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.opening import Layout
from trainer.data.stream import Law, State, from_json
from trainer.errors import BadInput, BadWorld
from trainer.frozen import config
from trainer.observe.countdown import Countdown
from trainer.observe.jsonl import read_rows
from trainer.place import Place, storage
from trainer.verify_resume_rank import Job, iterate, opened

PICTURES = "pictures"
SIDE_PX = 64
_SHOWN = 8

Seen = Counter[tuple[int, int]]
"""(sample id, how often it was seen before) -> times."""


@config
class VerifyResumeConfig:
    """`kiln verify-resume`."""

    dataset: Place
    """A published dataset: a folder or a URL."""
    encoding: str | None
    """Fingerprint of the latents to read, or pictures; null: the only latents, or pictures where
    there are none."""
    seed: NonNegativeInt
    """Keys the order of the samples, the moments of the kills and how each attempt goes on."""
    global_batch_images: PositiveInt
    """Samples of one step; a multiple of every world."""
    steps: PositiveInt | None
    """Steps of that size; null: two epochs and a few steps."""
    kills: NonNegativeInt
    """How often all processes are killed."""
    worlds: tuple[PositiveInt, ...]
    """Numbers of processes to go on with."""
    cache: str | None
    """A folder where shards are kept, as `data.cache` of a training run; null: none."""
    cache_gb: PositiveFloat
    """The cache's bound, in 10^9 bytes."""

    def __post_init__(self) -> None:
        """Refuse worlds among which a step cannot be shared."""
        if not self.worlds:
            raise ValueError("worlds=[] leaves nobody to read. Give worlds=[1,2,4].")
        least = lcm(*self.worlds)
        if self.global_batch_images % least:
            above = -(-self.global_batch_images // least) * least
            raise ValueError(
                f"global_batch_images={self.global_batch_images} is not a multiple of all "
                f"worlds={list(self.worlds)}. Try global_batch_images={above}."
            )


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


def main(argv: Sequence[str]) -> int:
    """`kiln verify-resume dataset=DATASET`."""
    return run_command(run, VerifyResumeConfig, "verify-resume", argv)


def run(cfg: VerifyResumeConfig) -> int:
    """Read once whole and once with kills; print the verdict, 1 if they differ."""
    with storage(cfg.dataset), tempfile.TemporaryDirectory(prefix="kiln-verify-resume-") as work:
        job = Job(
            dataset=str(cfg.dataset),
            encoding=_encoding(cfg),
            side_px=SIDE_PX,
            layout=Layout(seed=cfg.seed),
            cache=(cfg.cache, cfg.cache_gb) if cfg.cache else None,
            saved=None,
            folder=work,
        )
        with opened(job, 0) as source:
            law = source.samples.law
        num_samples = sum(law.sizes[0].values())
        steps = cfg.steps or 2 * num_samples // cfg.global_batch_images + 3
        whole = _whole(cfg, job, steps)
        killed, worlds = _killed(cfg, job, steps, elastic=len(law.buckets) == 1)
        num_bad = len(
            {(r["shard"], r["key"]) for p in Path(work).glob("*/q*") for r in read_rows(p)}
        )
        problem = compare(whole, killed) or repeated(law, whole, num_bad=num_bad)
        if problem:
            sys.stdout.write(f"{problem}\n")
            return 1
        epochs = whole_epochs(law, from_json(law, whole[-1].saved))
        bad = f", {num_bad} bad samples replaced" if num_bad else ""
        sys.stdout.write(
            f"identical: {steps} steps of {cfg.global_batch_images} "
            f"{job.encoding or PICTURES}, {len(worlds) - 1} kills, worlds "
            f"{', '.join(map(str, worlds))}; {epochs} whole epochs of {num_samples} samples, "
            f"each once{bad}\n"
        )
        return 0


def compare(whole: Sequence[Step], killed: Sequence[Step]) -> str | None:
    """Name the first step of which two readings got other samples; None if there is none.

    Args:
        whole: Steps of size 1.
        killed: Steps of any size, one behind the other.
    """
    for step in killed:
        expected = Seen()
        for part in whole[step.first : step.first + step.size]:
            expected.update(part.seen)
        if step.seen != expected:
            until = f" to {step.first + step.size - 1}" if step.size > 1 else ""
            missing, extra = expected - step.seen, step.seen - expected
            return (
                f"different at step {step.first}{until}: {missing.total()} samples are missing"
                f"{_some(missing)}, {extra.total()} are too many{_some(extra)}"
            )
    return None


def repeated(law: Law, whole: Sequence[Step], *, num_bad: int) -> str | None:
    """Name samples that came twice in an epoch, or not at all; None if there is none.

    Where samples are bad, others come twice in their place, and nothing is said.
    """
    if num_bad:
        return None
    seen = Seen()
    for step in whole:
        seen.update(step.seen)
    twice = Seen({pair: times for pair, times in seen.items() if times > 1})
    if twice:
        return f"different: {len(twice)} samples came twice in an epoch{_some(twice)}"
    num_samples = sum(law.sizes[0].values())
    per_epoch = Counter(epoch for _, epoch in seen)
    for epoch in range(whole_epochs(law, from_json(law, whole[-1].saved))):
        if per_epoch[epoch] != num_samples:
            return f"different: epoch {epoch} had {per_epoch[epoch]} of {num_samples} samples"
    return None


def whole_epochs(law: Law, state: State) -> int:
    """Count the epochs that all buckets of a stream of one dataset have been through."""
    return min(
        tally.since // law.sizes[0][bucket]
        for bucket, tally in zip(law.buckets, state.tallies, strict=True)
    )


def _some(samples: Seen) -> str:
    names = [f"{id_ & (2**64 - 1):016x}@{epoch}" for id_, epoch in sorted(samples)[:_SHOWN]]
    return f" ({', '.join(names)}{', ...' if len(samples) > _SHOWN else ''})" if names else ""


def _whole(cfg: VerifyResumeConfig, job: Job, steps: int) -> list[Step]:
    """Read in one process that nobody kills, without reading ahead."""
    pace = Pace(0, 1, cfg.global_batch_images, cfg.global_batch_images, 1, 0)
    job = replace(job, folder=f"{job.folder}/whole")
    with Countdown("uninterrupted", steps, unit="steps") as progress:
        with _ranks(job, pace) as gates:
            for done in range(1, steps + 1):
                _take_step(gates)
                progress.update(done)
        progress.finish()
    return _finished(job, pace, first=0, size=1)


def _killed(
    cfg: VerifyResumeConfig, job: Job, steps: int, *, elastic: bool
) -> tuple[list[Step], list[int]]:
    """Read with kills; give the steps that count, and how many processes each attempt had."""
    chance, found, worlds = random.Random(cfg.seed), list[Step](), list[int]()  # noqa: S311 - no secret
    with Countdown("with kills", steps, unit="steps") as progress:
        for attempt in range(cfg.kills + 1):
            first = found[-1].first + found[-1].size if found else 0
            if first == steps:
                break
            size = chance.choice([s for s in (1, 2, 3) if elastic or s == 1])
            # The last attempt takes all that is left, and so steps that fit.
            last = attempt == cfg.kills
            size = 1 if last or (steps - first) < size else size
            pace = _pace(cfg, chance, size)
            left = (steps - first) // size
            num_steps = left if last else min(left, chance.randint(0, 2 * left // (cfg.kills + 1)))
            saved = found[-1].saved if found else None
            job = replace(job, saved=saved, folder=f"{Path(job.folder).parent}/attempt_{attempt}")
            with _ranks(job, pace) as gates:
                for done in range(1, num_steps + 1):
                    _take_step(gates)
                    progress.update(first + done * size)
                if not last:  # in the middle of a step, if there is one more
                    _open(gates if num_steps < left else [])
                    time.sleep(chance.random() * 0.01)
            found += _finished(job, pace, first=first, size=size)
            worlds.append(pace.world)
        progress.finish()
    return found, worlds


def _pace(cfg: VerifyResumeConfig, chance: random.Random, size: int) -> Pace:
    world = chance.choice(cfg.worlds)
    images = cfg.global_batch_images * size
    own = images // world
    return Pace(
        rank=0,
        world=world,
        global_batch_images=images,
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
            raise BadInput(problem)


def _ended(rank: int) -> BadWorld:
    return BadWorld(
        f"the process of rank {rank} ended by itself: the machine may have run out of memory. Try "
        "fewer worlds= or a smaller global_batch_images=."
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


def _encoding(cfg: VerifyResumeConfig) -> str | None:
    if cfg.encoding == PICTURES:
        return None
    shards = load_manifest(cfg.dataset).shards_fingerprint
    there = [e.fingerprint for e in list_encodings(cfg.dataset) if e.dataset_fingerprint == shards]
    if cfg.encoding is None and len(there) <= 1:
        return there[0] if there else None
    if cfg.encoding not in there:
        got = "is none of this dataset" if cfg.encoding else "leaves a choice"
        raise BadInput(
            f"encoding={cfg.encoding or 'null'} {got}. Give one of: "
            f"{', '.join([*there, PICTURES])}."
        )
    return cfg.encoding
