"""What must hold between the stages of a pipeline: judgements of facts, and how those are read."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from trainer.config_pipeline import GatesConfig
from trainer.data.manifest import Encoding, ShardEntry, encoding_folder, load_manifest
from trainer.data.publish import file_sha256
from trainer.data.tombstones import read_cluster_weights, read_tombstones
from trainer.place import NUM_REQUESTS, is_local, sizes_bytes


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What gates judge a dataset by."""

    dataset: str
    """Where it lies."""
    rows_in: int
    """Rows of its source."""
    rows_kept: int
    """Samples that became of them."""
    duplicates: int
    """Samples that are another one's duplicate; those that share a weight count in part."""
    damaged: tuple[str, ...]
    """Files of it that are missing, or not what was published; empty if nobody looked."""


def problems(stage: str, gates: GatesConfig, facts: Facts) -> Iterator[str]:
    """Say what does not hold before a stage: what was got, what is needed, what to change."""
    kept_frac = facts.rows_kept / max(1, facts.rows_in)
    if gates.min_kept_frac is not None and kept_frac < gates.min_kept_frac:
        yield (
            f"{facts.rows_kept} of {facts.rows_in} rows became samples, "
            f"{_percent(kept_frac)}, and gates.{stage}.min_kept_frac={gates.min_kept_frac:g} asks "
            f"for {_percent(gates.min_kept_frac)}. `kiln stats dataset={facts.dataset}` says why "
            "rows were rejected. Change the source or the words of prepare; or, if it is right, "
            f"give gates.{stage}.min_kept_frac={_below(kept_frac):g}."
        )
    duplicate_frac = facts.duplicates / max(1, facts.rows_kept)
    if gates.max_duplicate_frac is not None and duplicate_frac > gates.max_duplicate_frac:
        yield (
            f"{facts.duplicates} of {facts.rows_kept} samples are duplicates, "
            f"{_percent(duplicate_frac)}, and gates.{stage}.max_duplicate_frac="
            f"{gates.max_duplicate_frac:g} allows {_percent(gates.max_duplicate_frac)}. "
            f"{facts.dataset}/dedup.html shows them. Change the source or the words of dedup; or, "
            f"if it is right, give gates.{stage}.max_duplicate_frac="
            f"{1 - _below(1 - duplicate_frac):g}."
        )
    if gates.integrity and facts.damaged:
        yield (
            f"{len(facts.damaged)} files are missing, or not what was published, e.g. "
            f"{facts.damaged[0]}, and gates.{stage}.integrity=true asks for all. The same line "
            "again makes them anew, with the stages prepare and encode among its stages= and "
            "recheck=hashes."
        )


def _percent(frac: float) -> str:
    return f"{100 * frac:.1f} %"


def _below(frac: float) -> float:
    """Round down to three digits."""
    return int(frac * 1000) / 1000


def read_facts(dataset: Path, gates: GatesConfig, encodings: Sequence[Encoding] = ()) -> Facts:
    """Read what some gates need to know; hashes files only if they ask for it.

    Args:
        dataset: A published dataset.
        gates: What is asked.
        encodings: Whose files must be right, too.
    """
    manifest = load_manifest(dataset)
    found: list[str] = []
    if gates.integrity:
        found += damaged(dataset, manifest.shards)
        for encoding in encodings:
            found += damaged(encoding_folder(dataset, encoding.fingerprint), encoding.shards)
    return Facts(
        dataset=str(dataset),
        rows_in=manifest.rows_in,
        rows_kept=manifest.rows_kept,
        duplicates=count_duplicates(dataset),
        damaged=tuple(found),
    )


def count_duplicates(dataset: Path) -> int:
    """Count what `kiln dedup` removed so far; and of what it weighed all but one per cluster."""
    why = read_tombstones(dataset, ["why"])["why"]
    removed = pc.sum(pc.match_substring_regex(why, "^(exact|near)_duplicate of ")).as_py() or 0
    weights = read_cluster_weights(dataset)["weight"].to_numpy()
    return int(removed) + round(float((1 - weights).sum()))


def damaged(folder: Path, shards: Sequence[ShardEntry]) -> list[str]:
    """Name tars and indexes that are missing, or not what was published.

    Args:
        folder: Of a dataset or an encoding.
        shards: What it says it has.
    """
    files = [
        file
        for shard in shards
        for file in (
            (shard.tar(folder), shard.bytes, shard.content_sha256),
            (shard.index(folder), shard.index_bytes, shard.index_sha256),
        )
    ]

    def is_right(file: tuple[Path, int, str | None]) -> bool:
        path, num_bytes, sha256 = file
        if sizes_bytes([path]) != [num_bytes]:
            return False
        return sha256 is None or file_sha256(path) == sha256

    num_threads = len(os.sched_getaffinity(0)) if is_local(folder) else NUM_REQUESTS
    with ThreadPoolExecutor(num_threads) as threads:
        flags = list(threads.map(is_right, files))
    return [str(path) for (path, _, _), right in zip(files, flags, strict=True) if not right]
