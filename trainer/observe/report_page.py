"""Lay a run's story out as one self-contained HTML page."""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from trainer.observe.charts import PLAIN_PX, WIDE_PX, Line, line_chart, smooth
from trainer.observe.dashboard import X_LABEL, Panel, evaluation_section, training_sections
from trainer.observe.evaluations import FOLDER, strip_path
from trainer.observe.figure_words import known_text
from trainer.observe.figures import Figures
from trainer.observe.html import Html, Script, absent, cards, page, picture, table, tag
from trainer.observe.report_accounts import accounts, attempts, figure_table
from trainer.observe.report_data import (
    Curves,
    evaluation_curves,
    page_data,
    training_curves,
)
from trainer.observe.report_numbers import (
    Numbers,
    duration,
    headline,
    in_joules,
    score_label,
    score_text,
    scores,
)
from trainer.observe.report_style import STYLE
from trainer.observe.story import DatasetFacts, Story

_FIRST_PICTURES = 24
_STRIPS = 8


def render(story: Story, figures: Figures, *, live_state: str | None = None) -> str:
    """Return the page; the same story gives the same bytes.

    Args:
        story: Of the run.
        figures: Of its account.
        live_state: For a page that asks its server for news: whether the run goes on.
    """
    numbers = headline(story, figures.by_bucket)
    sections = [
        _section("summary", None, _summary(story, numbers)),
        tools(is_live=live_state is not None),
        _section("samples", "Samples", _samples(story)),
        _section("evaluation", "Evaluation", _evaluation(story)),
        _section("training", "Training", _training(story)),
        _section("accounts", "Time and energy", accounts(story, figures)),
        _section("figures", "Energy, carbon and cost", figure_table(story, figures)),
        _section("data", "Data", _data(story.dataset)),
        _section("reconstructions", "Autoencoder", _reconstructions(story)),
        _section("config", "Configuration", _config(story)),
        _section("lineage", "Lineage", _lineage(story)),
    ]
    script = charts_script([story], live_state)
    return page(f"{story.name} - Kiln", *sections, style=STYLE, script=script)


def tools(*, is_live: bool) -> Html:
    """Make the place that the script fills; without scripts it stays hidden."""
    live = {"data_live": "yes"} if is_live else {}
    return tag("div", id="tools", hidden="", **live)


def charts_script(stories: Sequence[Story], live_state: str | None) -> Script:
    """Return the script that draws the charts anew, with its data.

    Args:
        stories: Of the runs that the page shows.
        live_state: As in `render`.
    """
    code = files("trainer.observe").joinpath("report.js").read_text(encoding="utf-8")
    data = page_data(stories, live_state or "written")
    return Script(code, data, may_ask=live_state is not None)


def _section(name: str, heading: str | None, body: Sequence[Html]) -> Html:
    title = [tag("h2", heading)] if heading else []
    return tag("section", *title, *body, id=name)


def _summary(story: Story, numbers: Numbers) -> list[Html]:
    return [
        tag("h1", story.name),
        tag("p", " ".join(_sentences(story, numbers)), class_="lead"),
        cards(headline_cards(numbers)),
    ]


def _sentences(story: Story, numbers: Numbers) -> Iterator[str]:
    model = story.config.get("model", {})
    what = f"A {model.get('kind', 'model')}"
    if num_parameters := model.get("num_parameters"):
        what += f" of {num_parameters / 1e6:.1f} M parameters"
    if not numbers.steps:
        yield f"{what}; no training step has been logged yet."
    else:
        of = f" of {numbers.total_steps:,}" if numbers.total_steps else ""
        data = f" of dataset {story.dataset.fingerprint[:12]}" if story.dataset else ""
        yield f"{what}, trained for {numbers.steps:,}{of} steps on {numbers.images:,} images{data}."
    if numbers.train.seconds:
        yield (
            f"Training took {duration(numbers.train.seconds)}, of which "
            f"{100 * numbers.productive_s / numbers.train.seconds:.0f} % went into the result, and "
            f"{in_joules(numbers.train.joules)}: {known_text(numbers.train.known_by)}."
        )
    if numbers.final_loss is not None:
        yield f"The loss ended at {numbers.final_loss:.4f}."
    if numbers.score:
        name, value, chance = numbers.score
        against = "" if chance is None else f", against {score_text(name, chance)} by chance"
        yield f"{score_label(name).capitalize()}: {score_text(name, value)}{against}."


