"""Read a published dataset in full: hashes, indexes, counts, quarantine and encodings agree."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from data_prep.config import VerifyConfig
from data_prep.prepare import print_yield
from data_prep.quarantine import Reason, read_quarantine
from data_prep.verify_records import (
    REPAIR,
    REPAIR_PLAN,
    foreign_files,
    record_problems,
    sidecar_problems,
    state_problems,
)
from trainer.command import run_command
from trainer.data.index import Window, scan_foreign, with_prefix
from trainer.data.manifest import (
    ENCODING,
    MANIFEST,
    REPAIR_ENCODING,
    Manifest,
    ShardEntry,
    encoding_folder,
    list_encodings,
    load_manifest,
)
from trainer.data.null_text import read_null_text
from trainer.data.publish import file_sha256
from trainer.data.shards import Shard, key_ids, read_index
from trainer.data.tombstones import (
    CLUSTER_WEIGHTS,
    REPAIR_WEIGHTS,
    TOMBSTONES,
    read_cluster_weights,
    read_row_weights,
    read_tombstones,
    removed_by_version,
    row_weights_path,
)
from trainer.errors import BadInput
from trainer.observe.countdown import Countdown
from trainer.place import open_sparsely, storage

REPAIR_INDEX = (
    "Its tar is not Kiln's: put it back as it was, or give the `kiln index` command again."
)


def main(argv: Sequence[str]) -> int:
    """Run `kiln verify`."""
    return run_command(run, VerifyConfig, "verify", argv)


def run(cfg: VerifyConfig) -> int:
    """Print what was read and every problem; 1 if there is any."""
    with storage(cfg.dataset):
        return _run(cfg)


def _run(cfg: VerifyConfig) -> int:
    manifest = load_manifest(cfg.dataset)
    problems: list[str] = []
    num_read = Counter[str]()
    with Countdown("reading", manifest.rows_kept) as progress:
        keys: dict[str, list[str]] = {}
        for entry in manifest.shards:
            problems += shard_problems(cfg.dataset, entry, keys, repair=REPAIR)
            num_read["shards"] += 1
            num_read["samples"] += entry.count
            progress.update(num_read["samples"])
        progress.finish()
    problems += repeated_keys(keys)
    problems += weight_problems(cfg.dataset, manifest, keys)
    problems += quarantine_problems(cfg.dataset, manifest)
    problems += record_problems(cfg.dataset, manifest)
    problems += state_problems(cfg.dataset, manifest)
    try:
        encodings = list_encodings(cfg.dataset)
        for fingerprint, found in encoding_problems(cfg.dataset, manifest, keys):
            num_read[f"encoding {fingerprint[:12]}"] += 1
            problems += found
    except BadInput as error:
        problems.append(str(error))
        encodings = []
    for folder in sorted(cfg.dataset.glob("encodings/*/index")):
        if not (folder.parent / ENCODING).exists():
            num_read[f"encoding {folder.parent.name[:12]}, unfinished"] = 0
    for encoding in encodings:
        problems += sidecar_problems(cfg.dataset, encoding)
    problems += foreign_files(cfg.dataset, manifest, encodings)
    print_yield(manifest)
    _print_read(cfg.dataset, num_read, problems)
    return 1 if problems else 0


def shard_problems(
    folder: Path, entry: ShardEntry, keys: dict[str, list[str]], *, repair: str
) -> Iterator[str]:
    """Compare one tar and its index with the manifest and with each other; reads the tar once.

    Args:
        folder: Dataset or encoding.
        entry: What the manifest says.
        keys: Gets the shard's keys, under its number.
        repair: What to do about a problem.
    """
    tar, index_path = entry.tar(folder), entry.index(folder)
    whole = entry.content_sha256 is not None
    repair = repair if entry.at is None else REPAIR_INDEX
    try:
        index = read_index(index_path, repair=repair)
        with Shard(tar, index, whole=whole, repair=repair) as shard:
            scanned, headers_sha256 = scan_like(entry, shard, repair=repair)
            for path, got, expected in (
                (tar, shard.sha256() if whole else headers_sha256, entry.sha256),
                (index_path, file_sha256(index_path), entry.index_sha256),
            ):
                if got != expected:
                    yield (
                        f"{path} has sha256 {got[:16]}..., the manifest says {expected[:16]}... "
                        f"{repair}"
                    )
            if entry.count != index.num_rows:
                yield (
                    f"{index_path} has {index.num_rows} rows, the manifest says {entry.count}. "
                    f"{repair}"
                )
            if not scanned.equals(
                index.select([n for n in scanned.column_names if n in index.schema.names])
            ):
                yield f"{tar} holds other members than {index_path} says. {repair}"
                return
            keys[entry.number] = index["key"].to_pylist()
            if "image_sha256" in index.column_names:
                yield from image_problems(shard, index, repair=repair)
    except BadInput as error:
        yield str(error)
    except (KeyError, ValueError, TypeError) as error:  # a readable index of another table
        yield f"{index_path} is no index of {tar} ({error!r}). {repair}"


def scan_like(entry: ShardEntry, shard: Shard, *, repair: str) -> tuple[pa.Table, str]:
    """Make the member part of a shard's index from its tar; the hash of foreign headers besides."""
    if entry.at is None:
        return shard.scan(), ""
    scan = scan_foreign(Window(shard.blob), repair=repair)
    by_tar = with_prefix(scan.index, entry.number)
    same = by_tar["key"].to_pylist() == shard.keys
    return by_tar if same else scan.index, scan.sha256


