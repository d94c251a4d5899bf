"""How long does it take to find all near-duplicate pictures by their perceptual hashes?"""

import json
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.harness import Case, claim_at_least, claim_at_most, measure, seconds, write_result
from data_prep.near import find_pairs
from data_prep.rows import connect

SIZES = (100_000, 200_000, 1_000_000)
# The peer's time grows with the square: a million would take it a quarter of an hour.
PEER_SIZES = SIZES[:2]
SHARD_ROWS = 10_000
MAX_DISTANCE = 4
COPIED_FRAC = 0.3
THREADS = 2
_CLUSTERS = """
import json, pathlib, sys, time
from data_prep.config_curate import DedupConfig
from data_prep.dedup import Dataset, find_clusters
from data_prep.rows import connect
from trainer.data.manifest import Manifest, ShardEntry
from trainer.frozen import compose
folder = pathlib.Path(sys.argv[1])
shards = tuple(
    ShardEntry(name=f"shards/{path.stem}.tar", bytes=0, sha256="", count=int(sys.argv[2]),
               index_bytes=0, index_sha256="")
    for path in sorted(folder.glob("index/*.parquet"))
)
rows = len(shards) * int(sys.argv[2])
manifest = Manifest(shards=shards, rows_in=rows, rows_kept=rows, rejected={})
cfg = compose(DedupConfig, "dedup", [f"dataset={folder}", f"max_distance={sys.argv[3]}"])
started_s = time.perf_counter()
with connect(folder / "spill", memory_gb=0.5, threads=int(sys.argv[4])) as connection:
    find_clusters(connection, cfg, [Dataset(folder, manifest)])
status = pathlib.Path("/proc/self/status").read_text()
peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps([time.perf_counter() - started_s, peak_mib]))
"""


@cache
def hashes(num: int) -> NDArray[np.uint64]:
    """Draw hashes of which some are copies of others with up to three bits flipped."""
    dice = np.random.default_rng(0)
    num_copies = round(COPIED_FRAC * num)
    own = dice.integers(0, 2**64, num - num_copies, dtype=np.uint64)
    copies = dice.choice(own, num_copies)
    for _ in range(3):
        bits = np.uint64(1) << dice.integers(0, 64, num_copies).astype(np.uint64)
        copies = np.where(dice.random(num_copies) < 0.6, copies ^ bits, copies)
    return dice.permutation(np.concatenate([own, copies]))


@cache
def indexes(folder: Path, num: int) -> Path:
    """Write the indexes of a dataset with these hashes; give its folder."""
    dataset = folder / str(num)
    (dataset / "index").mkdir(parents=True)
    for number, first in enumerate(range(0, num, SHARD_ROWS)):
        some = hashes(num)[first : first + SHARD_ROWS]
        rows = np.arange(first, first + len(some))
        table = {
            "key": [f"{row:016x}" for row in rows],
            "width": np.full(len(some), 256),
            "height": np.full(len(some), 256),
            "caption_chars": rows % 90,
            # Equal hashes are of equal files here.
            "image_sha256": [f"{phash:064x}" for phash in some.tolist()],
            "phash": some,
        }
        pq.write_table(pa.table(table), dataset / "index" / f"{number:05d}.parquet")
    return dataset


def kiln(folder: Path, num: int) -> int:
    """Find all pairs with DuckDB; give their number."""
    with connect(folder / "spill", memory_gb=0.5, threads=THREADS) as connection:
        return _kiln(connection, num)


def _kiln(connection: duckdb.DuckDBPyConnection, num: int) -> int:
    connection.register("given", pa.table({"phash": np.unique(hashes(num))}))
    connection.execute("CREATE TEMP TABLE hashes AS SELECT phash, true AS own FROM given")
    find_pairs(connection, MAX_DISTANCE)
    return int(connection.execute("SELECT count(*) FROM pairs").fetchall()[0][0])


def faiss_multi_hash(num: int) -> int:
    """Find the same pairs with faiss: five tables of 12 bits each, so that one always agrees."""
    faiss.omp_set_num_threads(THREADS)
    codes = np.unique(hashes(num)).view(np.uint8).reshape(-1, 8)
    index = faiss.IndexBinaryMultiHash(64, MAX_DISTANCE + 1, 12)
    index.add(codes)
    limits, _, _ = index.range_search(codes, MAX_DISTANCE + 1)
    return (int(limits[-1]) - len(codes)) // 2  # each pair twice, and each hash with itself


def clusters(folder: Path, num: int, *, value: int) -> float:
    """Go from indexes to clusters in a process of its own; give its seconds (0) or peak MiB (1)."""
    words = [str(indexes(folder, num)), str(SHARD_ROWS), str(MAX_DISTANCE), str(THREADS)]
    done = subprocess.run(
        [sys.executable, "-c", _CLUSTERS, *words], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout)[value])


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert kiln(folder, SIZES[0]) == faiss_multi_hash(SIZES[0]), "the peer finds other pairs"
        cases = []
        for size in SIZES:
            indexes(folder, size)
            case = partial(Case, case=f"{size:,} images")
            for system, package, run in (
                ("kiln", "duckdb", partial(kiln, folder, size)),
                ("faiss IndexBinaryMultiHash", "faiss-cpu", partial(faiss_multi_hash, size)),
            ):
                named = partial(case, system=system, packages=(package,))
                if system == "kiln" or size in PEER_SIZES:
                    cases.append(
                        named(metric="all pairs within 4 bits", unit="s", run=seconds(run))
                    )
            for value, metric, unit in (
                (0, "from indexes to clusters", "s"),
                (1, "from indexes to clusters, peak memory", "MiB"),
            ):
                run_one = partial(clusters, folder, size, value=value)
                cases.append(case(system="kiln", metric=metric, unit=unit, run=run_one))
        rows = measure(cases, repetitions=3, warmups=0)
    median = {(row.case, row.system, row.metric): row.median for row in rows}
    most, least = f"{SIZES[-1]:,} images", f"{SIZES[0]:,} images"
    peer = f"{PEER_SIZES[-1]:,} images"
    pairs, whole = "all pairs within 4 bits", "from indexes to clusters"
    write_result(
        "near",
        question=str(__doc__),
        rows=rows,
        claims=[
            claim_at_most(
                "A million perceptual hashes are looked up in less than a minute: seconds from "
                "indexes to clusters",
                measured=median[most, "kiln", whole],
                target=60.0,
            ),
            claim_at_least(
                f"no slower than faiss's exact multi-hash index at {peer}: its time by ours",
                measured=median[peer, "faiss IndexBinaryMultiHash", pairs]
                / median[peer, "kiln", pairs],
                target=1.0,
            ),
            claim_at_most(
                "The time grows less than by the square: ten times the images take",
                measured=median[most, "kiln", whole] / median[least, "kiln", whole],
                target=20.0,
            ),
        ],
    )


if __name__ == "__main__":
    main()
