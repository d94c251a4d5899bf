"""Laws of the grid's carbon: the packaged table is its source's, and hours weigh by their time."""

import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer
from trainer.config_accounts import AccountsConfig
from trainer.errors import BadInput
from trainer.observe.carbon import Hourly, grid_of, grids, rates, read_hourly

HOUR_S = 3600.0
START_S = datetime(2026, 1, 31, 13, tzinfo=UTC).timestamp()
TABLE = "time,g_co2_per_kwh\n2026-01-31T13:00Z,100\n2026-01-31T14:00Z,300\n2026-01-31T15:00Z,50\n"


def hours(values, *, start_s=START_S):
    return Hourly(
        path=Path("h.csv"),
        starts_unix_s=[start_s + HOUR_S * idx for idx in range(len(values))],
        per_kwh=values,
        lines=[idx + 2 for idx in range(len(values))],
        words="",
    )


def written(folder, text):
    path = folder / "hours.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("country", "g_co2_per_kwh"),
    [("USA", 369.5), ("FRA", 56.0), ("DEU", 381.0), ("SWE", 40.7), ("CHN", 582.3), ("GBR", 237.6),
     ("FIN", 79.2), ("NOR", 30.1), ("POL", 661.9), ("IND", 713.4)],
)  # fmt: skip
def test_the_table_is_its_source_s(country, g_co2_per_kwh):
    grid = grid_of(country)
    assert grid.g_co2_per_kwh == pytest.approx(g_co2_per_kwh, abs=0.051)
    assert grid.year == 2023


def test_every_country_has_a_mean_and_a_year():
    assert len(grids()) == 213
    for country, grid in grids().items():
        assert len(country) == 3
        assert country.isupper()
        assert 0 <= grid.g_co2_per_kwh < 1500
        assert 2000 <= grid.year <= 2023
        assert grid.name


def test_the_table_is_in_the_package():
    root = Path(trainer.__file__).parent
    told = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = told["tool"]["setuptools"]["package-data"]["trainer"]
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    assert set(root.rglob("*.csv")) <= packaged


@pytest.mark.parametrize(
    ("country", "advice"),
    [("GER", r"Did you mean DEU \(Germany\)"), ("Germany", r"mean DEU \(Germany\)\? Or give acc"),
     ("deu", r"mean DEU \(Germany\)"), ("USS", r"mean USA"), ("0000", "Known: ABW, AFG")],
)  # fmt: skip
def test_an_unknown_country_has_near_ones(country, advice):
    with pytest.raises(BadInput, match=f"accounts.grid={country} is none of the 213.*{advice}"):
        grid_of(country)


values = st.floats(0, 2000)


@given(st.lists(values, min_size=1, max_size=5), st.data())
def test_a_mean_weighs_hours_by_their_time(per_kwh, data):
    table, whole_s = hours(per_kwh), HOUR_S * len(per_kwh)
    ends = st.floats(0, 0.999 * whole_s)
    begin_s, middle_s, end_s = sorted(START_S + data.draw(ends) for _ in range(3))
    mean = table.mean(begin_s, end_s)
    assert min(per_kwh) * (1 - 1e-9) <= mean <= max(per_kwh) * (1 + 1e-9)
    parts = table.mean(begin_s, middle_s) * (middle_s - begin_s)
    parts += table.mean(middle_s, end_s) * (end_s - middle_s)
    assert mean * (end_s - begin_s) == pytest.approx(parts, rel=1e-6, abs=1e-3)
    each = sum(table.mean(at_s, at_s + HOUR_S) for at_s in table.starts_unix_s)
    assert table.mean(START_S, START_S + whole_s) * len(per_kwh) == pytest.approx(each)


def test_an_instant_is_in_the_hour_that_begins_then(tmp_path):
    table, _ = read_hourly(written(tmp_path, TABLE))
    assert table.mean(START_S + HOUR_S, START_S + HOUR_S) == 300
    assert table.mean(START_S + HOUR_S / 2, START_S + 2 * HOUR_S) == pytest.approx(700 / 3)


@pytest.mark.parametrize("time", ["2026-01-31T13:00", "2026-01-31 13:00:00+00:00",
                                  "2026-01-31T14:30+01:30", "20260131T13Z"])  # fmt: skip
def test_times_have_offsets_or_are_utc(tmp_path, time):
    table, _ = read_hourly(written(tmp_path, f"time,g_co2_per_kwh\n{time},7\n"))
    assert list(table.starts_unix_s) == [START_S]


