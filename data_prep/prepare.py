"""Download, check and publish image-text URLs as WebDataset; the same command again resumes."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.config import PrepareConfig
from data_prep.pool import run_units
from data_prep.publish import (
    WORK,
    UnitRecord,
    Unreachable,
    is_done,
    read_record,
    record_path,
    retract_unit,
)
from data_prep.reach import check_reachable, unreachable
from data_prep.rows import Unit, read_units, source_sha256
from trainer.command import run_command
from trainer.data.manifest import MANIFEST, Manifest, save_manifest
from trainer.errors import BadInput, BadWorld
from trainer.frozen import thaw
from trainer.observe.countdown import Countdown
from trainer.observe.ledger import accounted

# What shapes the stored bytes or decides about rows; the rest may change between two runs.
_NO_RULES = ("rows", "dataset", "processes", "threads", "recheck", "tdp_w_per_core")
_NO_DOWNLOAD_RULES = ("accept_unreachable", "user_agent")


def main(argv: Sequence[str]) -> int:
    """Run `kiln prepare`."""
    return run_command(run, PrepareConfig, "prepare", argv)


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do and what is done already."""

    units: list[Unit]
    rules_sha256: str
    records: dict[str, UnitRecord]
    """Records of the finished units, by name."""

    @property
    def todo(self) -> list[Unit]:
        """Units that are missing, stale or damaged."""
        return [unit for unit in self.units if unit.name not in self.records]


def run(cfg: PrepareConfig) -> int:
    """Publish what is missing of the dataset; print what became of every row."""
    units = read_units(cfg)
    with locked(cfg.dataset):
        work = survey(cfg, units)
        todo, leftovers = work.todo, _leftovers(cfg.dataset, units)
        if todo or leftovers:
            # A dataset without a manifest is unfinished.
            (cfg.dataset / MANIFEST).unlink(missing_ok=True)
            for name in leftovers:
                retract_unit(cfg.dataset, name)
        if todo:
            if work.records:
                say(f"{finished(work)}; going on.")
            with accounted(cfg.dataset, stage="prepare", tdp_w_per_core=cfg.tdp_w_per_core):
                _run_todo(cfg, work)
            shutil.rmtree(cfg.dataset / WORK, ignore_errors=True)
        manifest = make_manifest(cfg, work)
        save_manifest(cfg.dataset, manifest)
    print_yield(manifest)
    done = f"{manifest.rows_kept} samples in {len(manifest.shards)} shards"
    say(f"{cfg.dataset}: {done}." if todo else f"{cfg.dataset}: nothing to do, {done} are there.")
    return 0


def survey(cfg: PrepareConfig, units: list[Unit]) -> Work:
    """Find which units are done, from the same rows and rules, with their files intact."""
    rules_sha256 = hash_rules(rules(cfg))
    hashes = cfg.recheck == "hashes"
    records: dict[str, UnitRecord] = {}
    for unit in units:
        record = read_record(cfg.dataset, unit.name)
        if is_done(cfg.dataset, unit, record, rules_sha256=rules_sha256, hashes=hashes):
            assert record is not None
            records[unit.name] = record
    return Work(units, rules_sha256, records)


def _run_todo(cfg: PrepareConfig, work: Work) -> None:
    """Publish the missing units; add their records to `work.records`."""
    if not cfg.download.accept_unreachable:
        check_reachable((row for unit in work.todo for row in unit.rows), cfg.download)
    num_processes = cfg.processes or len(os.sched_getaffinity(0))
    num_processes = min(num_processes, len(work.todo))
    failed: list[Unreachable] = []
    num_rows = sum(len(unit.rows) for unit in work.todo)
    try:
        with Countdown("downloading", num_rows) as progress:
            for unit, result in run_units(
                work.todo,
                cfg,
                work.rules_sha256,
                num_processes=num_processes,
                on_rows=progress.update,
            ):
                if isinstance(result, UnitRecord):
                    work.records[unit.name] = result
                else:
                    failed.append(result)
                if not work.records and len(failed) >= num_processes:
                    break
            progress.finish()
    except KeyboardInterrupt:
        say(f"{finished(work)}.")
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise BadWorld(
            f"the disk is full at {error.filename or cfg.dataset}. {finished(work)}: free some "
            "space and give the same command again."
        ) from error
    if failed:
        first, num_rows = failed[0].first, sum(unit.rows for unit in failed)
        what = f"{finished(work)}, but not one of {num_rows} rows in {len(failed)} could be fetched"
        raise unreachable(what, first.url or "", first.reason, first.detail)


def finished(work: Work) -> str:
    """Say how much is safe."""
    kept = sum(record.rows_kept for record in work.records.values())
    return (
        f"{len(work.records)} of {len(work.units)} units are published and valid ({kept} samples)"
    )


def rules(cfg: PrepareConfig) -> dict[str, object]:
    """Give the part of the config that decides what is published."""
    plain = thaw(cfg)
    kept = {name: value for name, value in plain.items() if name not in _NO_RULES}
    download = plain["download"].items()
    kept["download"] = {k: value for k, value in download if k not in _NO_DOWNLOAD_RULES}
    return kept


def hash_rules(kept: dict[str, object]) -> str:
    """Hash the rules."""
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def make_manifest(cfg: PrepareConfig, work: Work) -> Manifest:
    """Add up the records of all units; the sum is the input, exactly."""
    records = [work.records[unit.name] for unit in work.units]
    rejected: Counter[str] = Counter()
    for record in records:
        rejected.update(record.rejected)
    manifest = Manifest(
        shards=tuple(record.shard for record in records if record.shard),
        rows_in=sum(len(unit.rows) for unit in work.units),
        rows_kept=sum(record.rows_kept for record in records),
        rejected=dict(sorted(rejected.items())),
        provenance={
            "source_sha256": source_sha256(cfg),
            "rules": rules(cfg),
            "rules_sha256": work.rules_sha256,
            "user_agent": cfg.download.user_agent,
            "versions": [dict(pairs) for pairs in sorted({_pairs(record) for record in records})],
        },
    )
    assert manifest.rows_in == manifest.rows_kept + manifest.rows_rejected, "rows do not add up"
    return manifest


def _pairs(record: UnitRecord) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(record.versions.items()))


def _leftovers(dataset: Path, units: list[Unit]) -> list[str]:
    """Name recorded units that the source does not have (any more)."""
    names = {unit.name for unit in units}
    return sorted({path.stem for path in record_path(dataset, "x").parent.glob("*.json")} - names)


@contextmanager
def locked(dataset: Path) -> Iterator[None]:
    """Keep a second `kiln prepare` out of the dataset; the lock ends with the process."""
    try:
        dataset.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"dataset={dataset} is a file, need a folder.") from error
    with (dataset / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadWorld(
                f"another `kiln prepare` is at work in {dataset}: wait for it."
            ) from error
        yield


def print_yield(manifest: Manifest) -> None:
    """Print rows in, kept, and rejected by reason."""
    table = Table("rows", "number", "share", title="What became of every row")
    table.columns[1].justify = table.columns[2].justify = "right"
    lines = [("in", manifest.rows_in), ("kept", manifest.rows_kept)]
    by_count = sorted(manifest.rejected.items(), key=lambda item: (-item[1], item[0]))
    lines += [(f"rejected: {reason}", count) for reason, count in by_count]
    for name, count in lines:
        table.add_row(name, f"{count}", f"{100 * count / manifest.rows_in:.2f} %")
    Console().print(table)


def say(text: str) -> None:
    """Print one line to the user."""
    Console(soft_wrap=True).print(text, highlight=False, markup=False)
