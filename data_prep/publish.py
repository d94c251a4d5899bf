"""Take one unit from its rows to a published shard, a quarantine and the record of both."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data_prep.captions import clean_caption
from data_prep.config import CaptionsConfig, PrepareConfig
from data_prep.denied import DeniedContent
from data_prep.guard import scheme_problem
from data_prep.languages import sift_languages
from data_prep.plan import Unit, moved_keys, read_rows
from data_prep.policy import policy_denied, read_policy
from data_prep.quarantine import (
    SYSTEMIC,
    Reason,
    Rejected,
    count_reasons,
    reason_of,
    retried,
    write_quarantine,
)
from data_prep.rows import Row
from data_prep.scorers import Candidate, Judged, Measured, load_scoring, scorer_versions
from trainer.data.manifest import ShardEntry, describe_shard, publish_shard
from trainer.data.publish import publish_json
from trainer.data.shards import Sample
from trainer.data.tombstones import removed_urls
from trainer.errors import BadWorld
from trainer.place import read_bytes, remove, sizes_bytes, storage_errors

if TYPE_CHECKING:
    from data_prep.download import Fetched

MIN_SYSTEMIC_ROWS = 20
"""Fewer rows than this say nothing about the network or the tools."""
_QUOTED_CHARS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord:
    """Says that a unit is done, from what, and what became of its rows: `units/00000.json`."""

    input_sha256: str
    """Hash of the rows and the rules."""
    rows_in: int
    """Rows of the unit."""
    rejected: dict[str, int]
    """Reason -> rows."""
    quarantine_sha256: str
    """Hash of the unit's quarantine file."""
    shard: ShardEntry | None
    """What was published; None if no row was kept."""
    versions: dict[str, str] = field(default_factory=dict)
    """Tools that made it."""

    @property
    def rows_kept(self) -> int:
        """Samples in the shard."""
        return self.shard.count if self.shard else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Systemic:
    """Nearly all rows of the unit failed in ways that are not the rows' fault; it was dropped."""

    unit: str
    """Its name."""
    rows: int
    """How many rows failed so."""
    tried: int
    """How many were tried."""
    first: Rejected
    """The first that failed for the most frequent of these reasons."""


def record_path(dataset: Path, name: str) -> Path:
    """Where the record of a unit lies."""
    return dataset / "units" / f"{name}.json"


def quarantine_path(dataset: Path, name: str) -> Path:
    """Where the rejected rows of a unit lie."""
    return dataset / "quarantine" / f"{name}.jsonl"


def status_path(dataset: Path, name: str) -> Path:
    """Where it lies what the unit's worker is doing, or did; no part of the dataset's identity."""
    return dataset / "status" / f"{name}.json"


def read_record(dataset: Path, name: str) -> UnitRecord | None:
    """Read the record of a unit; None if the unit is not done."""
    try:
        return TypeAdapter(UnitRecord).validate_json(read_bytes(record_path(dataset, name)))
    except (FileNotFoundError, ValidationError):
        return None


def is_done(
    dataset: Path, unit: Unit, record: UnitRecord | None, *, rules_sha256: str, hashes: bool
) -> bool:
    """Whether a unit was published from these rows and rules, and its files are still right."""
    if record is None or record.input_sha256 != unit.input_sha256(rules_sha256):
        return False
    shard = record.shard
    try:
        quarantine = read_bytes(quarantine_path(dataset, unit.name))
        if hashlib.sha256(quarantine).hexdigest() != record.quarantine_sha256:
            return False
        if shard is None:
            return True
        if hashes:
            return describe_shard(dataset, shard.name, shard.count) == shard
    except FileNotFoundError:
        return False
    found = sizes_bytes([shard.tar(dataset), shard.index(dataset)])
    return found == [shard.bytes, shard.index_bytes]


def publish_unit(
    unit: Unit, cfg: PrepareConfig, rules_sha256: str, on_row: Callable[[bool], None]
) -> UnitRecord | Systemic:
    """Download a unit and publish it; the record is written last and makes it count as done."""
    with _status(unit, cfg.dataset) as status:
        result = _publish_unit(unit, cfg, rules_sha256, on_row)
        if isinstance(result, UnitRecord):
            status |= {"rows_kept": result.rows_kept, "rejected": result.rejected}
        else:
            status["systemic"] = asdict(result)
        status["state"] = "done" if isinstance(result, UnitRecord) else "systemic failure"
        return result


