"""Encoding while training: frozen encoders beside the engine, on the thread that trains.

Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.config import TrainConfig
from trainer.data.manifest import list_encodings
from trainer.data.opening import Dataset
from trainer.data.shards import CAPTION_MEMBERS, read_index
from trainer.data.sources import Batch, CaptionedBatch, LatentBatch
from trainer.encoded import Latents, check_network, read_record, write_record
from trainer.errors import BadInput
from trainer.loop import Span
from trainer.models.encoders import (
    FrozenEncoders,
    caption_states,
    load_frozen_encoders,
    not_finite_latents,
    not_finite_states,
    picture_moments,
)
from trainer.models.fingerprint import identify
from trainer.runtime.comm import Comm


class OnlineEncoder:
    """Makes of pictures and captions what `kiln encode` would have written of them."""

    def __init__(self, encoders: FrozenEncoders, device: torch.device) -> None:
        """Take encoders that lie on `device`."""
        self._encoders, self._device = encoders, device

    def __call__(self, batch: Batch, span: Span) -> LatentBatch:
        """Encode a micro-batch; what that costs is accounted for as encoding.

        Raises:
            BadInput: An encoder gives what is not finite.
        """
        assert isinstance(batch, CaptionedBatch)
        if self._device.type == "cuda":  # what the GPU still has to train is not encoding
            torch.cuda.synchronize(self._device)
        # Whether all is finite is asked of the GPU, so the span ends when the encoders do.
        with span("encoding"), torch.backends.cudnn.flags(deterministic=True):
            moments_B2CHW = self._moments(batch)
            states = self.states(batch.captions)
            lengths_B = torch.tensor([len(state) for state in states])
            # The autoencoder's channels-last layout would send the network to other kernels.
            moments_B2CHW = moments_B2CHW.float().contiguous()
            text_BLD = pad_sequence(states, batch_first=True).float()
            mask_BL = torch.arange(text_BLD.shape[1])[None] < lengths_B[:, None]
            return LatentBatch(
                ids_B=batch.ids_B,
                visits_B=batch.visits_B,
                mean_BCHW=moments_B2CHW[:, 0],
                logvar_BCHW=moments_B2CHW[:, 1],
                text_BLD=text_BLD,
                text_mask_BL=mask_BL.to(self._device),
                weights_B=batch.weights_B,
            )

    def states(self, captions: Sequence[str]) -> list[Tensor]:
        """Encode captions: ``(L_i, D)`` float16 each; equal ones are encoded once.

        Raises:
            BadInput: The states of one are not finite.
        """
        text, unique = self._encoders.text, sorted(set(captions))
        # Captions of one length together, so that no padding enters the encoder.
        by_length = sorted(zip(text.tokens(unique), unique, strict=True), key=_length)
        found: dict[str, Tensor] = {}
        for _, group in groupby(by_length, key=_length):
            ids, names = zip(*group, strict=True)
            states_BLD = caption_states(text, torch.tensor(ids))
            if (bad := _first_not_finite(states_BLD)) is not None:
                raise not_finite_states(names[bad])
            found |= zip(names, states_BLD, strict=True)
        return [found[caption] for caption in captions]

    def _moments(self, batch: CaptionedBatch) -> Tensor:
        moments_B2CHW = picture_moments(self._encoders.autoencoder, batch.pictures_BHWC)
        if (bad := _first_not_finite(moments_B2CHW)) is not None:
            raise not_finite_latents(batch.names[bad])
        return moments_B2CHW


def open_online(
    cfg: TrainConfig, dataset: Dataset, comm: Comm
) -> tuple[OnlineEncoder, Latents, Tensor]:
    """Load the encoders on one rank, and settle with all others how latents are normalised.

    Returns:
        The encoder, what its latents are, and the ``(L, D)`` float32 states of the empty caption.

    Raises:
        BadInput: The encoders do not load, or do not fit the network.
        BadWorld: The model hub did not give them.
    """
    encoders = load_frozen_encoders(cfg.encoders, comm.device)
    latents = _describe(cfg, dataset, encoders)
    check_network(cfg, latents.facts)
    # An encoding may be published while the ranks look: rank 0's numbers count.
    mean_std = [*latents.facts["latent_mean"], *latents.facts["latent_std"]]
    agreed = comm.sum(mean_std if comm.rank == 0 else [0.0] * len(mean_std))
    half = len(agreed) // 2
    settled = {"latent_mean": agreed[:half], "latent_std": agreed[half:]}
    latents = replace(latents, facts=latents.facts | settled)
    if comm.rank == 0:
        write_record(Path(cfg.run), latents)
    encoder = OnlineEncoder(encoders, comm.device)
    (null_text_LD,) = encoder.states([""])
    return encoder, latents, null_text_LD.float()


def check_online(cfg: TrainConfig, datasets: Sequence[Dataset]) -> str:
    """Say before any rank starts that a run could not encode; return the encoders' fingerprint.

    Raises:
        BadInput: The encoders do not load, do not fit the network, or there are no captions.
        BadWorld: The model hub did not give the encoders.
    """
    for dataset in datasets:
        entry = dataset.manifest.shards[0]
        index = read_index(entry.index(dataset.folder))
        columns = [f"offset.{name}" for name in CAPTION_MEMBERS]
        if all(
            index[name].null_count == len(index) for name in columns if name in index.schema.names
        ):
            raise BadInput(
                f"{entry.tar(dataset.folder)} has no captions, which data.latents=online needs: no "
                f"sample has a .{' or a .'.join(CAPTION_MEMBERS)}. Give a dataset of pictures with "
                "captions."
            )
    latents = _describe(cfg, datasets[0], load_frozen_encoders(cfg.encoders, torch.device("cpu")))
    check_network(cfg, latents.facts)
    return latents.fingerprint


def _describe(cfg: TrainConfig, dataset: Dataset, encoders: FrozenEncoders) -> Latents:
    """Say what the latents are: as the run wrote down, or an encoding, or the autoencoder says."""
    identity = identify(cfg.encoders)
    recorded = read_record(Path(cfg.run))
    if recorded is not None and recorded.fingerprint == identity.fingerprint:
        return recorded
    # Be it of an older state of the dataset: its numbers are nearer than the autoencoder's.
    for encoding in list_encodings(dataset.folder):
        if encoding.fingerprint == identity.fingerprint:
            return Latents(encoding.fingerprint, encoding.facts)
    autoencoder = encoders.autoencoder
    side = cfg.encoders.image_side_px // autoencoder.downscale
    return Latents(
        identity.fingerprint,
        {
            **identity.facts,
            "latent_shape": [autoencoder.latent_channels, side, side],
            "text_width": encoders.text.width,
            "latent_mean": autoencoder.statistics.mean,
            "latent_std": autoencoder.statistics.std,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
    )


def _first_not_finite(values: Tensor) -> int | None:
    """Give the number of the first row that is not finite all over."""
    bad_B = ~values.isfinite().flatten(1).all(1)
    return int(bad_B.nonzero()[0]) if bad_B.any() else None


def _length(caption: tuple[list[int], str]) -> int:
    return len(caption[0])
