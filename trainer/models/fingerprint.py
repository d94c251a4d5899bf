"""Name encoders by content: everything that shapes a latent or a text state, hashed.

Where the files lie is no part of it, so the same weights have the same name on every machine.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import EncodersConfig
from trainer.errors import BadInput
from trainer.models.locations import locate

CROP_POLICY = "shorter side resized (area or cubic), centre crop"
DTYPE = "float16"

_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "special_tokens_map.json")
_VARIANTS = (".fp16.", ".bf16.", "non_ema")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which encoders made an encoding."""

    fingerprint: str
    """16 hex digits."""
    facts: dict[str, Any]
    """What went into it, and where the encoders were found."""


def identify(encoders: EncodersConfig) -> Identity:
    """Hash the encoders' files and settings; reads every weight once.

    Raises:
        BadInput: A folder is missing, or holds no weights.
        BadWorld: The model hub did not give them.
    """
    text = encoders.text
    hashed: dict[str, Any] = {
        "autoencoder": {
            "kind": encoders.autoencoder.kind,
            "files": _hashes(locate(encoders.autoencoder.path), _WEIGHTS),
        },
        "text": {
            "kind": text.kind,
            "files": _hashes(locate(text.path, text.subfolder), _WEIGHTS),
            "tokenizer": _hashes(locate(text.path, text.tokenizer_subfolder), _TOKENIZER),
            "max_tokens": text.max_tokens,
        },
        "image_side_px": encoders.image_side_px,
        "crop": CROP_POLICY,
        "dtype": DTYPE,
    }
    if text.padding != "none":  # absent without padding, which keeps older names
        hashed["text"]["padding"] = text.padding
    if encoders.buckets is not None:  # absent for squares, whose names stay what they were
        hashed["buckets"] = asdict(encoders.buckets)
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    paths = {"autoencoder": encoders.autoencoder.path, "text": text.path}
    return Identity(
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest()[:16],
        facts={**hashed, "paths": paths},
    )


def folder_fingerprint(folder: Path) -> str:
    """Hash the configuration and the weights in a model's folder; as many hex digits.

    Raises:
        BadInput: It holds no weights.
    """
    canonical = json.dumps(_hashes(folder, _WEIGHTS), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _hashes(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Return file name -> sha256."""
    names = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
    found = {
        name: _sha256(folder / name)
        for name in names
        if not any(variant in name for variant in _VARIANTS)
    }
    if not found:
        raise BadInput(
            f"{folder} has none of {', '.join(patterns)}. Give the folder that "
            "save_pretrained has written."
        )
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
