"""Say what a kWh is in CO2, and in money: by a country's yearly mean or by a table of hours."""

import csv
import difflib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Protocol

from trainer.config_accounts import AccountsConfig
from trainer.errors import BadInput

SOURCE = "codecarbon 3.3.2"
_TABLE = Path(__file__).with_name("grid_intensity.csv")
_TIME, _G_CO2, _PRICE = "time", "g_co2_per_kwh", "price_per_kwh"
HOUR_S = 3600.0
_NUM_SUGGESTIONS = 3


class Rate(Protocol):
    """What a kWh is in something else."""

    @property
    def words(self) -> str:
        """How much, and who says so."""

    def mean(self, start_unix_s: float, end_unix_s: float) -> float:
        """Return the mean over a span of time."""

    def overall_mean(self) -> float:
        """Return the mean over all that is known, for energy of which nobody knows when."""


@dataclass(frozen=True)
class Constant:
    """The same at all times."""

    per_kwh: float
    words: str

    def mean(self, start_unix_s: float, end_unix_s: float) -> float:
        """Return it."""
        return self.per_kwh

    def overall_mean(self) -> float:
        """Return it."""
        return self.per_kwh


@dataclass(frozen=True, kw_only=True)
class Hourly:
    """One value for each hour, of a column of a user's file."""

    path: Path
    starts_unix_s: Sequence[float]
    """Rising, at least an hour apart."""
    per_kwh: Sequence[float]
    lines: Sequence[int]
    """Where in the file."""
    words: str

    def mean(self, start_unix_s: float, end_unix_s: float) -> float:
        """Return the mean over a span of time.

        Raises:
            BadInput: The file lacks an hour of it.
        """
        return sum(self.per_kwh[idx] * frac for idx, frac in self._parts(start_unix_s, end_unix_s))

    def overall_mean(self) -> float:
        """Return the mean over the whole table.

        Raises:
            BadInput: The file has no hours.
        """
        if not self.per_kwh:
            raise BadInput(
                f"accounts.hourly={self.path} has no hours at all. Add lines, or give "
                "accounts.grid=COUNTRY instead."
            )
        return fmean(self.per_kwh)

    def _parts(self, start_unix_s: float, end_unix_s: float) -> Iterator[tuple[int, float]]:
        """Yield (hour, share of the span in it)."""
        at_s, span_s = start_unix_s, end_unix_s - start_unix_s
        while True:
            idx = bisect_right(self.starts_unix_s, at_s) - 1
            if idx < 0 or at_s >= self.starts_unix_s[idx] + HOUR_S:
                raise BadInput(self._gap(idx, at_s))
            until_s = min(end_unix_s, self.starts_unix_s[idx] + HOUR_S)
            yield idx, (until_s - at_s) / span_s if span_s > 0 else 1.0
            if until_s >= end_unix_s:
                return
            at_s = until_s

    def _gap(self, idx: int, at_s: float) -> str:
        neighbours = [
            f"line {self.lines[each]} is {utc(self.starts_unix_s[each])}"
            for each in (idx, idx + 1)
            if 0 <= each < len(self.lines)
        ]
        return (
            f"accounts.hourly={self.path} has no hour for {utc(at_s)}, when the account has "
            f"energy ({', '.join(neighbours) or 'it has no hours at all'}). Add the hours that are "
            "missing, or give accounts.grid=COUNTRY instead."
        )


@dataclass(frozen=True)
class Grid:
    """A country's electricity."""

    name: str
    g_co2_per_kwh: float
    year: int


