"""Take samples out of a dataset, or let them count less, without a change to any tar.

`tombstones.parquet` and `weights.parquet` name samples by key, so they outlive every tar that is
made again. From them and the indexes come `weights/00000.npy`, one number per row of a shard: all
that a reader needs. A removed row has minus the version at which it went, so that who began before
that version still knows it as one that was live.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trainer.data.manifest import Manifest, RowWeights, ShardEntry, save_manifest
from trainer.data.npy import read_npy
from trainer.data.publish import file_sha256, publish_bytes, published
from trainer.data.shards import key_ids, read_index
from trainer.errors import BadInput
from trainer.place import read_bytes, remove

TOMBSTONES = "tombstones.parquet"
CLUSTER_WEIGHTS = "weights.parquet"
HISTORY = "history.jsonl"
REMOVAL_SCHEMA = pa.schema([("key", pa.uint64()), ("url", pa.string()), ("why", pa.string())])
"""Of a sample to remove: its key, the URL that must not come back (null: it may), and why."""
TOMBSTONE_SCHEMA = REMOVAL_SCHEMA.append(pa.field("version", pa.int32()))
"""Of a removed sample: the same, and the removal version at which it went."""
WEIGHT_SCHEMA = pa.schema([("key", pa.uint64()), ("weight", pa.float32())])
"""Of a sample that counts less than 1: its key and its weight."""

REPAIR_WEIGHTS = "Give the dataset's `kiln prepare` command again: it makes the weights anew."

Uint64s = NDArray[np.uint64]


def key_numbers(index: pa.Table) -> Uint64s:
    """Give the ids of an index's keys as they are written in hexadecimal: without a sign."""
    return key_ids(index["key"].to_pylist()).view(np.uint64)


def read_tombstones(dataset: Path, columns: Iterable[str] | None = None) -> pa.Table:
    """Read who was removed, in order of keys; empty if nobody was."""
    names = list(columns or TOMBSTONE_SCHEMA.names)
    table = _read(dataset / TOMBSTONES, TOMBSTONE_SCHEMA, names)
    if "version" in names and "version" not in table.column_names:
        # Written before removals had versions.
        ones = np.ones(len(table), np.int32)
        table = table.append_column("version", pa.array(ones)).select(names)
    return table


def read_cluster_weights(dataset: Path) -> pa.Table:
    """Read which samples have a weight below 1, in order of keys; empty if none has."""
    return _read(dataset / CLUSTER_WEIGHTS, WEIGHT_SCHEMA)


def removed_urls(dataset: Path) -> list[str]:
    """List the URLs that must not be downloaded again."""
    urls = read_tombstones(dataset, ["url"])["url"]
    return sorted(set(urls.drop_null().to_pylist()))


def add_tombstones(dataset: Path, added: pa.Table, *, version: int) -> int:
    """Remove more samples; none ever comes back. Publishes no manifest.

    A sample that was removed before keeps its version and its line, but a line without a URL yields
    to one with.

    Args:
        dataset: The folder.
        added: Of the schema `REMOVAL_SCHEMA`, in any order.
        version: At which they go: one more than the manifest's if any of them is live.

    Returns:
        How many lines are new or new in kind.
    """
    before = read_tombstones(dataset)
    versions = pa.array(np.full(len(added), version, np.int32))
    new = added.cast(REMOVAL_SCHEMA).append_column("version", versions)
    both = pa.concat_tables([before, new])
    order = pa.table(
        {
            "key": both["key"],
            "open": pc.is_null(both["url"]),
            "idx": pa.array(np.arange(len(both))),
        }
    ).sort_by([("key", "ascending"), ("open", "ascending"), ("idx", "ascending")])
    keys = order["key"].to_numpy()
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    chosen = order["idx"].to_numpy()[first]
    num_new = int((chosen >= len(before)).sum())
    if num_new:
        table = both.take(pa.array(chosen))
        first_versions = table["version"].to_numpy().copy()
        there, places = find_sorted(keys[first], before["key"].to_numpy())
        first_versions[there] = before["version"].to_numpy()[places]
        _write(
            dataset / TOMBSTONES,
            table.drop_columns("version").append_column("version", pa.array(first_versions)),
        )
    return num_new


def save_cluster_weights(dataset: Path, weights: pa.Table) -> None:
    """Replace all weights below 1 by these, in any order. Publishes no manifest."""
    path = dataset / CLUSTER_WEIGHTS
    if len(weights):
        _write(path, weights.cast(WEIGHT_SCHEMA).sort_by("key"))
    else:
        remove(path)


def weigh(
    dataset: Path, manifest: Manifest, *, on_shard: Callable[[int], None] = lambda rows: None
) -> Manifest:
    """Write the row weights of all shards; return the manifest that lists them.

    Args:
        dataset: The folder.
        manifest: Lists the shards; it is not saved.
        on_shard: Called with the rows of each shard when it is done.
    """
    tombstones = read_tombstones(dataset, ["key", "version"])
    dead, versions = tombstones["key"].to_numpy(), tombstones["version"].to_numpy()
    lighter = read_cluster_weights(dataset)
    keys, weights = lighter["key"].to_numpy(), lighter["weight"].to_numpy()
    found: dict[str, RowWeights] = {}
    for shard in manifest.shards:
        path = row_weights_path(dataset, shard.number)
        if len(dead) or len(keys):
            own = key_numbers(read_index(shard.index(dataset), columns=["key"]))
            row_weights = np.ones(len(own), np.float32)
            there, places = find_sorted(own, keys)
            row_weights[there] = weights[places]
            there, places = find_sorted(own, dead)
            row_weights[there] = -versions[places]
            if (row_weights < 1).any():
                found[shard.number] = _save_row_weights(path, row_weights)
        if shard.number not in found:
            remove(path)
        on_shard(shard.count)
    return replace(
        manifest,
        weights=found,
        removal_version=int(versions.max(initial=0)),
        tombstones_sha256=_sha256(dataset / TOMBSTONES),
        cluster_weights_sha256=_sha256(dataset / CLUSTER_WEIGHTS),
    )


