"""Laws of the idle baseline: measured where meters measure, taken off where it is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.observe.test_figures import WORK, row
from tests.unit.observe.test_ledger import Clock, Watts, open_ledger
from trainer.config_accounts import AccountsConfig
from trainer.observe.accounts import close_check
from trainer.observe.figures import derive
from trainer.observe.idle import idle_of, measure_idle_w
from trainer.observe.jsonl import read_rows


def measure(clock, meters):
    def wait(seconds):
        clock.at_s += seconds

    return measure_idle_w(meters, wait=wait, clock_s=clock)


def test_meters_that_measure_show_their_watts_and_models_none():
    clock = Clock(50.0)
    meters = [
        Watts(clock, 70.0),
        Watts(clock, 75.0),
        Watts(clock, 40.0, "rapl"),
        Watts(clock, 9.0, "tdp_model", None),
        Watts(clock, 700.0, "limit_model"),
    ]
    assert measure(clock, meters) == pytest.approx({"counter": 145.0, "rapl": 40.0})


def test_where_nothing_is_measured_nobody_waits():
    clock = Clock()
    assert measure(clock, [Watts(clock, 9.0, "tdp_model", None)]) == {}
    assert measure(clock, []) == {}
    assert clock.at_s == 0


def ledger_of(tmp_path, *, busy_w, idle_w, seconds):
    """One node draws so much while it works, and its account knows its idle power."""
    clock = Clock(1000.0)
    path = tmp_path / "l.jsonl"
    with open_ledger(path, clock, meters=[Watts(clock, busy_w)]) as ledger:
        ledger.tell_idle({"counter": idle_w})
        ledger.switch("productive")
        clock.at_s += seconds
        ledger.reach(10)
    return read_rows(path)


def test_above_idle_is_gross_less_idle_watts_times_metered_time(tmp_path):
    rows = ledger_of(tmp_path, busy_w=500.0, idle_w=120.0, seconds=60)
    unseen = row("idle", 3600.0, 0.0, provenance="none")  # nobody read a meter then
    found = derive([*rows, unseen], WORK, AccountsConfig()).by_key
    assert found["idle_energy"].value == pytest.approx(120 * 60)
    assert found["idle_energy"].known_by == {"counter": 1.0}
    above = found["energy_above_idle_per_image"]
    assert above.value * WORK.images == pytest.approx(380 * 60)
    assert above.known_by == pytest.approx({"counter": 1.0})
    assert "120 W per node, measured before its ranks met" in above.assumptions[0]
    assert all(closure.holds() for closure in close_check(rows))


def test_what_is_stated_replaces_what_was_measured(tmp_path):
    rows = ledger_of(tmp_path, busy_w=500.0, idle_w=120.0, seconds=60)
    found = derive(rows, WORK, AccountsConfig(idle_node_w=100.0)).by_key
    above = found["energy_above_idle_per_image"]
    assert above.value * WORK.images == pytest.approx(400 * 60)
    assert above.known_by == pytest.approx({"counter": 500 / 600, "stated": 100 / 600})
    assert "100 W per node, stated" in above.assumptions[0]


def test_of_a_node_whose_idle_power_nobody_knows_there_is_no_figure(tmp_path):
    rows = ledger_of(tmp_path, busy_w=500.0, idle_w=120.0, seconds=60)
    other = row("productive", 60.0, 900.0, rank=1, last_step=10)
    found = derive([*rows, other], WORK, AccountsConfig()).by_key
    assert not {"idle_energy", "energy_above_idle_per_image"} & found.keys()
    found = derive([*rows, other], WORK, AccountsConfig(idle_node_w=100.0)).by_key
    assert found["idle_energy"].value == pytest.approx(100 * 120)


@pytest.mark.parametrize(
    ("provenance", "is_told"), [("tdp_model", False), ("limit_model", True), ("rapl", True)]
)
def test_from_a_model_without_idle_power_none_is_taken_off(provenance, is_told):
    rows = [row("productive", 60.0, 900.0, provenance=provenance, last_step=10)]
    found = derive(rows, WORK, AccountsConfig(idle_node_w=2.0)).by_key
    assert ("energy_above_idle_per_image" in found) is is_told


watts = st.floats(1, 1000)
nodes = st.lists(st.tuples(watts, watts, st.floats(1, 1e5)), min_size=1, max_size=5)


@given(nodes)
def test_nodes_add_up(nodes):
    rows = []
    for rank, (counter_w, rapl_w, seconds) in enumerate(nodes):
        idle = {"idle_w": {"counter": counter_w, "rapl": rapl_w}}
        rows.append(row("init", 0.0, 0.0, rank=rank, provenance="none", **idle))
        rows.append(row("init", seconds, 5.0, rank=rank))
        rows.append(row("init", 0.0, 1.0, rank=rank, provenance="rapl"))
    idle = idle_of(rows, stated_w=None)
    assert idle.metered_s == pytest.approx(sum(seconds for _, _, seconds in nodes))
    assert idle.joules_by["counter"] == pytest.approx(sum(c * s for c, _, s in nodes))
    assert idle.joules_by["rapl"] == pytest.approx(sum(r * s for _, r, s in nodes))
    assert idle.joules == pytest.approx(sum(idle.joules_by.values()))
