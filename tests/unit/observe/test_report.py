import json
import math
import re

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.observed_run import CAPTIONS, STEPS, Now, write_config, write_run, write_training
from trainer.errors import BadInput
from trainer.observe.accounts import totals
from trainer.observe.charts import Line, line_chart, round_ticks, short_number, smooth, thin
from trainer.observe.columns import last_of_each_step
from trainer.observe.evaluations import result_path, strip_path
from trainer.observe.html import Html, join, tag
from trainer.observe.ledger import read_account
from trainer.observe.report_numbers import headline, in_joules
from trainer.observe.story import read_story
from trainer.report import ReportConfig, dataset_facts, main, write_report

SECTIONS = ["summary", "samples", "evaluation", "training", "accounts", "figures", "data",
            "reconstructions", "config", "lineage"]  # fmt: skip


def page(run, **changes):
    fields = {"run": str(run), "dataset": None, "output": None, **changes}
    assert write_report(ReportConfig(**fields)) == 0
    return (run / "report.html").read_text()


def text_of(html):
    return re.sub(r"<[^>]+>", "\n", html)


def test_a_whole_run_is_told(tmp_path):
    html = page(write_run(tmp_path))
    assert re.findall(r'<section id="(\w+)">', html) == SECTIONS
    assert "not there yet" not in html
    assert html.count("<img ") == 3 * len(CAPTIONS)
    assert html.count("<svg ") == 4
    assert "The account does not close" not in html
    for number in ("4,680 of 5,000 rows", "12,800 images", "91.0 %, against 3.0 % by chance"):
        assert number in html


def test_pictures_of_eight_evaluations_are_shown_side_by_side_in_time(tmp_path):
    run = write_run(tmp_path)
    (run / "evaluations").mkdir()
    for step in range(10, 210, 10):
        scores = {"step": step, "images_seen": 64 * step, "scores": {"all": step / 200}}
        result_path(run, step, "ema").write_text(json.dumps(scores))
        assert ("The same captions over time" in page(run)) == (step > 20)
        Image.new("RGB", (8, 8), (step, 0, 0)).save(strip_path(run, step, "ema"))
    html = page(run)
    told = [
        int(images)
        for images in re.findall(r"<figcaption>after (\d+) images", html.replace(",", ""))
    ]
    assert len(told) == 8
    assert (told[0], told[-1]) == (640, 12800)
    assert told == sorted(set(told))
    assert html.count("<img ") == 3 * len(CAPTIONS) + 8


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path)
    assert page(run) == page(run)


def test_the_page_asks_for_nothing(tmp_path):
    html = page(write_run(tmp_path))
    addresses = re.findall(r'(?:src|href|url\()="?([^">]{0,12})', html)
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "@import" not in html


def test_text_from_files_stays_text(tmp_path):
    html = page(write_run(tmp_path))
    assert html.count("<script") == 2
    assert "&lt;script&gt;" in html
    assert "&lt;grey &amp; white&gt;" in html


def test_every_missing_part_names_the_command_that_makes_it(tmp_path):
    run = tmp_path / "fresh"
    write_config(run, tmp_path / "nowhere")
    html = page(run)
    assert re.findall(r'<section id="(\w+)">', html) == SECTIONS
    for command in ("prepare", "train", "evaluate", "sample"):
        assert f"kiln {command}" in text_of(html)


@pytest.mark.parametrize(
    "part", ["metrics.jsonl", "ledger.jsonl", "plan.json", "evaluation.json", "samples/index.json",
             "samples/real_2.png"]
)  # fmt: skip
def test_any_one_part_may_be_missing(tmp_path, part):
    run = write_run(tmp_path)
    (run / part).unlink()
    assert re.findall(r'<section id="(\w+)">', page(run)) == SECTIONS


def test_without_its_dataset_the_rest_is_told(tmp_path):
    run = write_run(tmp_path)
    (tmp_path / "dataset" / "manifest.json").unlink()
    html = page(run)
    assert "The dataset&#x27;s manifest" in html
    assert "12,800 images" in html


def test_a_picture_outside_of_the_samples_is_not_shown(tmp_path):
    run = write_run(tmp_path)
    (run / "secret.png").write_bytes(b"s")
    index = {"samples": [{"caption": "c", "picture": "../secret.png", "ok": None}]}
    (run / "samples" / "index.json").write_text(json.dumps(index))
    assert "is outside of samples/" in page(run)


def test_the_command_writes_where_it_is_told(tmp_path, caplog):
    run = write_run(tmp_path)
    out = tmp_path / "elsewhere.html"
    caplog.set_level("INFO")
    assert main([f"run={run}", f"output={out}"]) == 0
    assert out.read_text() == page(run)
    assert str(out) in caplog.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.yaml, so it is no run directory"):
        write_report(ReportConfig(run=str(tmp_path), dataset=None, output=None))


