"""Say what is in a published dataset, from its indexes and records: tables, a page and a JSON."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from data_prep.config_curate import StatsConfig
from data_prep.prepare import say
from data_prep.publish import read_record
from trainer.command import run_command
from trainer.data.manifest import (
    Manifest,
    ShardEntry,
    list_encodings,
    load_manifest,
)
from trainer.data.publish import publish_bytes, publish_json
from trainer.data.shards import read_index
from trainer.data.tombstones import read_row_weights
from trainer.errors import BadInput
from trainer.observe.charts import bar_chart
from trainer.observe.countdown import Countdown
from trainer.observe.html import Html, cards, page, tag
from trainer.observe.html import table as html_table
from trainer.observe.report_style import STYLE
from trainer.place import storage

PAGE = "stats.html"
_INF = float("inf")
_SIDE_PX = (0, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, _INF)
_CHARS = (0, 10, 20, 40, 60, 80, 100, 150, 200, 300, 500, 1000, _INF)
_ASPECTS = (0, 1 / 2, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 2, _INF)
_ASPECT_NAMES = (
    "taller than 1:2",
    "1:2 to 2:3",
    "2:3 to 3:4",
    "3:4 to square",
    "square (5 %)",
    "square to 4:3",
    "4:3 to 3:2",
    "3:2 to 2:1",
    "wider than 2:1",
)
_NUMBERS = (
    ("Width, px", "width", _SIDE_PX),
    ("Height, px", "height", _SIDE_PX),
    ("Original width, px", "original_width", _SIDE_PX),
    ("Original height, px", "original_height", _SIDE_PX),
    ("Caption, characters", "caption_chars", _CHARS),
)
_YIELDS = tuple(share / 10 for share in range(11))

Section = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a dataset holds."""

    name: str
    fingerprint: str
    rows: Section
    """What became of the rows; in = kept + rejected, kept = live + removed."""
    rejected: Section
    """Reason -> rows."""
    bytes: Section
    """Kind of file -> bytes."""
    encodings: Section
    """Encoding -> bytes."""
    charts: dict[str, Section]
    """What is counted -> name of a bin -> samples (or units)."""


def main(argv: Sequence[str]) -> int:
    """Run `kiln stats`."""
    return run_command(run, StatsConfig, "stats", argv)


def run(cfg: StatsConfig) -> int:
    """Count, print, and write the page and the numbers behind it."""
    with storage(cfg.dataset):
        return _run(cfg)


def _run(cfg: StatsConfig) -> int:
    manifest = load_manifest(cfg.dataset)
    with Countdown("reading indexes", manifest.rows_kept) as progress:
        stats = count(cfg, manifest, on_rows=progress.advance)
        progress.finish()
    _print(stats)
    path = cfg.out or cfg.dataset / PAGE
    numbers = {name: getattr(stats, name) for name in Stats.__slots__}
    try:
        publish_bytes(path, render(stats).encode())
        publish_json(path.with_suffix(".json"), numbers)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error}). Give another one: out=...") from error
    say(f"{path} has the same as a page, {path.with_suffix('.json')} as numbers.")
    return 0


def count(
    cfg: StatsConfig, manifest: Manifest, *, on_rows: Callable[[int], None] = lambda rows: None
) -> Stats:
    """Count over the live samples of all shards; memory grows with the number of hosts alone."""
    bins: dict[str, NDArray[np.int64]] = {}
    words: dict[str, Counter[str]] = {
        name: Counter() for name in ("format", "host", "language", "member")
    }
    for entry in manifest.shards:
        _count_shard(cfg.dataset, manifest, entry, bins, words)
        on_rows(entry.count)
    domains = Counter[str]()
    for host, number in words["host"].items():
        domains[host.rpartition(".")[2]] += number
    charts = {
        title: _named(bins[column], _bin_names(edges))
        for title, column, edges in _NUMBERS
        if column in bins
    }
    if "aspect" in bins:
        charts["Aspect, width : height"] = _named(bins["aspect"], _ASPECT_NAMES)
    charts |= {
        "Languages": _top(words["language"], cfg.top),
        "Top-level domains": _top(domains, cfg.top),
        "Hosts": _top(words["host"], cfg.top),
        "Formats": _top(words["format"], cfg.top),
        "Yield of units, % of rows kept": _yields(cfg.dataset),
    }
    return Stats(
        name=cfg.dataset.name,
        fingerprint=manifest.fingerprint,
        rows={
            "in": manifest.rows_in,
            "kept": manifest.rows_kept,
            "live": manifest.rows_live,
            "removed": manifest.rows_removed,
            "weighted": manifest.rows_weighted,
            "rejected": manifest.rows_rejected,
        },
        rejected=_top(Counter(manifest.rejected), None),
        bytes={
            "shards": sum(shard.bytes for shard in manifest.shards),
            "indexes": sum(shard.index_bytes for shard in manifest.shards),
            **{f"of shards: {name}": size for name, size in words["member"].most_common()},
        },
        encodings={
            f"{encoding.fingerprint} ({encoding.facts.get('image_side_px', '?')} px)": sum(
                shard.bytes for shard in encoding.shards
            )
            for encoding in list_encodings(cfg.dataset)
        },
        charts={title: chart for title, chart in charts.items() if chart},
    )


