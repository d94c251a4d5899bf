import re

import pytest

from tests.observed_run import STEPS, write_run
from trainer.observe.accounts import Total, totals
from trainer.observe.ledger import Bucket, read_account
from trainer.observe.report_ledger import attempt_rows, attempt_strips, energy_bars
from trainer.observe.story import read_story


def test_slots_have_every_second_of_every_bucket(tmp_path):
    rows = read_account(write_run(tmp_path))
    strips = attempt_strips(rows, {0: "walltime"})
    assert [strip.attempt for strip in strips] == [0, 1]
    for (stage, bucket), total in totals(rows).items():
        assert stage == "train"
        found_s = sum(sum(strip.seconds.get(bucket, ())) for strip in strips)
        assert found_s == pytest.approx(total.seconds)
    for strip in strips:
        length_s = strip.edges_s[-1] - strip.edges_s[0]
        assert sum(map(sum, strip.seconds.values())) == pytest.approx(length_s)
    assert strips[1].edges_s[0] >= strips[0].edges_s[-1] - 1e-6


def test_goodput_is_the_share_of_the_attempt_that_is_in_the_result(tmp_path):
    first, second = attempt_strips(read_account(write_run(tmp_path)), {})
    lost_s = sum(first.seconds[Bucket.LOST_WORK])
    assert lost_s == pytest.approx(20 * 0.9, rel=1e-3)
    assert first.goodput_frac == pytest.approx(100 * 0.9 / first.edges_s[-1], rel=1e-3)
    assert Bucket.LOST_WORK not in second.seconds
    productive_s = sum(second.seconds[Bucket.PRODUCTIVE])
    assert productive_s == pytest.approx((STEPS - 100) * 0.9, rel=1e-3)


def test_rows_say_how_attempts_ended(tmp_path):
    run = write_run(tmp_path)
    ledger = read_account(run)
    endings = {0: "preempted"}
    story = read_story(run, ledger=ledger, dataset=None, versions={}, endings=endings)
    (figure,) = attempt_rows(story)
    texts = re.findall(r"<text[^>]*>([^<]*% in the result[^<]*)", figure)
    assert [text.split(", ")[1] for text in texts] == ["preempted", "ended properly"]
    torn = [row for row in ledger if not (row["attempt"] == 1 and row.get("closed"))]
    assert [strip.ending for strip in attempt_strips(torn, {})][1] == "running or killed"
    x_ends = [
        float(x) + float(w) for x, w in re.findall(r'<rect x="([^"]+)" width="([^"]+)"', figure)
    ]
    assert max(x_ends) <= 960
    assert not attempt_strips([], {})


def test_bars_are_stacked_by_how_joules_are_known():
    buckets = {Bucket.PRODUCTIVE: Total(10.0, {"counter": 300.0, "tdp_model": 100.0}),
               Bucket.INIT: Total(5.0, {"tdp_model": 40.0, "none": 0.0}),
               Bucket.IDLE: Total(5.0, {"none": 0.0})}  # fmt: skip
    (figure,) = energy_bars(buckets)
    found = re.findall(r'class="p-(\w+)" style="width:([\d.]+)%', figure)
    assert found == [("counter", "75.00"), ("tdp_model", "25.00"), ("tdp_model", "10.00")]
    assert figure.count("swatch") == 2
    assert energy_bars({Bucket.IDLE: Total(5.0, {"none": 0.0})}) == []
