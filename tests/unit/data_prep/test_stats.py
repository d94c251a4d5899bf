import json
from collections import Counter

import pytest

from data_prep.config_curate import DedupConfig, StatsConfig
from data_prep.dedup import run as dedup
from data_prep.stats import count, run
from tests.curated_dataset import dataset_of, sample
from tests.latents_without_encoders import make_dataset
from tests.tiny_source import prepare_cfg, publish_here
from trainer.data.manifest import load_manifest
from trainer.data.shards import read_index
from trainer.errors import BadInput
from trainer.frozen import compose


def config(dataset, *words):
    return compose(StatsConfig, "stats", [f"dataset={dataset}", *words])


def stats_of(dataset, *words):
    return count(config(dataset, *words), load_manifest(dataset))


def test_every_chart_counts_every_live_sample_once(served, tmp_path):
    cfg = prepare_cfg(served, tmp_path / "d")
    publish_here(cfg)
    dedup(compose(DedupConfig, "dedup", [f"dataset={cfg.dataset}"]))
    manifest = load_manifest(cfg.dataset)
    stats = stats_of(cfg.dataset)
    rows = stats.rows
    assert rows["in"] == rows["kept"] + rows["rejected"]
    assert rows["kept"] == rows["live"] + rows["removed"]
    assert stats.rejected == manifest.rejected
    units = stats.charts.pop("Yield of units, % of rows kept")
    assert sum(units.values()) == len(list(cfg.dataset.glob("units/*.json")))
    assert {"Width, px", "Hosts", "Formats", "Original width, px"} < set(stats.charts)
    for chart in stats.charts.values():
        assert sum(chart.values()) == rows["live"]
    assert stats.charts["Hosts"] == {"127.0.0.1": rows["live"]}
    assert stats.bytes["shards"] > sum(
        size for name, size in stats.bytes.items() if name.startswith("of shards")
    )


def test_bins_hold_what_their_names_say(tmp_path):
    sides = (32, 63, 64, 200, 128, 300)
    dataset = dataset_of(
        tmp_path / "d",
        [sample(i, "x" * (side // 8), side_px=side) for i, side in enumerate(sides)],
    )
    charts = stats_of(dataset).charts
    for title, values in (
        ("Width, px", sides),
        ("Caption, characters", [side // 8 for side in sides]),
    ):
        for name, number in charts[title].items():
            low, high = (int(part) for part in name.split(" to "))
            assert number == sum(low <= value <= high for value in values)
    assert charts["Aspect, width : height"] == {"square (5 %)": len(sides)}


def test_what_is_beyond_the_top_is_one_line(tmp_path):
    urls = [f"https://h{n}.{'com' if n % 3 else 'org'}/{i}" for n in range(6) for i in range(n + 1)]
    dataset = dataset_of(tmp_path / "d", [sample(i, url=url) for i, url in enumerate(urls)])
    charts = stats_of(dataset, "top=2").charts
    assert charts["Hosts"] == {"h5.com": 6, "h4.com": 5, "4 others": 10}
    hosts = Counter(
        host for path in dataset.glob("index/*.parquet") for host in read_index(path)["host"]
    )
    assert sum(charts["Top-level domains"].values()) == sum(hosts.values()) == len(urls)


def test_encodings_and_datasets_without_the_newer_columns_are_counted(tmp_path):
    stats = stats_of(make_dataset(tmp_path))
    assert sum(stats.encodings.values()) > 0
    assert stats.charts == {"Formats": {"jpg": 20}}


def test_the_page_and_the_numbers_are_written_where_asked(tmp_path, capsys):
    url = "https://<b>.example/a"
    dataset = dataset_of(tmp_path / "<b>d", [sample(1, url=url), sample(2)])
    page = tmp_path / "out" / "page.html"
    assert run(config(f"'{dataset}'", f"out={page}")) == 0
    said = json.loads(page.with_suffix(".json").read_text())
    assert said["rows"]["live"] == 2
    html = page.read_text()
    assert "<b>d" not in html
    assert "&lt;b&gt;" in html
    assert said["fingerprint"] in html
    assert "Width, px" in capsys.readouterr().out
    assert not (dataset / "stats.html").exists()


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    dataset = dataset_of(tmp_path / "d", [sample(1)])
    with pytest.raises(BadInput, match=r"page\.html cannot be written .*out="):
        run(config(dataset, "out=/proc/page.html"))
