"""Features of real pictures, computed once and kept on disk."""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np

from trainer.data.publish import published
from trainer.errors import BadInput
from trainer.quality.features import Features, Pictures, Rows

log = logging.getLogger(__name__)

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def reference_features(
    features: Features,
    pictures: Callable[[], Iterable[Pictures]],
    *,
    identity: str,
    count: int,
    folder: Path,
) -> Rows:
    """Return the features of real pictures, from a file of `folder` if they were computed before.

    Args:
        features: The network.
        pictures: Gives batches ``(B, H, W, 3)``, called only if it must be; the same pictures in
            the same order whenever the identity is the same.
        identity: What the pictures depend on: the dataset's fingerprint, their size, how they were
            chosen. With the network's fingerprint and the count it names the file.
        count: Pictures to use; fewer if there are not as many.
        folder: Of files; made if it is not there.

    Returns:
        ``(N, D)`` float32, N at most `count`.

    Raises:
        BadInput: There are no pictures.
    """
    key = json.dumps([features.fingerprint, identity, count])
    path = folder / f"{features.name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    try:
        return _read(path, features.width)
    except FileNotFoundError:
        pass
    except _DAMAGED as error:
        log.warning("%s is damaged (%s): the features are computed anew", path, error)
    rows_ND = _compute(features, pictures(), count)
    if not len(rows_ND):
        raise BadInput(f"the set of real pictures '{identity}' is empty: nothing to compare with.")
    with published(path) as partial, partial.open("wb") as file:
        np.savez(file, rows=rows_ND)
    return rows_ND


def _read(path: Path, width: int) -> Rows:
    """Read a file; what zip's checksums do not cover is checked by the shape."""
    # From memory: where the file is no zip, numpy would leave it open.
    with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as file:
        rows_ND: Rows = file["rows"]
    if rows_ND.ndim != 2 or rows_ND.shape[1] != width or rows_ND.dtype != np.float32:
        raise ValueError(f"it holds {rows_ND.dtype} of shape {rows_ND.shape}")
    return rows_ND


def _compute(features: Features, batches: Iterable[Pictures], count: int) -> Rows:
    found, left = [np.empty((0, features.width), np.float32)], count
    for batch in batches:
        found.append(features(batch[:left]))
        left -= len(found[-1])
        if left == 0:
            break
    return np.concatenate(found)
