"""Checkpoints as they lie in a folder or at a URL: found, checked, and read at any layout.

`step_00000012/` holds, for every rank, one file of weights, one of their averages and one of the
optimizer's moments, each tensor a flat range `NAME@START` of a parameter. `checkpoint.json` lists
them with their hashes; it is written last, and a folder without it does not count.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.errors import BadInput
from trainer.place import NUM_REQUESTS, is_local, read_bytes, sizes_bytes
from trainer.runtime.rundir import RECORD, complete
from trainer.runtime.tensors import Stored, read_wanted, sha256_of, stored_tensors

log = logging.getLogger(__name__)

Kind = Literal["weight", "ema", "optim"]
KINDS: tuple[Kind, ...] = ("weight", "ema", "optim")
Tensors = Mapping[Kind, Mapping[str, Tensor]]
"""Kind -> `NAME@START` -> flat range; of averages and moments with `WHICH/` before it."""
SCHEMA = 2
LATEST = "latest"


@dataclass(frozen=True)
class TrainState:
    """Where training stands; equal on all ranks and all that the data stream needs to go on."""

    step: int
    images_seen: int
    seed: int
    dataset_fingerprint: str
    encoding_fingerprint: str
    stream: dict[str, Any]
    """Where the data stream goes on: `trainer.data.stream.to_json`."""
    losses: list[float] = field(default_factory=list)
    """Of the last good steps, which the next ones are judged by."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    name: str
    kind: Kind
    rank: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What `checkpoint.json` says."""

    state: TrainState
    attempt: int
    """Of the run, which saved it."""
    scalars: dict[str, float]
    """Of the optimizer: steps, and the loss scale where there is one."""
    shapes: dict[str, list[int]]
    """Full shape of every trained parameter, to put them together without the model."""
    averages: list[str]
    """Names of the moving averages; the first is the one that is sampled from."""
    files: list[File] = field(default_factory=list)

    @property
    def kinds(self) -> set[Kind]:
        """What is kept of it; all, unless it was thinned."""
        return {file.kind for file in self.files}

    def of(self, kinds: Collection[Kind]) -> list[File]:
        """Return the files of some kinds."""
        return [file for file in self.files if file.kind in kinds]


def newest_valid(root: Path, kinds: Collection[Kind] = KINDS) -> Path | None:
    """Find the newest checkpoint whose files of some kinds are there and hash right.

    Every one that is passed over is named in the log, with the reason.
    """
    for folder in reversed(complete(root)):
        problem = verify(folder, kinds)
        if problem is None:
            return folder
        if not problem.startswith(_THINNED):
            log.warning("%s is damaged (%s); trying the one before it", folder, problem)
    return None


def verify(
    folder: Path, kinds: Collection[Kind] = KINDS, *, part: int = 0, parts: int = 1
) -> str | None:
    """Re-hash a checkpoint's files; return what is wrong, or None.

    Args:
        folder: Of the checkpoint.
        kinds: What must be there, and is looked at.
        part: Only every `parts`-th file from this one on is hashed, so that ranks share the work.
        parts: See `part`.
    """
    try:
        record = read_record(folder)
    except BadInput as error:
        return str(error)
    if missing := set(kinds) - record.kinds:
        return f"{_THINNED}: it has no {', '.join(sorted(missing))} any more"
    files = record.of(kinds)[part::parts]
    sizes = sizes_bytes([folder / file.name for file in files])
    for file, found in zip(files, sizes, strict=True):
        if found is None:
            return f"{file.name} is missing"
        if found != file.bytes:
            return f"{file.name} has {found} bytes, needs {file.bytes}"

    def is_right(file: File) -> bool:
        return sha256_of(folder / file.name) == file.sha256

    with ThreadPoolExecutor(1 if is_local(folder) else NUM_REQUESTS) as threads:
        for file, right in zip(files, threads.map(is_right, files), strict=True):
            if not right:
                return f"{file.name} does not have the recorded sha256"
    return None


def read_record(folder: Path) -> Record:
    """Read what a checkpoint says of itself.

    Raises:
        BadInput: There is no record, or it is damaged or of another version of Kiln.
    """
    path = folder / RECORD
    try:
        told: dict[str, Any] = json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"{path} is missing or cut off; the checkpoint does not count") from error
    schema = told.pop("schema", None)
    if schema != SCHEMA:
        raise BadInput(f"{path} has schema {schema}, this Kiln reads {SCHEMA}")
    return Record(
        **{
            **told,
            "state": TrainState(**told["state"]),
            "files": [File(**file) for file in told["files"]],
        }
    )


def record_json(record: Record) -> dict[str, Any]:
    """Give what `read_record` reads."""
    return {"schema": SCHEMA, **asdict(record)}


def read_state(folder: Path) -> TrainState:
    """Read where a checkpoint stands, without its tensors."""
    return read_record(folder).state


def load(folder: Path, tensors: Tensors, shapes: Mapping[str, Sequence[int]]) -> Record:
    """Fill one rank's tensors from a checkpoint of any world size and ZeRO stage.

    Args:
        folder: Of the checkpoint.
        tensors: To fill, whichever kinds.
        shapes: Of the network's parameters.

    Raises:
        BadInput: The checkpoint is of another network, or has other averages.
    """
    record = read_record(folder)
    _check_network(folder, record.shapes, shapes)
    pieces = _Pieces(folder, record, tensors.keys())
    with torch.no_grad():
        read_wanted(
            want
            for kind, named in tensors.items()
            for key, target in named.items()
            for want in pieces.find(kind, *_split(key), target)
        )
    return record


class _Pieces:
    """The flat ranges in all ranks' files, found by tensor name; any range can be read back."""

    def __init__(self, folder: Path, record: Record, kinds: Collection[Kind]) -> None:
        self._folder = folder
        self._places: dict[tuple[Kind, str], list[tuple[int, Stored]]] = {}
        for file in record.of(kinds):
            for key, stored in stored_tensors(folder / file.name).items():
                tensor, start = _split(key)
                self._places.setdefault((file.kind, tensor), []).append((start, stored))

    def find(self, kind: Kind, tensor: str, start: int, target: Tensor) -> Iterator[Any]:
        """Yield what to read for the range [start, start + len(target)) of a flattened tensor."""
        missing = target.numel()
        for piece_start, stored in self._places.get((kind, tensor), []):
            low = max(start, piece_start)
            high = min(start + target.numel(), piece_start + stored.shape[0])
            if low < high:
                yield stored.range(low - piece_start, target[low - start : high - start])
                missing -= high - low
        if missing:
            raise BadInput(
                f"{self._folder} lacks {missing} of {target.numel()} numbers of {kind} {tensor}. "
                "Resume with the ema.* and optim.* settings it was saved with, or choose another "
                "run=."
            )


_THINNED = "thinned"


def _split(key: str) -> tuple[str, int]:
    name, _, start = key.rpartition("@")
    return name, int(start)


def _check_network(
    folder: Path, saved: Mapping[str, Sequence[int]], ours: Mapping[str, Sequence[int]]
) -> None:
    for name in (*saved, *ours):
        got, need = saved.get(name), ours.get(name)
        if got is None or need is None or list(got) != list(need):
            raise BadInput(
                f"{folder} is of another network: its {name} is {_shape(got)}, this one's is "
                f"{_shape(need)}. Use the config it was trained with, or choose another run=, "
                "which may begin with these weights: start_from=."
            )


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "a number"
