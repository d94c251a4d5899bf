"""The text states of the empty caption, which every encoding has beside its shards."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import REPAIR_ENCODING
from trainer.data.npy import read_npy
from trainer.errors import BadInput
from trainer.place import read_bytes

NULL_TEXT = "null_text.npy"


def read_null_text(folder: Path, *, sha256: str | None = None) -> NDArray[np.float16]:
    """Read the states of the empty caption.

    Args:
        folder: The encoding's.
        sha256: What the file hashes to, if that is known.

    Returns:
        ``(L, D)`` states, L > 0 tokens, all of them finite.

    Raises:
        BadInput: The file is not there, or is not what `kiln encode` wrote.
    """
    path = folder / NULL_TEXT
    try:
        content = read_bytes(path)
    except FileNotFoundError as error:
        raise BadInput(f"{path} is not there. {REPAIR_ENCODING}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise BadInput(f"{path} is damaged: its hash is not the encoding's. {REPAIR_ENCODING}")
    try:
        states_LD: NDArray[np.float16] = read_npy(content)
        if states_LD.ndim != 2 or states_LD.dtype != np.float16 or not states_LD.size:
            found = f"{states_LD.dtype} of shape {states_LD.shape}, need float16 (tokens, width)"
            raise ValueError(found)
        if not np.isfinite(states_LD).all():
            raise ValueError("its numbers are not all finite")
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}). {REPAIR_ENCODING}") from error
    return states_LD
