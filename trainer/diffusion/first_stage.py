"""The losses of a first stage: one number per picture.

Letters: ``B`` pictures, ``C`` channels, ``H W`` rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-10  # keeps the gradient finite where all channels are zero


def kl_to_standard_normal(mean_BCHW: Tensor, logvar_BCHW: Tensor) -> Tensor:
    """Return ``(B,)``: KL(N(mean, exp(logvar)) || N(0, 1)) in nats per latent number."""
    kl = 0.5 * (mean_BCHW.square() + logvar_BCHW.exp() - 1 - logvar_BCHW)
    return kl.flatten(1).mean(1)


def reconstruction_loss(
    picture_BCHW: Tensor,
    decoded_BCHW: Tensor,
    mean_BCHW: Tensor,
    logvar_BCHW: Tensor,
    *,
    absolute_weight: float,
    kl_weight: float,
) -> Tensor:
    """Return the autoencoder's loss, per sample.

    Args:
        picture_BCHW: Pictures in [-1, 1].
        decoded_BCHW: Their reconstructions.
        mean_BCHW: Means of their latents.
        logvar_BCHW: Log-variances of their latents.
        absolute_weight: Weight of the mean absolute error; the squared one has weight 1.
        kl_weight: Weight of the KL divergence per latent number.

    Returns:
        ``(B,)``: mean squared error, plus the weighted absolute error and KL.
    """
    error = (decoded_BCHW.float() - picture_BCHW.float()).flatten(1)
    kl = kl_to_standard_normal(mean_BCHW.float(), logvar_BCHW.float())
    return error.square().mean(1) + absolute_weight * error.abs().mean(1) + kl_weight * kl


def feature_distance(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    channel_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the distance in a network's features (Zhang et al. 2018, equation 1), per picture.

    Args:
        ours: ``(B, C, H, W)`` features of one set of pictures at each depth, whose sizes differ.
        theirs: Those of the other.
        channel_weights: ``(C,)`` on the squared differences at each depth, as LPIPS learned them;
            None weighs all equally: twice the cosine distance at each place.

    Returns:
        ``(B,)`` float32: the sum over depths, of means over places, of sums over channels. The
        length of a feature does not matter, its direction does.
    """
    total_B = torch.zeros(len(ours[0]), device=ours[0].device)
    for depth, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (_direction(a) - _direction(b)).square()
        if channel_weights is not None:
            error = error * channel_weights[depth][:, None, None]
        total_B = total_B + error.sum(1).mean((1, 2))
    return total_B


def _direction(features_BCHW: Tensor) -> Tensor:
    features_BCHW = features_BCHW.float()
    return features_BCHW * (features_BCHW.square().sum(1, keepdim=True) + _TINY).rsqrt()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss (Lim & Ye 2017; Esser et al. 2021's weights), per picture.

    Args:
        real: ``(B, 1, H, W)`` logits of pictures.
        fake: Those of reconstructions.

    Returns:
        ``(B,)`` float32: 1 for a discriminator that says zero, 0 for one that is always right.
    """
    missed = (1 - real.float()).relu() + (1 + fake.float()).relu()
    return 0.5 * missed.flatten(1).mean(1)


def deceiving_loss(fake: Tensor) -> Tensor:
    """Return ``(B,)``, what an autoencoder pays that does not deceive: minus the mean logit."""
    return -fake.float().flatten(1).mean(1)
