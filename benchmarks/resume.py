"""How long does it take to know the next batch, at the start and in the middle of an epoch of N?"""

import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import count

import numpy as np
from webdataset.filters import detshuffle

from benchmarks.harness import Case, claim_at_least, claim_at_most, measure, write_result
from benchmarks.harness import seconds as timed
from trainer.data.stream import Law, Member, Slots, from_json, rank_slots, step_slots, to_json
from trainer.data.stream import begin as begin_stream

BATCH = 2048
SHARD_ROWS = 10_000
SIZES = (10_000, 1_000_000, 10_000_000)
LAION_5B = 5_526_641_167
SKIP_LIMIT = 1_000_000
"""Beyond this many samples a pipeline that must read and drop takes minutes; not measured."""


seeds = count()


def law(num_samples: int) -> Law:
    """Make the law of a dataset of shards of about 10,000 samples, with a seed never used before.

    Under a seed that was used the permutation of the shards might still be in memory.
    """
    num_shards = -(-num_samples // SHARD_ROWS)
    counts = np.full(num_shards, num_samples // num_shards)
    counts[: num_samples % num_shards] += 1
    member = Member("synthetic", "0" * 64, 0, {"": counts})
    return Law(next(seeds), (member,), "shards", min(64, num_shards), 4, "roll")


def batch_rows(law: Law, slots: Slots) -> None:
    """Find the rows of one rank of eight."""
    mine = rank_slots(law, slots, rank=3, world=8)
    law.orders[0][mine.bucket].at(mine.positions)


def kiln_start(num_samples: int) -> None:
    """Begin a run: from the counts of the shards to the rows of a rank's first batch."""
    whole = law(num_samples)
    batch_rows(whole, step_slots(whole, begin_stream(whole, [1.0]), BATCH))


def kiln(num_samples: int) -> None:
    """Resume in mid-epoch: the same, from a saved state."""
    whole = law(num_samples)
    saved = to_json(whole, begin_stream(whole, [1.0]))
    saved |= {"samples": num_samples // 2, "tallies": [[num_samples // 2, 0]]}
    batch_rows(whole, step_slots(whole, from_json(whole, saved), BATCH))


def permutation(num_samples: int) -> None:
    """Permute all indices in memory and cut the batch out: map-style datasets and samplers."""
    order = np.random.default_rng(0).permutation(num_samples)
    order[num_samples // 2 : num_samples // 2 + BATCH].copy()


def webdataset_skip(num_samples: int) -> None:
    """Run webdataset's deterministic shuffle and drop what was seen, without reading any data."""
    random.seed(0)
    shuffled = detshuffle(bufsize=1000, seed=0).run(iter(range(num_samples)))
    for number, _ in enumerate(shuffled):
        if number == min(num_samples // 2 + BATCH, num_samples) - 1:
            return


def peak_mib(action: Callable[[], None]) -> float:
    """Peak memory that Python and numpy allocate during an action, in MiB."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def main() -> None:
    """Measure and write the result."""
    systems = {
        "kiln": (kiln, (*SIZES, LAION_5B), ("numpy",)),
        "kiln, from the start": (kiln_start, (*SIZES, LAION_5B), ("numpy",)),
        "permutation in memory": (permutation, SIZES, ("numpy",)),
        "webdataset detshuffle, skipping": (webdataset_skip, (10_000, SKIP_LIMIT), ("webdataset",)),
    }
    cases = []
    for size in (*SIZES, LAION_5B):
        for name, (function, sizes, packages) in systems.items():
            if size in sizes:
                case = partial(Case, case=f"N = {size:,}", system=name, packages=packages)
                action = partial(function, size)
                cases.append(case(metric="time", unit="s", run=timed(action)))
                if name.startswith(("kiln", "perm")):
                    memory = partial(peak_mib, action)
                    cases.append(case(metric="peak memory", unit="MiB", run=memory))
    rows = measure(cases, repetitions=5)
    value = {(row.case, row.system, row.metric): row.median for row in rows}
    big, small = f"N = {LAION_5B:,}", f"N = {SIZES[0]:,}"
    ten_million = f"N = {SIZES[-1]:,}"
    million = f"N = {SKIP_LIMIT:,}"
    skip = value[million, "webdataset detshuffle, skipping", "time"]
    write_result(
        "resume",
        question=str(__doc__),
        rows=rows,
        claims=[
            claim_at_most(
                "Kiln resumes in the middle of 5.5 billion samples within 1 s",
                measured=value[big, "kiln", "time"],
                target=1.0,
            ),
            claim_at_most(
                "and starts as quickly",
                measured=value[big, "kiln, from the start", "time"],
                target=1.0,
            ),
            claim_at_most(
                "in less than 100 MB",
                measured=value[big, "kiln", "peak memory"] * 2**20 / 1e6,
                target=100.0,
            ),
            claim_at_most(
                "At a million samples it needs no more memory than at ten thousand, but for 1 MiB",
                measured=value[million, "kiln", "peak memory"]
                - value[small, "kiln", "peak memory"],
                target=1.0,
            ),
            claim_at_least(
                "At ten million samples a permutation in memory takes at least 10x the time",
                measured=value[ten_million, "permutation in memory", "time"]
                / value[ten_million, "kiln", "time"],
                target=10.0,
            ),
            claim_at_least(
                "At a million samples skipping through webdataset's shuffle takes 100x the time",
                measured=skip / value[million, "kiln", "time"],
                target=100.0,
            ),
        ],
    )


if __name__ == "__main__":
    main()