def image_problems(shard: Shard, index: pa.Table, *, repair: str) -> Iterator[str]:
    """Compare the stored pictures with their hashes in the index."""
    for row, expected in enumerate(index["image_sha256"].to_pylist()):
        pictures = set(shard.extensions(row)) - {"json", "txt"}
        if len(pictures) != 1:
            yield f"{shard.path}: {shard.keys[row]} has {len(pictures)} pictures. {repair}"
            continue
        (extension,) = pictures
        if hashlib.sha256(shard.read(row, extension)).hexdigest() != expected:
            key = shard.keys[row]
            yield f"{shard.path}: {key}.{extension} is not what the index says. {repair}"


def repeated_keys(keys: dict[str, list[str]]) -> Iterator[str]:
    """Name keys that are in more than one place."""
    counts = Counter(key for shard in keys.values() for key in shard)
    repeated = sorted(key for key, count in counts.items() if count > 1)
    if repeated:
        yield f"{len(repeated)} keys are there more than once, e.g. {repeated[0]}. {REPAIR}"


def quarantine_problems(dataset: Path, manifest: Manifest) -> Iterator[str]:
    """Compare the quarantine files with the manifest: rows in == kept + rejected."""
    counts: Counter[str] = Counter()
    for path in sorted((dataset / "quarantine").glob("plan-*.parquet")):
        try:
            with open_sparsely(path) as file:
                counts.update(pq.read_table(file, columns=["reason"])["reason"].to_pylist())
        except (pa.ArrowInvalid, OSError) as error:
            yield f"{path} is no readable parquet file ({error}). {REPAIR_PLAN}"
    for path in sorted((dataset / "quarantine").glob("*.jsonl")):
        try:
            counts.update(row.reason for row in read_quarantine(path))
        except BadInput as error:
            yield str(error)
    del counts[Reason.RETRIED]  # those rows are counted where they were tried again
    for reason in sorted(set(counts) | set(manifest.rejected)):
        expected = manifest.rejected.get(reason, 0)
        if counts[reason] != expected:
            yield (
                f"{dataset / 'quarantine'} has {counts[reason]} rows for {reason}, the manifest "
                f"says {expected}. {REPAIR}"
            )


