"""What share of a training step of the demo is spent waiting for data?"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import Case, claim_at_most, measure, write_result
from benchmarks.stream_data import npy
from trainer.config import TrainConfig
from trainer.data.manifest import (
    Encoding,
    Manifest,
    encoding_folder,
    publish_shard,
    save_encoding,
    save_manifest,
)
from trainer.data.shards import Sample
from trainer.frozen import compose
from trainer.models.fingerprint import identify
from trainer.observe.jsonl import read_rows

SHARDS, SHARD_ROWS = 8, 750
IMAGES = 1600


def publish(dataset: Path) -> None:
    """Publish noise of the shapes of the demo's latents and text states."""
    cfg = compose(TrainConfig, "train", [f"data.dataset={dataset}"])
    model, dice = cfg.model, np.random.default_rng(0)
    assert model.kind == "unet"
    side, width = model.latent_side, model.text_width
    fingerprint = identify(cfg.encoders).fingerprint
    folder = encoding_folder(dataset, fingerprint)

    def samples(shard: int, *, encoded: bool) -> list[Sample]:
        keys = [f"{shard * SHARD_ROWS + row:016x}" for row in range(SHARD_ROWS)]
        if not encoded:
            return [Sample(key, {"txt": b"a caption"}) for key in keys]
        moments = dice.normal(size=(SHARD_ROWS, 2, model.latent_channels, side, side))
        texts = [dice.normal(size=(int(dice.integers(8, 20)), width)) for _ in keys]
        return [
            Sample(key, {"latent.npy": npy(latent), "text.npy": npy(text)})
            for key, latent, text in zip(keys, moments, texts, strict=True)
        ]

    names = [f"{shard:05d}.tar" for shard in range(SHARDS)]
    shards = [
        publish_shard(dataset, f"shards/{name}", samples(shard, encoded=False))
        for shard, name in enumerate(names)
    ]
    sidecars = [
        publish_shard(folder, name, samples(shard, encoded=True))
        for shard, name in enumerate(names)
    ]
    rows = SHARDS * SHARD_ROWS
    manifest = Manifest(
        shards=tuple(one for one in shards if one), rows_in=rows, rows_kept=rows, rejected={}
    )
    save_manifest(dataset, manifest)
    channels = model.latent_channels
    facts = {
        "latent_shape": [channels, side, side],
        "latent_mean": [0.0] * channels,
        "latent_std": [1.0] * channels,
        "text_width": width,
    }
    (folder / "null_text.npy").write_bytes(npy(dice.normal(size=(2, width))))
    save_encoding(
        dataset,
        Encoding(
            fingerprint=fingerprint,
            dataset_fingerprint=manifest.shards_fingerprint,
            shards=tuple(one for one in sidecars if one),
            bucket_counts={"64x64": [SHARD_ROWS] * SHARDS},
            facts=facts,
        ),
    )


def wait(dataset: Path) -> tuple[float, float]:
    """Train as the demo does.

    Returns:
        The share of the steps' time that went into waiting for data, from the second step on, and
        the seconds that the first step waited.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [f"data.dataset={dataset}", f"run={run}", f"total_images={IMAGES}"]
        quiet = ["logging.wandb=off", "logging.quiet=true", "logging.every_steps=1"]
        command = [sys.executable, "-m", "trainer.cli", "train", *words, *quiet]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        first, *others = read_rows(run / "metrics.jsonl")
    waited_s = sum(row["time/data_wait_s"] for row in others)
    return waited_s / (others[-1]["time_unix_s"] - first["time_unix_s"]), first["time/data_wait_s"]


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "dataset"
        publish(dataset)
        starts: list[float] = []

        def later_steps() -> float:
            frac, first_s = wait(dataset)
            starts.append(first_s)
            return frac

        case = partial(
            Case,
            case=f"the demo's network on 2 ranks, {IMAGES:,} images",
            system="kiln",
            packages=("torch", "deepspeed"),
        )
        rows = measure(
            [
                case(metric="share of a step spent waiting", unit="frac", run=later_steps),
                case(metric="wait of the first step", unit="s", run=starts.pop),
            ],
            repetitions=3,
            warmups=1,
        )
    write_result(
        "data_wait",
        question=str(__doc__),
        rows=rows,
        claims=[
            claim_at_most(
                "A training step of the demo waits for data less than 1 % of its time",
                measured=rows[0].median,
                target=0.01,
            )
        ],
    )


if __name__ == "__main__":
    main()
