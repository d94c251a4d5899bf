"""Laws of an account's figures: parts add up, assumptions act alone, nothing comes of nothing."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.observe.test_carbon import HOUR_S, START_S, hours
from trainer.config_accounts import AccountsConfig
from trainer.observe.carbon import Constant, rates
from trainer.observe.figure_words import joules_text, known_text, value_text
from trainer.observe.figures import Figure, Work, derive, work_on
from trainer.observe.ledger import Bucket

WORK = Work(images=1000, kept_samples=50, num_nodes=1, num_gpus=4)
LOST = ("train", Bucket.LOST_WORK)
NOT_LOST = [bucket for bucket in Bucket if bucket is not Bucket.LOST_WORK]


def row(bucket, seconds, joules, **changes):
    productive = bucket == "productive"
    return {
        "stage": "train",
        "attempt": 0,
        "rank": 0,
        "bucket": bucket,
        "start_unix_s": START_S,
        "seconds": seconds,
        "joules": joules,
        "provenance": "counter",
        **({"first_step": 0, "last_step": 0} if productive else {}),
        **changes,
    }


amounts = st.just(0.0) | st.floats(1e-3, 1e7)
watts_each = st.just(0.0) | st.floats(1e-3, 500)


@st.composite
def accounts(draw):
    """Ledgers of some stages: periods one after the other, with attempts, steps and provenances."""
    rows = []
    for stage in draw(st.lists(st.sampled_from(["plan", "prepare", "encode", "train", "evaluate"]),
                               unique=True, min_size=1)):  # fmt: skip
        at_s, attempt, step = START_S, 0, 0
        for _ in range(draw(st.integers(1, 6))):
            attempt += draw(st.booleans())
            first_step = draw(st.integers(0, step))
            step = first_step + draw(st.integers(0, 9))
            labels = {"stage": stage, "attempt": attempt, "start_unix_s": at_s}
            seconds, joules = draw(st.floats(0, 3600)), draw(amounts)
            bucket = draw(st.sampled_from(NOT_LOST))
            steps = {"first_step": first_step, "last_step": step} if bucket == "productive" else {}
            rows.append(row(bucket, seconds, joules, **labels, **steps))
            if draw(st.booleans()):
                rows.append(row(bucket, 0.0, draw(amounts), provenance="tdp_model",
                                **labels, **steps))  # fmt: skip
            at_s += seconds
    return rows


def values(figures):
    return {key: figure.value for key, figure in figures.by_key.items()}


@given(accounts())
def test_parts_add_up_to_the_whole(rows):
    found = derive(rows, WORK, AccountsConfig())
    all_j = sum(each["joules"] for each in rows)
    by_stage = {stage: 0.0 for stage, _ in found.by_bucket}
    for (stage, _), total in found.by_bucket.items():
        by_stage[stage] += total.joules
    assert sum(total.seconds for total in found.by_bucket.values()) == pytest.approx(
        sum(each["seconds"] for each in rows)
    )
    if all_j == 0:
        assert "energy" not in found.by_key
        return
    told = values(found)
    assert told["energy"] == pytest.approx(all_j, rel=1e-12)
    assert told["energy"] == pytest.approx(sum(by_stage.values()), rel=1e-12)
    train_j = told.get("gross_energy_per_image", 0.0) * WORK.images
    data_j = told.get("data_energy_per_image", 0.0) * WORK.images
    rest_j = by_stage.get("evaluate", 0.0)
    assert told["energy"] == pytest.approx(train_j + data_j + rest_j, rel=1e-12)
    if "data_energy_per_sample" in told:
        assert told["data_energy_per_sample"] * WORK.kept_samples == pytest.approx(data_j)


@given(st.lists(st.tuples(st.sampled_from(NOT_LOST), st.integers(1, 10**9)), min_size=1))
def test_whole_joules_add_up_to_the_last_one(parts):
    rows = [row(bucket, 1.0, joules) for bucket, joules in parts]
    found = derive(rows, WORK, AccountsConfig())
    by_bucket = sum(total.joules for total in found.by_bucket.values())
    assert values(found)["energy"] == by_bucket == sum(joules for _, joules in parts)


@given(accounts())
def test_gross_is_net_and_what_came_to_nothing(rows):
    found = derive(rows, WORK, AccountsConfig())
    told = values(found)
    net, gross = (told.get(f"{kind}_energy_per_image", 0.0) for kind in ("net", "gross"))
    assert gross >= net >= 0
    if gross:
        assert told["energy_goodput"] == pytest.approx(net / gross)
        assert 0 <= told["energy_goodput"] <= 1
        assert told["images_per_kwh"] * gross == pytest.approx(3.6e6)
        lost = sum(t.joules for (s, b), t in found.by_bucket.items() if (s, b) == LOST)
        assert told["lost_energy"] == pytest.approx(lost / 3.6e6)
        assert net * WORK.images + lost <= gross * WORK.images * (1 + 1e-12)


@given(accounts(), st.floats(1, 3), watts_each)
def test_pue_scales_the_building_and_nothing_else(rows, pue, watts):
    stated = AccountsConfig(node_overhead_w=watts, price_per_gpu_hour=2.0)
    rates_ = {"carbon": Constant(381.0, ""), "price": Constant(0.3, "")}
    before = derive(rows, WORK, stated, **rates_)
    after = derive(rows, WORK, replace(stated, pue=pue), **rates_)
    assert after.by_bucket == before.by_bucket
    assert after.by_key.keys() == before.by_key.keys()
    for key, figure in before.by_key.items():
        if key in {"facility_energy", "carbon", "energy_cost"}:
            assert after.by_key[key].value == pytest.approx(pue * figure.value, rel=1e-12)
            assert after.by_key[key].known_by == pytest.approx(figure.known_by)
        else:
            assert after.by_key[key] == figure


@given(accounts(), watts_each)
def test_overhead_is_of_every_second_that_a_node_was_held(rows, watts):
    found = derive(rows, WORK, AccountsConfig(node_overhead_w=watts)).by_key
    held_s = sum(each["seconds"] for each in rows if each["bucket"] != "queue")
    metered_j = sum(each["joules"] for each in rows)
    if metered_j > 0 and "facility_energy" in found:
        facility = found["facility_energy"]
        assert facility.value * 3.6e6 == pytest.approx(metered_j + watts * held_s, rel=1e-9)
        stated_frac = facility.known_by.get("stated", 0.0)
        assert stated_frac * facility.value * 3.6e6 == pytest.approx(watts * held_s, abs=1e-6)


@given(accounts(), st.floats(0, 1500))
def test_hours_that_are_all_alike_are_a_year(rows, g_co2_per_kwh):
    yearly = derive(rows, WORK, AccountsConfig(), carbon=Constant(g_co2_per_kwh, ""))
    hourly = derive(rows, WORK, AccountsConfig(), carbon=hours([g_co2_per_kwh] * 8))
    assert values(hourly) == pytest.approx(values(yearly), rel=1e-9)


@given(accounts(), watts_each)
def test_shares_of_what_is_known_sum_to_one(rows, watts):
    stated = AccountsConfig(node_overhead_w=watts, price_per_gpu_hour=2.0)
    found = derive(rows, WORK, stated, carbon=Constant(381.0, ""), price=Constant(0.3, ""))
    for figure in found.by_key.values():
        assert sum(figure.known_by.values()) == pytest.approx(1.0), figure
        assert all(0 < frac <= 1 + 1e-12 for frac in figure.known_by.values())
        assert figure.assumptions
    measured = {key for key, each in found.by_key.items() if "stated" not in each.known_by}
    assert measured | {"facility_energy", "carbon", "energy_cost"} >= found.by_key.keys()


def test_a_period_is_split_over_the_hours_in_which_it_was():
    """Its rows say how long each bucket and provenance was, not when within it."""
    period = {"start_unix_s": START_S + HOUR_S / 2}
    rows = [
        row("productive", 2700.0, 3.6e6, **period),
        row("productive", 0.0, 3.6e6, **period, provenance="tdp_model"),
        row("data_stall", 900.0, 3.6e6, **period),
        row("drain", 60.0, 3.6e6, start_unix_s=START_S + 2 * HOUR_S),
    ]
    found = derive(rows, WORK, AccountsConfig(), carbon=hours([100.0, 300.0, 1000.0])).by_key
    assert found["carbon"].value == pytest.approx((3 * 200.0 + 1000.0) / 1e3)


def test_cost_follows_the_price_of_the_hour():
    rows = [
        row("productive", 3600.0, 3.6e6),
        row("drain", 60.0, 7.2e6, start_unix_s=START_S + 7200),
    ]
    prices = hours([0.5, 9.0, -0.1])
    found = derive(rows, WORK, AccountsConfig(pue=2.0), price=prices).by_key
    assert found["energy_cost"].value == pytest.approx(2 * (0.5 - 2 * 0.1))
    assert "carbon" not in found


ALL = {
    "energy", "gross_energy_per_image", "net_energy_per_image", "images_per_kwh", "energy_goodput",
    "time_goodput", "lost_energy", "lost_energy_per_interruption", "data_energy_per_image",
    "data_energy_per_sample", "facility_energy", "carbon", "energy_cost", "gpu_hours", "gpu_cost",
}  # fmt: skip
JOULES = ALL - {"time_goodput", "gpu_hours", "gpu_cost"}
PER_IMAGE = {"gross_energy_per_image", "net_energy_per_image", "images_per_kwh",
             "data_energy_per_image"}  # fmt: skip


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        ("nothing", set()),
        ("joules", JOULES),
        ("train", ALL - {"energy", "data_energy_per_image", "data_energy_per_sample",
                         "facility_energy", "carbon", "energy_cost"}),
        ("data", {"data_energy_per_image", "data_energy_per_sample"}),
        ("images", PER_IMAGE),
        ("kept_samples", {"data_energy_per_sample"}),
        ("num_gpus", {"gpu_hours", "gpu_cost"}),
        ("price_per_gpu_hour", {"gpu_cost"}),
        ("price", {"energy_cost"}),
        ("carbon", {"carbon"}),
        ("interruptions", {"lost_energy_per_interruption"}),
    ],
)  # fmt: skip
def test_no_figure_without_its_input(without, missing):
    rows = [
        row("productive", 60.0, 900.0, stage="prepare"),
        row("productive", 60.0, 900.0, last_step=10),
        row("productive", 60.0, 900.0, attempt=1, first_step=5, last_step=10),
    ]
    match without:
        case "joules":
            rows = [{**each, "joules": 0.0, "provenance": "none"} for each in rows]
        case "train":
            rows = rows[:1]
        case "data":
            rows = rows[1:]
        case "interruptions":
            rows = rows[:2]
    work = replace(WORK, **{without: 0} if hasattr(WORK, without) else {})
    stated = AccountsConfig(price_per_gpu_hour=None if without == "price_per_gpu_hour" else 2.0)
    known = {"carbon": Constant(381.0, ""), "price": Constant(0.3, "")}
    known.pop(without, None)
    assert derive(rows, work, stated, **known).by_key.keys() == ALL - missing


def test_overhead_alone_is_no_energy_of_a_building():
    rows = [row("productive", 60.0, 0.0, provenance="none")]
    found = derive(rows, WORK, AccountsConfig(node_overhead_w=100.0), carbon=Constant(1.0, ""))
    assert not {"energy", "facility_energy", "carbon"} & found.by_key.keys()


def test_what_was_lost_is_shared_out_over_the_interruptions():
    rows = [
        row("productive", 100.0, 100 * 3.6e6, last_step=100),
        row("lost_work", 5.0, 0.0, provenance="none"),
        row("productive", 50.0, 50 * 3.6e6, attempt=1, first_step=60, last_step=110),
        row("productive", 10.0, 10 * 3.6e6, attempt=2, first_step=110, last_step=120),
        row("productive", 10.0, 10 * 3.6e6, attempt=2, first_step=115, last_step=125),
    ]
    found = derive(rows, WORK, AccountsConfig()).by_key
    assert found["lost_energy"].value == pytest.approx(40 + 5)
    assert found["lost_energy_per_interruption"].value == pytest.approx(40 / 2)


def test_gpus_are_paid_for_as_long_as_they_are_held():
    rows = [
        row("queue", 9999.0, 0.0),
        row("init", 1800.0, 1.0),
        row("productive", 5400.0, 1.0, last_step=3),
        row("productive", 5400.0, 1.0, last_step=3, rank=1),  # another node's, at the same time
        row("evaluation", 5400.0, 1.0, stage="evaluate"),
    ]
    stated = AccountsConfig(price_per_gpu_hour=2.5, currency="EUR")
    found = derive(rows, WORK, stated).by_key
    assert found["gpu_hours"].value == pytest.approx((0.5 + 2 * 1.5) * 4)
    assert (found["gpu_cost"].value, found["gpu_cost"].unit) == (pytest.approx(35.0), "EUR")


def test_nodes_without_a_meter_are_told():
    rows = [row("productive", 60.0, 900.0, last_step=10, rank=rank) for rank in (0, 8)]
    for num_nodes, is_told in ((1, False), (2, False), (3, True)):
        found = derive(rows, replace(WORK, num_nodes=num_nodes), AccountsConfig()).by_key
        for key in ("energy", "gross_energy_per_image", "facility_energy"):
            assert ("the meters of 2 of 3 nodes alone" in found[key].assumptions) is is_told


@pytest.mark.parametrize(
    ("cluster", "nodes", "gpus"),
    [({}, 1, 0), ({"num_nodes": 3, "ranks_per_node": 4, "device": "cuda"}, 3, 12),
     ({"num_nodes": 2, "ranks_per_node": 4, "device": "cpu"}, 2, 0)],
)  # fmt: skip
def test_the_cluster_says_how_many_gpus_train(cluster, nodes, gpus):
    work = work_on(cluster, images=1, kept_samples=2)
    assert (work.num_nodes, work.num_gpus) == (nodes, gpus)


def test_the_year_of_a_grid_is_told_with_its_source():
    stated = AccountsConfig(grid="DEU")
    carbon, _ = rates(stated)
    found = derive([row("init", 1.0, 3.6e6)], WORK, stated, carbon=carbon).by_key
    assert found["carbon"].value == pytest.approx(0.38095)
    assert "Germany's mean of 2023 (codecarbon 3.3.2)" in found["carbon"].assumptions[0]


@pytest.mark.parametrize(
    ("known_by", "text"),
    [
        ({"tdp_model": 0.29, "counter": 0.71},
         "71 % measured (counter), 29 % modelled (tdp_model)"),
        ({"rapl": 0.2, "counter": 0.7, "stated": 0.1},
         "90 % measured (counter, rapl), 10 % stated"),
        ({"counter": 0.999, "tdp_model": 0.001},
         ">99 % measured (counter), <1 % modelled (tdp_model)"),
        ({"counter": 0.5, "tdp_model": 0.1, "limit_model": 0.4},
         "50 % measured (counter), 50 % modelled (tdp_model, limit_model)"),
        ({"clock": 1.0}, "100 % measured (clock)"),
        ({"power_integral": 0.5 + 0.5 - 1e-16}, "100 % measured (power_integral)"),
        ({}, "no meter"),
    ],
)  # fmt: skip
def test_how_it_is_known_is_said_in_shares(known_by, text):
    assert known_text(known_by) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (8612.0, "J", "8.61 kJ"),
        (0.1769, "J/image", "0.177 J/image"),
        (0.795, "frac", "79.5 %"),
        (20_353_356.0, "images/kWh", "20,400,000 images/kWh"),
        (37.5, "kWh", "37.5 kWh"),
        (0.00005, "kWh", "180 J"),
        (11_260.0, "kgCO2e", "11,300 kgCO2e"),
        (0.000585, "kgCO2e", "0.585 gCO2e"),
        (999.9, "EUR", "1,000 EUR"),
        (-0.25, "USD", "-0.250 USD"),
    ],
)
def test_values_have_three_digits_and_a_unit(value, unit, text):
    assert value_text(Figure("", "", value, unit, {})) == text


@pytest.mark.parametrize("provenance", ["tdp_model", "limit_model"])
def test_a_model_is_told_with_what_it_takes_for_granted(provenance):
    rows = [row("productive", 60.0, 900.0, provenance=provenance, last_step=10)]
    energy = derive(rows, WORK, AccountsConfig()).by_key["energy"]
    assert [words for words in energy.assumptions if words.startswith(f"{provenance}: ")]
    assert energy.known_by == {provenance: 1.0}


def test_joules_are_told_by_provenance():
    found = derive([row("init", 1.0, 12_300.0)], WORK, AccountsConfig()).by_bucket
    assert joules_text(found["train", Bucket.INIT]) == "12.3 kJ (counter)"
    found = derive([row("init", 1.0, 0.0)], WORK, AccountsConfig()).by_bucket
    assert joules_text(found["train", Bucket.INIT]) == "-"
