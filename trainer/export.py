"""Write a run's averaged weights as a folder that diffusers loads with from_pretrained."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trainer.command import run_command
from trainer.config import AutoencoderModelConfig, TrainConfig
from trainer.config_tools import ExportConfig
from trainer.data.manifest import encoding_folder, load_encoding
from trainer.data.publish import publish_json
from trainer.errors import BadInput
from trainer.frozen import read_yaml, thaw
from trainer.models.autoencoders import build_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.models.loading import load_weights
from trainer.observe.jsonl import read_rows
from trainer.place import place
from trainer.runtime.checkpoint import TrainState, read_ema

log = logging.getLogger(__name__)

TRAINING = "training.json"
_LAST_ROWS = 20


def main(argv: Sequence[str]) -> int:
    """`kiln export run=RUN to=DIR`."""
    return run_command(run, ExportConfig, "export", argv)


def run(cfg: ExportConfig) -> int:
    """Build the folder beside its place, then move it there."""
    run_dir, to = Path(cfg.run), Path(cfg.to)
    _check_target(to)
    trained = read_yaml(TrainConfig, run_dir / "config.yaml")
    weights, state = read_ema(run_dir)
    model: nn.Module
    if isinstance(trained.model, AutoencoderModelConfig):
        model = build_autoencoder(trained.model)
    else:
        model = build_denoiser(trained.model)
    load_weights(model, weights, source=str(run_dir))
    inner: Any = model.inner
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    inner.eval().save_pretrained(partial, safe_serialization=True)
    publish_json(partial / TRAINING, training_facts(run_dir, trained, state))
    shutil.rmtree(to, ignore_errors=True)
    partial.rename(to)
    log.info(
        "%s: %s after %d images, %.1f M parameters",
        to,
        type(inner).__name__,
        state.images_seen,
        sum(p.numel() for p in model.parameters()) / 1e6,
    )
    return 0


def training_facts(run_dir: Path, trained: TrainConfig, state: TrainState) -> dict[str, Any]:
    """Say how the weights came about: what was trained on, for how long, and how it went."""
    metrics = read_rows(run_dir / "metrics.jsonl")
    ledger = [row for row in read_rows(run_dir / "ledger.jsonl") if row["stage"] == "train"]
    last = [row["train/loss"] for row in metrics[-_LAST_ROWS:]]
    facts: dict[str, Any] = {
        "step": state.step,
        "images_seen": state.images_seen,
        "dataset_fingerprint": state.dataset_fingerprint,
        "mean_loss_of_last_rows": sum(last) / len(last) if last else None,
        "training_s": sum(row["seconds"] for row in ledger),
        "training_j": sum(row["joules"] for row in ledger),
        "joules_provenance": sorted({row["provenance"] for row in ledger if row["joules"]}),
        "weights": "exponential moving average",
        **{name: thaw(trained)[name] for name in ("model", "objective", "batch", "optim", "seed")},
    }
    if state.encoding_fingerprint:
        folder = encoding_folder(place(trained.data.dataset), state.encoding_fingerprint)
        facts["encoding"] = load_encoding(folder).facts
    return facts


def _check_target(to: Path) -> None:
    """Never delete what is no export."""
    if to.is_dir() and any(to.iterdir()) and not (to / TRAINING).exists():
        raise BadInput(
            f"to={to} is a folder with other things in it. Give a new folder, or one that an "
            "export wrote."
        )
    if to.exists() and not to.is_dir():
        raise BadInput(f"to={to} is a file. Give a folder.")
