"""Checkpoints that are complete or absent: safetensors fragments, hashed, published by a rename."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.publish import file_sha256, publish_json
from trainer.errors import BadInput, BadWorld
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema
from trainer.runtime.fragments import MOMENTS, FragmentReader

log = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]
SCHEMA = 1
_RECORD = "checkpoint.json"


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


def save(
    root: Path,
    state: TrainState,
    fragments: FragmentReader,
    ema: Ema,
    comm: Comm,
    *,
    shapes: dict[str, list[int]],
    keep_last: int,
) -> Path:
    """Write one checkpoint from all ranks, publish it, then delete what is too old.

    Args:
        root: The run's `checkpoints` folder.
        state: Where training stands.
        fragments: This rank's weights and moments.
        ema: This rank's averages.
        comm: All ranks must call together.
        shapes: Full shape of every parameter, to put fragments together without the model.
        keep_last: Complete checkpoints that stay.

    Raises:
        BadWorld: A rank could not write; nothing was published and older checkpoints stand.
    """
    final = root / f"step_{state.step:08d}"
    partial = root / f".{final.name}.partial"
    if comm.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier()
    failure: OSError | SafetensorError | None = None
    try:
        _write_rank(partial, comm.rank, fragments, ema)
    except (OSError, SafetensorError) as error:
        failure = error
    if comm.sum([float(failure is not None)])[0]:
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = failure or "another rank's write failed; its log says why"
        raise BadWorld(
            f"rank {comm.rank} could not save {final}: {reason}. Older checkpoints in {root} are "
            "untouched; make room or choose another run=, then give the same command again."
        ) from failure
    if comm.rank == 0:
        _publish(partial, final, state, shapes, world=comm.world, adam_steps=fragments.adam_steps)
        for old in complete(root)[:-keep_last]:
            shutil.rmtree(old)
    comm.barrier()
    return final


def newest_valid(root: Path) -> Path | None:
    """Find the newest checkpoint whose files are all there and hash right; say which are not."""
    for folder in reversed(complete(root)):
        problem = verify(folder)
        if problem is None:
            return folder
        log.warning("%s is damaged (%s); trying the one before it", folder, problem)
    return None


def complete(root: Path) -> list[Path]:
    """List published checkpoints, oldest first; a folder without its record does not count."""
    return sorted(path.parent for path in root.glob(f"step_*/{_RECORD}"))


def verify(folder: Path) -> str | None:
    """Re-hash every file of a checkpoint; return what is wrong, or None."""
    try:
        record = _read_record(folder)
    except BadInput as error:
        return str(error)
    for name, facts in record["files"].items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, needs {facts['bytes']}"
        if file_sha256(path) != facts["sha256"]:
            return f"{name} does not have the recorded sha256"
    return None


def load(folder: Path, fragments: FragmentReader, ema: Ema) -> TrainState:
    """Fill this rank's fragments from a checkpoint of any world size and ZeRO stage.

    Raises:
        BadInput: The checkpoint is of another network.
    """
    record = _read_record(folder)
    pieces = _Pieces(folder, record["files"])
    for fragment, average in zip(fragments, ema.tensors(), strict=True):
        targets = {"weight": fragment.weight, "ema": average, **fragment.moments}
        for kind, target in targets.items():
            pieces.fill(f"{kind}/{fragment.name}", fragment.start, target)
    fragments.publish()
    fragments.adam_steps = record["adam_steps"]
    return TrainState(**record["state"])


def read_state(folder: Path) -> TrainState:
    """Read where a checkpoint stands, without its tensors."""
    return TrainState(**_read_record(folder)["state"])


def weights_fingerprint(folder: Path) -> str:
    """Hash the hashes that a checkpoint has of its files: one name for all its weights."""
    files = _read_record(folder)["files"]
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_weights(
    run: Path, which: Weights, *, checkpoint: Path | None = None
) -> tuple[dict[str, Tensor], TrainState]:
    """Put the weights of a run's newest valid checkpoint together; reads nothing else.

    Args:
        run: Run directory.
        which: Their exponential moving averages, or the weights as the optimizer left them.
        checkpoint: Another checkpoint than the newest.

    Returns:
        Every parameter by name, fp32 on CPU in its full shape, and where training stood.

    Raises:
        BadInput: The run has no valid checkpoint.
    """
    folder = checkpoint or newest_valid(run / "checkpoints")
    if folder is None:
        raise BadInput(
            f"{run} has no complete checkpoint; train it first: kiln train run={run} ..."
        )
    record = _read_record(folder)
    pieces = _Pieces(folder, record["files"])
    kind = {"ema": "ema", "raw": "weight"}[which]
    weights = {}
    for name, shape in record["shapes"].items():
        weights[name] = torch.empty(shape)
        pieces.fill(f"{kind}/{name}", 0, weights[name].view(-1))
    return weights, TrainState(**record["state"])


class _Pieces:
    """The 1-D pieces of all ranks' files, found by tensor name; any range can be read back."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {
            name: safe_open(folder / name, framework="pt") for name in sorted(names)
        }
        self._places: dict[str, list[tuple[int, str, str]]] = {}
        for file, handle in self._files.items():
            for key in handle.keys():  # noqa: SIM118 - no mapping
                tensor, _, start = key.rpartition("@")
                self._places.setdefault(tensor, []).append((int(start), file, key))

    def fill(self, tensor: str, start: int, target: Tensor) -> None:
        """Copy the range [start, start + len(target)) of a flattened tensor into `target`."""
        missing = target.numel()
        for piece_start, file, key in self._places.get(tensor, []):
            source = self._files[file].get_slice(key)
            low = max(start, piece_start)
            high = min(start + target.numel(), piece_start + source.get_shape()[0])
            if low < high:
                part = source[low - piece_start : high - piece_start]
                target[low - start : high - start].copy_(part)
                missing -= high - low
        if missing:
            raise BadInput(
                f"{self._folder} lacks {missing} of {target.numel()} numbers of {tensor}: it was "
                "saved from another network. Use the config it was trained with, or another run=."
            )


def _write_rank(folder: Path, rank: int, fragments: FragmentReader, ema: Ema) -> None:
    tensors = dict(_named_tensors(fragments, ema))
    path = folder / f"rank_{rank:05d}.safetensors"
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    facts = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def _named_tensors(fragments: FragmentReader, ema: Ema) -> Iterator[tuple[str, Tensor]]:
    for fragment, average in zip(fragments, ema.tensors(), strict=True):
        place = f"{fragment.name}@{fragment.start}"
        yield f"weight/{place}", fragment.weight.detach().contiguous()
        yield f"ema/{place}", average
        for key in MOMENTS:
            yield f"{key}/{place}", fragment.moments[key].contiguous()


def _publish(
    partial: Path,
    final: Path,
    state: TrainState,
    shapes: dict[str, list[int]],
    *,
    world: int,
    adam_steps: int,
) -> None:
    files = {}
    for rank in range(world):
        facts = partial / f"rank_{rank:05d}.json"
        files[f"rank_{rank:05d}.safetensors"] = json.loads(facts.read_text(encoding="utf-8"))
        facts.unlink()
    record = {
        "schema": SCHEMA,
        "state": asdict(state),
        "adam_steps": adam_steps,
        "files": files,
        "shapes": shapes,
    }
    publish_json(partial / _RECORD, record)
    # A step saved again after a resume replaces the old folder, which is damaged or equal.
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise BadInput(f"{path} is missing or cut off; the checkpoint does not count") from error
    if record.get("schema") != SCHEMA:
        raise BadInput(f"{path} has schema {record.get('schema')}, this Kiln reads {SCHEMA}")
    return record