def weight_problems(dataset: Path, manifest: Manifest, keys: dict[str, list[str]]) -> Iterator[str]:
    """Compare the weights of all rows with the manifest, the tombstones and the cluster weights."""
    for name, expected in (
        (TOMBSTONES, manifest.tombstones_sha256),
        (CLUSTER_WEIGHTS, manifest.cluster_weights_sha256),
    ):
        path = dataset / name
        found = file_sha256(path) if path.exists() else None
        if found != expected:
            yield (
                f"{path} has sha256 {found and found[:16]}, the manifest says "
                f"{expected and expected[:16]}. {REPAIR_WEIGHTS}"
            )
    try:
        tombstones, lighter = read_tombstones(dataset), read_cluster_weights(dataset)
    except BadInput as error:
        yield str(error)
        return
    due = dict(zip(lighter["key"].to_pylist(), lighter["weight"].to_pylist(), strict=True))
    versions = tombstones["version"].to_pylist()
    due |= dict(zip(tombstones["key"].to_pylist(), (-float(v) for v in versions), strict=True))
    if manifest.removal_version != max(versions, default=0):
        yield (
            f"{dataset / MANIFEST} has removal version {manifest.removal_version}, {TOMBSTONES} "
            f"has {max(versions, default=0)}. {REPAIR_WEIGHTS}"
        )
    for shard in manifest.shards:
        try:
            weights = read_row_weights(dataset, shard, manifest.weights.get(shard.number))
        except BadInput as error:
            yield str(error)
            continue
        listed = manifest.weights.get(shard.number)
        if listed and listed.removed != removed_by_version(weights):
            yield (
                f"{dataset / MANIFEST} counts other removals in shard {shard.number} than "
                f"{row_weights_path(dataset, shard.number)} has. {REPAIR_WEIGHTS}"
            )
        numbers = key_ids(keys.get(shard.number, [])).view(np.uint64).tolist()
        wanted = [due.get(number, 1.0) for number in numbers]
        if wanted and weights.tolist() != wanted:
            yield (
                f"{row_weights_path(dataset, shard.number)} is not what {TOMBSTONES} and "
                f"{CLUSTER_WEIGHTS} say of its samples. {REPAIR_WEIGHTS}"
            )


def encoding_problems(
    dataset: Path, manifest: Manifest, keys: dict[str, list[str]]
) -> Iterator[tuple[str, list[str]]]:
    """Check every encoding's files, and that it has the dataset's keys and its own buckets."""
    for encoding in list_encodings(dataset):
        folder = encoding_folder(dataset, encoding.fingerprint)
        found: list[str] = []
        if encoding.dataset_fingerprint != manifest.shards_fingerprint:
            found.append(f"{folder} was made from another state of the dataset. {REPAIR_ENCODING}")
        try:
            read_null_text(folder, sha256=encoding.facts.get("null_text_sha256"))
        except BadInput as error:
            found.append(str(error))
        encoded: dict[str, list[str]] = {}
        for place, entry in enumerate(encoding.shards):
            found += shard_problems(folder, entry, encoded, repair=REPAIR_ENCODING)
            if encoded.get(entry.number) != keys.get(entry.number):
                found.append(
                    f"{entry.tar(folder)} has other keys than the dataset's shard "
                    f"{entry.number}. {REPAIR_ENCODING}"
                )
            if entry.number in encoded:
                index = read_index(entry.index(folder), columns=["bucket"])
                listed = {name: counts[place] for name, counts in encoding.bucket_counts.items()}
                buckets = index["bucket"].to_pylist() if index.num_columns else []
                if Counter(listed) != Counter(buckets):
                    found.append(
                        f"{entry.index(folder)} has other buckets than {folder / ENCODING} counts. "
                        f"{REPAIR_ENCODING}"
                    )
        yield encoding.fingerprint, found


def _print_read(dataset: Path, num_read: Counter[str], problems: list[str]) -> None:
    table = Table("read", "number", title=f"{dataset}: {len(problems) or 'no'} problems")
    for name, count in num_read.items():
        table.add_row(name, str(count))
    console = Console(soft_wrap=True)
    console.print(table)
    for problem in problems:
        console.print(f"- {problem}", markup=False, highlight=False)
