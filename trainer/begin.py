"""Begin with weights that are there, of a diffusers folder or another run; LoRA stays on them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from trainer.config import AutoencoderModelConfig, TrainConfig, TransformerConfig, UNetConfig
from trainer.data.publish import publish_json
from trainer.errors import BadInput
from trainer.frozen import read_yaml
from trainer.models.denoisers import Denoiser
from trainer.models.fingerprint import folder_fingerprint
from trainer.models.loading import load_weights
from trainer.models.lora import load_merged
from trainer.models.start import check_section, check_start, find_denoiser, load_start
from trainer.runtime.checkpoint import newest_valid, verify
from trainer.runtime.comm import Comm
from trainer.runtime.rundir import checkpoint_root, step_folder, step_of
from trainer.runtime.weights import read_weights, weights_fingerprint

BASE = "base.json"


@dataclass(frozen=True)
class Base:
    """The weights that LoRA's adapters sit on."""

    fingerprint: str
    step: int | None
    """Of a run's checkpoint; None for a folder."""


def check_begin(cfg: TrainConfig) -> None:
    """Say before any rank starts that the weights to begin with do not fit.

    Raises:
        BadInput: They are of another network, or not there; or adapters sit on others.
    """
    if cfg.start_from is None or isinstance(cfg.model, AutoencoderModelConfig):
        return
    if (section := _run_section(cfg.start_from)) is not None:
        check_section(cfg.start_from, cfg.model, section)
    else:
        check_start(cfg.start_from, cfg.model)
    if cfg.lora is not None and (Path(cfg.run) / BASE).exists():
        _check_base(cfg, Path(cfg.run))


def hold_base(cfg: TrainConfig, comm: Comm) -> None:
    """Write down at a LoRA run's first start on which weights it trains; compare at all others.

    Args:
        cfg: Of the run; without LoRA nothing is done.
        comm: Rank 0 reads the weights' files, the others wait for it.

    Raises:
        BadInput: They are others than before, or not there.
    """
    if cfg.lora is None:
        return
    if comm.rank == 0:
        path = Path(cfg.run) / BASE
        if path.exists():
            _check_base(cfg, Path(cfg.run))
        else:
            publish_json(path, asdict(_find_base(cfg, None)))
    comm.from_rank_0(0.0)


def begin_with(denoiser: Denoiser, cfg: TrainConfig) -> None:
    """Copy the weights that `start_from` names, of a run the averages of its newest checkpoint.

    Raises:
        BadInput: They are of another network, or do not load.
    """
    _load_base(denoiser, cfg, _recorded(Path(cfg.run)))


def load_trained(
    denoiser: Denoiser, run: Path, cfg: TrainConfig, weights: dict[str, Tensor]
) -> None:
    """Copy what a run trained: all weights, or those it began with and its adapters merged in.

    Args:
        denoiser: Built from the run's model section.
        run: Its directory, wherever that was moved to.
        cfg: Of the run.
        weights: As `read_weights` gives them.

    Raises:
        BadInput: They are of another network; or LoRA's base is another one, or not there.
    """
    if cfg.lora is None:
        load_weights(denoiser, weights, source=str(run))
    else:
        _load_base(denoiser, cfg, _check_base(cfg, run))
        load_merged(denoiser, weights, cfg.lora, source=str(run))


def _load_base(denoiser: Denoiser, cfg: TrainConfig, base: Base | None) -> None:
    assert cfg.start_from is not None
    assert not isinstance(cfg.model, AutoencoderModelConfig)
    if _run_section(cfg.start_from) is None:
        load_start(denoiser, cfg.start_from, cfg.model)
        return
    run = Path(cfg.start_from)
    checkpoint = _checkpoint(run, None if base is None else base.step)
    weights, _ = read_weights(run, "ema", checkpoint=checkpoint)
    load_trained(denoiser, run, read_yaml(TrainConfig, run / "config.yaml"), weights)


def _recorded(run: Path) -> Base | None:
    path = run / BASE
    return Base(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _check_base(cfg: TrainConfig, run: Path) -> Base:
    recorded = _recorded(run)
    if recorded is None:
        raise BadInput(
            f"{run} trains adapters, and its {BASE}, which says on which weights, is not there. "
            "Bring it back from a copy of the run, or choose another run=."
        )
    found = _find_base(cfg, recorded)
    if found.fingerprint != recorded.fingerprint:
        of = "" if recorded.step is None else f" of step {recorded.step}"
        raise BadInput(
            f"start_from={cfg.start_from} has weights with fingerprint {found.fingerprint}, but "
            f"the adapters of {run} were trained on {recorded.fingerprint}{of}. Bring those back, "
            "or choose another run=."
        )
    return recorded


def _find_base(cfg: TrainConfig, recorded: Base | None) -> Base:
    """Name the weights to begin with, of a run those at the recorded step if it still has them."""
    assert cfg.start_from is not None
    if _run_section(cfg.start_from) is None:
        return Base(folder_fingerprint(find_denoiser(cfg.start_from)), None)
    run = Path(cfg.start_from)
    folder = _checkpoint(run, None if recorded is None else recorded.step)
    fingerprint = weights_fingerprint(run, "ema", folder)[:16]
    below = _recorded(run)
    if below is not None:  # adapters on adapters
        fingerprint = f"{fingerprint} on {below.fingerprint}"
    return Base(fingerprint, step_of(folder))


def _checkpoint(run: Path, step: int | None) -> Path:
    root = checkpoint_root(run)
    if step is not None and verify(folder := step_folder(root, step), {"ema"}) is None:
        return folder
    newest = newest_valid(root, {"ema"})
    if newest is None:
        raise BadInput(f"start_from={run} has no complete checkpoint. Train it first.")
    return newest


def _run_section(path: str) -> UNetConfig | TransformerConfig | None:
    config = Path(path) / "config.yaml"
    if not config.is_file():
        return None
    section = read_yaml(TrainConfig, config).model
    if isinstance(section, AutoencoderModelConfig):
        raise BadInput(
            f"start_from={path} trains an autoencoder. Give the run of a denoiser, or a diffusers "
            "folder."
        )
    return section
