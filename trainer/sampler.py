"""Draw pictures with a run's weights: noise that belongs to each caption, guidance, decoding.

Letters: ``B`` samples, ``C`` latent channels, ``H W`` rows and columns, ``L`` text tokens, ``D``
width of a text state.
"""

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.begin import load_trained
from trainer.build import build_parameterization
from trainer.config import AutoencoderModelConfig, TrainConfig
from trainer.config_diffusion import DenoisingConfig
from trainer.config_first_stage import ReconstructionConfig
from trainer.config_tools import SamplingConfig
from trainer.data.publish import file_sha256
from trainer.diffusion.parameterization import Parameterization
from trainer.drawing import Known, check_sampling, draw_latents
from trainer.encoded import latents_of
from trainer.errors import BadInput
from trainer.export_card import WEIGHTS
from trainer.frozen import read_yaml
from trainer.models.autoencoders import Autoencoder, load_autoencoder
from trainer.models.denoisers import build_denoiser
from trainer.models.fingerprint import identify
from trainer.models.parallel import one_core_workers
from trainer.models.text_encoders import TextEncoder, load_text_encoder
from trainer.pipeline_folder import is_pipeline_folder, read_pipeline
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.rundir import checkpoint_root, step_folder
from trainer.runtime.weights import read_weights, weights_fingerprint

Pixels = NDArray[np.uint8]
Asked = tuple[str, int]
"""A caption, and the number that keys its noise."""
RECONSTRUCTION_BATCH = 32


