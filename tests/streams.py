"""Laws of streams over datasets that are nothing but counts, and streams of real datasets."""

from contextlib import closing, contextmanager

import numpy as np

from trainer.data.manifest import list_encodings, load_manifest
from trainer.data.opening import Dataset, Layout, make_law, open_readers
from trainer.data.quarantine import Quarantine
from trainer.data.sources import CaptionedSource, LatentSource, PictureSource, Samples
from trainer.data.stream import Law, Member, Slots, advance, rank_slots, step_slots


def law_of(*datasets, **changes):
    """Make a law; a dataset is a list of rows per shard, or a dict of such by bucket."""
    members = []
    for number, counts in enumerate(datasets):
        by_bucket = counts if isinstance(counts, dict) else {"": counts}
        arrays = {name: np.asarray(rows, np.int64) for name, rows in by_bucket.items()}
        members.append(Member(f"d{number}", f"{number:064x}", 0, arrays))
    options = {"seed": 5, "mode": "shards", "streams": 2, "window_shards": 2, "ending": "roll"}
    return Law(members=tuple(members), **(options | changes))


def rows_of(law, slots):
    """Give (dataset, bucket, row, epoch) of each sample of a step."""
    out = {}
    for member in np.unique(slots.members).tolist():
        mine = np.flatnonzero(slots.members == member)
        rows, epochs = law.orders[member][slots.bucket].at(slots.positions[mine])
        for number, row, epoch in zip(mine.tolist(), rows.tolist(), epochs.tolist(), strict=True):
            out[number] = (member, slots.bucket, row, epoch)
    return [out[number] for number in range(len(slots.members))]


def run(law, state, batches, *, world=1):
    """Give the samples of steps of these sizes, put together from ranks, and the state behind."""
    steps = []
    for images in batches:
        slots = step_slots(law, state, images)
        parts = [rank_slots(law, slots, rank=rank, world=world) for rank in range(world)]
        assert {len(part.positions) for part in parts} == {images // world}
        steps.append([sample for part in parts for sample in rows_of(law, part)])
        state = advance(law, state, images)
    return steps, state


@contextmanager
def latents(dataset, **options):
    """Open the latents of a dataset's only encoding; options are those of a layout and readers."""
    with _samples(dataset, list_encodings(dataset)[0], **options) as samples:
        yield LatentSource(samples)


@contextmanager
def pictures(dataset, *, side_px, **options):
    """Open the pictures of a dataset."""
    with _samples(dataset, None, **options) as samples:
        yield PictureSource(samples, side_px=side_px)


@contextmanager
def captioned(dataset, *, side_px, **options):
    """Open the pictures and captions of a dataset."""
    with _samples(dataset, None, **options) as samples:
        yield CaptionedSource(samples, side_px=side_px)


def size(source):
    """Samples of an epoch."""
    return sum(sum(sizes.values()) for sizes in source.samples.law.sizes)


def load(source, positions, *, epoch=0):
    """Load positions of an epoch of the only bucket of the only dataset."""
    (bucket,), positions = source.samples.law.buckets, np.asarray(positions)
    slots = Slots(bucket, np.zeros_like(positions), positions + epoch * size(source))
    return source.load(slots)


def ids(batch):
    """Give the sample ids of a batch as keys' numbers."""
    return batch.ids_B.numpy().view(np.uint64).tolist()


@contextmanager
def _samples(dataset, encoding, *, cache=None, log=None, max_bad_frac=0.0, version=None, **layout):
    found = Dataset(dataset, load_manifest(dataset), encoding)
    law = make_law(
        [found],
        Layout(**{"seed": 3} | layout),
        removal_versions=None if version is None else [version],
    )
    readers = open_readers([found], law, cache=cache)
    samples = Samples(law, readers, Quarantine(log, max_bad_frac=max_bad_frac))
    with closing(samples):
        yield samples