@pytest.mark.parametrize(
    ("file", "damage"),
    [("config.yaml", "a: [1"), ("evaluation.json", "{"), ("plan.json", "[1]"),
     ("metrics.jsonl", "x\n")],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, file, damage):
    run = write_run(tmp_path)
    (run / file).write_text(damage)
    with pytest.raises(BadInput, match=file):
        page(run)


def test_rows_of_steps_done_again_are_superseded():
    assert last_of_each_step(np.array([1.0, 2, 3, 4, 3, 5])).tolist() == [
        True, True, False, False, True, True,
    ]  # fmt: skip
    assert last_of_each_step(np.array([])).tolist() == []


def test_productive_time_is_that_of_the_steps_in_the_result(tmp_path):
    run, now = tmp_path / "r", Now()
    write_config(run, tmp_path / "d")
    write_training(run, now)
    story = read_story(run, ledger=read_account(run), dataset=None, versions={})
    numbers = headline(story, totals(story.ledger))
    assert numbers.productive_s == pytest.approx(STEPS * 0.9, rel=1e-3)
    assert numbers.train.seconds == pytest.approx(now.at_s - Now().at_s)
    assert numbers.train.joules == pytest.approx(10 * numbers.train.seconds)
    assert numbers.train.known_by == {"tdp_model": 1.0}


def figures_section(html):
    return re.search(r'<section id="figures">(.*?)</section>', html).group(1)


def test_figures_say_how_they_are_known_and_what_they_assume(tmp_path):
    html = figures_section(page(write_run(tmp_path)))
    text = re.sub(r"<[^>]+>", "|", html)
    assert "|Energy per image, gross||0.177 J/image||100 % modelled (tdp_model)||" in text
    assert "tdp_model: busy core-seconds x stated watts" in text
    assert "PUE 1: nothing for cooling" in text
    for unknown in ("gCO2e", "Cost", "GPU"):
        assert unknown not in text
    assert "nobody said which grid it was. Run |kiln report run=" in text


def test_assumptions_are_given_without_touching_the_run(tmp_path, capsys):
    run = write_run(tmp_path)
    config = (run / "config.yaml").read_bytes()
    words = ["accounts.grid=DEU", "accounts.pue=1.5", "accounts.price_per_kwh=0.3"]
    assert main([f"run={run}", *words, "accounts.currency=EUR"]) == 0
    text = re.sub(r"<[^>]+>", "|", figures_section((run / "report.html").read_text()))
    energy_j = 10 * (75 + 48 + 5 + 226.4)
    assert f"|Facility energy||{in_joules(1.5 * energy_j)}||100 % modelled" in text
    assert f"|Carbon||{1.5 * energy_j / 3.6e6 * 380.95:.3f} gCO2e||" in text
    assert "380.95 gCO2/kWh, Germany&#x27;s mean of 2023 (codecarbon 3.3.2)" in text
    assert f"|Cost of energy||{1.5 * energy_j / 3.6e6 * 0.3:#.3g} EUR||" in text
    assert "nobody said which grid" not in text
    assert (run / "config.yaml").read_bytes() == config
    said = capsys.readouterr().out
    assert re.search(r"Energy per image, gross +0\.177 J/image +100 % modelled", said)
    assert re.search(rf"Carbon +{1.5 * energy_j / 3.6e6 * 380.95:.3f} gCO2e", said)


def test_what_the_run_assumes_holds_where_the_report_says_nothing(tmp_path):
    run = write_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    cluster = {"device": "cuda", "num_nodes": 1, "ranks_per_node": 8}
    stated = {"grid": "FRA", "pue": 1.25, "price_per_gpu_hour": 2.0}
    config |= {"cluster": cluster, "accounts": stated}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = figures_section(page(run, accounts={"pue": 1.5, "grid": None}))
    for told in ("PUE 1.5: stated", "France", "2 USD per GPU hour", "x 8 GPUs"):
        assert told in text


