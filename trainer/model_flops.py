"""Count the floating point operations of a micro-batch, right for its size."""

from collections.abc import Callable
from functools import cache

import torch

from trainer.config import TrainConfig
from trainer.data.sources import Batch, LatentBatch
from trainer.hardware import by_device_name
from trainer.models.costs import training_flops


def flops_counter(cfg: TrainConfig) -> Callable[[Batch], float]:
    """Return what counts a micro-batch's forward and backward passes of the denoiser.

    An autoencoder's, which is trained on crops of many sizes, are not counted: 0.
    """

    @cache
    def of_image(height: int, width: int, tokens: int) -> int:
        return training_flops(
            cfg.model, latent_height=height, latent_width=width, text_tokens=tokens, lora=cfg.lora
        )

    def of_batch(batch: Batch) -> float:
        if not isinstance(batch, LatentBatch):
            return 0.0
        num_images, _, height, width = batch.mean_BCHW.shape
        return float(num_images * of_image(height, width, batch.text_BLD.shape[1]))

    return of_batch


def peak_flops(cfg: TrainConfig) -> float | None:
    """Return the peak rate of this rank's device at the network's precision, per second.

    None where its maker's figure is not known, as of CPUs.
    """
    if cfg.cluster.device == "cpu":
        return None
    device = by_device_name(torch.cuda.get_device_name())
    if device is None or (cfg.engine.precision == "bf16" and not device.has_bf16):
        return None
    is_half = cfg.engine.precision in {"bf16", "fp16"}
    return 1e12 * (device.half_tflops if is_half else device.fp32_tflops)
