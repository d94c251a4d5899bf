"""Mean and spread of a dataset's latents: as somebody said, or measured on some pictures."""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.decode import cover, decode_bgr
from trainer.data.index import PICTURES
from trainer.data.manifest import list_encodings
from trainer.data.opening import Dataset
from trainer.data.shards import Shard, read_index
from trainer.data.tombstones import read_row_weights
from trainer.errors import BadData
from trainer.models.autoencoders import Autoencoder, Statistics
from trainer.models.encoders import picture_moments, statistics_of

MEASURED_IMAGES = 256
_MEASURED_SHARDS = 16
_BATCH_IMAGES = 16

# Shape suffixes: B pictures, H W rows and columns, C colours or latent channels.


def find_statistics(
    dataset: Dataset,
    autoencoder: Autoencoder,
    *,
    fingerprint: str,
    side_px: int,
    device: torch.device,
) -> tuple[Statistics, str]:
    """Find how latents are to be normalised, and who says so.

    An encoding by the same encoders says it of the whole dataset, be it of an older state of it;
    else the autoencoder may say it; else some of the dataset's pictures are measured.

    Args:
        dataset: Its pictures.
        autoencoder: On `device`.
        fingerprint: Of the encoders.
        side_px: Of the squares that are encoded.
        device: Of the autoencoder.
    """
    for encoding in list_encodings(dataset.folder):
        if encoding.fingerprint == fingerprint:
            facts = encoding.facts
            return Statistics(facts["latent_mean"], facts["latent_std"]), "encoding"
    said = autoencoder.statistics
    if any(said.mean) or set(said.std) != {1.0}:
        return said, "autoencoder"
    pictures = list(_pictures(dataset, side_px))
    if not pictures:
        return said, "autoencoder"
    return _measured(pictures, autoencoder, device), f"{len(pictures)} pictures"


def _measured(
    pictures: list[NDArray[np.uint8]], autoencoder: Autoencoder, device: torch.device
) -> Statistics:
    num_values = 0
    first_C, second_C = np.zeros((2, autoencoder.latent_channels))
    for first in range(0, len(pictures), _BATCH_IMAGES):
        some = np.stack(pictures[first : first + _BATCH_IMAGES])
        pictures_BHWC = torch.from_numpy(some).to(device)
        moments = picture_moments(autoencoder, pictures_BHWC).double().cpu().numpy()
        mean_BCHW, logvar_BCHW = moments[:, 0], moments[:, 1]
        num_values += mean_BCHW[:, 0].size
        first_C += mean_BCHW.sum((0, 2, 3))
        second_C += (mean_BCHW**2 + np.exp(logvar_BCHW)).sum((0, 2, 3))
    return statistics_of(num_values, first_C.tolist(), second_C.tolist())


def _pictures(dataset: Dataset, side_px: int) -> Iterator[NDArray[np.uint8]]:
    """Yield about `MEASURED_IMAGES` pictures that can be decoded, from all over the dataset."""
    shards = dataset.manifest.shards
    chosen = np.unique(np.linspace(0, len(shards) - 1, _MEASURED_SHARDS).astype(int)).tolist()
    for entry in (shards[number] for number in chosen):
        weights = dataset.manifest.weights.get(entry.number)
        live = np.flatnonzero(read_row_weights(dataset.folder, entry, weights) > 0)
        with Shard(entry.tar(dataset.folder), read_index(entry.index(dataset.folder))) as shard:
            for row in live[: -(-MEASURED_IMAGES // len(chosen))].tolist():
                extension = next((x for x in PICTURES if x in shard.extensions(row)), None)
                with suppress(BadData):
                    if extension is not None:
                        bgr_HWC = decode_bgr(shard.read(row, extension), name=shard.keys[row])
                        yield cover(bgr_HWC, side_px, side_px).rgb_HWC
