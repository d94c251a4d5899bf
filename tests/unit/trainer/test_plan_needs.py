import json
from dataclasses import asdict
from math import ceil, sqrt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.attempts import Begin, End
from trainer.config import TrainConfig
from trainer.data.manifest import ShardEntry
from trainer.errors import BadInput
from trainer.frozen import compose
from trainer.observe.carbon import Constant
from trainer.plan_forecast import (
    LEAST_FAILURES,
    RSC_MTTF_GPU_H,
    check_run,
    failures_of,
    forecast,
    measured_failures,
)
from trainer.plan_needs import QUEUE_S, RESTART_S, best_interval_s, predict_data, stretched
from trainer.train import recorded_predictions


def run(*words):
    return compose(TrainConfig, "train", ["experiment=sd2_512", "data.dataset=none", *words])


def needs(*words):
    return forecast(run(*words)).needs


def test_more_failures_never_take_less_time():
    found = [needs(f"cluster.mttf_gpu_h={hours}").run_h.mid for hours in (1e6, 1e5, 1e4, 2e3, 1e3)]
    assert found == sorted(found)


def test_without_failures_and_stalls_work_takes_its_time():
    assert stretched(1e6, interval_s=600, stall_s=0, mttf_s=1e12) == pytest.approx(1e6, rel=1e-5)


def simulated(work_s, *, interval_s, stall_s, mttf_s, dice):
    """Live through a run: failures come at random, also while it starts again."""
    now_s, next_s = 0.0, dice.expovariate(1 / mttf_s)
    for _ in range(round(work_s / interval_s)):
        need_s = interval_s + stall_s
        while now_s + need_s > next_s:
            now_s = next_s
            next_s += dice.expovariate(1 / mttf_s)
            need_s = RESTART_S + interval_s + stall_s
        now_s += need_s
    return now_s


@pytest.mark.parametrize("mttf_s", [1800.0, 7200.0, 36_000.0])
def test_failures_take_what_they_take_in_runs_that_are_lived_through(mttf_s):
    told = {"interval_s": 600.0, "stall_s": 20.0, "mttf_s": mttf_s}
    lived_s = simulated(6e6, **told, dice=Random(0))
    assert stretched(6e6, **told) == pytest.approx(lived_s, rel=0.03)


def test_jobs_are_whole_and_each_starts_and_is_queued():
    for limit_min in (30, 240, 1440):
        found = needs(f"cluster.time_limit_min={limit_min}", "cluster.mttf_gpu_h=1e12")
        useful_h = limit_min / 60 - (300 + RESTART_S) / 3600  # it is warned 300 s before the end
        work_h = found.run_h.mid - found.num_jobs * RESTART_S / 3600
        assert found.num_jobs == ceil(work_h / useful_h)
        waited_h = found.wall_h.mid - found.run_h.mid
        assert waited_h == pytest.approx(found.num_jobs * QUEUE_S / 3600)


def test_the_best_interval_is_young_s_and_loses_least():
    stall_s, mttf_s = 5.0, 32 * 3600.0
    best = best_interval_s(stall_s, mttf_s)
    assert best == pytest.approx(sqrt(2 * stall_s * mttf_s))
    lost = [
        stretched(1.0, interval_s=best * factor, stall_s=stall_s, mttf_s=mttf_s)
        for factor in (0.5, 0.9, 1.0, 1.1, 2.0)
    ]
    assert min(lost) == pytest.approx(lost[2], rel=1e-4)


def test_the_recommended_interval_loses_no_more_than_the_configured_one():
    for images in (20_480, 204_800, 2_048_000, 20_480_000):
        found = needs(f"checkpoint.every_images={images}")
        if found.interval_s >= found.checkpoint_write_s:
            assert found.best_loss_frac <= found.loss_frac + 1e-6


