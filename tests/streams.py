"""Laws of streams over datasets that are nothing but counts."""

import numpy as np

from trainer.data.stream import Law, Member, advance, rank_slots, step_slots


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
    out = []
    for member, position in zip(slots.members.tolist(), slots.positions.tolist(), strict=True):
        row, epoch = law.orders[member][slots.bucket].at(np.array([position]))
        out.append((member, slots.bucket, int(row[0]), int(epoch[0])))
    return out


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
