"""Take one unit from its rows to a published shard, a quarantine and the record of both."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_prep.config import PrepareConfig
from data_prep.guard import scheme_problem
from data_prep.quarantine import (
    UNREACHED,
    Reason,
    Rejected,
    count_reasons,
    reason_of,
    write_quarantine,
)
from data_prep.rows import Row, Unit
from trainer.data.manifest import ShardEntry, describe_shard
from trainer.data.publish import file_sha256, publish_json
from trainer.data.shards import Sample, write_shard

WORK = ".work"


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
class Unreachable:
    """Not one row of the unit could be fetched, and nothing was published."""

    unit: str
    """Its name."""
    rows: int
    """How many rows were tried."""
    first: Rejected
    """The first of them, as an example."""


def record_path(dataset: Path, name: str) -> Path:
    """Where the record of a unit lies."""
    return dataset / "units" / f"{name}.json"


def quarantine_path(dataset: Path, name: str) -> Path:
    """Where the rejected rows of a unit lie."""
    return dataset / "quarantine" / f"{name}.jsonl"


def read_record(dataset: Path, name: str) -> UnitRecord | None:
    """Read the record of a unit; None if the unit is not done."""
    try:
        return TypeAdapter(UnitRecord).validate_json(record_path(dataset, name).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def is_done(
    dataset: Path, unit: Unit, record: UnitRecord | None, *, rules_sha256: str, hashes: bool
) -> bool:
    """Whether a unit was published from these rows and rules, and its files are still right."""
    if record is None or record.input_sha256 != unit.input_sha256(rules_sha256):
        return False
    quarantine = quarantine_path(dataset, unit.name)
    if not quarantine.exists() or file_sha256(quarantine) != record.quarantine_sha256:
        return False
    shard = record.shard
    if shard is None:
        return True
    if hashes:
        try:
            return describe_shard(dataset, shard.name, shard.count) == shard
        except FileNotFoundError:
            return False
    files = ((shard.tar(dataset), shard.bytes), (shard.index(dataset), shard.index_bytes))
    return all(path.exists() and path.stat().st_size == size for path, size in files)


def publish_unit(
    unit: Unit, cfg: PrepareConfig, rules_sha256: str, on_row: Callable[[bool], None]
) -> UnitRecord | Unreachable:
    """Download a unit and publish it; the record is written last and makes it count as done."""
    dataset, name = cfg.dataset, unit.name
    retract_unit(dataset, name)
    rejected, candidates = sift(unit.rows)
    num_sifted = len(rejected)
    work = dataset / WORK / name
    work.mkdir(parents=True)
    shard: ShardEntry | None = None
    try:
        if candidates:
            samples = _samples(candidates, work, cfg, rejected, on_row)
            shard = _publish_shard(dataset, f"shards/{name}.tar", samples)
        if shard is None and not cfg.download.accept_unreachable:
            unreached = [row for row in rejected if row.reason in UNREACHED]
            if candidates and len(unreached) == len(candidates):
                return Unreachable(unit=name, rows=len(unreached), first=unreached[0])
        for _ in range(num_sifted):
            on_row(False)
        return _finish(unit, cfg, rules_sha256, rejected, shard)
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    assert kept + len(rejected) == len(unit.rows), f"unit {unit.name}: rows do not add up"
    quarantine = quarantine_path(cfg.dataset, unit.name)
    write_quarantine(quarantine, rejected)
    record = UnitRecord(
        input_sha256=unit.input_sha256(rules_sha256),
        rows_in=len(unit.rows),
        rejected=count_reasons(rejected),
        quarantine_sha256=file_sha256(quarantine),
        shard=shard,
        versions=versions(),
    )
    publish_json(record_path(cfg.dataset, unit.name), asdict(record))
    return record


def retract_unit(dataset: Path, name: str) -> None:
    """Remove what a unit published, the record first, so that it never vouches for half a unit."""
    record_path(dataset, name).unlink(missing_ok=True)
    for path in (
        dataset / "shards" / f"{name}.tar",
        dataset / "index" / f"{name}.parquet",
        quarantine_path(dataset, name),
    ):
        path.unlink(missing_ok=True)
    shutil.rmtree(dataset / WORK / name, ignore_errors=True)


def sift(rows: Iterable[Row]) -> tuple[list[Rejected], list[Row]]:
    """Part sorted rows into those that need not be fetched, with the reason, and the others."""
    rejected: list[Rejected] = []
    candidates: list[Row] = []
    for row in rows:
        problem: tuple[Reason, str] | None = None
        if not row.url:
            problem = Reason.MISSING_URL, ""
        elif not row.caption:
            problem = Reason.MISSING_CAPTION, ""
        elif candidates and candidates[-1].key == row.key:
            problem = Reason.DUPLICATE, "same URL and caption as the row that was kept"
        elif scheme := scheme_problem(row.url):
            problem = Reason.SCHEME_REFUSED, scheme
        if problem is None:
            candidates.append(row)
        else:
            rejected.append(_rejected(row, "source", *problem))
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

    urls, captions = [row.url for row in rows], [row.caption for row in rows]
    for row, fetched in zip(rows, fetch(urls, captions, work, cfg, on_row), strict=True):
        if fetched.facts is None:
            reason, detail = reason_of(fetched.status, fetched.message)
            stage = "decode" if fetched.status == "failed_to_resize" else "download"
            rejected.append(_rejected(row, stage, reason, detail))
        else:
            yield make_sample(row, fetched.image, fetched.facts, cfg.encode_format)


def make_sample(row: Row, image: bytes, facts: dict[str, Any], extension: str) -> Sample:
    """Build what the tar and the index store for a kept row."""
    about = json.loads(row.extra_json) | facts
    about |= {"key": row.key, "url": row.url, "caption": row.caption}
    members = {
        extension: image,
        "json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(errors="replace"),
        "txt": row.caption.encode(errors="replace"),
    }
    columns = {
        "width": facts["width"],
        "height": facts["height"],
        "caption_chars": len(row.caption),
        "image_sha256": hashlib.sha256(image).hexdigest(),
    }
    return Sample(row.key, members, columns)


def _publish_shard(dataset: Path, name: str, samples: Iterable[Sample]) -> ShardEntry | None:
    index = dataset / "index" / f"{Path(name).stem}.parquet"
    count = write_shard(dataset / name, index, samples)
    if count == 0:  # an empty shard would only be a trap for readers
        (dataset / name).unlink()
        index.unlink()
        return None
    return describe_shard(dataset, name, count)