def test_cost_is_linear_in_the_price():
    one, two = (needs(f"accounts.price_per_gpu_hour={price}").gpu_cost for price in (1, 2))
    assert (two.low, two.mid, two.high) == (2 * one.low, 2 * one.mid, 2 * one.high)
    assert one.mid == needs().gpu_hours.mid


def test_energy_follows_pue_and_carbon_follows_energy():
    plain, cooled = needs(), needs("accounts.pue=1.5", "accounts.grid=DEU")
    assert cooled.kwh.mid == pytest.approx(1.5 * plain.kwh.mid)
    rate = forecast(run("accounts.grid=DEU")).carbon
    assert isinstance(rate, Constant)
    assert cooled.kg_co2e.mid == pytest.approx(cooled.kwh.mid * rate.per_kwh / 1e3)


def hours_of_a_kwh(folder):
    path = folder / "hours.csv"
    rows = "2026-01-31T13:00Z,100,0.1\n2026-01-31T14:00Z,300,0.3\n"
    path.write_text(f"time,g_co2_per_kwh,price_per_kwh\n{rows}")
    return path


def test_of_a_table_of_hours_the_mean_is_taken_as_nobody_knows_when_the_run_is(tmp_path):
    found = needs(f"accounts.hourly={hours_of_a_kwh(tmp_path)}")
    assert found.kg_co2e.mid == pytest.approx(found.kwh.mid * 200 / 1e3)
    assert found.energy_cost.mid == pytest.approx(found.kwh.mid * 0.2)


def test_tables_that_no_mean_can_be_taken_of_are_refused_unless_it_trains(tmp_path, caplog):
    (tmp_path / "empty.csv").write_text("time,g_co2_per_kwh\n")
    for name, refusal in (("none.csv", "cannot be read"), ("empty.csv", "has no hours at all")):
        cfg = run(f"accounts.hourly={tmp_path / name}")
        with pytest.raises(BadInput, match=rf"accounts\.hourly=.*{name} {refusal}"):
            check_run(cfg)
        assert recorded_predictions(cfg) == {}
        assert f"{name} {refusal}" in caplog.text
    assert recorded_predictions(run())["predicted"]["wall_h"] > 0


def test_what_is_unknown_is_not_told():
    found = needs()
    assert (found.gpu_cost, found.energy_cost, found.kg_co2e) == (None, None, None)


def test_hours_add_up():
    found = needs()
    assert found.train_h.mid < found.run_h.mid < found.wall_h.mid
    assert found.gpu_hours.mid == pytest.approx(found.run_h.mid * 128)
    assert found.num_failures == pytest.approx(found.run_h.mid / found.mttf_h)


def attempt(run_folder, number, cause, *, hours, saved_step=1):
    folder = run_folder / "attempts" / f"{number:03d}"
    folder.mkdir(parents=True)
    begin = Begin(job_id="1", nodes=("n1", "n2"), unix_s=0.0, saved_step=0)
    end = End(cause=cause, why="", unix_s=hours * 3600, saved_step=saved_step, suspects={})
    (folder / "begin.json").write_text(json.dumps(asdict(begin)))
    (folder / "end.json").write_text(json.dumps(asdict(end)))


def test_failures_are_stated_or_measured_or_published(tmp_path):
    assert failures_of(run("cluster.mttf_gpu_h=5"), tmp_path).mttf_gpu_h == 5
    assert failures_of(run(), tmp_path / "none").mttf_gpu_h == RSC_MTTF_GPU_H
    for number in range(LEAST_FAILURES - 1):
        attempt(tmp_path / "a", number, "lost", hours=10, saved_step=number + 1)
    assert failures_of(run(), tmp_path).mttf_gpu_h == RSC_MTTF_GPU_H
    attempt(tmp_path / "b", 0, "stuck", hours=10)
    attempt(tmp_path / "b", 1, "walltime", hours=30)
    found = failures_of(run(), tmp_path)
    hours = 10 * LEAST_FAILURES + 30
    assert found.mttf_gpu_h == pytest.approx(hours * 2 * 8 / LEAST_FAILURES)
    assert f"{LEAST_FAILURES} failures" in found.words


