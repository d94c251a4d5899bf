"""When a job begins: no admissible hour is better, and what cannot be chosen is said."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.render import sbatch_script
from tests.cluster.jobs import job_of
from trainer.begin_time import Choice, choose, gaps, hours_of, plan_begin
from trainer.config_accounts import AccountsConfig
from trainer.config_start import StartConfig
from trainer.errors import BadInput
from trainer.frozen import freeze
from trainer.observe.carbon import Hourly

HOUR_S = 3600.0
FIRST_S = datetime(2026, 12, 1, 0, tzinfo=UTC).timestamp()
NOW_S = FIRST_S + 0.5 * HOUR_S
JOB = job_of(Path("/runs/night"), time_limit_min=120)
VALUES = [300, 300, 100, 100, 200, 50, 300, 300]


def table(values):
    return Hourly(
        path=Path("h.csv"),
        starts_unix_s=[FIRST_S + HOUR_S * idx for idx in range(len(values))],
        per_kwh=values,
        lines=[idx + 2 for idx in range(len(values))],
        words="",
    )


def summed(values, begin_s, end_s):
    """The law by itself: each hour's value times the seconds of it that the run takes."""
    total = 0.0
    for idx, value in enumerate(values):
        start_s = FIRST_S + HOUR_S * idx
        total += value * max(0.0, min(end_s, start_s + HOUR_S) - max(begin_s, start_s))
    return total


@st.composite
def wishes(draw):
    """Values of hours, now, the deadline and how long the run takes; all of it fits."""
    values = draw(st.lists(st.floats(-500, 2000), min_size=2, max_size=12))
    end_s = FIRST_S + HOUR_S * len(values)
    now_s = draw(st.floats(FIRST_S, end_s - 1800))
    deadline_s = draw(st.floats(now_s + 1200, end_s))
    hours = draw(st.floats(0.1, (deadline_s - now_s) / HOUR_S))
    return values, now_s, deadline_s, min(hours, (deadline_s - now_s) / HOUR_S * (1 - 1e-12))


@given(wishes())
def test_no_admissible_begin_is_better_and_none_before_is_as_good(wish):
    values, now_s, deadline_s, hours = wish
    choice = choose(table(values), now_unix_s=now_s, deadline_unix_s=deadline_s, hours=hours)
    sums = {}
    for begin_s in (now_s, *(FIRST_S + HOUR_S * idx for idx in range(len(values)))):
        if begin_s == now_s or now_s < begin_s <= deadline_s - hours * HOUR_S:
            sums[begin_s] = summed(values, begin_s, begin_s + hours * HOUR_S)
    rounding = 1e-6 * (1 + max(map(abs, values))) * HOUR_S
    chosen = sums[choice.begin_unix_s]
    assert chosen <= min(sums.values()) + rounding
    assert choice.mean * hours * HOUR_S == pytest.approx(chosen, abs=rounding)
    assert choice.mean_now * hours * HOUR_S == pytest.approx(sums[now_s], abs=rounding)
    assert all(
        total > chosen - rounding
        for begin_s, total in sums.items()
        if begin_s < choice.begin_unix_s
    )


@given(st.floats(-500, 2000), wishes())
def test_where_all_hours_are_alike_it_begins_now(value, wish):
    values, now_s, deadline_s, hours = wish
    alike = table([value] * len(values))
    choice = choose(alike, now_unix_s=now_s, deadline_unix_s=deadline_s, hours=hours)
    assert choice.begin_unix_s == now_s


def test_of_equal_hours_the_first_is_taken():
    choice = choose(
        table([9, 5, 5, 5]), now_unix_s=NOW_S, deadline_unix_s=FIRST_S + 4 * HOUR_S, hours=1
    )
    assert choice.begin_unix_s == FIRST_S + HOUR_S


def test_the_saving_is_a_share_only_of_what_is_above_nothing():
    assert Choice(0, 150, 300).saving_frac == 0.5
    assert Choice(0, -2, -1).saving_frac is None
    assert Choice(0, -1, 0).saving_frac is None


@given(st.sets(st.integers(0, 20)), st.floats(0, 20), st.floats(0, 20))
def test_gaps_are_exactly_what_no_hour_covers(hours, one, other):
    begin_s, end_s = sorted((one * HOUR_S, other * HOUR_S))
    starts = [hour * HOUR_S for hour in sorted(hours)]
    found = list(gaps(starts, begin_s, end_s))
    covered_s = sum(max(0.0, min(end_s, s + HOUR_S) - max(begin_s, s)) for s in starts)
    assert sum(b - a for a, b in found) + covered_s == pytest.approx(end_s - begin_s)
    for a, b in found:
        assert begin_s <= a < b <= end_s
        assert not any(s < b and a < s + HOUR_S for s in starts)


def test_an_array_of_which_few_run_at_once_takes_longer():
    assert hours_of(JOB) == 2
    assert hours_of(replace(JOB, array=(0, 1, 2, 3, 4))) == 2
    assert hours_of(replace(JOB, array=(0, 1, 2, 3, 4), at_once=2)) == 6


