"""Power that follows a known law, through meters and ledgers: joules are its integral."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.observe.test_energy import RecordedGpus
from tests.unit.observe.test_ledger import Clock, open_ledger
from trainer.observe.accounts import close_check, combined, totals
from trainer.observe.energy import CounterMeter, PowerMeter, gpu_meters
from trainer.observe.jsonl import read_rows
from trainer.observe.merging import each_device_once

TRACES = {
    "constant": (lambda t: 300.0, lambda t: 300.0 * t),
    "ramp": (lambda t: 50 + 2 * t, lambda t: 50 * t + t**2),
    "ramp down": (lambda t: 700 - 3 * t, lambda t: 700 * t - 1.5 * t**2),
}
"""Watts by time, and joules since 0."""
trace = pytest.mark.parametrize(("watts", "joules"), TRACES.values(), ids=TRACES)
pauses = st.lists(st.floats(0.05, 20), min_size=1, max_size=10)


class Counter:
    """A counter of microjoules on a power trace."""

    def __init__(self, clock, joules, *, wraps_at=None, reset_s=None):
        self.clock, self.joules, self.wraps_at, self.reset_s = clock, joules, wraps_at, reset_s

    def __call__(self):
        counted_j = self.joules(self.clock.at_s)
        if self.reset_s is not None and self.clock.at_s >= self.reset_s:
            counted_j -= self.joules(self.reset_s)
        microjoules = round(counted_j * 1e6)
        return microjoules % self.wraps_at if self.wraps_at else microjoules


def meter_of(counter, **more):
    return CounterMeter(counter, unit_j=1e-6, provenance="counter", device="gpu", **more)


@trace
@given(pauses=pauses)
def test_a_counter_gives_the_integral_and_so_does_one_that_wraps(watts, joules, pauses):
    clock = Clock()
    wraps_at = 15_000_000_000  # 15 kJ: never twice between two reads, as nobody could tell
    plain = meter_of(Counter(clock, joules))
    wrapping = meter_of(Counter(clock, joules, wraps_at=wraps_at), wraps_at=wraps_at)
    for pause_s in pauses:
        clock.at_s += pause_s
        assert plain.read_j() == pytest.approx(joules(clock.at_s), abs=1e-5)
        assert wrapping.read_j() == pytest.approx(joules(clock.at_s), abs=1e-5)


@trace
@given(pauses=pauses, reset_s=st.floats(0, 100))
def test_a_reset_loses_what_was_drawn_since_the_read_before_and_no_more(
    watts, joules, pauses, reset_s
):
    clock = Clock()
    meter = meter_of(Counter(clock, joules, reset_s=reset_s))
    lost_j = 0.0
    for pause_s in pauses:
        before_s, clock.at_s = clock.at_s, clock.at_s + pause_s
        if before_s < reset_s <= clock.at_s:
            lost_j = joules(reset_s) - joules(before_s)
            if joules(clock.at_s) - joules(reset_s) >= joules(before_s):
                return  # already beyond where it was: no reader can see such a reset
        assert meter.read_j() == pytest.approx(joules(clock.at_s) - lost_j, abs=1e-5)


@trace
@given(pauses=pauses)
def test_readings_of_power_that_is_linear_give_the_integral(watts, joules, pauses):
    clock = Clock()
    meter = PowerMeter(lambda: watts(clock.at_s), device="gpu", clock_s=clock)
    for pause_s in pauses:
        clock.at_s += pause_s
        assert meter.read_j() == pytest.approx(joules(clock.at_s))


@trace
@given(reads=st.lists(st.tuples(st.floats(0.05, 10), st.booleans()), min_size=1, max_size=10))
def test_a_gap_costs_a_counter_nothing_and_an_integral_its_change_of_power(watts, joules, reads):
    clock, readable = Clock(), [True]
    exact = Counter(clock, joules)
    counter = meter_of(lambda: exact() if readable[0] else None)
    power = PowerMeter(
        lambda: watts(clock.at_s) if readable[0] else None, device="gpu", clock_s=clock
    )
    for pause_s, readable[0] in reads:
        clock.at_s += pause_s
        counter.read_j(), power.read_j()
    clock.at_s, readable[0] = clock.at_s + 1, True
    assert counter.read_j() == pytest.approx(joules(clock.at_s), abs=1e-5)
    change_w = abs(watts(clock.at_s) - watts(0))
    assert abs(power.read_j() - joules(clock.at_s)) <= change_w * clock.at_s + 1e-6


def test_a_gpu_loses_its_counter_and_gets_it_back():
    gpus = RecordedGpus({"GPU-a": 0})
    (meter,) = gpu_meters(gpus, None)
    told = []
    for gpus.mj["GPU-a"] in (1_000, None, None, 4_000):
        told.append(meter.read_j())
    assert told == pytest.approx([1.0, 1.0, 1.0, 4.0])


@trace
@settings(max_examples=20)
@given(dies_s=st.integers(3, 90), work_s=st.integers(20, 90))
def test_a_dead_rank_s_node_has_the_joules_up_to_its_last_row(
    tmp_path_factory, watts, joules, dies_s, work_s
):
    """Two nodes write each second; the first rank of one dies, and the other goes on."""
    folder, rows = tmp_path_factory.mktemp("dead"), []
    for rank, end_s in enumerate((work_s, min(dies_s, work_s))):
        clock = Clock()
        path = folder / f"{rank}.jsonl"
        meter = meter_of(Counter(clock, joules))
        ledger = open_ledger(path, clock, rank=rank, node=f"n{rank}", meters=[meter])
        ledger.switch("productive")
        for clock.at_s in range(1, end_s + 1):
            ledger.reach(clock.at_s)
            ledger.flush()
        if end_s == work_s:
            ledger.close()
        else:
            clock.at_s += 0.9  # what it drew then is in no account
        rows += read_rows(path)
    found = combined(totals(each_device_once(rows)).values())
    assert found.joules == pytest.approx(joules(work_s) + joules(min(dies_s, work_s)), rel=1e-6)
    assert found.known_by == pytest.approx({"counter": 1.0})
    assert all(closure.holds() for closure in close_check(rows))


@trace
def test_buckets_have_the_joules_of_their_time(tmp_path, watts, joules):
    clock = Clock()
    meter = meter_of(Counter(clock, joules))
    with open_ledger(tmp_path / "l.jsonl", clock, meters=[meter]) as ledger:
        clock.at_s = 30.0
        ledger.switch("productive")
        clock.at_s = 70.0
        with ledger.span("evaluation"):
            clock.at_s = 90.0
        ledger.switch("drain")
        clock.at_s = 100.0
    told = {b.value: t.joules for (_, b), t in totals(read_rows(tmp_path / "l.jsonl")).items()}
    ends = {"init": (0, 30), "productive": (30, 70), "evaluation": (70, 90), "drain": (90, 100)}
    assert told == pytest.approx(
        {b: joules(end) - joules(begin) for b, (begin, end) in ends.items()}
    )