def test_only_what_hardware_or_a_site_may_cause_after_a_first_step_is_a_failure(tmp_path):
    for number in range(LEAST_FAILURES):
        attempt(tmp_path / "bug", number, "crashed", hours=10)
        attempt(tmp_path / "never_began", number, "stuck", hours=10, saved_step=0)
        attempt(tmp_path / "bad", number, "bad_node", hours=10, saved_step=0)
    assert failures_of(run(), tmp_path).mttf_gpu_h == RSC_MTTF_GPU_H


@pytest.mark.parametrize("torn", ["{", "[]", "{}", '{"nodes": 3}', None])
def test_a_run_that_cannot_be_read_is_named_and_its_neighbours_count(tmp_path, torn, caplog):
    for number in range(LEAST_FAILURES):
        attempt(tmp_path / "sweep/000", number, "lost", hours=10, saved_step=number + 1)
    begin = tmp_path / "a/attempts/000/begin.json"
    begin.parent.mkdir(parents=True)
    if torn is None:
        begin.mkdir()
    else:
        begin.write_text(torn)
    assert failures_of(run(), tmp_path).mttf_gpu_h == pytest.approx(10 * 2 * 8)
    assert f"failures of {tmp_path / 'a'} are not counted" in caplog.text


def test_runs_are_not_looked_for_deeper_than_they_lie(tmp_path):
    for number in range(LEAST_FAILURES):
        attempt(tmp_path / "home/me/run", number, "lost", hours=10, saved_step=number + 1)
    assert measured_failures(tmp_path) == (0.0, 0)


@pytest.mark.parametrize("hours", [1e-3, 0.04, 1.0])
def test_where_no_interval_is_survived_nothing_is_told_that_follows(hours):
    made = forecast(run(f"cluster.mttf_gpu_h={hours}"))
    assert made.speed is not None
    assert made.needs is None
    recorded = recorded_predictions(run(f"cluster.mttf_gpu_h={hours}"))["predicted"]
    assert "images_per_s" in recorded
    assert "wall_h" not in recorded


@settings(max_examples=15, deadline=None)
@given(st.floats(-3, 9), st.integers(1, 15))
def test_whatever_fails_and_however_often_it_saves_the_figures_are_finite(mttf_digits, digits):
    found = needs(f"cluster.mttf_gpu_h={10**mttf_digits}", f"checkpoint.every_images={10**digits}")
    if found is not None:
        assert found.wall_h.mid < 1e20
        assert 0 <= found.best_loss_frac <= 1


def test_no_interval_is_longer_than_the_run():
    longest, whole = needs(f"checkpoint.every_images={10**12}"), run().total_images
    assert longest.interval_s == pytest.approx(longest.train_h.mid * 3600)
    assert longest.loss_frac == needs(f"checkpoint.every_images={2 * whole}").loss_frac
    short = needs("total_images=4096", "cluster.mttf_gpu_h=1e9")
    assert short.best_interval_s == pytest.approx(short.train_h.mid * 3600)
    assert short.best_interval_images == 4096


def shards(*counts):
    return [
        ShardEntry(
            name=f"{number:05d}",
            bytes=1000 * count,
            sha256="",
            count=count,
            index_bytes=0,
            index_sha256="",
        )
        for number, count in enumerate(counts)
    ]


def test_a_cache_that_holds_all_fetches_all_once():
    kept = run("data.cache=/cache", "data.cache_gb=1")
    found = predict_data(kept, [shards(10, 10)], [1.0], images=100)
    assert (found.num_samples, found.total_bytes, found.epochs) == (20, 20_000, 5.0)
    assert found.egress_bytes == 20_000
    assert predict_data(run(), [shards(10, 10)], [1.0], images=100).egress_bytes == 5 * 20_000
