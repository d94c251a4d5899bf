"""What does a step of Kiln cost beside those of others, what does it hold, when does it begin?"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from diffusers import AutoencoderKL
from rich.progress import track

from benchmarks import data_wait
from benchmarks.harness import Claim, Row, claim_at_least, claim_at_most, row_of, write_result
from benchmarks.train_memory import memory
from benchmarks.train_start import start
from data_prep import encode
from data_prep.config import EncodeConfig
from data_prep.scenes import caption, draw_scene, paint
from trainer.data.manifest import Manifest, publish_shard, save_manifest
from trainer.data.shards import Sample
from trainer.frozen import compose
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.local import ALLOCATOR_ENV, run_ranks

IMAGES = 32
STEPS = 24
REPETITIONS = 5
PICTURES = 256
SIDE_PX = 128


@dataclass(frozen=True)
class Setup:
    """A run of Kiln, and the peers whose steps are taken in turn with its own."""

    case: str
    peers: tuple[str, ...]
    world: int = 1
    words: tuple[str, ...] = ()
    has_pictures: bool = False
    is_tuned: bool = True
    """With the settings of the allocator that `kiln train` gives its ranks."""
    repetitions: int = REPETITIONS


ONE = Setup(
    "one rank, ZeRO 0, latents",
    ("bare PyTorch loop", "plain DeepSpeed, ZeRO 1"),
    1,
    ("engine.zero_stage=0",),
)
ONE_DEFAULT = Setup(
    "one rank, ZeRO 0, latents, allocator as it is",
    ("bare PyTorch loop",),
    1,
    ("engine.zero_stage=0",),
    is_tuned=False,
)
TWO = Setup(
    "two ranks, ZeRO 1, latents",
    ("PyTorch DDP", "plain DeepSpeed, ZeRO 1"),
    2,
    ("engine.zero_stage=1",),
)
DIFFUSERS = ("diffusers' loop, 0 workers", "diffusers' loop, 1 worker")
ONLINE = Setup(
    "one rank, encoding while training",
    DIFFUSERS,
    1,
    ("engine.zero_stage=0", "data.latents=online"),
    has_pictures=True,
    repetitions=2,
)
CACHED = Setup(
    "one rank, encoded before",
    DIFFUSERS,
    1,
    ("engine.zero_stage=0", "data.latents=encoded"),
    has_pictures=True,
    repetitions=2,
)
PEERS = {
    "bare PyTorch loop": "bare",
    "PyTorch DDP": "ddp",
    "plain DeepSpeed, ZeRO 1": "deepspeed",
    DIFFUSERS[0]: "diffusers-0",
    DIFFUSERS[1]: "diffusers-1",
}


def publish_pictures(folder: Path) -> tuple[Path, Path, Path]:
    """Paint pictures with captions: a dataset, the same as files, and an autoencoder for them.

    The autoencoder has Stable Diffusion's shape, 8 pixels per latent row, and few channels, so
    that encoders take about two thirds of a step; its weights are noise.
    """
    files, autoencoder = folder / "files", folder / "autoencoder"
    files.mkdir()
    samples = []
    for number in range(PICTURES):
        scene, picture = draw_scene(number, seed=0), BytesIO()
        paint(scene, 160, 144, jitter_seed=number).save(picture, "JPEG", quality=95)
        name = hashlib.sha256(f"{number}".encode()).hexdigest()[:16]
        members = {"jpg": picture.getvalue(), "txt": caption(scene).encode(), "json": b"{}"}
        samples.append(Sample(name, members))
        for extension in ("jpg", "txt"):
            (files / f"{name}.{extension}").write_bytes(members[extension])
    entry = publish_shard(folder / "pictures", "shards/00000.tar", sorted(samples))
    assert entry is not None
    save_manifest(
        folder / "pictures",
        Manifest(shards=(entry,), rows_in=PICTURES, rows_kept=PICTURES, rejected={}),
    )
    AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(autoencoder)
    return folder / "pictures", files, autoencoder


class Bench:
    """Runs setups, and keeps what they told."""

    def __init__(self, folder: Path) -> None:
        """Publish the datasets."""
        self._folder = folder
        self.latents = folder / "latents"
        data_wait.publish(self.latents)
        self._pictures, self._files, autoencoder = publish_pictures(folder)
        self._encoders = (
            f"encoders.autoencoder.path={autoencoder}",
            f"encoders.image_side_px={SIDE_PX}",
        )
        encode.run(compose(EncodeConfig, "encode", [f"dataset={self._pictures}", *self._encoders]))

    def run(self, setup: Setup) -> dict[str, dict[str, float]]:
        """Train a few steps; return what `benchmarks.train_rank.measure` found."""
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            out = Path(scratch) / "out.json"
            words = [
                f"data.dataset={self._pictures if setup.has_pictures else self.latents}",
                *(self._encoders if setup.has_pictures else ()),
                f"run={scratch}/run",
                f"total_images={STEPS * IMAGES}",
                f"batch.micro_batch_images={IMAGES // setup.world}",
                f"cluster.ranks_per_node={setup.world}",
                "checkpoint.every_images=1000000",
                "logging.wandb=off",
                "logging.quiet=true",
                *setup.words,
            ]
            told = {
                "words": words,
                "peers": [PEERS[name] for name in setup.peers],
                "files": str(self._files) if setup.has_pictures else None,
                "out": str(out),
            }
            run_ranks(
                "benchmarks.train_rank",
                [json.dumps(told)],
                num_ranks=setup.world,
                log_dir=Path(scratch),
                env={"OMP_NUM_THREADS": "1", **(ALLOCATOR_ENV if setup.is_tuned else {})},
            )
            found: dict[str, dict[str, float]] = json.loads(out.read_text(encoding="utf-8"))
        return found


def rows_of(setup: Setup, told: Sequence[dict[str, dict[str, float]]]) -> list[Row]:
    """Turn what runs told into rows: steps, ratios in pairs, shares of a step."""

    def row(system: str, metric: str, unit: str, values: list[float]) -> Row:
        return row_of(
            values,
            case=f"{setup.case}, {IMAGES} images",
            system=system,
            metric=metric,
            unit=unit,
        )

    rows = [row("kiln", "step", "ms", [1000 * one["step_s"]["kiln"] for one in told])]
    for name in setup.peers:
        key = PEERS[name]
        rows.append(row(name, "step", "ms", [1000 * one["step_s"][key] for one in told]))
        ratios = [one["ratio"][key] for one in told]
        rows.append(row(f"kiln / {name}", "steps beside each other", "", ratios))
    collectives = [one["collectives"]["moving average"] for one in told]
    rows.append(row("kiln", "collectives of a moving average", "", collectives))
    for what in told[0]["share"]:
        shares = [100 * one["share"][what] for one in told]
        rows.append(row("kiln", f"{what}, of a step", "%", shares))
    return rows


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Compare with what the issue asks for."""

    def ratio(setup: Setup, peer: str) -> float:
        return next(
            row.median
            for row in rows
            if row.case.startswith(f"{setup.case}, {IMAGES}") and row.system == f"kiln / {peer}"
        )

    def faster(setup: Setup) -> float:
        return min(1 / ratio(setup, peer) for peer in DIFFUSERS)

    return [
        claim_at_most(
            "one rank: a step of Kiln, over one of the bare loop",
            measured=ratio(ONE, "bare PyTorch loop"),
            target=1.05,
        ),
        claim_at_most(
            "two ranks: a step of Kiln with ZeRO 1, over one of DDP",
            measured=ratio(TWO, "PyTorch DDP"),
            target=1.05,
        ),
        claim_at_least(
            "encoding while training: images/s, over the best of diffusers' loop",
            measured=faster(ONLINE),
            target=1.1,
        ),
        claim_at_least(
            "encoded before: images/s, over the best of diffusers' loop",
            measured=faster(CACHED),
            target=2.5,
        ),
        claim_at_most(
            "collectives of a moving average",
            measured=max(row.max for row in rows if row.metric.startswith("collectives")),
            target=0.0,
        ),
        *(
            claim_at_most(f"{row.case}: {row.metric}, %", measured=row.median, target=1.0)
            for row in rows
            if row.metric.endswith("of a step")
            and row.case.startswith((f"{ONE.case}, {IMAGES}", TWO.case))
        ),
    ]


def main() -> int:
    """Measure, and write the result."""
    build_cpu_op()
    setups = (ONE, ONE_DEFAULT, TWO, ONLINE, CACHED)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        told: dict[Setup, list[dict[str, dict[str, float]]]] = {setup: [] for setup in setups}
        turns = [s for turn in range(REPETITIONS) for s in setups if turn < s.repetitions]
        for setup in track(turns, "measuring"):
            told[setup].append(bench.run(setup))
        rows = [row for setup in setups for row in rows_of(setup, told[setup])]
        claims = claims_of(rows)
        held, held_claims = memory(bench.latents, Path(name))
        rows += [*held, *start(bench.latents, Path(name))]
    write_result("train", question=str(__doc__), rows=rows, claims=[*claims, *held_claims])
    return 0


if __name__ == "__main__":
    sys.exit(main())