def headline_cards(numbers: Numbers) -> Iterator[tuple[str, str]]:
    """Yield the (name, value) pairs that come first."""
    yield "steps", f"{numbers.steps:,}"
    yield "images seen", f"{numbers.images:,}"
    if numbers.train.seconds:
        yield "training time", duration(numbers.train.seconds)
        yield "productive", f"{100 * numbers.productive_s / numbers.train.seconds:.0f} %"
    if numbers.productive_s:
        yield "images/s, productive", f"{numbers.images / numbers.productive_s:.1f}"
    if numbers.train.joules:
        known = known_text(numbers.train.known_by)
        yield f"training energy, {known}", in_joules(numbers.train.joules)
    if numbers.final_loss is not None:
        yield "final loss", f"{numbers.final_loss:.4f}"
    if numbers.score:
        name, value, _ = numbers.score
        yield score_label(name), score_text(name, value)


def _data(facts: DatasetFacts | None) -> list[Html]:
    if facts is None:
        return absent("The dataset's manifest", "kiln prepare")
    whole = max(facts.rows_in, 1)
    rejected = sorted(facts.rejected.items(), key=lambda item: (-item[1], item[0]))
    counts = [("kept", facts.rows_kept), *((f"rejected: {why}", n) for why, n in rejected)]
    rows = [(what, f"{count:,}", f"{100 * count / whole:.1f} %") for what, count in counts]
    intro = tag(
        "p",
        f"{facts.rows_kept:,} of {facts.rows_in:,} rows became samples, in {facts.num_shards:,} "
        f"shards of {facts.bytes / 1e6:,.1f} MB together. Every other row is in quarantine, with "
        "its reason.",
    )
    foot = ("rows in", f"{facts.rows_in:,}", "100 %")
    return [intro, table(("", "rows", "share"), rows, numeric=2, foot=foot)]


def _training(story: Story) -> list[Html]:
    parts: list[Html] = []
    curves = training_curves(story)
    for section in training_sections([story.metrics.newest()]):
        charts = _charts(section.panels, curves)
        heading = [tag("h3", section.name)] if charts and parts else []
        parts += [*heading, *charts]
    return parts or absent("Two logged steps", f"kiln train run={story.run_dir}")


def _charts(panels: Sequence[Panel], curves: Curves) -> list[Html]:
    """Draw the panels that have enough points."""
    drawn = [chart for panel in panels if (chart := _chart(panel, curves)) is not None]
    return [tag("div", *drawn, class_="charts")] if drawn else []


