"""Training objectives: one number per sample.

Letters: ``B`` samples, ``C`` channels, ``H W`` rows and columns.
"""

from collections.abc import Callable

from torch import Tensor

from trainer.diffusion.process import Process, diffuse, like

Predict = Callable[[Tensor, Tensor], Tensor]


def denoising_loss(
    process: Process, predict: Predict, x0: Tensor, noise: Tensor, t_B: Tensor
) -> Tensor:
    """Return the mean squared error of a prediction, per sample.

    Args:
        process: The path and the parameterization.
        predict: The network: ``(x_t, network_time_B)`` to a tensor like x_t.
        x0: ``(B, ...)`` clean data, float32.
        noise: Standard normal draws like x0, passed in.
        t_B: ``(B,)`` times from ``process.training_time``.

    Returns:
        ``(B,)`` float32.
    """
    t = like(t_B, x0)
    prediction = predict(diffuse(process, x0, noise, t), process.network_time(t_B))
    error = prediction.float() - process.target(x0, noise, t).float()
    return error.square().flatten(1).mean(1)


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
