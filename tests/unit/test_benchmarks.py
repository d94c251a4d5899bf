import itertools
import json
import platform

import pytest

from benchmarks.harness import (
    RESULTS,
    Case,
    claim_at_least,
    claim_at_most,
    measure,
    seconds,
    write_result,
)
from benchmarks.render import PAGE, read_results, render

KEYS = {"case", "system", "metric", "unit", "median", "min", "max", "repetitions", "versions"}


def case(system, run, **changes):
    return Case(case="c", system=system, metric="time", unit="s", run=run, **changes)


def test_cases_run_in_turn_and_warmups_do_not_count():
    calls, clock = [], itertools.count()

    def runs(name):
        return lambda: (calls.append(name), float(next(clock)))[1]

    rows = measure([case("a", runs("a")), case("b", runs("b"))], repetitions=3, warmups=1)
    assert calls == ["a", "b"] * 4
    found = [(row.min, row.median, row.max, row.repetitions) for row in rows]
    assert found == [(2, 4, 6, 3), (3, 5, 7, 3)]


def test_a_timed_action_takes_time():
    assert seconds(lambda: sum(range(1000)))() > 0


@pytest.mark.parametrize(("measured", "at_least", "at_most"), [(1, False, True), (2, True, True),
                                                               (3, True, False)])  # fmt: skip
def test_claims_hold_or_not(measured, at_least, at_most):
    assert claim_at_least("t", measured=measured, target=2).holds is at_least
    assert claim_at_most("t", measured=measured, target=2).holds is at_most


def test_a_result_goes_through_the_file_to_the_page(tmp_path):
    rows = measure([case("kiln|x", lambda: 0.25, packages=["numpy"])], repetitions=2, warmups=0)
    claims = [claim_at_most("kiln is quick", measured=0.25, target=0.1)]
    file = write_result("speed", question="How fast?", rows=rows, claims=claims, folder=tmp_path)
    result = json.loads(file.read_text())
    assert set(result["rows"][0]) == KEYS
    assert platform.node() not in result["machine"].values()
    page = render(read_results(tmp_path))
    assert "## speed" in page
    assert "| kiln is quick | 0.25 | 0.1 | **no** |" in page
    assert "| c | kiln\\|x | time | 0.25 | 0.25 | 0.25 | s | 2 |" in page
    assert "numpy " in page


def test_the_page_does_not_depend_on_the_order_of_files():
    one = {"question": "?", "rows": [], "claims": []}
    assert render({"a": one, "b": one}) == render({"b": one, "a": one})


def test_committed_results_are_whole():
    for name, result in read_results(RESULTS).items():
        assert all(set(row) == KEYS for row in result["rows"]), name
        assert all(row["min"] <= row["median"] <= row["max"] for row in result["rows"]), name
        assert all({"text", "measured", "target", "holds"} == set(c) for c in result["claims"])


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == render(read_results()), "run `python -m benchmarks.render`"
