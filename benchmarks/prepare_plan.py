"""How fast are rows of metadata judged by a policy and planned, and in how much memory?"""

import json
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Case, claim_at_least, claim_at_most, measure, seconds, write_result
from data_prep.config import PrepareConfig
from data_prep.policy import broken_rule_sql, load_lists, make_rules, plain_policy
from data_prep.rows import connect, open_source, rows_sql, source_files
from trainer.frozen import compose

SIZES = (10_000, 100_000, 1_000_000)
RULES = {
    "min_side_px": 256,
    "max_aspect_ratio": 3,
    "min_caption_chars": 5,
    "min_similarity": 0.28,
    "max_punsafe": 0.5,
    "max_pwatermark": 0.8,
    "denied_top_level_domains": ["test"],
}
_PLAN = """
import json, pathlib, sys, time
from data_prep.config import PrepareConfig
from data_prep.plan import make_plan
from data_prep.policy import plain_policy
from trainer.frozen import compose
cfg = compose(PrepareConfig, "prepare", json.loads(sys.argv[1]))
started_s = time.perf_counter()
make_plan(cfg, plain_policy(safety="not_laion"), cfg.scratch_folder)
status = pathlib.Path("/proc/self/status").read_text()
peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps([time.perf_counter() - started_s, peak_mib]))
"""


@cache
def source(folder: Path, num_rows: int) -> Path:
    """Write rows as wide as LAION's; give the parquet."""
    dice = np.random.default_rng(0)
    numbers = np.arange(num_rows)
    table = pa.table(
        {
            "URL": [f"https://host{i % 997}.example.com/a/path/{i}/image.jpg" for i in numbers],
            "TEXT": [f"the caption of picture {i}, with a few more words" for i in numbers],
            "WIDTH": dice.integers(64, 2048, num_rows),
            "HEIGHT": dice.integers(64, 2048, num_rows),
            "similarity": dice.uniform(0.2, 0.4, num_rows),
            "punsafe": dice.uniform(0, 1, num_rows),
            "pwatermark": dice.uniform(0, 1, num_rows),
        }
    )
    path = folder / f"{num_rows}.parquet"
    pq.write_table(table, path, row_group_size=100_000)
    return path


def judge(folder: Path, num_rows: int) -> None:
    """Count the rows for every reason, on one core."""
    path = str(source(folder, num_rows))
    cfg = compose(PrepareConfig, "prepare", [f"rows={path}", f"dataset={folder}"])
    policy = plain_policy(**RULES)
    with connect(folder / "spill", memory_gb=1, threads=1) as connection:
        found = open_source(connection, source_files(path), cfg.columns)
        load_lists(connection, policy)
        query = rows_sql(cfg.columns, found, broken_rule_sql(make_rules(policy, found)))
        connection.execute(f"SELECT reason, count(*) FROM ({query}) GROUP BY reason").fetchall()


def judge_with_pandas(folder: Path, num_rows: int) -> None:
    """Judge by the same rules with masks over a data frame, as DataComp's baselines do."""
    rows = pd.read_parquet(source(folder, num_rows))
    sides = rows[["WIDTH", "HEIGHT"]]
    host = rows["URL"].str.extract(r"^https?://([^/:?#]+)", expand=False)
    good = (sides.min(axis=1) >= 256) & (sides.max(axis=1) <= 3 * sides.min(axis=1))
    good &= rows["TEXT"].str.len() >= 5
    good &= (rows["similarity"] >= 0.28) & (rows["punsafe"] <= 0.5) & (rows["pwatermark"] <= 0.8)
    good &= ~host.str.endswith(".test")
    good.value_counts()


def plan(folder: Path, num_rows: int, *, value: int) -> float:
    """Plan all rows in a process of their own; give its seconds (0) or its peak MiB (1)."""
    with tempfile.TemporaryDirectory(dir=folder) as dataset:
        words = [f"rows={source(folder, num_rows)}", f"dataset={dataset}", "processes=1"]
        words.append("plan_memory_gb=0.25")
        done = subprocess.run(
            [sys.executable, "-c", _PLAN, json.dumps(words)],
            check=True,
            capture_output=True,
            text=True,
        )
    return float(json.loads(done.stdout)[value])


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = []
        for size in SIZES:
            case = partial(Case, case=f"{size:,} rows")
            for system, how in (("kiln", judge), ("pandas", judge_with_pandas)):
                source(folder, size)
                run = seconds(partial(how, folder, size))
                package = "duckdb" if system == "kiln" else "pandas"
                named = partial(case, system=system, packages=(package,))
                cases.append(named(metric="judging, one core", unit="s", run=run))
            for value, metric, unit in ((0, "planning", "s"), (1, "planning, peak memory", "MiB")):
                run = partial(plan, folder, size, value=value)
                cases.append(case(system="kiln", metric=metric, unit=unit, run=run))
        rows = measure(cases, repetitions=3)
    median = {(row.case, row.system, row.metric): row.median for row in rows}
    most, hundred = f"{SIZES[-1]:,} rows", f"{SIZES[-2]:,} rows"
    judged_s = median[most, "kiln", "judging, one core"]
    write_result(
        "prepare_plan",
        question=str(__doc__),
        rows=rows,
        claims=[
            claim_at_least(
                "A core judges a million rows of metadata a second",
                measured=SIZES[-1] / judged_s,
                target=1e6,
            ),
            claim_at_least(
                "no slower than masks over a pandas data frame",
                measured=median[most, "pandas", "judging, one core"] / judged_s,
                target=1.0,
            ),
            claim_at_most(
                "Planning grows no faster than the rows: ten times the rows take",
                measured=median[most, "kiln", "planning"] / median[hundred, "kiln", "planning"],
                target=12.0,
            ),
        ],
    )


if __name__ == "__main__":
    main()