@contextmanager
def _status(unit: Unit, dataset: Path) -> Iterator[dict[str, Any]]:
    """Publish what a unit's worker is at, when it starts and when it ends."""
    path, started_s = status_path(dataset, unit.name), time.monotonic()
    status: dict[str, Any] = {
        "state": "running",
        "rows": unit.rows,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started_unix_s": round(time.time(), 3),
    }
    publish_json(path, status)
    status["state"] = "failed"
    try:
        yield status
    except BaseException as error:
        status["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        status["elapsed_s"] = round(time.monotonic() - started_s, 3)
        # What is wrong here is wrong for the unit as well, and reported there.
        with suppress(OSError, BadWorld), storage_errors(dataset):
            publish_json(path, status)


def _publish_unit(
    unit: Unit, cfg: PrepareConfig, rules_sha256: str, on_row: Callable[[bool], None]
) -> UnitRecord | Systemic:
    dataset, name = cfg.dataset, unit.name
    retract_unit(dataset, name)
    removed = frozenset(removed_urls(dataset))
    rows, moved = read_rows(dataset, unit), moved_keys(dataset, unit)
    rejected, candidates = sift(rows, cfg.captions, moved=moved, removed=removed)
    policy = read_policy(cfg.policy)
    if policy.languages:
        foreign, candidates = sift_languages(candidates, policy)
        rejected += foreign
    num_sifted = len(rejected)
    work = cfg.scratch_folder / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shard: ShardEntry | None = None
    try:
        if candidates:
            samples = _samples(candidates, work, cfg, rejected, on_row)
            shard = publish_shard(dataset, f"shards/{name}.tar", samples)
        if not cfg.download.accept_unreachable:
            problem = systemic(name, rejected, len(candidates), cfg.download.max_failed_frac)
            if problem is not None:
                retract_unit(dataset, name)
                return problem
        for _ in range(num_sifted):
            on_row(False)
        return _finish(unit, cfg, rules_sha256, rejected, shard)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def systemic(
    unit: str, rejected: Sequence[Rejected], tried: int, max_failed_frac: float
) -> Systemic | None:
    """Say whether so many rows failed for reasons of the network or of the tools that none counts.

    Args:
        unit: Its name.
        rejected: What became of the rows that were not kept.
        tried: Rows of which a download was tried.
        max_failed_frac: The largest share of them that is borne.
    """
    failed = [row for row in rejected if row.reason in SYSTEMIC]
    if tried < MIN_SYSTEMIC_ROWS or len(failed) <= max_failed_frac * tried:
        return None
    ((most, _),) = Counter(row.reason for row in failed).most_common(1)
    first = next(row for row in failed if row.reason == most)
    return Systemic(unit=unit, rows=len(failed), tried=tried, first=first)


def _finish(
    unit: Unit,
    cfg: PrepareConfig,
    rules_sha256: str,
    rejected: list[Rejected],
    shard: ShardEntry | None,
) -> UnitRecord:
    from data_prep.download import versions  # noqa: PLC0415 - imports img2dataset, seconds

    rejected.sort(key=lambda row: (row.key, row.reason, row.detail))
    kept = shard.count if shard else 0
    assert kept + len(rejected) == unit.rows, f"unit {unit.name}: rows do not add up"
    quarantine = quarantine_path(cfg.dataset, unit.name)
    quarantine_sha256 = write_quarantine(quarantine, rejected)
    record = UnitRecord(
        input_sha256=unit.input_sha256(rules_sha256),
        rows_in=unit.rows,
        rejected=count_reasons(rejected),
        quarantine_sha256=quarantine_sha256,
        shard=shard,
        versions=versions() | scorer_versions(cfg.scorers),
    )
    publish_json(record_path(cfg.dataset, unit.name), asdict(record))
    return record


def retract_unit(dataset: Path, name: str) -> None:
    """Remove what a unit published, the record first, so that it never vouches for half a unit."""
    remove(record_path(dataset, name))
    for path in (
        dataset / "shards" / f"{name}.tar",
        dataset / "index" / f"{name}.parquet",
        quarantine_path(dataset, name),
    ):
        remove(path)


def sift(
    rows: Iterable[Row],
    captions: CaptionsConfig,
    *,
    moved: Collection[str] = (),
    removed: Collection[str] = (),
) -> tuple[list[Rejected], list[Row]]:
    """Part rows into those that need not be fetched, with the reason, and the others, cleaned.

    Args:
        rows: Of one unit.
        moved: Keys of rows that a later unit tries again.
        captions: How they are cleaned; an original that differs is in `extra`.
        removed: URLs that were taken down.
    """
    rejected: list[Rejected] = []
    candidates: list[Row] = []
    for row in rows:
        if row.key in moved:
            rejected.append(retried(row.key, row.url))
        elif row.url in removed:
            rejected.append(_rejected(row, "source", Reason.REMOVED, "taken down by kiln remove"))
        elif problem := scheme_problem(row.url):
            rejected.append(_rejected(row, "source", Reason.SCHEME_REFUSED, problem))
        elif not (caption := clean_caption(row.caption, captions)):
            problem = f"nothing left of {row.caption[:_QUOTED_CHARS]!r}"
            rejected.append(_rejected(row, "source", Reason.MISSING_CAPTION, problem))
        elif caption == row.caption:
            candidates.append(row)
        else:
            extra = row.extra | {"caption_original": row.caption}
            candidates.append(replace(row, caption=caption, extra=extra))
    return rejected, candidates


def _rejected(row: Row, stage: str, reason: str, detail: str) -> Rejected:
    return Rejected(key=row.key, url=row.url, stage=stage, reason=str(reason), detail=detail)


def _samples(
    rows: list[Row],
    work: Path,
    cfg: PrepareConfig,
    rejected: list[Rejected],
    on_row: Callable[[bool], None],
) -> Iterator[Sample]:
    """Download rows and yield the samples in order of their keys; failures join `rejected`."""
    from data_prep.download import fetch  # noqa: PLC0415 - imports img2dataset, seconds

    # Before the download: weights that are no good stop the command.
    scoring = load_scoring(cfg.scorers, cfg.encode_format, cfg.quality)
    denied = policy_denied(cfg.policy)
    is_judged = scoring is not None or denied is not None

    def on_fetched(kept: bool) -> None:
        if not (kept and is_judged):
            on_row(kept)

    fetched = fetch([row.url for row in rows], work, cfg, on_fetched)
    candidates = _candidates(rows, fetched, rejected)
    if denied is not None:
        judged = ((found, _denied(found, denied)) for found in candidates)
        candidates = _passed(judged, "decode", rejected, on_row)
    if scoring is not None:
        candidates = _passed(scoring.judge(candidates), "score", rejected, on_row)
    for found in candidates:
        if is_judged:
            on_row(True)
        yield make_sample(found.row, found.image, found.facts, cfg.encode_format, found.measured)


def _candidates(
    rows: list[Row], fetched: Iterable["Fetched"], rejected: list[Rejected]
) -> Iterator[Candidate]:
    """Yield the rows that have a picture; the others join `rejected`."""
    for row, result in zip(rows, fetched, strict=True):
        if result.facts is None:
            reason, detail = reason_of(result.status, result.message)
            stage = "decode" if result.status == "failed_to_resize" else "download"
            rejected.append(_rejected(row, stage, reason, detail))
        else:
            measured: Measured = {"language": row.language} if row.language else {}
            yield Candidate(row, result.image, result.facts, measured)


def _denied(candidate: Candidate, denied: DeniedContent) -> tuple[Reason, str] | None:
    """Judge the stored bytes; the downloaded ones were judged before they were decoded."""
    found = denied.find(candidate.image)
    return (Reason.DENIED_CONTENT, found) if found else None


def _passed(
    judged: Iterable[Judged],
    stage: str,
    rejected: list[Rejected],
    on_row: Callable[[bool], None],
) -> Iterator[Candidate]:
    """Yield the candidates without a problem; the others join `rejected`."""
    for candidate, problem in judged:
        if problem is None:
            yield candidate
        else:
            on_row(False)
            rejected.append(_rejected(candidate.row, stage, *problem))


def make_sample(
    row: Row,
    image: bytes,
    facts: dict[str, Any],
    extension: str,
    measured: Measured = MappingProxyType({}),
) -> Sample:
    """Build what the tar and the index store for a kept row; both get what was measured."""
    phash = facts["phash"]
    about = {**row.extra, **facts, **measured, "phash": f"{phash:016x}"}
    about |= {"key": row.key, "url": row.url, "caption": row.caption}
    members = {
        extension: image,
        "json": json.dumps(about, sort_keys=True, ensure_ascii=False, default=str).encode(
            errors="replace"
        ),
        "txt": row.caption.encode(errors="replace"),
    }
    columns = {
        "width": facts["width"],
        "height": facts["height"],
        "original_width": facts["original_width"],
        "original_height": facts["original_height"],
        "caption_chars": len(row.caption),
        "image_sha256": hashlib.sha256(image).hexdigest(),
        "phash": np.uint64(phash),
        "host": urlsplit(row.url).hostname,
        **measured,
    }
    return Sample(row.key, members, columns)