@cache
def grids() -> Mapping[str, Grid]:
    """Read the packaged table: country -> mean of its newest year."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            row["country"]: Grid(row["name"], float(row[_G_CO2]), int(row["year"])) for row in rows
        }


def grid_of(country: str) -> Grid:
    """Return a country's electricity.

    Raises:
        BadInput: The table has no such country; near ones are named.
    """
    if country not in grids():
        raise BadInput(
            f"accounts.grid={country} is none of the {len(grids())} countries of {SOURCE}'s table "
            f"(ISO 3166 alpha-3). {_advice(country)} Or give accounts.hourly=FILE."
        )
    return grids()[country]


def _advice(country: str) -> str:
    text = country.casefold()
    codes = {code.casefold(): code for code in grids()}
    by_name = {grid.name.casefold(): code for code, grid in grids().items()}
    found = [code for name, code in by_name.items() if len(text) > 1 and name.startswith(text)]
    known = codes | by_name
    found += [known[each] for each in difflib.get_close_matches(text, known, n=_NUM_SUGGESTIONS)]
    near = list(dict.fromkeys(found))[:_NUM_SUGGESTIONS]
    if not near:
        return f"Known: {', '.join(grids())}."
    return f"Did you mean {' or '.join(f'{code} ({grids()[code].name})' for code in near)}?"


def rates(stated: AccountsConfig) -> tuple[Rate | None, Rate | None]:
    """Return grams of CO2 and the price of a kWh, as far as either is known.

    Raises:
        BadInput: The country or the file of hours is none.
    """
    carbon: Rate | None = None
    price: Rate | None = None
    if stated.grid is not None:
        grid = grid_of(stated.grid)
        words = f"{grid.g_co2_per_kwh:g} gCO2/kWh, {grid.name}'s mean of {grid.year} ({SOURCE})"
        carbon = Constant(grid.g_co2_per_kwh, words)
    if stated.hourly is not None:
        carbon, price = read_hourly(stated.hourly)
    if price is None and stated.price_per_kwh is not None:
        words = f"{stated.price_per_kwh:g} {stated.currency} per kWh, stated"
        price = Constant(stated.price_per_kwh, words)
    return carbon, price


def read_hourly(path: Path, *, key: str = "accounts.hourly") -> tuple[Hourly, Hourly | None]:
    """Read grams of CO2, and prices if the file has them.

    Args:
        path: A CSV file.
        key: That a user gave it with.

    Raises:
        BadInput: It is no such table; the message names the line.
    """
    lines = _read_lines(path, key)
    starts_unix_s: list[float] = []
    for line, row in lines:
        starts_unix_s.append(_start(row[_TIME], starts_unix_s, f"{path}, line {line}"))

    def column(name: str, *, least: float) -> Hourly:
        return Hourly(
            path=path,
            starts_unix_s=starts_unix_s,
            per_kwh=[
                _number(row[name], f"{path}, line {line}: {name}", least=least)
                for line, row in lines
            ],
            lines=[line for line, _ in lines],
            words=f"{name} of each hour ({path.name})",
        )

    has_prices = bool(lines) and _PRICE in lines[0][1]
    # A price may be below 0, and sometimes is.
    return column(_G_CO2, least=0.0), column(_PRICE, least=-math.inf) if has_prices else None


def _read_lines(path: Path, key: str) -> list[tuple[int, dict[str, str | None]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            has = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = has
            missing = [name for name in (_TIME, _G_CO2) if name not in has]
            if missing:
                raise BadInput(
                    f"{path}, line 1: got the columns {', '.join(has) or '(none)'}, need {_TIME}, "
                    f"{_G_CO2} and perhaps {_PRICE}. Add {' and '.join(missing)}."
                )
            return [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise BadInput(
            f"{key}={path} cannot be read: {error.strerror}. "
            f"Give a CSV file with the columns {_TIME} and {_G_CO2}."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{key}={path} is no CSV in UTF-8: {error}.") from error


def _start(text: str | None, before_unix_s: Sequence[float], where: str) -> float:
    """Return when an hour begins; it must be at least one later than those before."""
    try:
        time = datetime.fromisoformat((text or "").strip())
    except ValueError as error:
        raise BadInput(
            f"{where}: got the time {text!r}, need ISO 8601, such as 2026-01-31T13:00Z."
        ) from error
    start_unix_s = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    last_unix_s = before_unix_s[-1] if before_unix_s else -math.inf
    if start_unix_s in before_unix_s[-1:]:
        raise BadInput(f"{where}: the time {text} is there twice. Take one of the lines out.")
    if start_unix_s < last_unix_s:
        raise BadInput(
            f"{where}: got the time {text} after {utc(last_unix_s)}, need rising times. Sort the "
            "lines by time."
        )
    if start_unix_s < last_unix_s + HOUR_S:
        raise BadInput(
            f"{where}: got the time {text} within the hour from {utc(last_unix_s)}, need one line "
            "for each hour."
        )
    return start_unix_s


def _number(text: str | None, where: str, *, least: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        need = "a number" if least == -math.inf else f"a number of at least {least:g}"
        raise BadInput(f"{where}: got {text!r}, need {need}.")
    return value


def utc(unix_s: float) -> str:
    """Write a moment down to the minute."""
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M} UTC"
