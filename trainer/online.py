"""Encoding while training: frozen encoders beside the engine, on the thread that trains.

Shape suffixes: B samples, C latent channels, H W rows and columns, L text tokens, D text width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.config import TrainConfig
from trainer.data.opening import Dataset
from trainer.data.shards import CAPTION_MEMBERS, read_index
from trainer.data.sources import Batch, CaptionedBatch, LatentBatch
from trainer.encoded import (
    Latents,
    check_encoders,
    check_network,
    read_record,
    require_record,
    write_record,
)
from trainer.errors import BadInput
from trainer.loop import Span
from trainer.models.autoencoders import Statistics
from trainer.models.encoders import (
    FrozenEncoders,
    caption_states,
    load_frozen_encoders,
    not_finite_latents,
    not_finite_states,
    picture_moments,
)
from trainer.models.fingerprint import Identity, identify
from trainer.runtime.comm import Comm
from trainer.spread import find_statistics


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
        with span("encoding"), _equal_bits():
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


@dataclass(frozen=True, slots=True)
class Online:
    """What a rank needs to train on pictures and captions."""

    encode: OnlineEncoder
    fingerprint: str
    """Of the encoders: that of the encoding that `kiln encode` would make with them."""
    statistics: Statistics
    """By which latents are normalised; equal on all ranks and in all attempts."""
    null_text_LD: Tensor
    """float32 states of the empty caption."""


def open_online(cfg: TrainConfig, dataset: Dataset, comm: Comm, *, has_begun: bool) -> Online:
    """Load the encoders on one rank; rank 0 settles, once for a run, how latents are normalised.

    Args:
        cfg: Of the run.
        dataset: Its first.
        comm: With the other ranks.
        has_begun: The run has a checkpoint: how its latents are normalised must be written down.

    Raises:
        BadInput: The encoders do not load, do not fit the network, or are not those that a run
            began with; or such a run does not say any more how its latents are normalised.
        BadWorld: The model hub did not give them.
    """
    encoders = load_frozen_encoders(cfg.encoders, comm.device)
    check_network(cfg, _shapes(cfg, encoders))
    identity = identify(cfg.encoders)
    if has_begun:  # before rank 0 writes: a refusal must leave the record as it is
        check_encoders(require_record(Path(cfg.run)).fingerprint, identity.fingerprint)
    channels = encoders.autoencoder.latent_channels
    told = [0.0] * (2 * channels)
    if comm.rank == 0:
        facts = _recorded(cfg, dataset, encoders, identity, device=comm.device).facts
        told = [*facts["latent_mean"], *facts["latent_std"]]
    agreed = comm.sum(told)
    encoder = OnlineEncoder(encoders, comm.device)
    (null_text_LD,) = encoder.states([""])
    return Online(
        encode=encoder,
        fingerprint=identity.fingerprint,
        statistics=Statistics(agreed[:channels], agreed[channels:]),
        null_text_LD=null_text_LD.float(),
    )


def _recorded(
    cfg: TrainConfig,
    dataset: Dataset,
    encoders: FrozenEncoders,
    identity: Identity,
    *,
    device: torch.device,
) -> Latents:
    """Read what the run wrote down of its latents; at its beginning, write it."""
    recorded = read_record(Path(cfg.run))
    if recorded is not None and recorded.fingerprint == identity.fingerprint:
        return recorded
    statistics, source = find_statistics(
        dataset,
        encoders.autoencoder,
        fingerprint=identity.fingerprint,
        side_px=cfg.encoders.image_side_px,
        device=device,
    )
    latents = Latents(
        identity.fingerprint,
        {
            **identity.facts,
            **_shapes(cfg, encoders),
            "latent_mean": statistics.mean,
            "latent_std": statistics.std,
            "latent_statistics": source,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
    )
    write_record(Path(cfg.run), latents)
    return latents


def _shapes(cfg: TrainConfig, encoders: FrozenEncoders) -> dict[str, Any]:
    autoencoder = encoders.autoencoder
    side = cfg.encoders.image_side_px // autoencoder.downscale
    return {
        "latent_shape": [autoencoder.latent_channels, side, side],
        "text_width": encoders.text.width,
    }


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
    identity = identify(cfg.encoders)
    encoders = load_frozen_encoders(cfg.encoders, torch.device("cpu"))
    check_network(cfg, _shapes(cfg, encoders))
    return identity.fingerprint


@contextmanager
def _equal_bits() -> Iterator[None]:
    """Let equal pictures give equal bits; training may use faster kernels."""
    # Not cudnn.flags: by its defaults it would switch cuDNN off.
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _first_not_finite(values: Tensor) -> int | None:
    """Give the number of the first row that is not finite all over."""
    bad_B = ~values.isfinite().flatten(1).all(1)
    return int(bad_B.nonzero()[0]) if bad_B.any() else None


def _length(caption: tuple[list[int], str]) -> int:
    return len(caption[0])
