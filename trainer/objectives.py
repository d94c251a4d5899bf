"""From a micro-batch to one loss per sample: draws that belong to the sample, then the network."""

import torch
from torch import Tensor, nn

from trainer.data.sources import LatentBatch, PictureBatch
from trainer.diffusion import philox
from trainer.diffusion.objective import denoising_loss, reconstruction_loss
from trainer.diffusion.process import Process, like

# Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.


class LatentObjective:
    """Denoising of latents given captions, with caption dropout."""

    def __init__(
        self,
        process: Process,
        *,
        seed: int,
        latent_mean_C: Tensor,
        latent_std_C: Tensor,
        null_text_LD: Tensor,
        caption_dropout: float,
    ) -> None:
        """Take what does not change between batches.

        Args:
            process: Path and parameterization.
            seed: Keys all draws, together with sample ids and visits.
            latent_mean_C: Means of the latents over the dataset, per channel.
            latent_std_C: Their standard deviations; the network sees normalised latents.
            null_text_LD: States of the empty caption.
            caption_dropout: Share of captions replaced by it.
        """
        self._process, self._seed, self._caption_dropout = process, seed, caption_dropout
        self._shift, self._scale = latent_mean_C[:, None, None], latent_std_C[:, None, None]
        self._null_text_LD = null_text_LD

    def __call__(self, model: nn.Module, batch: LatentBatch | PictureBatch) -> Tensor:
        """Return ``(B,)`` losses; the draws depend on seed, sample and visit alone."""
        assert isinstance(batch, LatentBatch)
        shape = batch.mean_BCHW.shape[1:]
        who = (self._seed, batch.ids_B, batch.visits_B)
        posterior = philox.normals(*who, purpose=philox.LATENT, shape=shape)
        latents = batch.mean_BCHW + (0.5 * batch.logvar_BCHW).exp() * posterior
        x0_BCHW = (latents - self._shift) / self._scale
        noise_BCHW = philox.normals(*who, purpose=philox.NOISE, shape=shape)
        u_B = philox.uniforms(*who, purpose=philox.TIME, count=1)[:, 0]
        text_BLD, mask_BL = self._drop_captions(batch)

        def predict(x_t: Tensor, time_B: Tensor) -> Tensor:
            out: Tensor = model(x_t, time_B, text_BLD, mask_BL)
            return out

        t_B = self._process.training_time(u_B)
        return denoising_loss(self._process, predict, x0_BCHW, noise_BCHW, t_B)

    def _drop_captions(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        u_B = philox.uniforms(
            self._seed, batch.ids_B, batch.visits_B, purpose=philox.CAPTION_DROPOUT, count=1
        )[:, 0]
        dropped_B = u_B < self._caption_dropout
        num_tokens = max(batch.text_BLD.shape[1], len(self._null_text_LD))
        text_BLD = _pad_tokens(batch.text_BLD, num_tokens)
        null_1LD = _pad_tokens(self._null_text_LD[None], num_tokens)
        mask_BL = _pad_tokens(batch.text_mask_BL, num_tokens)
        null_mask_1L = torch.arange(num_tokens)[None] < len(self._null_text_LD)
        return (
            torch.where(like(dropped_B, text_BLD), null_1LD, text_BLD),
            torch.where(dropped_B[:, None], null_mask_1L.to(mask_BL.device), mask_BL),
        )


class ReconstructionObjective:
    """The autoencoder's: reconstruct pictures through a draw of their latents."""

    def __init__(
        self, *, seed: int, latent_shape: tuple[int, int, int], kl_weight: float, edge_weight: float
    ) -> None:
        """Take the weights; `latent_shape` is (C, H, W) of one latent."""
        self._seed, self._latent_shape = seed, latent_shape
        self._kl_weight, self._edge_weight = kl_weight, edge_weight

    def __call__(self, model: nn.Module, batch: LatentBatch | PictureBatch) -> Tensor:
        """Return ``(B,)`` losses."""
        assert isinstance(batch, PictureBatch)
        noise_BCHW = philox.normals(
            self._seed,
            batch.ids_B,
            batch.visits_B,
            purpose=philox.LATENT,
            shape=self._latent_shape,
        )
        decoded, mean, logvar = model(batch.pictures_BCHW, noise_BCHW)
        return reconstruction_loss(
            batch.pictures_BCHW,
            decoded,
            mean,
            logvar,
            kl_weight=self._kl_weight,
            edge_weight=self._edge_weight,
        )


def _pad_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """Append zeros (or False) along dimension 1."""
    shape = (x.shape[0], num_tokens - x.shape[1], *x.shape[2:])
    return torch.cat([x, x.new_zeros(shape)], dim=1)
