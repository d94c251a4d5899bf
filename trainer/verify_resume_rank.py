"""One rank of `kiln verify-resume`: reads in step with the others, and writes down what it got."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from trainer.data import stream
from trainer.data.cache import Cache
from trainer.data.loader import Pace, micro_batches
from trainer.data.manifest import encoding_folder, load_encoding, load_manifest
from trainer.data.opening import Dataset, Layout, make_law, open_readers
from trainer.data.quarantine import Quarantine
from trainer.data.sources import LatentSource, PictureSource, Samples, Source
from trainer.errors import BadInput, BadWorld
from trainer.observe.jsonl import JsonLines
from trainer.place import place


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks of one attempt do."""

    dataset: str
    encoding: str | None
    """Its fingerprint; None: the pictures are read."""
    side_px: int
    """Of decoded pictures."""
    layout: Layout
    cache: tuple[str, float] | None
    """Folder and 10^9 bytes."""
    saved: dict[str, Any] | None
    """The state to begin from; None is the first sample."""
    folder: str
    """Where the ranks write: `rank_0.jsonl` and so on, `quarantine_0.jsonl` and so on."""


@contextmanager
def opened(job: Job, rank: int) -> Iterator[Source]:
    """Open what a job reads."""
    folder = place(job.dataset)
    pictures = job.encoding is None
    encoding = None if pictures else load_encoding(encoding_folder(folder, str(job.encoding)))
    dataset = Dataset(folder, load_manifest(folder), encoding)
    versions = stream.removal_versions(job.saved) if job.saved else None
    law = make_law([dataset], job.layout, removal_versions=versions)
    cache = Cache(Path(job.cache[0]), max_bytes=int(job.cache[1] * 1e9)) if job.cache else None
    quarantine = Quarantine(Path(job.folder) / f"quarantine_{rank}.jsonl", max_bad_frac=1.0)
    samples = Samples(law, open_readers([dataset], law, cache=cache), quarantine)
    with closing(samples):
        yield PictureSource(samples, side_px=job.side_px) if pictures else LatentSource(samples)


def iterate(job: Job, pace: Pace, gate: Connection) -> None:
    """Take one step for each message through the gate, until it is closed.

    The answer comes when the step's samples are written down: None, or the error that ends it all.
    """
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError), opened(job, pace.rank) as source:
        try:
            _iterate(job, pace, gate, source)
        except (BadInput, BadWorld) as error:
            gate.send(error)


def _iterate(job: Job, pace: Pace, gate: Connection, source: Source) -> None:
    law = source.samples.law
    state = stream.from_json(law, job.saved) if job.saved else stream.begin(law, [1.0])
    num_micro = pace.global_batch_images // pace.world // pace.micro_batch_images
    batches = micro_batches(source, state, pace)
    with closing(JsonLines(Path(job.folder) / f"rank_{pace.rank}.jsonl")) as record:
        while True:
            gate.recv()
            seen: list[tuple[int, int]] = []
            for batch in islice(batches, num_micro):
                seen += zip(batch.ids_B.tolist(), batch.visits_B.tolist(), strict=True)
            state = stream.advance(law, state, pace.global_batch_images)
            record.append([{"samples": seen, "state": stream.to_json(law, state)}])
            gate.send(None)
