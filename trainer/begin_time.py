"""Choose when a job begins, by the carbon or the price of the hours that it will take."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from slurm.spec import JobSpec
from trainer.config_accounts import AccountsConfig
from trainer.config_start import StartConfig
from trainer.errors import BadInput
from trainer.observe.carbon import HOUR_S, Hourly, read_hourly, utc
from trainer.observe.progress import in_words

_MINUTE_S = 60.0
_TIE = 1e-9
"""Means that differ by less, of the largest value, differ by rounding alone."""


@dataclass(frozen=True)
class Choice:
    """When a job begins, and what its energy is worth then."""

    begin_unix_s: float
    mean: float
    """Of a kWh, over the run."""
    mean_now: float
    """The same if it began now."""

    @property
    def saving_frac(self) -> float | None:
        """Share that is saved by waiting; None where there is nothing to take a share of."""
        return 1 - self.mean / self.mean_now if self.mean_now > 0 else None


@dataclass(frozen=True)
class Planned:
    """A job that was given its begin, and what a user is told of that."""

    job: JobSpec
    words: str
    """Empty where nobody asked for anything."""


def choose(table: Hourly, *, now_unix_s: float, deadline_unix_s: float, hours: float) -> Choice:
    """Find the begin with the least mean over the run; of equal ones the first.

    Now and all hours of the table that leave time enough are compared. The power that a run draws
    does not depend on when it runs, so that the least mean is the least sum.

    Args:
        table: Covers the time from now to the deadline.
        now_unix_s: The earliest begin.
        deadline_unix_s: The latest end; not before now and `hours`.
        hours: What the run takes.
    """
    span_s = hours * HOUR_S
    last_unix_s = deadline_unix_s - span_s
    begins = [now_unix_s, *(s for s in table.starts_unix_s if now_unix_s < s <= last_unix_s)]
    means = [table.mean(begin, begin + span_s) for begin in begins]
    least = min(means) + _TIE * max(map(abs, table.per_kwh))
    begin, mean = next(pair for pair in zip(begins, means, strict=True) if pair[1] <= least)
    return Choice(begin, mean, means[0])


def gaps(
    starts_unix_s: Sequence[float], begin_unix_s: float, end_unix_s: float
) -> Iterator[tuple[float, float]]:
    """Yield the spans of a time that no hour covers.

    Args:
        starts_unix_s: Of the hours, rising.
        begin_unix_s: Of the time.
        end_unix_s: Of the time.
    """
    at_s = begin_unix_s
    for start_s in starts_unix_s:
        if at_s < min(start_s, end_unix_s):
            yield at_s, min(start_s, end_unix_s)
        at_s = max(at_s, start_s + HOUR_S)
    if at_s < end_unix_s:
        yield at_s, end_unix_s


def hours_of(job: JobSpec) -> float:
    """Return how long a job may take; an array of which few run at once takes several times."""
    waves = math.ceil(len(job.array) / job.at_once) if job.at_once and job.array else 1
    return waves * job.time_limit_min / 60


def plan_begin(
    job: JobSpec,
    start: StartConfig,
    accounts: AccountsConfig,
    *,
    now_unix_s: float,
    has_begun: bool,
) -> Planned:
    """Give a job its begin.

    Args:
        job: As it is without.
        start: What was asked for.
        accounts: Of the run: whose table is taken where `start` has none, and the currency.
        now_unix_s: When it is submitted.
        has_begun: Whether the run has, in a job before. It then goes on even where its deadline
            cannot be kept any more: the same line again continues a run.

    Raises:
        BadInput: The deadline is too near, or the table lacks what is needed.
    """
    if start.by is None or start.deadline is None:
        return Planned(job, "")
    hours = start.hours or hours_of(job)
    deadline_unix_s = start.deadline.timestamp()  # local where it has no offset
    if deadline_unix_s < now_unix_s + hours * HOUR_S:
        if has_begun:
            late = f"start.deadline={_local(deadline_unix_s)} cannot be kept: it goes on now"
            return Planned(job, late)
        raise BadInput(_too_near(deadline_unix_s, now_unix_s, hours, start))
    table = _table(start, accounts)
    missing = list(gaps(table.starts_unix_s, now_unix_s, deadline_unix_s))
    if missing:
        spans = ", ".join(f"{utc(a)} to {utc(b)}" for a, b in missing)
        raise BadInput(
            f"start.hourly={table.path} does not cover the time until start.deadline="
            f"{_local(deadline_unix_s)}: no hours for {spans}. Add them, or give an earlier "
            "deadline."
        )
    choice = choose(table, now_unix_s=now_unix_s, deadline_unix_s=deadline_unix_s, hours=hours)
    unit = "gCO2/kWh" if start.by == "carbon" else f"{accounts.currency}/kWh"
    words = _words(choice, now_unix_s, unit, _over(hours, start))
    if choice.begin_unix_s == now_unix_s:
        return Planned(job, words)
    return Planned(replace(job, begin=datetime.fromtimestamp(choice.begin_unix_s)), words)


def _table(start: StartConfig, accounts: AccountsConfig) -> Hourly:
    path = start.hourly or accounts.hourly
    if path is None:
        raise BadInput(
            f"start.by={start.by} needs a table of hours, and start.hourly and accounts.hourly are "
            "null. Give start.hourly=FILE, a CSV with the columns time and g_co2_per_kwh, and "
            "price_per_kwh for start.by=price."
        )
    carbon, price = read_hourly(path, key="start.hourly" if start.hourly else "accounts.hourly")
    if start.by == "carbon":
        return carbon
    if price is None:
        raise BadInput(
            f"start.by=price, and {path} has no column price_per_kwh. Add it, or give "
            "start.by=carbon."
        )
    return price


def _too_near(deadline_unix_s: float, now_unix_s: float, hours: float, start: StartConfig) -> str:
    earliest_s = math.ceil((now_unix_s + hours * HOUR_S) / _MINUTE_S) * _MINUTE_S
    return (
        f"start.deadline={_local(deadline_unix_s)} is too near: from now on, "
        f"{_local(now_unix_s)}, the job needs {_over(hours, start)}. The earliest deadline that "
        f"works is start.deadline={datetime.fromtimestamp(earliest_s):%Y-%m-%dT%H:%M}; or leave "
        "start out, and it begins now."
    )


def _over(hours: float, start: StartConfig) -> str:
    told = f"{hours:.4g} h"
    return told if start.hours else f"{told}, its walltime as start.hours is null"


def _words(choice: Choice, now_unix_s: float, unit: str, over: str) -> str:
    if choice.begin_unix_s == now_unix_s:
        return f"begins now: {choice.mean:.4g} {unit} over {over}, and no later hour is better"
    wait = in_words(choice.begin_unix_s - now_unix_s)
    frac = choice.saving_frac
    saved = "" if frac is None else f", {100 * frac:.0f} % less"
    return (
        f"begins at {_local(choice.begin_unix_s)}, in {wait}: {choice.mean:.4g} {unit} over "
        f"{over}; starting now it would be {choice.mean_now:.4g}{saved}"
    )


def _local(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s).astimezone():%Y-%m-%d %H:%M %Z}"