def test_hours_are_those_of_the_run(tmp_path):
    run = write_run(tmp_path)
    hourly = tmp_path / "hours.csv"
    hourly.write_text("time,g_co2_per_kwh\n2027-01-15T08:00Z,100\n")
    html = figures_section(page(run, accounts={"hourly": str(hourly)}))
    assert "g_co2_per_kwh of each hour (hours.csv)" in html
    hourly.write_text("time,g_co2_per_kwh\n2027-01-15T09:00Z,100\n")
    with pytest.raises(BadInput, match=r"has no hour for 2027-01-15 08:00 UTC"):
        page(run, accounts={"hourly": str(hourly)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["accounts.grid=DUE"], r"accounts\.grid=DUE is none .*Did you mean .*DEU \(Germany\)"),
        (["accounts.pue=0.9"], r"accounts\.pue=0\.9: .*greater than or equal to 1"),
        (["accounts.pue=much"], r"accounts\.pue='much': .*number"),
        (["accounts.price_per_kwh=-1"], r"accounts\.price_per_kwh=-1.*greater than or equal to 0"),
        (["accounts.node_overhead_w=inf"], r"accounts\.node_overhead_w=inf: .*finite"),
        (["accounts.currency='a b'"], r"accounts\.currency='a b'"),
        (["accounts.gird=DEU"], r"got the key 'accounts\.gird'.*Did you mean accounts\.grid"),
        (["accounts.grid=DEU", "accounts.hourly=h.csv"],
         r"accounts: grid=DEU and hourly=h\.csv both say .*Set one of them to null"),
    ],
)  # fmt: skip
def test_impossible_assumptions_are_refused(tmp_path, words, message):
    with pytest.raises(BadInput, match=message):
        main([f"run={write_run(tmp_path)}", *words])


def test_what_was_lost_is_told_of_each_attempt(tmp_path):
    text = re.sub(r"<[^>]+>", "|", page(write_run(tmp_path)))
    lost_j = 10 * 20 * 0.9
    assert re.search(rf"\|train 0\|.*?\|{lost_j:.0f} J \(tdp_model\)\|\|120\|", text)
    assert re.search(r"\|train 1\|[^a-z]*UTC[^0-9]*1 min \d\d s\|\|-\|\|200\|", text)


def test_dataset_facts_add_up(tmp_path):
    write_run(tmp_path)
    facts = dataset_facts(tmp_path / "dataset")
    assert facts.rows_kept + sum(facts.rejected.values()) == facts.rows_in


finite = st.floats(-1e6, 1e6)


@given(finite, st.floats(1e-6, 1e3), st.integers(2, 9))
def test_ticks_are_few_even_and_reach_over_the_span(low, relative_span, num_ticks):
    span = relative_span * max(abs(low), 1.0)
    ticks = round_ticks(low, low + span, num_ticks)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step + 1e-9 * abs(low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= num_ticks + 2
    mantissa = step / 10 ** math.floor(math.log10(step))
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 0.01


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=900))
def test_thinning_keeps_means_and_bounds(points):
    points.sort()
    thinned = thin(points, 100)
    assert len(thinned) <= 100
    if len(points) % math.ceil(len(points) / 100) == 0:
        mean = sum(y for _, y in points) / len(points)
        assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(mean, abs=1e-3)


def test_smoothing_leaves_a_constant_alone_and_averages_the_last_ones():
    assert smooth([(x, 3.0) for x in range(5)], num_points=3) == [(x, 3.0) for x in range(5)]
    assert smooth([(0, 1.0), (1, 3.0), (2, 8.0)], num_points=2) == [(0, 1.0), (1, 2.0), (2, 5.5)]


def test_every_point_of_a_chart_lies_inside_it():
    points = [(float(x), 100 * math.sin(x)) for x in range(50)] + [(51.0, math.nan)]
    svg = line_chart("wave", [Line(points, "bold")], x_label="x")
    drawn = re.search(r'polyline points="([^"]+)"', svg).group(1)
    assert "nan" not in svg
    for pair in drawn.split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 470
        assert 0 <= y <= 250


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)], [(1.0, math.nan), (2.0, math.inf)]])
def test_too_little_gives_no_chart(points):
    assert line_chart("none", [Line(points, "bold")], x_label="x") is None


def test_a_flat_curve_can_be_drawn():
    for value in (0.0, 5.0, -2.0):
        points = [(0.0, value), (9.0, value)]
        assert line_chart("flat", [Line(points, "bold")], x_label="x") is not None


def test_numbers_are_short():
    numbers = (64000, 0.001, 0, 2.5e6, 0.25)
    assert [short_number(n) for n in numbers] == ["64k", "0.001", "0", "2.5M", "0.25"]
    assert [in_joules(j) for j in (812, 1800, 3.1e6, 7e9)] == [
        "812 J", "1.80 kJ", "3.10 MJ", "7.00 GJ",
    ]  # fmt: skip


def test_markup_is_escaped_once():
    inner = tag("b", "<&>")
    assert inner == "<b>&lt;&amp;&gt;</b>"
    assert tag("p", inner, "<", class_="a") == '<p class="a"><b>&lt;&amp;&gt;</b>&lt;</p>'
    assert join([Html("<i>"), ["x", "&"]]) == "<i>x&amp;"
