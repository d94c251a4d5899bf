"""A small real training run for the cluster: `kiln launch`, DeepSpeed, two nodes."""

from pathlib import Path

from tests.latents_without_encoders import CHANNELS, SIDE, TEXT_WIDTH, make_dataset
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.frozen import compose
from trainer.models.fingerprint import identify
from trainer.observe.jsonl import read_rows

NETWORK = [
    "model=transformer_tiny",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.head_width=8",
    f"model.latent_channels={CHANNELS}",
    f"model.latent_side={SIDE}",
    f"model.text_width={TEXT_WIDTH}",
    "data.threads=1",
    "logging.every_steps=1",
    "logging.wandb=off",
    "logging.quiet=true",
]
SITE = [
    "cluster=example",
    "cluster.device=cpu",
    "cluster.num_nodes=2",
    "cluster.ranks_per_node=1",
    "cluster.time_limit_min=10",
    "cluster.warn_before_kill_s=20",
    "cluster.slurm.partition=train",
    "cluster.slurm.account=''",
    "cluster.slurm.exclusive=false",
    "cluster.slurm.memory_gb=2",
    "cluster.slurm.preflight.min_free_gb=0.1",
]


def publish(root: Path) -> Path:
    """Publish a dataset whose latents are said to be of the default encoders."""
    cfg = compose(TrainConfig, "train", ["data.dataset=none", *NETWORK])
    fingerprint = identify(cfg.encoders).fingerprint
    return make_dataset(root, shard_counts=(90, 70, 80), fingerprint=fingerprint)


def words(dataset: Path, run: Path, *more: str) -> list[str]:
    return [f"data.dataset={dataset}", f"run={run}", *NETWORK, *more]


def launch(dataset: Path, run: Path, *more: str) -> int:
    return main(["launch", run.name, *words(dataset, run), *SITE, *more])


def losses(run: Path) -> dict[int, float]:
    """Loss by step; of a step that was taken again, the last one."""
    return {row["step"]: row["train/loss"] for row in _training(run)}


def newest_step(run: Path) -> int:
    return max((row["step"] for row in _training(run)), default=0)


def _training(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [row for row in read_rows(path) if "train/loss" in row] if path.exists() else []
