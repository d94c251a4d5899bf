"""Classifier-free guidance (Ho & Salimans 2022), with rescaling and an interval of times."""

from torch import Tensor

from trainer.diffusion.solvers import Denoise


def combine(with_text: Tensor, without: Tensor, *, scale: float, rescale_frac: float) -> Tensor:
    """Extrapolate from the unconditional to the conditional estimate of x0.

    Args:
        with_text: ``(B, ...)`` x0 given the caption.
        without: x0 given the empty caption.
        scale: 1 is the conditional model itself; above 1 follows the caption more closely.
        rescale_frac: Share by which each sample's standard deviation is brought back to the
            conditional estimate's (Lin et al. 2024, section 3.4).
    """
    guided = without + scale * (with_text - without)
    if rescale_frac == 0:
        return guided
    rows = (-1, *[1] * (guided.ndim - 1))
    ratio = with_text.flatten(1).std(1) / guided.flatten(1).std(1).clamp(min=1e-12)
    return guided * (rescale_frac * ratio.reshape(rows) + (1 - rescale_frac))


def classifier_free(
    with_text: Denoise,
    without: Denoise,
    *,
    scale: float,
    rescale_frac: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Return the guided denoiser.

    Args:
        with_text: Denoiser given the captions.
        without: Denoiser given empty captions.
        scale: See `combine`; 1 never asks `without`.
        rescale_frac: See `combine`.
        interval: Times (low, high] in which to guide (Kynkaanniemi et al. 2024); outside of it
            the conditional denoiser alone answers, at half the cost.
    """
    low, high = interval

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        x0 = with_text(x, t)
        if scale == 1 or not low < float(t) <= high:
            return x0
        return combine(x0, without(x, t), scale=scale, rescale_frac=rescale_frac)

    return denoise
