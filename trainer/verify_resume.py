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

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from math import lcm
from pathlib import Path

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from trainer.command import run_command
from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.opening import Layout
from trainer.data.stream import Law, State, from_json
from trainer.errors import BadInput
from trainer.frozen import config
from trainer.observe.countdown import Countdown
from trainer.observe.jsonl import read_rows
from trainer.place import Place, storage
from trainer.verify_resume_attempts import Seen, Step, read_killed, read_whole
from trainer.verify_resume_rank import Job, opened

PICTURES = "pictures"
SIDE_PX = 64
_SHOWN = 8


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
        num_steps = cfg.steps or 2 * num_samples // cfg.global_batch_images + 3
        sizes = (1, 2, 3) if len(law.buckets) == 1 else (1,)
        with Countdown("uninterrupted", num_steps, unit="steps") as progress:
            whole = read_whole(job, cfg.global_batch_images, num_steps, progress.update)
            progress.finish()
        with Countdown("with kills", num_steps, unit="steps") as progress:
            attempts = read_killed(
                job,
                cfg.global_batch_images,
                num_steps,
                kills=cfg.kills,
                worlds=cfg.worlds,
                sizes=sizes,
                progress=progress.update,
            )
            progress.finish()
        logs = [row for path in Path(work).glob("*/quarantine_*") for row in read_rows(path)]
        num_bad = len({(row["shard"], row["key"]) for row in logs})
        steps = [step for attempt in attempts for step in attempt.steps]
        problem = compare(whole, steps) or repeated(law, whole, num_bad=num_bad)
        if problem:
            sys.stdout.write(f"{problem}\n")
            return 1
        epochs = whole_epochs(law, from_json(law, whole[-1].saved))
        worlds = ", ".join(str(attempt.world) for attempt in attempts)
        once = f"{num_bad} bad samples replaced" if num_bad else "each once"
        sys.stdout.write(
            f"identical: {num_steps} steps of {cfg.global_batch_images} "
            f"{'latents' if job.encoding else PICTURES}, {min(cfg.kills, len(attempts))} kills, "
            f"worlds {worlds}; {epochs} whole epochs of {num_samples} samples, {once}\n"
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
            last = step.first + step.size - 1
            steps = f"steps {step.first} to {last}" if step.size > 1 else f"step {last}"
            missing, extra = expected - step.seen, step.seen - expected
            return (
                f"different at {steps}: {missing.total()} samples are missing{_some(missing)}, "
                f"{extra.total()} are too many{_some(extra)}"
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