def is_weighed(dataset: Path, manifest: Manifest) -> bool:
    """Whether the manifest knows the tombstones and weights that are there."""
    known = (manifest.tombstones_sha256, manifest.cluster_weights_sha256)
    return known == (_sha256(dataset / TOMBSTONES), _sha256(dataset / CLUSTER_WEIGHTS))


def find_sorted(wanted: Uint64s, among: Uint64s) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the places in `wanted` of what `among`, which is sorted, has, and where it has it."""
    if not len(among):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    places = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    there = np.flatnonzero(among[places] == wanted)
    return there, places[there]


def row_weights_path(dataset: Path, number: str) -> Path:
    """Where the weights of a shard's samples lie."""
    return dataset / "weights" / f"{number}.npy"


def read_row_weights(
    dataset: Path, shard: ShardEntry, expected: RowWeights | None
) -> NDArray[np.float32]:
    """Read what each sample of a shard counts: 1 for most, minus their version for removed ones.

    Raises:
        BadInput: The file is not the one that the manifest lists.
    """
    if expected is None:
        return np.ones(shard.count, np.float32)
    path = row_weights_path(dataset, shard.number)
    if not path.exists():
        raise BadInput(f"{path} is not there, the manifest lists it. {REPAIR_WEIGHTS}")
    if file_sha256(path) != expected.sha256:
        raise BadInput(
            f"{path} is not what the manifest said when it was read: samples were removed or "
            f"weighted since, or it is damaged. Start again; if that does not help: "
            f"{REPAIR_WEIGHTS}"
        )
    return read_npy(read_bytes(path))


def live_rows(weights: NDArray[np.float32], version: int) -> NDArray[np.int64]:
    """Give the rows that were live at a removal version, those that were removed since among them.

    Args:
        weights: ``(rows,)`` of a shard, from `read_row_weights`.
        version: 0 is before any removal.
    """
    return np.flatnonzero((weights > 0) | removed_since(weights, version))


def removed_since(weights: NDArray[np.float32], version: int) -> NDArray[np.bool_]:
    """Say of each row whether it was live at a removal version and is not now."""
    return weights < -version


def removed_by_version(weights: NDArray[np.float32]) -> dict[int, int]:
    """Count the removed rows: removal version -> rows, in order of versions."""
    versions, counts = np.unique(-weights[weights <= 0].astype(np.int64), return_counts=True)
    return dict(zip(versions.tolist(), counts.tolist(), strict=True))


def save_state(dataset: Path, manifest: Manifest, *, why: str, parent: str | None = None) -> None:
    """Save the manifest, and record in `history.jsonl` what its fingerprint came from, and why.

    Args:
        dataset: The folder.
        manifest: The new one.
        why: The command that changed the dataset, in words.
        parent: Fingerprint of the state before; None is the last that was recorded.
    """
    path = dataset / HISTORY
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        states = [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path} is damaged ({error}): put it back from a copy, or remove the wrong line."
        ) from error
    state = {
        "fingerprint": manifest.fingerprint,
        "why": why,
        "rows_kept": manifest.rows_kept,
        "removal_version": manifest.removal_version,
        "rows_removed": manifest.rows_removed,
        "rows_weighted": manifest.rows_weighted,
    }
    if not states or states[-1]["fingerprint"] != manifest.fingerprint:
        state["parent"] = parent or (states[-1]["fingerprint"] if states else None)
        publish_bytes(path, f"{text}{json.dumps(state, sort_keys=True)}\n".encode())
    save_manifest(dataset, manifest)


def _save_row_weights(path: Path, weights: NDArray[np.float32]) -> RowWeights:
    with published(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array(file, weights, version=(1, 0), allow_pickle=False)
    return RowWeights(
        removed=removed_by_version(weights),
        weighted=int(((weights > 0) & (weights < 1)).sum()),
        sha256=file_sha256(path),
    )


def _read(path: Path, schema: pa.Schema, columns: Iterable[str] | None = None) -> pa.Table:
    names = list(columns or schema.names)
    if not path.exists():
        return pa.table({name: pa.array([], schema.field(name).type) for name in names})
    try:
        with path.open("rb") as file:
            return pq.ParquetFile(file).read(names)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(
            f"{path} is no readable parquet file ({error}). It says which samples were removed or "
            "weighted: put it back from a copy."
        ) from error


def _write(path: Path, table: pa.Table) -> None:
    with published(path) as partial, partial.open("wb") as file:
        pq.write_table(table.combine_chunks(), file, compression="zstd")


def _sha256(path: Path) -> str | None:
    return file_sha256(path) if path.exists() else None
