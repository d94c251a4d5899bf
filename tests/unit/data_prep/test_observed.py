"""What a data command does is in the ledger, in metrics.jsonl and in W&B's own files."""

import json
import time

from data_prep.observed import RateLog
from data_prep.prepare import run
from tests.tiny_source import FAULTY, prepare_cfg
from trainer.data.manifest import load_manifest
from trainer.observe.accounts import close_check, totals
from trainer.observe.jsonl import read_rows
from trainer.observe.ledger import Bucket, accounted, read_account
from trainer.observe.sinks import Sinks


def test_rates_and_reasons_go_to_metrics_and_to_wandb(served, tmp_path):
    cfg = prepare_cfg(served, tmp_path / "dataset", "wandb=offline")
    assert run(cfg) == 0
    folder = tmp_path / "dataset" / "observe" / "prepare"
    last = read_rows(folder / "metrics.jsonl")[-1]
    manifest = load_manifest(tmp_path / "dataset")
    assert last["images_seen"] == manifest.rows_kept
    assert last["rejected/truncated"] == FAULTY["truncated"][0] + FAULTY["cut"][0]
    in_shards = {f"rejected/{name}": n for name, n in manifest.rejected.items()}
    planned = {"rejected/duplicate"}  # by the plan, before the download
    assert {key for key in last if key.startswith("rejected/")} == set(in_shards) - planned
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    rows = read_account(tmp_path / "dataset")
    for stage in ("plan", "prepare"):
        for kind in ("seconds", "joules"):
            written = sum(row[kind] for row in rows if row["stage"] == stage)
            # All but what W&B takes to end.
            assert 0 < last[f"{kind}/{stage}"] <= written
            assert stage == "prepare" or last[f"{kind}/{stage}"] == written


def test_the_rate_leaves_out_the_start_of_the_workers(tmp_path):
    with (
        accounted(tmp_path, stage="prepare", tdp_w_per_core=1.0) as ledger,
        Sinks.open(
            tmp_path, attempt=0, total_steps=0, config={}, wandb="off", progress="quiet"
        ) as sinks,
    ):
        rates = RateLog(sinks, ledger)
        for _ in range(5):
            time.sleep(0.1)
            rates.update(0, 0)
        time.sleep(0.1)
        rates.update(10, 5)
        rates.finish({})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert 40 < row["rows_per_s"] <= 100
    assert row["kept_frac"] == 0.5


def test_parts_account_for_themselves_and_the_sum_closes(served, tmp_path):
    dataset = tmp_path / "dataset"
    for part in range(2):
        assert run(prepare_cfg(served, dataset, "parts=2", f"part={part}")) == 0
    rows = read_account(dataset)
    assert {(row["stage"], row["rank"]) for row in rows} == {
        ("plan", 0),
        ("prepare", 0),
        ("prepare", 1),
    }
    assert totals(rows)["prepare", Bucket.PRODUCTIVE].seconds > 0
    assert all(closure.holds() for closure in close_check(rows))
    done = [
        read_rows(dataset / "observe" / f"prepare-{part:04d}" / "metrics.jsonl")[-1]["images_seen"]
        for part in range(2)
    ]
    assert sum(done) == json.loads((dataset / "manifest.json").read_text())["rows_kept"]
