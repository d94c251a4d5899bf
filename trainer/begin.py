"""Begin a fresh run with weights that are there: of a diffusers folder, or of another run."""

from pathlib import Path

from trainer.config import AutoencoderModelConfig, TrainConfig, TransformerConfig, UNetConfig
from trainer.errors import BadInput
from trainer.frozen import read_yaml
from trainer.models.denoisers import Denoiser
from trainer.models.loading import load_weights
from trainer.models.start import check_section, check_start, load_start
from trainer.runtime.weights import read_weights


def check_begin(cfg: TrainConfig) -> None:
    """Say before any rank starts that the weights to begin with do not fit.

    Raises:
        BadInput: They are of another network, or not there.
    """
    if cfg.start_from is None or isinstance(cfg.model, AutoencoderModelConfig):
        return
    if (section := _run_section(cfg.start_from)) is not None:
        check_section(cfg.start_from, cfg.model, section)
    else:
        check_start(cfg.start_from, cfg.model)


def begin_with(denoiser: Denoiser, cfg: TrainConfig) -> None:
    """Copy the weights that `start_from` names, of a run the averages of its newest checkpoint.

    Raises:
        BadInput: They are of another network, or do not load.
    """
    assert cfg.start_from is not None
    assert not isinstance(cfg.model, AutoencoderModelConfig)
    if _run_section(cfg.start_from) is None:
        load_start(denoiser, cfg.start_from, cfg.model)
    else:
        weights, _ = read_weights(Path(cfg.start_from), "ema")
        load_weights(denoiser, weights, source=cfg.start_from)


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
