"""Pictures <-> latents: pretrained first stages, and the one that Kiln trains.

Letters: ``B`` pictures, ``C`` channels, ``H W`` rows and columns. Pictures are float RGB in
[-1, 1]; latents are as the autoencoder leaves them, not normalised.
"""

from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from trainer.config import AutoencoderConfig, AutoencoderModelConfig
from trainer.config_first_stage import DiscriminatorConfig
from trainer.models.discriminator import PatchDiscriminator, build_discriminator, held_constant
from trainer.models.loading import load_frozen
from trainer.models.locations import locate

LOGVAR_OF_NOTHING = -30.0  # the least log-variance that AutoencoderKL itself allows


class Statistics(NamedTuple):
    """Of latents, per channel; a network is trained on ``(latent - mean) / std``."""

    mean: list[float]
    std: list[float]


class Autoencoder(Protocol):
    """A frozen first stage."""

    latent_channels: int
    downscale: int
    """Rows of a picture per row of its latent."""
    statistics: "Statistics"
    """Of its latents, as its makers measured them."""

    def moments(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance of the latents."""

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pictures; values may leave [-1, 1] a little."""

    def to(self, device: torch.device) -> "Autoencoder":
        """Move to a device."""


class KlAutoencoder:
    """diffusers AutoencoderKL."""

    def __init__(self, net: Any) -> None:  # noqa: ANN401 - diffusers is untyped
        self.net = net
        self.latent_channels: int = net.config.latent_channels
        self.downscale: int = 2 ** (len(net.config.block_out_channels) - 1)
        self.statistics = _statistics(net.config)

    @torch.inference_mode()
    def moments(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log-variance of the latents."""
        latents = self.net.encode(pictures_BCHW).latent_dist
        return latents.mean, latents.logvar

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pictures."""
        pictures: Tensor = self.net.decode(latents_BCHW).sample
        return pictures

    def to(self, device: torch.device) -> "KlAutoencoder":
        """Move to a device."""
        self.net.to(device)
        return self


class TinyAutoencoder:
    """diffusers AutoencoderTiny: deterministic, so its latents have (almost) no variance."""

    def __init__(self, net: Any) -> None:  # noqa: ANN401 - diffusers is untyped
        self.net = net
        self.latent_channels: int = net.config.latent_channels
        # net.spatial_scale_factor is 8 whatever the config.
        self.downscale: int = 2 ** (len(net.config.encoder_block_out_channels) - 1)
        self.statistics = _statistics(net.config)

    @torch.inference_mode()
    def moments(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents and a log-variance of next to nothing."""
        mean = self.net.encode(pictures_BCHW).latents
        return mean, torch.full_like(mean, LOGVAR_OF_NOTHING)

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return pictures."""
        pictures: Tensor = self.net.decode(latents_BCHW).sample
        return pictures

    def to(self, device: torch.device) -> "TinyAutoencoder":
        """Move to a device."""
        self.net.to(device)
        return self


def _statistics(config: Any) -> Statistics:  # noqa: ANN401 - diffusers is untyped
    """Read them as diffusers' pipelines do: whole vectors, or one shift and one factor for all."""
    channels = config.latent_channels
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0] * channels, [1.0] * channels
    return Statistics([float(m) for m in mean], [float(s) / config.scaling_factor for s in std])


def load_autoencoder(cfg: AutoencoderConfig) -> Autoencoder:
    """Load a pretrained first stage in float32, frozen.

    Raises:
        BadInput: There is no such folder or package, or it holds something else.
        BadWorld: The model hub did not give it.
    """
    folder = locate(cfg.path)
    # diffusers' low-memory loading needs accelerate, and says so on every load without it.
    cls = AutoencoderKL if cfg.kind == "kl" else AutoencoderTiny
    net = load_frozen(cls, folder, low_cpu_mem_usage=False)
    net.to(memory_format=torch.channels_last)  # a third less time per picture on CPUs
    return KlAutoencoder(net) if cfg.kind == "kl" else TinyAutoencoder(net)


class TrainableAutoencoder(nn.Module):
    """An AutoencoderKL in training; `inner` is the diffusers module that export saves.

    A discriminator that learns beside it is a part of it, so that one engine and one optimizer
    train both, and checkpoints, averages and rollbacks hold both.
    """

    def __init__(self, inner: Any, discriminator: PatchDiscriminator | None = None) -> None:  # noqa: ANN401 - diffusers is untyped
        super().__init__()
        self.inner, self.discriminator = inner, discriminator

    def forward(
        self, pictures_BCHW: Tensor, noise_BCHW: Tensor, is_judging: bool = True
    ) -> tuple[Tensor, ...]:
        """Encode, sample the latent with the given noise, decode; let the discriminator judge.

        Args:
            pictures_BCHW: RGB in [-1, 1].
            noise_BCHW: Standard normal draws in the latents' shape.
            is_judging: Else the discriminator sees no picture; its parameters still have
                gradients, of zero, so that the optimizer treats them alike at every ZeRO stage.

        Returns:
            The reconstructions, the latents' means and their log-variances; fp32. With a
            discriminator three logits of each patch follow: of the pictures and of the
            reconstructions, from which only it gets gradients; and again of the reconstructions,
            from which only the autoencoder does.
        """
        dtype = next(self.inner.parameters()).dtype
        pictures_BCHW = pictures_BCHW.to(dtype)
        latents = self.inner.encode(pictures_BCHW).latent_dist
        drawn = latents.mean + latents.std * noise_BCHW.to(dtype)
        decoded = self.inner.decode(drawn).sample
        found = (decoded.float(), latents.mean.float(), latents.logvar.float())
        if self.discriminator is None:
            return found
        judged = decoded if is_judging else decoded[:0]
        with held_constant(self.discriminator):
            deceived = self.discriminator(judged)
        both = torch.cat([pictures_BCHW[: len(judged)], judged.detach()])
        real, fake = self.discriminator(both).chunk(2)
        return (*found, real, fake, deceived)

    def recompute_activations(self) -> None:
        """Trade compute for memory in the backward pass."""
        self.inner.enable_gradient_checkpointing()


def build_autoencoder(
    cfg: AutoencoderModelConfig,
    *,
    seed: int = 0,
    discriminator: DiscriminatorConfig | None = None,
) -> TrainableAutoencoder:
    """Make a freshly initialised autoencoder; equal seeds give equal weights.

    Args:
        cfg: Of the autoencoder.
        seed: Of all weights; those of the autoencoder do not depend on the discriminator.
        discriminator: Learns beside it.
    """
    levels = len(cfg.block_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = AutoencoderKL(
            latent_channels=cfg.latent_channels,
            block_out_channels=cfg.block_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=cfg.layers_per_block,
            norm_num_groups=cfg.norm_groups,
            mid_block_add_attention=cfg.mid_attention,
            scaling_factor=1.0,
        )
    if discriminator is None:
        return TrainableAutoencoder(inner)
    return TrainableAutoencoder(inner, build_discriminator(discriminator, seed=seed))
