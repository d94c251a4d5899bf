"""Read the whole account of a run: what all its nodes wrote, and the time that only Slurm saw."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slurm.attempts import read_attempts
from slurm.runfile import JOBS, read_rows, read_spec
from trainer.observe.accounts import close_check
from trainer.observe.allocation import Allocation, missing_frac, placed, unseen
from trainer.observe.ledger import read_account
from trainer.observe.merging import each_device_once, period_ends

log = logging.getLogger(__name__)

CLOSES_WITHIN_FRAC = 0.01


def run_account(run_dir: Path, dataset_dir: Path | None = None) -> list[Mapping[str, Any]]:
    """Return the rows of a run's ledgers, each second of each node and each joule once.

    Warns where they do not close: where they differ by more than 1 % from the wall clock.

    Args:
        run_dir: Of the run.
        dataset_dir: Where those of its dataset should come first.
    """
    prepared = read_account(dataset_dir) if dataset_dir else []
    rows = each_device_once([*prepared, *read_account(run_dir)])
    for closure in close_check(rows):
        if not closure.holds():
            log.warning(
                "%s: attempt %d of %s (rank %d) took %.1f s and its account has %.1f s; what "
                "follows from it is as wrong.",
                run_dir,
                closure.attempt,
                closure.stage,
                closure.rank,
                closure.wall_s,
                closure.counted_s,
            )
    allocations = allocations_of(run_dir, rows)
    on_nodes = placed(rows, allocations)
    whole = [*on_nodes, *unseen(on_nodes, allocations)]
    off_frac = missing_frac(whole, allocations)
    if off_frac > CLOSES_WITHIN_FRAC:
        log.warning(
            "%s: the accounts of its nodes differ by %.1f %% from the time that Slurm lent them; "
            "what follows from them is as wrong.",
            run_dir,
            100 * off_frac,
        )
    return whole


def allocations_of(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> list[Allocation]:
    """Return what Slurm lent to each attempt; nothing for a run on this machine.

    Args:
        run_dir: Of the run.
        rows: Of its ledgers: of an attempt that was lost nobody wrote when that was.
    """
    submitted = {row["job_id"]: row["unix_s"] for row in read_rows(run_dir / JOBS)}
    spec = read_spec(run_dir)
    last_s: dict[int, float] = {}
    for ((stage, _, number), _), end_s in period_ends(rows).items():
        if stage == "train":
            last_s[number] = max(end_s, last_s.get(number, end_s))
    allocations: list[Allocation] = []
    free_unix_s: dict[str, float] = {}
    attempts = read_attempts(run_dir)
    for attempt, following in zip(attempts, [*attempts, None][1:], strict=True):
        begin, end = attempt.begin, attempt.end
        end_unix_s = end.unix_s if end else None
        # Of one that was lost in a job that did not come back nobody writes an end.
        if (end and end.cause == "lost") or (end is None and following):
            next_unix_s = following.begin.unix_s if following else math.inf
            end_unix_s = min(last_s.get(attempt.number, begin.unix_s), next_unix_s)
        # A job that was to begin later, or after others, was not in the queue until then.
        first = begin.eligible_unix_s or submitted.get(begin.job_id, begin.unix_s)
        queued = free_unix_s.get(begin.job_id, first)
        allocations.append(
            Allocation(
                attempt=attempt.number,
                nodes=begin.nodes,
                ranks_per_node=spec.ranks_per_node if spec else 1,
                queued_unix_s=min(queued, begin.unix_s),
                begin_unix_s=begin.unix_s,
                end_unix_s=end_unix_s,
            )
        )
        free_unix_s[begin.job_id] = end_unix_s or begin.unix_s
    return allocations
