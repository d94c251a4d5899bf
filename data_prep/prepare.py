"""Download, check and publish image-text URLs as WebDataset; the same command again resumes."""

import errno
import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.config import PrepareConfig
from data_prep.distribute import run_distributed
from data_prep.observed import RateLog, observed
from data_prep.plan import (
    Generation,
    Unit,
    list_units,
    make_plan,
    read_rows,
)
from data_prep.policy import Policy, load_policy
from data_prep.pool import run_units
from data_prep.publish import (
    Systemic,
    UnitRecord,
    is_done,
    read_record,
    record_path,
    retract_unit,
)
from data_prep.quarantine import UNREACHED, Reason
from data_prep.reach import check_reachable, unreachable
from data_prep.retry import mark_moved, plan_retry
from data_prep.scorers import scorer_rules
from trainer.command import run_command
from trainer.data.manifest import MANIFEST, Manifest
from trainer.data.tombstones import save_state, weigh
from trainer.errors import BadInput, BadWorld
from trainer.frozen import thaw
from trainer.observe.countdown import Countdown
from trainer.place import NUM_REQUESTS, is_local, local_folder, remove, storage

# What shapes the stored bytes or decides about rows; the rest may change between two runs.
_NO_RULES = (
    "rows",
    "dataset",
    "parts",
    "part",
    "plan_memory_gb",
    "scratch",
    "distributor",
    "processes",
    "threads",
    "recheck",
    "retry",
    "wandb",
    "wandb_project",
    "tdp_w_per_core",
)
_NO_DOWNLOAD_RULES = (
    "accept_unreachable",
    "max_failed_frac",
    "user_agent",
    "retries",
    "max_wait_s",
    "host_connections",
    "host_requests_per_s",
)