def test_columns_may_stand_in_any_order_beside_others(tmp_path):
    text = "\ufefftime,price_per_kwh, g_co2_per_kwh,note\n2026-01-31T13:00Z,-0.05,7,windy\n"
    carbon, price = read_hourly(written(tmp_path, text))
    assert (carbon.mean(START_S, START_S + 60), price.mean(START_S, START_S + 60)) == (7, -0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: got the columns \(none\), need time, g_co2_per_kwh"),
        ("time,g\n", r"line 1: got the columns time, g, need .*Add g_co2_per_kwh\."),
        (TABLE.replace("300", "much"), r"line 3: g_co2_per_kwh: got 'much', need a number of at"),
        (TABLE.replace(",300", ""), r"line 3: g_co2_per_kwh: got None, need a number"),
        (TABLE.replace("300", "-3"), r"line 3: g_co2_per_kwh: got '-3', need a number of at least"),
        (TABLE.replace("300", "nan"), r"line 3: g_co2_per_kwh: got 'nan', need a number"),
        (TABLE.replace("2026-01-31T14:00Z", "2 pm"), r"line 3: got the time '2 pm', need ISO 8601"),
        (TABLE.replace("T14:00Z", "T13:00Z"), r"line 3: the time 2026-01-31T13:00Z is there twice"),
        (TABLE.replace("T14:00Z", "T12:00Z"), r"line 3: .*after 2026-01-31 13:00 UTC, need rising"),
        (TABLE.replace("T14:00Z", "T13:30Z"), r"line 3: .*within the hour from 2026-01-31 13:00"),
        ('time,g_co2_per_kwh\n"2026', r"hours\.csv is no CSV in UTF-8: "),
        ("time,g_co2_per_kwh,price_per_kwh\n2026-01-31T13:00Z,1,inf\n",
         r"line 2: price_per_kwh: got 'inf', need a number\."),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_told_with_its_line(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        read_hourly(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"accounts.hourly=.*none.csv cannot be read: No such file"):
        read_hourly(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"time,g_co2_per_kwh\n\xff,1\n")
    with pytest.raises(BadInput, match=r"latin\.csv is no CSV in UTF-8"):
        read_hourly(tmp_path / "latin.csv")


@pytest.mark.parametrize(
    ("at_s", "where"),
    [
        (-1.0, r"2026-01-31 12:59 UTC.*\(line 2 is 2026-01-31 13:00 UTC\)"),
        (1.5 * HOUR_S, r"2026-01-31 14:30 UTC.*line 2 is .* 13:00 UTC, line 3 is .* 15:00 UTC"),
        (3 * HOUR_S, r"2026-01-31 16:00 UTC.*\(line 3 is 2026-01-31 15:00 UTC\)"),
    ],
)
def test_an_hour_that_is_needed_and_missing_is_named(tmp_path, at_s, where):
    lines = TABLE.splitlines(keepends=True)
    table, _ = read_hourly(written(tmp_path, "".join([*lines[:2], lines[3]])))
    assert table.mean(START_S, START_S + HOUR_S) == 100
    with pytest.raises(BadInput, match=f"accounts.hourly=.*has no hour for {where}"):
        table.mean(START_S + at_s, START_S + at_s + 1)


def test_a_table_without_hours_lacks_them_all(tmp_path):
    table, price = read_hourly(written(tmp_path, "time,g_co2_per_kwh\n"))
    assert price is None
    with pytest.raises(BadInput, match="it has no hours at all"):
        table.mean(START_S, START_S)
    with pytest.raises(BadInput, match=r"accounts\.hourly=.* has no hours at all\. Add lines"):
        table.overall_mean()


def test_the_overall_mean_is_that_over_the_span_of_a_table_without_gaps(tmp_path):
    table, _ = read_hourly(written(tmp_path, TABLE))
    end_s = table.starts_unix_s[-1] + HOUR_S
    assert table.overall_mean() == pytest.approx(table.mean(table.starts_unix_s[0], end_s))


def test_what_is_unknown_has_no_rate(tmp_path):
    assert rates(AccountsConfig()) == (None, None)
    carbon, price = rates(AccountsConfig(grid="FRA", price_per_kwh=0.2, currency="EUR"))
    assert carbon.mean(0, 1) == grids()["FRA"].g_co2_per_kwh
    assert "56.039 gCO2/kWh, France's mean of 2023 (codecarbon 3.3.2)" in carbon.words
    assert (price.mean(0, 1), price.words) == (0.2, "0.2 EUR per kWh, stated")


def test_prices_of_hours_come_before_a_stated_one(tmp_path):
    path = written(tmp_path, "time,g_co2_per_kwh,price_per_kwh\n2026-01-31T13:00Z,1,0.5\n")
    _, price = rates(AccountsConfig(hourly=path, price_per_kwh=0.2))
    assert price.mean(START_S, START_S + 1) == 0.5
    path = written(tmp_path, TABLE)
    _, price = rates(AccountsConfig(hourly=path, price_per_kwh=0.2))
    assert price.mean(START_S, START_S + 1) == 0.2