@dataclass(frozen=True)
class Sampler:
    """Everything between captions and pictures."""

    trained: TrainConfig | None
    """The run's configuration; None for an exported folder."""
    objective: DenoisingConfig
    image_side_px: int
    state: TrainState
    """Where the training of the weights stood."""
    weights: str
    weights_sha256: str
    """Of the checkpoint that they are in."""
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

    @property
    def cfg(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            BadInput: The weights are those of an exported folder.
        """
        if self.trained is None:
            raise BadInput(
                "an exported folder has no dataset and no checkpoints. Give the run that it was "
                "exported from."
            )
        return self.trained

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
        asked = list(zip(captions, range(len(captions)), strict=True))
        size = sampling.batch_images
        batches = [asked[first : first + size] for first in range(0, len(asked), size)]
        return np.concatenate(list(self.draw(batches, sampling, on_steps=on_steps)))

    def draw(
        self,
        batches: Sequence[Sequence[Asked]],
        sampling: SamplingConfig,
        *,
        known: Known | None = None,
        on_steps: Callable[[int], None] = lambda _: None,
    ) -> Generator[Pixels, None, None]:
        """Yield the pictures of each batch, ``(B, H, W, 3)`` uint8 RGB, as soon as it is done.

        Args:
            batches: What to draw together; equal batches give equal bits.
            sampling: How; its ``batch_images`` is not used.
            known: A picture to start from.
            on_steps: As in `sample`.

        Raises:
            BadInput: The run cannot be sampled like that.
            BadWorld: The network gave something that is no finite number.
        """
        self.check(sampling)
        unwanted_LD = self.null_text_LD
        if sampling.negative:
            (unwanted_LD,) = self.text.encode([sampling.negative])
        stopped, one_at_a_time = threading.Event(), threading.Lock()

        def draw(batch: Sequence[Asked]) -> Pixels:
            with one_at_a_time:  # the tokenizer is not made for several threads
                texts = self.text.encode([text for text, _ in batch])
            # Padded together, so that both halves have one shape.
            padded = pad_texts([*texts, *[unwanted_LD] * len(texts)])
            last = torch.empty(0)
            for latents in self._draw(padded, [n for _, n in batch], sampling, known):
                last = latents
                if not sampling.is_adaptive:
                    on_steps(len(batch))
                if stopped.is_set():
                    break
            if sampling.is_adaptive:  # nobody knew how many steps it would be
                on_steps(len(batch) * sampling.num_steps)
            return self.decode(last)

        with one_core_workers(self.threads) as workers:
            try:
                yield from workers.map(draw, batches)
            finally:  # what is in flight ends at its next step
                stopped.set()

    def check(self, sampling: SamplingConfig) -> None:
        """Refuse what this run cannot do; see `trainer.drawing.check_sampling`."""
        dropout = self.objective.caption_dropout
        check_sampling(self.parameterization, sampling, caption_dropout=dropout)

    def encode(self, picture: Pixels) -> Tensor:
        """Turn an ``(H, W, 3)`` uint8 picture into its normalised latent ``(C, h, w)``."""
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
        mean, _ = self.autoencoder.moments(pixels.to(self.device).float() / 127.5 - 1.0)
        scale, shift = self.latent_std_C[:, None, None], self.latent_mean_C[:, None, None]
        # The autoencoder's channels-last layout would send the network to other kernels.
        return ((mean[0] - shift) / scale).contiguous()

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

    def with_weights(self, run: Path, checkpoint: Path, which: str) -> "Sampler":
        """Return a sampler with other weights of the same run."""
        assert not isinstance(self.cfg.model, AutoencoderModelConfig)
        weights, state = read_weights(run, which, checkpoint=checkpoint)
        model = build_denoiser(self.cfg.model)
        load_trained(model, run, self.cfg, weights)
        return replace(
            self,
            state=state,
            weights=which,
            weights_sha256=weights_fingerprint(run, which, checkpoint),
            model=model.to(self.device).eval(),
        )

    @torch.inference_mode()
    def _draw(
        self,
        padded: tuple[Tensor, Tensor],
        numbers: Sequence[int],
        sampling: SamplingConfig,
        known: Known | None,
    ) -> Iterator[Tensor]:
        """Yield normalised latents after every step."""
        text_BLD, mask_BL = (each.to(self.device) for each in padded)
        count = len(numbers)
        yield from draw_latents(
            self.model,
            self.parameterization,
            (text_BLD[:count], mask_BL[:count]),
            (text_BLD[count:], mask_BL[count:]),
            numbers=numbers,
            shape=self.latent_shape,
            cfg=sampling,
            known=known,
        )


def load_sampler(
    run: Path,
    *,
    device: str,
    threads: int,
    checkpoint: Path | None = None,
    weights: str = "ema",
) -> Sampler:
    """Load a run's weights and the encoders of its latents, or an exported folder.

    Args:
        run: Run directory, or what `kiln export` wrote of one, which has but one set of weights.
        device: cpu or cuda.
        threads: Batches at the same time.
        checkpoint: One of the run's; the newest valid one without.
        weights: As in `trainer.runtime.weights`.

    Raises:
        BadInput: No such run, no checkpoint, an autoencoder's run, or a dataset whose latents
            other encoders made.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device=cuda, but torch finds no GPU here. Try device=cpu.")
    if is_pipeline_folder(run):
        return _exported(run, torch.device(device), threads)
    cfg = read_yaml(TrainConfig, run / "config.yaml")
    if isinstance(cfg.model, AutoencoderModelConfig):
        raise BadInput(
            f"{run} trains an autoencoder, which draws nothing from captions. Give the run of a "
            f"denoiser, or write this one's weights: kiln export run={run} out=DIR"
        )
    assert not isinstance(cfg.objective, ReconstructionConfig)
    facts = latents_of(cfg, run).facts
    tensors, state = read_weights(run, weights, checkpoint=checkpoint)
    model = build_denoiser(cfg.model)
    load_trained(model, run, cfg, tensors)
    used = step_folder(checkpoint_root(run), state.step)
    where = torch.device(device)
    text = load_text_encoder(cfg.encoders.text).to(where)
    channels, height, width = facts["latent_shape"]
    return Sampler(
        trained=cfg,
        objective=cfg.objective,
        image_side_px=cfg.encoders.image_side_px,
        state=state,
        weights=weights,
        weights_sha256=weights_fingerprint(run, weights, used),
        model=model.to(where).eval(),
        parameterization=build_parameterization(cfg.objective),
        autoencoder=load_autoencoder(cfg.encoders.autoencoder).to(where),
        text=text,
        null_text_LD=text.encode([""])[0],
        latent_mean_C=torch.tensor(facts["latent_mean"], device=where),
        latent_std_C=torch.tensor(facts["latent_std"], device=where),
        latent_shape=(channels, height, width),
        device=where,
        threads=threads,
    )


def _exported(folder: Path, where: torch.device, threads: int) -> Sampler:
    found = read_pipeline(folder)
    files = sorted((folder / found.model.kind).glob("*.safetensors"))
    hashes = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    facts = found.training
    return Sampler(
        trained=None,
        objective=found.objective,
        image_side_px=found.encoders.image_side_px,
        state=TrainState(
            step=facts["step"],
            images_seen=facts["images_seen"],
            seed=facts["seed"],
            dataset_fingerprint=facts["dataset_fingerprint"],
            encoding_fingerprint=identify(found.encoders).fingerprint,
            stream={},
        ),
        weights="raw" if facts["weights"] == WEIGHTS["raw"] else "ema",
        weights_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        model=found.denoiser.to(where),
        parameterization=build_parameterization(found.objective),
        autoencoder=found.autoencoder.to(where),
        text=found.text.to(where),
        null_text_LD=found.null_text_LD,
        latent_mean_C=found.latent_mean_C.to(where),
        latent_std_C=found.latent_std_C.to(where),
        latent_shape=found.latent_shape,
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