def main(argv: Sequence[str]) -> int:
    """Run `kiln prepare`."""
    return run_command(run, PrepareConfig, "prepare", argv)


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do and what is done already."""

    generations: list[Generation]
    units: list[Unit]
    policy: Policy
    rules_sha256: str
    records: dict[str, UnitRecord]
    """Records of the finished units, by name."""

    @property
    def todo(self) -> list[Unit]:
        """Units that are missing, stale or damaged."""
        return [unit for unit in self.units if unit.name not in self.records]


def run(cfg: PrepareConfig) -> int:
    """Publish what is missing of the dataset; print what became of every row."""
    with storage(cfg.dataset):
        return _run(cfg, load_policy(cfg.policy))


def _run(cfg: PrepareConfig, policy: Policy) -> int:
    shared = cfg.parts > 1
    if (cfg.dataset / "indexed").exists():
        raise BadInput(
            f"dataset={cfg.dataset} was made by `kiln index`, of tars that lie elsewhere. Give "
            "another folder."
        )
    with locked(cfg.dataset, wait=shared):
        work = make_work(cfg, policy)
        if not shared:
            done = _do(cfg, work)
            if cfg.retry:
                work, tried = retry_work(cfg, work)
                done += tried
            return _finish(cfg, work, done)
    with locked(cfg.dataset, f".lock-part-{cfg.part:04d}"):
        done = _do(cfg, work)
    with locked(cfg.dataset, wait=True):
        return _finish(cfg, survey(cfg, work.generations, policy), done)


def make_work(cfg: PrepareConfig, policy: Policy) -> Work:
    """Plan the source, take back what is not in the plan any more, and see what is done."""
    generations = make_plan(cfg, policy, cfg.scratch_folder)
    mark_moved(cfg.dataset, generations)
    work = survey(cfg, generations, policy)
    leftovers = _leftovers(cfg.dataset, work.units)
    if work.todo or leftovers:
        # A dataset without a manifest is unfinished.
        remove(cfg.dataset / MANIFEST)
        for name in leftovers:
            retract_unit(cfg.dataset, name)
    return work


def retry_work(cfg: PrepareConfig, work: Work) -> tuple[Work, int]:
    """Try rows again that failed for one of `cfg.retry`; return the new state of the work."""
    generations, num_rows = plan_retry(cfg, work.generations)
    say(f"{cfg.dataset}: {num_rows} rows in quarantine for {', '.join(cfg.retry)} to try again.")
    if not num_rows:
        return work, 0
    remove(cfg.dataset / MANIFEST)
    mark_moved(cfg.dataset, generations)
    work = survey(cfg, generations, work.policy)
    return work, _do(cfg, work)


def survey(cfg: PrepareConfig, generations: list[Generation], policy: Policy) -> Work:
    """Find which units are done, from the same rows and rules, with their files intact."""
    rules_sha256 = hash_rules(rules(cfg, policy))
    hashes = cfg.recheck == "hashes"
    units = list_units(generations)

    def done(unit: Unit) -> UnitRecord | None:
        record = read_record(cfg.dataset, unit.name)
        right = is_done(cfg.dataset, unit, record, rules_sha256=rules_sha256, hashes=hashes)
        return record if right else None

    # Remote, all the time goes into waiting for answers.
    with ThreadPoolExecutor(1 if is_local(cfg.dataset) else NUM_REQUESTS) as threads:
        found = zip(units, threads.map(done, units), strict=True)
        records = {unit.name: record for unit, record in found if record is not None}
    return Work(generations, units, policy, rules_sha256, records)


def _do(cfg: PrepareConfig, work: Work) -> int:
    """Publish the missing units of this part; return their number."""
    todo = [unit for unit in work.todo if unit.number % cfg.parts == cfg.part]
    if todo:
        if work.records:
            say(f"{finished(work)}; going on.")
        with observed(cfg, stage="prepare") as rates:
            _run_todo(cfg, work, todo, rates)
    shutil.rmtree(cfg.scratch_folder, ignore_errors=True)
    return len(todo)


def _finish(cfg: PrepareConfig, work: Work, num_published: int) -> int:
    """Write the manifest if all units are there, and say what there is."""
    if work.todo:
        say(f"{cfg.dataset}: part {cfg.part} of {cfg.parts} is done; {finished(work)}.")
        return 0
    manifest = make_manifest(cfg, work)
    save_state(cfg.dataset, manifest, why="kiln prepare")
    print_yield(manifest)
    done = f"{manifest.rows_live} samples in {len(manifest.shards)} shards"
    told = f"{done}." if num_published else f"nothing to do, {done} are there."
    say(f"{cfg.dataset}: {told}")
    return 0


def _run_todo(cfg: PrepareConfig, work: Work, todo: list[Unit], rates: RateLog) -> None:
    """Publish the missing units; add their records to `work.records`."""
    if not cfg.download.accept_unreachable:
        urls = (row.url for unit in islice(todo, 3) for row in read_rows(cfg.dataset, unit))
        check_reachable(urls, cfg.download)
    num_processes = min(cfg.num_processes, len(todo))
    failed: list[Systemic] = []
    rejected = Counter[str]()
    publish = run_units if cfg.distributor == "processes" else run_distributed
    try:
        with Countdown("downloading", sum(unit.rows for unit in todo)) as progress:

            def on_rows(done: int, kept: int) -> None:
                progress.update(done, kept)
                rates.update(done, kept)

            for unit, result in publish(
                todo,
                cfg,
                work.rules_sha256,
                num_processes=num_processes,
                on_rows=on_rows,
            ):
                if isinstance(result, UnitRecord):
                    work.records[unit.name] = result
                    rejected.update(result.rejected)
                else:
                    failed.append(result)
                # What is wrong with one in every process is wrong with the next, too.
                if len(failed) >= num_processes:
                    break
            progress.finish()
        rates.finish({f"rejected/{reason}": count for reason, count in rejected.items()})
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
        raise _systemic(work, failed)


def _systemic(work: Work, failed: Sequence[Systemic]) -> BadWorld:
    first = failed[0].first
    num_rows, num_tried = sum(unit.rows for unit in failed), sum(unit.tried for unit in failed)
    what = f"{finished(work)}, but {num_rows} of {num_tried} rows in {len(failed)} failed alike"
    if first.reason in UNREACHED:
        return unreachable(what, first.url or "", first.reason, first.detail)
    return BadWorld(
        f"{what}, e.g. {first.url}: {first.reason} ({first.detail}). So many failures of one kind "
        "are no fault of the rows; nothing of these units was published. Find the cause (a proxy, "
        "a ban, a broken library) and give the same command again; or, if it is right, add "
        "download.accept_unreachable=true."
    )


def finished(work: Work) -> str:
    """Say how much is safe."""
    kept = sum(record.rows_kept for record in work.records.values())
    return (
        f"{len(work.records)} of {len(work.units)} units are published and valid ({kept} samples)"
    )


def rules(cfg: PrepareConfig, policy: Policy) -> dict[str, object]:
    """Give the part of the config that decides what is published."""
    plain = thaw(cfg) | {"policy": policy.facts}
    kept = {name: value for name, value in plain.items() if name not in _NO_RULES}
    kept["scorers"] = scorer_rules(cfg.scorers)
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
    for counts in (*(plan.rejected for plan in work.generations), *(r.rejected for r in records)):
        rejected.update(counts)
    moved = rejected.pop(Reason.RETRIED, 0)
    assert moved == sum(sum(plan.moved.values()) for plan in work.generations), (
        "rows lost in moving"
    )
    manifest = Manifest(
        shards=tuple(record.shard for record in records if record.shard),
        rows_in=sum(plan.rows_new for plan in work.generations),
        rows_kept=sum(record.rows_kept for record in records),
        rejected=dict(sorted(rejected.items())),
        provenance={
            "plan_sha256": [plan.plan_sha256 for plan in work.generations],
            "rules": rules(cfg, work.policy),
            "rules_sha256": work.rules_sha256,
            "policy_sha256": work.policy.sha256,
            "user_agent": cfg.download.user_agent,
            "versions": [dict(pairs) for pairs in sorted({_pairs(record) for record in records})],
        },
    )
    assert manifest.rows_in == manifest.rows_kept + manifest.rows_rejected, "rows do not add up"
    return weigh(cfg.dataset, manifest)


def _pairs(record: UnitRecord) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(record.versions.items()))


def _leftovers(dataset: Path, units: list[Unit]) -> list[str]:
    """Name recorded units that the source does not have (any more)."""
    names = {unit.name for unit in units}
    return sorted({path.stem for path in record_path(dataset, "x").parent.glob("*.json")} - names)


@contextmanager
def locked(
    dataset: Path, name: str = ".lock", *, wait: bool = False, make: bool = True
) -> Iterator[None]:
    """Keep other commands out of the dataset; the lock ends with the process.

    A remote dataset is locked on this machine only. `parts=` and `part=` keep machines apart; what
    all of them write, the plan and the manifest, has the same bytes whoever does.

    Args:
        dataset: The folder or URL.
        name: Which of its locks.
        wait: Wait for the others, instead of raising.
        make: Make the folder, if there is none.

    Raises:
        BadInput: It is no folder, or one that this user may not write to.
        BadWorld: Another command is at work there.
    """
    folder = dataset if is_local(dataset) else local_folder(dataset)
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.exists():
            raise BadInput(f"{dataset} is not there. Give a dataset= that `kiln prepare` made.")
        lock = (folder / name).open("w")
    except (FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"dataset={dataset} is a file, need a folder.") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise BadInput(
            f"dataset={dataset} cannot be written to ({error}). Give a folder that is there, or "
            "can be made, and that you may write to."
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BadWorld(
                f"another `kiln` command is at work in {dataset}: wait for it."
            ) from error
        yield


def print_yield(manifest: Manifest) -> None:
    """Print rows in, kept, and rejected by reason."""
    table = Table("rows", "number", "share", title="What became of every row")
    table.columns[1].justify = table.columns[2].justify = "right"
    lines = [("in", manifest.rows_in), ("kept", manifest.rows_kept)]
    by_count = sorted(manifest.rejected.items(), key=lambda item: (-item[1], item[0]))
    lines += [(f"rejected: {reason}", count) for reason, count in by_count]
    if manifest.rows_removed:
        lines.insert(2, ("of these removed since", manifest.rows_removed))
    for name, count in lines:
        table.add_row(name, f"{count}", f"{100 * count / manifest.rows_in:.2f} %")
    Console().print(table)


def say(text: str) -> None:
    """Print one line to the user."""
    Console(soft_wrap=True).print(text, highlight=False, markup=False)
