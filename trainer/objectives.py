"""From a micro-batch to one loss per sample: draws that belong to the sample, then the network."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.config_first_stage import ReconstructionConfig
from trainer.data.sources import Batch, LatentBatch, PictureBatch
from trainer.diffusion import philox
from trainer.diffusion.first_stage import deceiving_loss, hinge_loss, reconstruction_loss
from trainer.diffusion.objective import Predict
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

    def __call__(self, model: nn.Module, batch: Batch, _images_seen: int = 0) -> Tensor:
        """Return ``(B,)`` losses; the draws depend on seed, sample and visit alone."""
        assert isinstance(batch, LatentBatch)
        shape = batch.mean_BCHW.shape[1:]
        num_words = philox.words_of_normals(shape)
        words = philox.words(
            self._seed,
            batch.ids_B,
            batch.visits_B,
            counts={
                philox.LATENT: num_words,
                philox.NOISE: num_words,
                philox.TIME: 1,
                philox.CAPTION_DROPOUT: 1,
            },
        )
        posterior = philox.as_normals(words[philox.LATENT], shape)
        latents = batch.mean_BCHW + (0.5 * batch.logvar_BCHW).exp() * posterior
        x0_BCHW = (latents - self._shift) / self._scale
        noise_BCHW = philox.as_normals(words[philox.NOISE], shape)
        time_u_B, dropout_u_B = (
            philox.as_uniforms(words[purpose])[:, 0]
            for purpose in (philox.TIME, philox.CAPTION_DROPOUT)
        )
        text_BLD, mask_BL = self._drop_captions(batch, dropout_u_B)

        def predict(x_t: Tensor, time_B: Tensor) -> Tensor:
            out: Tensor = model(x_t, time_B, text_BLD, mask_BL)
            return out

        loss_B = self._loss(predict, x0_BCHW, noise_BCHW, self._times(time_u_B))
        return _weigh(loss_B, batch.weights_B)

    def _drop_captions(self, batch: LatentBatch, u_B: Tensor) -> tuple[Tensor, Tensor]:
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


class Distance(Protocol):
    """A measure of pictures, by which gradients reach the first ones."""

    def __call__(self, ours_BCHW: Tensor, theirs_BCHW: Tensor) -> Tensor:
        """Return ``(B,)`` float32 for RGB pictures in [-1, 1]."""


class ReconstructionObjective:
    """The autoencoder's: reconstruct pictures, or random crops of them, through drawn latents.

    With a discriminator the loss of a picture has the value of the autoencoder's loss alone, and
    the gradients of both losses: deceiving reaches the autoencoder only, and the hinge loss the
    discriminator only, so that one backward pass is two. The logged loss then makes no leap where
    the discriminator begins, which would count as a spike.

    The weight of deceiving is fixed. VQGAN (Esser et al. 2021, equation 7) adapts it, by the norms
    of two gradients of the last layer over a batch: that takes two more backward passes, sees the
    samples of one rank only, so that a run would depend on the number of ranks, and cannot see
    weights that ZeRO-3 has partitioned.
    """

    def __init__(
        self,
        cfg: ReconstructionConfig,
        *,
        seed: int,
        latent_channels: int,
        pixels_per_latent: int,
        distance: Distance | None = None,
    ) -> None:
        """Take the weights, and how the latents of a picture are shaped.

        Args:
            cfg: Weights, crops, and when the discriminator starts, if the model has one.
            seed: Keys all draws, together with sample ids and visits.
            latent_channels: Of a latent.
            pixels_per_latent: Rows of a picture per row of its latent.
            distance: In the features of the network that `cfg` names.
        """
        self._cfg, self._seed, self._distance = cfg, seed, distance
        self._latent_channels, self._pixels_per_latent = latent_channels, pixels_per_latent
        self._whole_frac = cfg.whole_frac if cfg.crop_side_px else 1.0

    def __call__(self, model: nn.Module, batch: Batch, images_seen: int = 0) -> Tensor:
        """Return ``(B,)`` losses; what is cropped, and where, belongs to the sample."""
        assert isinstance(batch, PictureBatch)
        u_B3 = philox.uniforms(
            self._seed, batch.ids_B, batch.visits_B, purpose=philox.CROP, count=3
        )
        whole_B = u_B3[:, 0] < self._whole_frac
        loss_B = torch.empty(len(whole_B), device=batch.pictures_BCHW.device)
        for chosen_B, side_px in (
            (whole_B, batch.pictures_BCHW.shape[-1]),
            (~whole_B, self._cfg.crop_side_px),
        ):
            if chosen_B.any():
                pictures = crops(batch.pictures_BCHW[chosen_B], u_B3[chosen_B, 1:], side_px)
                who = (batch.ids_B[chosen_B], batch.visits_B[chosen_B])
                loss_B[chosen_B] = self._loss(
                    model, pictures, self._noise(pictures, *who), images_seen
                )
        return _weigh(loss_B, batch.weights_B)

    def _noise(self, pictures_BCHW: Tensor, ids_B: Tensor, visits_B: Tensor) -> Tensor:
        side = pictures_BCHW.shape[-1] // self._pixels_per_latent
        shape = (self._latent_channels, side, side)
        return philox.normals(self._seed, ids_B, visits_B, purpose=philox.LATENT, shape=shape)

    def _loss(
        self, model: nn.Module, pictures_BCHW: Tensor, noise_BCHW: Tensor, images_seen: int
    ) -> Tensor:
        cfg = self._cfg
        is_judging = cfg.discriminator is not None and images_seen >= cfg.discriminator.start_images
        decoded, mean, logvar, *logits = model(pictures_BCHW, noise_BCHW, is_judging)
        loss_B = reconstruction_loss(
            pictures_BCHW,
            decoded,
            mean,
            logvar,
            absolute_weight=cfg.absolute_weight,
            kl_weight=cfg.kl_weight,
        )
        if self._distance is not None:
            assert cfg.features is not None
            loss_B = loss_B + cfg.features.weight * self._distance(decoded, pictures_BCHW)
        if cfg.discriminator is not None:
            loss_B = loss_B + _adversarial(*logits, weight=cfg.discriminator.weight)
        return loss_B


def _adversarial(real: Tensor, fake: Tensor, deceived: Tensor, *, weight: float) -> Tensor:
    """Return ``(B,)``: what deceiving costs, with the hinge loss's gradients; or () of zero."""
    hinge_B, deceiving_B = hinge_loss(real, fake), deceiving_loss(deceived)
    loss_B = weight * deceiving_B + hinge_B - hinge_B.detach()
    # Of no pictures: parameters of the discriminator still get gradients, which are zero.
    return loss_B if len(loss_B) else loss_B.sum()


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
