"""Draw pictures with a run's weights: noise that belongs to each caption, guidance, decoding.

Letters: ``B`` samples, ``C`` latent channels, ``H W`` rows and columns, ``L`` text tokens, ``D``
width of a text state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.build import build_parameterization
from trainer.config import AutoencoderModelConfig, ReconstructionConfig, TrainConfig
from trainer.config_tools import SamplingConfig
from trainer.data.manifest import load_manifest
from trainer.diffusion.parameterization import Parameterization
from trainer.drawing import check_sampling, draw_latents
from trainer.encoded import matching_encoding
from trainer.errors import BadInput
from trainer.frozen import read_yaml
from trainer.models.autoencoders import Autoencoder, load_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.models.loading import load_weights
from trainer.models.parallel import one_core_workers
from trainer.models.text_encoders import TextEncoder, load_text_encoder
from trainer.place import place
from trainer.runtime.checkpoint import TrainState, Weights, read_weights

Pixels = NDArray[np.uint8]
RECONSTRUCTION_BATCH = 32


@dataclass(frozen=True)
class Sampler:
    """Everything between captions and pictures."""

    cfg: TrainConfig
    state: TrainState
    """Where the training of the weights stood."""
    model: nn.Module
    parameterization: Parameterization
    autoencoder: Autoencoder
    text: TextEncoder
    null_text_LD: Tensor
    """States of the empty caption."""
    latent_mean_C: Tensor
    latent_std_C: Tensor
    latent_shape: tuple[int, int, int]
    device: torch.device
    threads: int
    """Batches at the same time, one core each."""

    def sample(
        self,
        captions: Sequence[str],
        sampling: SamplingConfig,
        *,
        on_steps: Callable[[int], None] = lambda _: None,
    ) -> Pixels:
        """Draw one picture per caption.

        The first noise is keyed by (seed, the caption's number), so neither the batch size nor
        the other captions change a picture by more than rounding.

        Args:
            captions: At least one.
            sampling: How.
            on_steps: Told, from several threads, how many more picture-steps are done; there
                are ``len(captions) * num_steps``.

        Returns:
            ``(N, H, W, 3)`` uint8 RGB.
        """
        check_sampling(self.parameterization, sampling)
        texts = self.text.encode(captions)
        size = sampling.batch_images

        def draw(first: int) -> Pixels:
            numbers = range(first, min(first + size, len(captions)))
            chosen = texts[first : first + size]
            return self.decode(self._draw(chosen, numbers, sampling, on_steps))

        with one_core_workers(self.threads) as workers:
            return np.concatenate(list(workers.map(draw, range(0, len(captions), size))))

    def decode(self, normalised_BCHW: Tensor) -> Pixels:
        """Turn normalised latents into ``(B, H, W, 3)`` uint8 RGB."""
        scale, shift = self.latent_std_C[:, None, None], self.latent_mean_C[:, None, None]
        return to_pixels(self.autoencoder.decode(normalised_BCHW * scale + shift))

    def reconstruct(self, pictures: Pixels) -> Pixels:
        """Pass ``(N, H, W, 3)`` uint8 pictures through the autoencoder and back."""
        tensor = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)

        def there_and_back(batch: Tensor) -> Pixels:
            mean, _ = self.autoencoder.moments(batch.to(self.device).float() / 127.5 - 1.0)
            return to_pixels(self.autoencoder.decode(mean))

        with one_core_workers(self.threads) as workers:
            batches = torch.split(tensor, RECONSTRUCTION_BATCH)
            return np.concatenate(list(workers.map(there_and_back, batches)))

    def untrained(self) -> "Sampler":
        """Return a sampler with the network as it was before training."""
        assert not isinstance(self.cfg.model, AutoencoderModelConfig)
        fresh = build_denoiser(self.cfg.model, seed=self.cfg.seed)
        return replace(self, model=fresh.to(self.device).eval())

    def with_weights(self, run: Path, checkpoint: Path, which: Weights) -> "Sampler":
        """Return a sampler with other weights of the same run."""
        assert not isinstance(self.cfg.model, AutoencoderModelConfig)
        weights, state = read_weights(run, which, checkpoint=checkpoint)
        model = build_denoiser(self.cfg.model)
        load_weights(model, weights, source=str(checkpoint))
        return replace(self, state=state, model=model.to(self.device).eval())

    @torch.inference_mode()
    def _draw(
        self,
        texts: list[Tensor],
        numbers: Sequence[int],
        sampling: SamplingConfig,
        on_steps: Callable[[int], None],
    ) -> Tensor:
        """Return normalised latents."""
        unwanted_LD = self.null_text_LD
        if sampling.negative:
            (unwanted_LD,) = self.text.encode([sampling.negative])
        # Padded together, so that both halves have one shape.
        text_BLD, mask_BL = pad_texts([*texts, *[unwanted_LD] * len(texts)])
        text_BLD, mask_BL = text_BLD.to(self.device), mask_BL.to(self.device)
        count = len(texts)
        x_BCHW = torch.empty(0)
        for latents in draw_latents(
            self.model,
            self.parameterization,
            (text_BLD[:count], mask_BL[:count]),
            (text_BLD[count:], mask_BL[count:]),
            numbers=numbers,
            shape=self.latent_shape,
            cfg=sampling,
        ):
            x_BCHW = latents
            on_steps(count)
        return x_BCHW


def load_sampler(
    run: Path,
    *,
    device: str,
    threads: int,
    checkpoint: Path | None = None,
    weights: Weights = "ema",
) -> Sampler:
    """Load a run's weights and the encoders of its latents.

    Args:
        run: Run directory.
        device: cpu or cuda.
        threads: Batches at the same time.
        checkpoint: One of the run's; the newest valid one without.
        weights: Averaged or raw.

    Raises:
        BadInput: No such run, no checkpoint, an autoencoder's run, or a dataset whose latents
            other encoders made.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device=cuda, but torch finds no GPU here. Try device=cpu.")
    cfg = read_yaml(TrainConfig, run / "config.yaml")
    if isinstance(cfg.model, AutoencoderModelConfig):
        raise BadInput(
            f"{run} trains an autoencoder, which draws nothing from captions. Give the run of a "
            f"denoiser, or write this one's weights: kiln export run={run} out=DIR"
        )
    assert not isinstance(cfg.objective, ReconstructionConfig)
    dataset = place(cfg.data.dataset)
    encoding = matching_encoding(cfg, dataset, load_manifest(dataset))
    tensors, state = read_weights(run, weights, checkpoint=checkpoint)
    model = build_denoiser(cfg.model)
    load_weights(model, tensors, source=str(run))
    where = torch.device(device)
    text = load_text_encoder(cfg.encoders.text).to(where)
    channels, height, width = encoding.facts["latent_shape"]
    return Sampler(
        cfg=cfg,
        state=state,
        model=model.to(where).eval(),
        parameterization=build_parameterization(cfg.objective),
        autoencoder=load_autoencoder(cfg.encoders.autoencoder).to(where),
        text=text,
        null_text_LD=text.encode([""])[0],
        latent_mean_C=torch.tensor(encoding.facts["latent_mean"], device=where),
        latent_std_C=torch.tensor(encoding.facts["latent_std"], device=where),
        latent_shape=(channels, height, width),
        device=where,
        threads=threads,
    )


def to_pixels(pictures_BCHW: Tensor) -> Pixels:
    """Turn pictures in [-1, 1] into ``(B, H, W, 3)`` uint8."""
    levels = ((pictures_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: Pixels = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def pad_texts(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack ``(L_i, D)`` text states to fp32 ``(B, L, D)`` and a bool mask ``(B, L)``."""
    text_BLD = torch.nn.utils.rnn.pad_sequence([t.float() for t in texts], batch_first=True)
    lengths_B = torch.tensor([len(text) for text in texts])
    return text_BLD, torch.arange(text_BLD.shape[1])[None] < lengths_B[:, None]