def wish(folder, values=VALUES, **changes):
    """What a launch line may ask for; the deadline is eight hours after the first hour."""
    path = folder / "hours.csv"
    price = "" if values is None else ",price_per_kwh"
    rows = [
        f"2026-12-01T{hour:02d}:00Z,{value}" + (f",{value / 1000}" if price else "")
        for hour, value in enumerate(values or VALUES)
    ]
    path.write_text("\n".join([f"time,g_co2_per_kwh{price}", *rows, ""]))
    told = {"by": "carbon", "hourly": str(path), "deadline": "2026-12-01T08:00Z", "hours": 2}
    return freeze(StartConfig, {**told, **changes})


def planned(start, *, job=JOB, accounts=None, has_begun=False):
    accounts = accounts or AccountsConfig(currency="EUR")
    return plan_begin(job, start, accounts, now_unix_s=NOW_S, has_begun=has_begun)


def test_the_job_gets_its_begin_in_local_time_and_the_user_the_saving(tmp_path):
    found = planned(wish(tmp_path))
    begin = datetime.fromtimestamp(FIRST_S + 2 * HOUR_S)
    assert found.job == replace(JOB, begin=begin)
    assert f"#SBATCH --begin={begin:%Y-%m-%dT%H:%M:%S}\n" in sbatch_script(found.job)
    assert found.words == (
        f"begins at {begin.astimezone():%Y-%m-%d %H:%M %Z}, in 1 h 30 min: 100 gCO2/kWh over 2 h; "
        "starting now it would be 250, 60 % less"
    )


def test_a_price_has_the_currency_of_the_account(tmp_path):
    assert "0.1 EUR/kWh over 2 h; starting now" in planned(wish(tmp_path, by="price")).words


def test_the_walltime_stands_for_hours_that_nobody_gave(tmp_path):
    found = planned(wish(tmp_path, hours=None))
    assert "100 gCO2/kWh over 2 h, its walltime as start.hours is null; starting" in found.words


def test_a_job_that_is_best_begun_now_has_no_begin(tmp_path):
    found = planned(wish(tmp_path, values=[1] * 8))
    assert found.job == JOB
    assert found.words == "begins now: 1 gCO2/kWh over 2 h, and no later hour is better"


def test_the_account_s_table_is_taken_where_start_has_none(tmp_path):
    table = wish(tmp_path).hourly
    start = freeze(StartConfig, {"by": "carbon", "deadline": "2026-12-01T08:00Z", "hours": 2})
    assert planned(start, accounts=AccountsConfig(hourly=table)).job.begin is not None


def test_nothing_is_asked_and_nothing_is_said():
    assert planned(StartConfig()).job == JOB
    assert planned(StartConfig()).words == ""


def test_a_deadline_that_cannot_be_kept_is_refused_with_one_that_can(tmp_path):
    with pytest.raises(BadInput, match=r"start\.deadline=.* is too near: .* needs 9 h") as said:
        planned(wish(tmp_path, hours=9))
    earliest = f"{datetime.fromtimestamp(NOW_S + 9 * HOUR_S):%Y-%m-%dT%H:%M}"
    assert f"works is start.deadline={earliest}; or leave start out" in str(said.value)
    long = wish(tmp_path, values=VALUES * 3, hours=9, deadline=earliest)
    assert planned(long).words.startswith("begins now")


def test_a_run_that_has_begun_goes_on_after_its_deadline(tmp_path):
    found = planned(wish(tmp_path, hours=9), has_begun=True)
    assert found.job == JOB
    assert "cannot be kept: it goes on now" in found.words
    assert planned(wish(tmp_path), has_begun=True).job.begin is not None


def test_hours_that_the_table_lacks_are_named(tmp_path):
    start = wish(tmp_path)
    lines = start.hourly.read_text().splitlines(keepends=True)
    start.hourly.write_text("".join([*lines[:4], *lines[6:8]]))
    message = (
        r"start\.hourly=.*does not cover .*: no hours for 2026-12-01 03:00 UTC to 2026-12-01 05:00 "
        r"UTC, 2026-12-01 07:00 UTC to 2026-12-01 08:00 UTC\. Add them"
    )
    with pytest.raises(BadInput, match=message):
        planned(start)


def test_a_price_needs_its_column(tmp_path):
    with pytest.raises(BadInput, match=r"start\.by=price, and .* has no column price_per_kwh"):
        planned(wish(tmp_path, values=None, by="price"))


def test_a_choice_needs_a_table_that_can_be_read(tmp_path):
    with pytest.raises(BadInput, match=r"needs a table of hours, and start\.hourly and accounts"):
        planned(wish(tmp_path, hourly=None))
    with pytest.raises(BadInput, match=r"start\.hourly=.*none\.csv cannot be read"):
        planned(wish(tmp_path, hourly=str(tmp_path / "none.csv")))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"hours": 3.0}, r"got hours=3\.0, and by is null.* Give start\.by=carbon"),
        ({"by": "carbon"}, r"by=carbon needs to know .* Give start\.deadline=, such as 2026-12"),
        ({"by": "carbon", "deadline": "2026-12-01", "hours": 0}, "hours=0"),
        ({"by": "carbon", "deadline": "soon"}, "deadline='soon'"),
        ({"by": "wind", "deadline": "2026-12-01"}, "by='wind'"),
    ],
)
def test_a_wish_that_is_none_is_refused(told, message):
    with pytest.raises(BadInput, match=message):
        freeze(StartConfig, told)