def _count_shard(
    dataset: Path,
    manifest: Manifest,
    entry: ShardEntry,
    bins: dict[str, NDArray[np.int64]],
    words: Mapping[str, Counter[str]],
) -> None:
    index = read_index(entry.index(dataset))
    for name in index.column_names:
        if name.startswith("size."):
            words["member"][name.removeprefix("size.")] += pc.sum(index[name]).as_py() or 0
    weights = read_row_weights(dataset, entry, manifest.weights.get(entry.number))
    index = index.filter(pa.array(weights > 0))
    for _, column, edges in _NUMBERS:
        _add(bins, column, _numbers(index, column), edges)
    width, height = _numbers(index, "width"), _numbers(index, "height")
    if width is not None and height is not None:
        _add(bins, "aspect", width / np.maximum(height, 1), _ASPECTS)
    for name in ("host", "language"):
        if name in index.column_names:
            counts = pc.value_counts(index[name].drop_null()).to_pylist()
            words[name].update({pair["values"]: pair["counts"] for pair in counts})
    for name in ("jpg", "png", "webp"):
        if f"offset.{name}" in index.column_names:
            column = index[f"offset.{name}"]
            words["format"][name] += len(column) - column.null_count


def _numbers(index: pa.Table, name: str) -> NDArray[np.float64] | None:
    if name not in index.column_names:
        return None
    values: NDArray[np.float64] = index[name].drop_null().to_numpy().astype(np.float64)
    return values


def _add(
    bins: dict[str, NDArray[np.int64]],
    name: str,
    values: NDArray[np.float64] | None,
    edges: Sequence[float],
) -> None:
    if values is not None:
        counts = np.histogram(values, edges)[0].astype(np.int64)
        bins[name] = bins.get(name, np.zeros(len(counts), np.int64)) + counts


def _yields(dataset: Path) -> Section:
    shares = [
        record.rows_kept / max(record.rows_in, 1)
        for path in sorted(dataset.glob("units/*.json"))
        if (record := read_record(dataset, path.stem))
    ]
    counts = np.histogram(shares, _YIELDS)[0]
    names = [f"{round(100 * low)} to {round(100 * high)}" for low, high in pairwise(_YIELDS)]
    return _named(counts, names)


def _bin_names(edges: Sequence[float]) -> list[str]:
    return [
        f"{low:,} and more" if high == _INF else f"{low:,} to {high - 1:,}"
        for low, high in pairwise(edges)
    ]


def _named(counts: NDArray[np.int64], names: Sequence[str]) -> Section:
    """Name the bins, without empty ones at either end."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {}
    ends = slice(int(filled[0]), int(filled[-1]) + 1)
    return dict(zip(names[ends], counts[ends].tolist(), strict=True))


def _top(counts: Counter[str], most: int | None) -> Section:
    """Order by count, then name; what is beyond `most` becomes one line."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = dict(ordered[:most])
    rest = ordered[len(shown) :]
    if rest:
        shown[f"{len(rest):,} others"] = sum(number for _, number in rest)
    return shown


def _print(stats: Stats) -> None:
    console = Console()
    tables = {"rows": stats.rows, "rejected": stats.rejected, "bytes": stats.bytes}
    for title, section in (tables | {"encodings": stats.encodings} | stats.charts).items():
        if not section:
            continue
        whole = stats.rows["in"] if section is stats.rows else max(sum(section.values()), 1)
        table = Table(title, "number", "share")
        table.columns[1].justify = table.columns[2].justify = "right"
        for name, number in section.items():
            share = "" if section is stats.bytes else f"{100 * number / max(whole, 1):.1f} %"
            table.add_row(name, f"{number:,}", share)
        console.print(table)


def render(stats: Stats) -> str:
    """Return the page; the same numbers give the same bytes."""
    rows = stats.rows
    facts = [
        ("samples", f"{rows['live']:,}"),
        ("rows in", f"{rows['in']:,}"),
        ("rejected", f"{rows['rejected']:,}"),
        ("removed", f"{rows['removed']:,}"),
        ("weighted", f"{rows['weighted']:,}"),
        ("in shards", f"{stats.bytes['shards'] / 1e6:,.1f} MB"),
    ]
    share = 100 * rows["live"] / max(rows["in"], 1)
    charts = [bar_chart(title, list(chart.items())) for title, chart in stats.charts.items()]
    return page(
        f"{stats.name} - Kiln",
        tag("h1", stats.name),
        tag(
            "p",
            f"{rows['live']:,} samples, {share:.1f} % of the rows of its sources; fingerprint ",
            tag("code", stats.fingerprint),
            ". Charts count live samples.",
            class_="lead",
        ),
        cards(facts),
        tag("h2", "What became of the rows"),
        html_table(("", "rows", "share"), list(_shares(stats)), numeric=2),
        tag("h2", "What is in it"),
        tag("div", *charts, class_="charts"),
        tag("h2", "Bytes"),
        _bytes(stats),
        style=STYLE,
    )


def _shares(stats: Stats) -> Iterator[tuple[str, str, str]]:
    named = {"in": stats.rows["in"], "kept": stats.rows["kept"]}
    named["removed since"] = stats.rows["removed"]
    named |= {f"rejected: {reason}": number for reason, number in stats.rejected.items()}
    for name, number in named.items():
        yield name, f"{number:,}", f"{100 * number / max(stats.rows['in'], 1):.2f} %"


def _bytes(stats: Stats) -> Html:
    named = stats.bytes | {f"encoding {name}": size for name, size in stats.encodings.items()}
    samples = max(stats.rows["kept"], 1)
    rows = [
        (name, f"{size / 1e6:,.2f} MB", f"{size / samples:,.0f}") for name, size in named.items()
    ]
    return html_table(("", "size", "bytes per sample"), rows, numeric=2)