def _chart(panel: Panel, curves: Curves) -> Html | None:
    value, *behind = (curves.points(key) for key in panel.keys)
    lines = [Line(points, "faint") for points in behind]
    if panel.is_noisy:
        lines.append(Line(value, "faint"))
        value = smooth(value, num_points=max(1, len(value) // 40))
    return line_chart(
        panel.name,
        [*lines, Line(value, "bold")],
        x_label=X_LABEL,
        from_zero=panel.from_zero,
        width_px=WIDE_PX if panel.is_wide else PLAIN_PX,
        data_panel=panel.keys[0],
    )


def _evaluation(story: Story) -> list[Html]:
    found, charts = scores(story.evaluation), _evaluation_charts(story)
    if not found and not charts:
        return absent("The evaluation", f"kiln evaluate run={story.run_dir}")
    rows = [
        (
            score_label(name),
            score_text(name, value),
            "-" if chance is None else score_text(name, chance),
        )
        for name, value, chance in found
    ]
    facts = [
        f"{key.replace('_', ' ')}: {value}"
        for key, value in story.evaluation.items()
        if isinstance(value, str | int | float)
    ]
    note = [tag("p", "; ".join(facts), class_="note")] if facts else []
    newest = table(("score", "this run", "by chance (untrained)"), rows, numeric=2)
    return [newest, *note, *charts, *_curves(story)]


def _curves(story: Story) -> list[Html]:
    """Show what `kiln evaluate curves=...` drew."""
    shown = []
    for name in ("curves_steps", "grid_steps", "curves_guidance", "grid_guidance"):
        path = story.run_dir / FOLDER / f"{name}.png"
        if path.exists():
            words = name.replace("curves_", "Quality against ").replace("grid_", "Pictures by ")
            figure = (tag("figcaption", words), picture(path, alt=words))
            shown.append(tag("figure", *figure, class_="chart wide"))
    return shown


def _evaluation_charts(story: Story) -> list[Html]:
    section = evaluation_section(story.evaluations)
    if section is None:
        return []
    curves = evaluation_curves(story)
    first = section.panels[0]
    against = line_chart(
        f"{first.name} against energy",
        [Line(curves.points(first.keys[0], axis="joules"), "bold")],
        x_label="joules of training",
    )
    return [*_charts(section.panels, curves), *([against] if against else [])]


def _samples(story: Story) -> list[Html]:
    entries = story.samples.get("samples", [])
    if not entries:
        return absent("Pictures", f"kiln sample run={story.run_dir}")
    folder = story.run_dir / "samples"
    figures = [
        tag(
            "figure",
            _picture(folder, entry.get("picture"), alt=entry["caption"]),
            tag("figcaption", *_verdict(entry.get("ok")), entry["caption"]),
        )
        for entry in entries
    ]
    first = tag("div", *figures[:_FIRST_PICTURES], class_="pictures")
    if len(figures) <= _FIRST_PICTURES:
        return [first, *_over_time(story)]
    rest = tag("div", *figures[_FIRST_PICTURES:], class_="pictures")
    more = tag("summary", f"{len(figures) - _FIRST_PICTURES} more")
    return [first, tag("details", more, rest), *_over_time(story)]


def _over_time(story: Story) -> list[Html]:
    """Show the same captions after more and more images, of up to `_STRIPS` evaluations."""
    weights = story.evaluation.get("weights", "ema")
    strips = [
        (strip_path(story.run_dir, row["step"], weights), row["images_seen"])
        for row in story.evaluations
    ]
    there = [(path, images) for path, images in strips if path.is_file()]
    if len(there) < 2:
        return []
    last, shown = len(there) - 1, min(len(there), _STRIPS)
    chosen = [there[round(idx * last / (shown - 1))] for idx in range(shown)]
    figures = []
    for path, images in chosen:
        words = f"after {images:,} images"
        inner = (picture(path, alt=words), tag("figcaption", words))
        figures.append(tag("figure", *inner, class_="chart wide"))
    return [tag("h3", "The same captions over time"), *figures]


def _verdict(ok: bool | None) -> list[Html]:
    if ok is None:
        return []
    word, style = ("right: ", "ok") if ok else ("wrong: ", "wrong")
    return [tag("span", word, class_=style)]


def _reconstructions(story: Story) -> list[Html]:
    entries = story.samples.get("reconstructions", [])
    if not entries:
        return absent("Reconstructions", f"kiln sample run={story.run_dir}")
    folder = story.run_dir / "samples"
    figures = []
    for entry in entries:
        caption = entry["caption"]
        real = _picture(folder, entry.get("real"), alt=f"real: {caption}")
        coded = _picture(folder, entry.get("reconstructed"), alt=f"reconstructed: {caption}")
        pair = [tag("div", real, tag("small", "real"))]
        pair.append(tag("div", coded, tag("small", "reconstructed")))
        figures.append(tag("figure", tag("div", *pair, class_="pair"), tag("figcaption", caption)))
    words = "Real pictures, and what is left of them after the autoencoder: no sample is sharper."
    return [tag("p", words), tag("div", *figures, class_="pictures pairs")]


def _picture(folder: Path, name: object, *, alt: str) -> Html:
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        return tag("span", f"{name} is outside of {folder.name}/", class_="missing")
    return picture(path, alt=alt)


def _config(story: Story) -> list[Html]:
    text = yaml.safe_dump(dict(story.config), sort_keys=False, default_flow_style=None)
    return [tag("details", tag("summary", "The resolved configuration"), tag("pre", text))]


def _lineage(story: Story) -> list[Html]:
    rows: list[tuple[str, Html | str]] = []
    if story.dataset:
        rows.append(("dataset fingerprint", tag("code", story.dataset.fingerprint)))
        rows += [
            (f"dataset {name.replace('_', ' ')}", _value(value))
            for name, value in story.dataset.provenance.items()
        ]
    rows += [(f"version of {name}", _value(version)) for name, version in story.versions.items()]
    return [*attempts(story), table(("", ""), rows, numeric=0)]


def _value(value: Any) -> Html:  # noqa: ANN401 - JSON
    return tag("code", value if isinstance(value, str) else yaml.safe_dump(value).strip(" .\n"))
