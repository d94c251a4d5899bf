"""Make a run directory and a dataset folder as the commands leave them, with known numbers."""

import json
import math
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

from trainer.data.manifest import Manifest, ShardEntry, save_manifest
from trainer.observe.ledger import Clock, Ledger

STEPS = 200
IMAGES_PER_STEP = 64
CAPTIONS = [
    f"a {size} {color} {shape} on a {ground} background"
    for size, color, shape, ground in [
        ("small", "red", "circle", "yellow"),
        ("large", "blue", "square", "white"),
        ("small", "green", "triangle", "black"),
        ("large", "orange", "star", "purple"),
        ("small", "black", "cross", "pink"),
        ("large", "purple", "ring", "<grey & white>"),
    ]
]


class Model:
    """Ten watts by the clock, known from a model."""

    provenance = "tdp_model"
    device = None

    def __init__(self, clock):
        self._clock = clock

    def read_j(self):
        return 10.0 * self._clock()


class Now:
    def __init__(self):
        self.at_s = 1_800_000_000.0

    def __call__(self):
        return self.at_s


def write_dataset(folder: Path, now: Now) -> None:
    """A manifest of 5,000 rows with rejects, and the ledger of its making."""
    folder.mkdir(parents=True)
    sizes = {"bytes": 3_100_000, "sha256": "ab" * 32, "index_bytes": 9, "index_sha256": "cd" * 32}
    shards = tuple(
        ShardEntry(name=f"shards/{number:05d}.tar", count=1170, **sizes) for number in range(4)
    )
    rejected = {"http_404": 150, "not_an_image": 61, "duplicate": 58, "too_small": 34,
                "opt_out": 17}  # fmt: skip
    provenance = {"source_sha256": "12" * 32, "rules": {"min_side_px": 64}, "img2dataset": "1.47.0"}
    save_manifest(
        folder,
        Manifest(shards=shards, rows_in=5000, rows_kept=4680, rejected=rejected,
                 provenance=provenance),
    )  # fmt: skip
    for stage, seconds in (("prepare", 75), ("encode", 48)):
        with open_ledger(folder, now, stage=stage) as ledger:
            now.at_s += 2.5
            ledger.switch("productive")
            now.at_s += seconds


def open_ledger(folder: Path, now: Now, *, stage: str) -> Ledger:
    return Ledger(
        folder / "ledger.jsonl",
        stage=stage,
        meters=(Model(now),),
        clock=Clock(now, now, flush_every_s=1e9),
    )


def write_config(run: Path, dataset: Path) -> None:
    run.mkdir(parents=True)
    config = {
        "run": str(run),
        "data": {"dataset": str(dataset)},
        "model": {"kind": "transformer", "num_parameters": 2_300_000},
        "note": "</pre><script>alert(1)</script>",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def write_training(run: Path, now: Now) -> None:
    """Two attempts; the second goes back from step 120 to 100."""
    with (run / "metrics.jsonl").open("w") as metrics:
        for attempt, (first, last) in enumerate([(0, 120), (100, STEPS)]):
            with open_ledger(run, now, stage="train") as ledger:
                now.at_s += 6
                ledger.resume_at(first)
                ledger.switch("productive")
                for step in range(first + 1, last + 1):
                    with ledger.span("data_stall"):
                        now.at_s += 0.04
                    now.at_s += 0.9
                    if step % 50 == 0:
                        with ledger.span("checkpoint_stall"):
                            now.at_s += 1.5
                    ledger.reach(step)
                    metrics.write(json.dumps(metrics_row(step, attempt, now.at_s)) + "\n")
                ledger.switch("drain")
                now.at_s += 0.8
    (run / "plan.json").write_text(json.dumps({"total_steps": STEPS}))


def metrics_row(step: int, attempt: int, time_unix_s: float) -> dict:
    return {
        "step": step,
        "images_seen": step * IMAGES_PER_STEP,
        "time_unix_s": time_unix_s,
        "attempt": attempt,
        "train/loss": 0.15 + math.exp(-step / 30) + 0.05 * math.sin(37.0 * step),
        "train/lr": 1e-3 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
        "speed/images_per_s": 68 + 3 * math.sin(step / 9),
    }


def write_results(run: Path) -> None:
    """Scores, samples (one of them wrong) and reconstructions."""
    scores = {
        "shape_and_color_frac": {"value": 0.91, "chance": 0.03},
        "relation_frac": {"value": 0.74, "chance": None},
    }
    (run / "evaluation.json").write_text(
        json.dumps({"scores": scores, "step": STEPS, "num_samples": 256, "guidance": 4.0})
    )
    folder = run / "samples"
    folder.mkdir()
    index = {"samples": [], "reconstructions": []}
    for idx, caption in enumerate(CAPTIONS):
        files = [f"{kind}_{idx}.png" for kind in ("sample", "real", "coded")]
        for shift, file in enumerate(files):
            paint(idx, shift).save(folder / file)
        ok = None if idx == 5 else idx != 3
        index["samples"].append({"caption": caption, "picture": files[0], "ok": ok})
        pair = {"caption": caption, "real": files[1], "reconstructed": files[2]}
        index["reconstructions"].append(pair)
    (folder / "index.json").write_text(json.dumps(index))


def paint(idx: int, shift: int) -> Image.Image:
    colors = ["red", "blue", "green", "orange", "black", "purple"]
    grounds = ["yellow", "white", "black", "purple", "pink", "grey"]
    image = Image.new("RGB", (64, 64), grounds[idx])
    box = (10 + 4 * shift, 12, 42 + 4 * shift, 44)
    ImageDraw.Draw(image).ellipse(box, fill=colors[idx])
    return image


def write_run(root: Path) -> Path:
    """Make a whole run under `root`; return its directory."""
    now = Now()
    write_dataset(root / "dataset", now)
    run = root / "scenes"
    write_config(run, root / "dataset")
    write_training(run, now)
    write_results(run)
    return run
