import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.observe.test_ledger import Clock, Watts, open_ledger
from trainer.observe.accounts import totals
from trainer.observe.jsonl import read_rows
from trainer.observe.merging import covered_frac, each_device_once
from trainer.observe.waiting_time import Waited, hand_over


def joules(rows):
    return sum(total.joules for total in totals(rows).values())


def account(path, clock, *, begin_s, end_s, watts=((100.0, "gpu"),), **labels):
    """Count from one second to another, and write every ten."""
    clock.at_s = begin_s
    meters = [Watts(clock, power, device=device) for power, device in watts]
    with open_ledger(path, clock, meters=meters, **{"node": "n1", **labels}) as ledger:
        ledger.switch("productive")
        while clock.at_s < end_s:
            clock.at_s = min(clock.at_s + 10, end_s)
            ledger.flush()
    return read_rows(path)


seconds = st.integers(0, 200)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(seconds, st.integers(1, 200)), min_size=1, max_size=5))
def test_a_device_gives_each_joule_once_however_many_read_it(tmp_path, spans):
    clock, rows, read = Clock(), [], set()
    for number, (begin_s, length_s) in enumerate(spans):
        path = tmp_path / f"{number}.jsonl"
        path.unlink(missing_ok=True)
        span = {"begin_s": begin_s, "end_s": begin_s + length_s}
        rows += account(path, clock, attempt=number, stage="evaluate", **span)
        read |= set(range(begin_s, begin_s + length_s))
    assert joules(each_device_once(rows)) == pytest.approx(100 * len(read))


def test_a_job_that_waits_reads_no_device(tmp_path, monkeypatch):
    clock = Clock()
    rows = account(tmp_path / "a", clock, begin_s=0, end_s=100)
    for name, value in hand_over(Waited(-50.0, 90.0)).items():
        monkeypatch.setenv(name, value)
    rows += account(tmp_path / "b", clock, stage="evaluate", begin_s=100, end_s=200)
    assert each_device_once(rows) == rows
    assert totals(rows)["evaluate", "queue"].seconds == 140


def test_another_node_or_another_device_has_joules_of_its_own(tmp_path):
    clock, span = Clock(), {"begin_s": 0, "end_s": 100}
    rows = account(tmp_path / "a", clock, **span)
    rows += account(tmp_path / "b", clock, node="n2", rank=1, **span)
    rows += account(tmp_path / "c", clock, watts=[(100.0, "other")], stage="evaluate", **span)
    assert each_device_once(rows) == rows
    assert joules(rows) == pytest.approx(30_000)


def test_of_two_devices_one_that_is_read_already_counts_as_half(tmp_path):
    clock, span = Clock(), {"begin_s": 0, "end_s": 100}
    rows = account(tmp_path / "a", clock, **span)
    both = [(100.0, "gpu"), (100.0, "other")]
    rows += account(tmp_path / "b", clock, watts=both, stage="evaluate", **span)
    assert joules(each_device_once(rows)) == pytest.approx(20_000)


def test_the_first_to_read_keeps_the_joules(tmp_path):
    clock = Clock()
    rows = account(tmp_path / "late", clock, stage="evaluate", begin_s=50, end_s=150)
    rows += account(tmp_path / "early", clock, begin_s=0, end_s=100)
    found = totals(each_device_once(rows))
    by_stage = {stage: total.joules for (stage, bucket), total in found.items() if total.joules}
    assert by_stage == pytest.approx({"evaluate": 5_000, "train": 10_000})


@given(st.tuples(seconds, seconds), st.lists(st.tuples(seconds, seconds)))
def test_a_second_that_several_spans_cover_counts_once(period, spans):
    begin_s, end_s = sorted(period)
    ordered = sorted((min(span), max(span)) for span in spans)
    inside = range(begin_s, end_s)
    count = sum(any(low <= second < high for low, high in ordered) for second in inside)
    expected = count / len(inside) if inside else 0
    assert covered_frac((begin_s, end_s), ordered) == pytest.approx(expected)
