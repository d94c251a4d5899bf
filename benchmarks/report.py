"""How long does the report of a long run take, from rows to a page?"""

import json
import math
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.harness import Case, claim_at_most, measure, write_result
from trainer.config_tools import ReportConfig
from trainer.report import write_report

NUM_ROWS = 1_000_000
ROWS_PER_ATTEMPT = 170_000
"""Rows between the stops of the run."""
STEPS_BACK = 500
_START_UNIX_S = 1_800_000_000.0


def write_long_run(run: Path, num_rows: int) -> None:
    """Write a run with metrics as `kiln train` writes them, about 370 bytes a row."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}\n", encoding="utf-8")
    step, attempt = 0, 0
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            if number and number % ROWS_PER_ATTEMPT == 0:
                step, attempt = step - STEPS_BACK, attempt + 1
            step += 1
            file.write(json.dumps(_row(step, attempt, number)) + "\n")
    with (run / "ledger.jsonl").open("w", encoding="utf-8") as file:
        for number in range(0, num_rows, 1000):
            file.write(json.dumps(_ledger_row(number)) + "\n")


def _row(step: int, attempt: int, number: int) -> dict[str, float]:
    wave = math.sin(number / 900)
    return {
        "step": step,
        "images_seen": 256 * step,
        "time_unix_s": _START_UNIX_S + number,
        "attempt": attempt,
        "train/loss": 0.4 + math.exp(-step / 90_000) + 0.01 * wave,
        "train/grad_norm": 1.5 + wave / 3,
        "train/lr": 1e-4,
        "speed/images_per_s": 255.1 + wave,
        "speed/tflops_per_rank": 61.2 + wave,
        "speed/mfu_frac": 0.41 + wave / 90,
        "speed/data_wait_frac": 0.02 + wave / 90,
        "speed/slowest_rank_ratio": 1.03,
        "time/data_wait_s": 0.02 + wave / 90,
        "energy/w": 611.7 + wave,
        "energy/j_per_image": 2.4 + wave / 9,
    }


def _ledger_row(number: int) -> dict[str, object]:
    return {
        "attempt": number // ROWS_PER_ATTEMPT,
        "rank": 0,
        "stage": "train",
        "bucket": "productive",
        "start_unix_s": _START_UNIX_S + number,
        "seconds": 1000.0,
        "joules": 611_700.0,
        "provenance": "counter",
        "step": number + 1000,
        "first_step": number,
        "last_step": number + 1000,
    }


def page_s(run: Path) -> float:
    """Write the page; return how long that took."""
    started_s = time.perf_counter()
    assert write_report(ReportConfig(run=str(run), dataset=None, output=None)) == 0
    return time.perf_counter() - started_s


def main() -> None:
    """Measure and write the result."""
    folder = Path(tempfile.mkdtemp())
    try:
        run = folder / "long"
        write_long_run(run, NUM_ROWS)
        size_mb = (run / "metrics.jsonl").stat().st_size / 1e6
        case = f"{NUM_ROWS:,} rows of metrics, {size_mb:.0f} MB"
        packages = ("pyarrow", "numpy")
        named = partial(Case, case=case, system="kiln report", unit="s", packages=packages)
        rows = measure([named(metric="page", run=partial(page_s, run))], repetitions=3)
    finally:
        shutil.rmtree(folder)
    text = "The report of a run with a million rows of metrics takes less than 10 s"
    claims = [claim_at_most(text, measured=rows[0].max, target=10.0)]
    write_result("report", question=str(__doc__), rows=rows, claims=claims)


if __name__ == "__main__":
    main()
