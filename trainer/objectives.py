"""From a micro-batch to one loss per sample: draws that belong to the sample, then the network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.data.sources import LatentBatch, PictureBatch
from trainer.diffusion import philox
from trainer.diffusion.objective import Predict, reconstruction_loss
from trainer.diffusion.process import like

Loss = Callable[[Predict, Tensor, Tensor, Tensor], Tensor]
"""(network, x0, noise, times) -> one number per sample."""

# Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.


class LatentObjective:
    """Denoising of latents given captions, with caption dropout."""

    def __init__(
        self,
        loss: Loss,
        times: Callable[[Tensor], Tensor],
        *,
        seed: int,
        latent_mean_C: Tensor,
        latent_std_C: Tensor,
        null_text_LD: Tensor,
        caption_dropout: float,
    ) -> None:
        """Take what does not change between batches.

        Args:
            loss: Of latents, noise and times.
            times: Uniform draws in (0, 1) -> times.
            seed: Keys all draws, together with sample ids and visits.
            latent_mean_C: Means of the latents over the dataset, per channel.
            latent_std_C: Their standard deviations; the network sees normalised latents.
            null_text_LD: States of the empty caption.
            caption_dropout: Share of captions replaced by it.
        """
        self._loss, self._times = loss, times
        self._seed, self._caption_dropout = seed, caption_dropout
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

        loss_B = self._loss(predict, x0_BCHW, noise_BCHW, self._times(u_B))
        return _weigh(loss_B, batch.weights_B)

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
    """The autoencoder's: reconstruct pictures, or random crops of them, through drawn latents."""

    def __init__(
        self,
        *,
        seed: int,
        latent_channels: int,
        pixels_per_latent: int,
        absolute_weight: float,
        kl_weight: float,
        crop_side_px: int,
        whole_frac: float,
    ) -> None:
        """Take the weights, and how the latents of a picture are shaped."""
        self._seed = seed
        self._latent_channels, self._pixels_per_latent = latent_channels, pixels_per_latent
        self._weights = {"absolute_weight": absolute_weight, "kl_weight": kl_weight}
        self._crop_side_px = crop_side_px
        self._whole_frac = whole_frac if crop_side_px else 1.0

    def __call__(self, model: nn.Module, batch: LatentBatch | PictureBatch) -> Tensor:
        """Return ``(B,)`` losses; what is cropped, and where, belongs to the sample."""
        assert isinstance(batch, PictureBatch)
        u_B3 = philox.uniforms(
            self._seed, batch.ids_B, batch.visits_B, purpose=philox.CROP, count=3
        )
        whole_B = u_B3[:, 0] < self._whole_frac
        loss_B = torch.empty(len(whole_B), device=batch.pictures_BCHW.device)
        for chosen_B, side_px in (
            (whole_B, batch.pictures_BCHW.shape[-1]),
            (~whole_B, self._crop_side_px),
        ):
            if chosen_B.any():
                pictures = crops(batch.pictures_BCHW[chosen_B], u_B3[chosen_B, 1:], side_px)
                who = (batch.ids_B[chosen_B], batch.visits_B[chosen_B])
                loss_B[chosen_B] = self._loss(model, pictures, *who)
        return _weigh(loss_B, batch.weights_B)

    def _loss(
        self, model: nn.Module, pictures_BCHW: Tensor, ids_B: Tensor, visits_B: Tensor
    ) -> Tensor:
        side = pictures_BCHW.shape[-1] // self._pixels_per_latent
        shape = (self._latent_channels, side, side)
        noise_BCHW = philox.normals(self._seed, ids_B, visits_B, purpose=philox.LATENT, shape=shape)
        decoded, mean, logvar = model(pictures_BCHW, noise_BCHW)
        return reconstruction_loss(pictures_BCHW, decoded, mean, logvar, **self._weights)


def crops(pictures_BCHW: Tensor, u_B2: Tensor, side_px: int) -> Tensor:
    """Cut one square per picture; ``u_B2`` in (0, 1) says where, evenly over all places."""
    num_places = pictures_BCHW.shape[-1] - side_px + 1
    places = (u_B2 * num_places).long().clamp(max=num_places - 1).tolist()
    squares = [
        picture[:, top : top + side_px, left : left + side_px]
        for picture, (top, left) in zip(pictures_BCHW, places, strict=True)
    ]
    return torch.stack(squares)


def _weigh(loss_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """Near-duplicates count less; the mean over a batch then weighs clusters, not samples."""
    return loss_B if weights_B is None else weights_B * loss_B


def _pad_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """Append zeros (or False) along dimension 1."""
    shape = (x.shape[0], num_tokens - x.shape[1], *x.shape[2:])
    return torch.cat([x, x.new_zeros(shape)], dim=1)
