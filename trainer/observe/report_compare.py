"""Lay several runs out beside each other as one self-contained HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.observe.charts import PLAIN_PX, WIDE_PX, Line, line_chart
from trainer.observe.dashboard import Panel, Section
from trainer.observe.figure_words import value_text
from trainer.observe.figures import Figures
from trainer.observe.html import Html, absent, join, page, table, tag
from trainer.observe.report_data import Curves, evaluation_curves, sections_of, training_curves
from trainer.observe.report_numbers import headline
from trainer.observe.report_page import charts_script, headline_cards, tools
from trainer.observe.report_style import STYLE
from trainer.observe.story import Story

NUM_COLOURS = 8

Told = tuple[Story, Figures]


def render_several(told: Sequence[Told], *, live_state: str | None = None) -> str:
    """Return the page.

    Args:
        told: Runs with the figures of their accounts, in the order of their colours.
        live_state: For a page that asks its server for news: whether a run goes on.
    """
    stories = [story for story, _ in told]
    names = [story.name for story in stories]
    sections = [
        tag("section", tag("h1", " and ".join(names)), _headlines(told), id="summary"),
        tools(is_live=live_state is not None),
        tag("section", tag("h2", "Curves"), *_curves(stories), id="curves-of-runs"),
        tag("section", tag("h2", "Energy, carbon and cost"), _figures(told), id="figures"),
        tag("section", tag("h2", "What differs"), *_differences(stories), id="config"),
    ]
    script = charts_script(stories, live_state)
    return page(f"{' and '.join(names)} - Kiln", *sections, style=STYLE, script=script)


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the dotted keys that have not the same value everywhere, with the values."""
    flat = [dict(_flat(config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key, "-") for one in flat] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _beside(columns: Sequence[Mapping[str, str]], names: Sequence[Html]) -> Html:
    """Make a table with a row for each key and a column for each run."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, *(column.get(key, "-") for column in columns)) for key in keys]
    filled = table(("", *names), rows, numeric=len(columns))
    return tag("div", filled, class_="wide")


def _names(stories: Sequence[Story]) -> list[Html]:
    return [
        join((tag("i", class_=f"swatch run{idx % NUM_COLOURS}"), story.name))
        for idx, story in enumerate(stories)
    ]


def _headlines(told: Sequence[Told]) -> Html:
    columns = [dict(headline_cards(headline(story, figures.by_bucket))) for story, figures in told]
    return _beside(columns, _names([story for story, _ in told]))


def _figures(told: Sequence[Told]) -> Html:
    columns = [
        {figure.name: value_text(figure) for figure in figures.by_key.values()}
        for _, figures in told
    ]
    return _beside(columns, _names([story for story, _ in told]))


def _differences(stories: Sequence[Story]) -> list[Html]:
    found = differing([story.config for story in stories])
    if not found:
        return [tag("p", "Nothing in their configurations.")]
    rows = [(tag("code", key), *values) for key, values in found.items()]
    return [tag("div", table(("key", *_names(stories)), rows, numeric=0), class_="wide")]


def _curves(stories: Sequence[Story]) -> list[Html]:
    curves = {
        "Evaluation": [evaluation_curves(story) for story in stories],
        "": [training_curves(story) for story in stories],
    }
    parts: list[Html] = []
    for section in _sections(stories):
        of = curves.get(section.name, curves[""])
        drawn = [chart for panel in section.panels if (chart := _chart(panel, of)) is not None]
        if drawn:
            parts += [tag("h3", section.name), tag("div", *drawn, class_="charts")]
    return parts or absent("Two logged steps", "kiln train")


def _sections(stories: Sequence[Story]) -> list[Section]:
    """Join the sections of all runs, each panel once."""
    panels: dict[str, dict[str, Panel]] = {}
    for story in stories:
        for section in sections_of(story):
            known = panels.setdefault(section.name, {})
            for panel in section.panels:
                known.setdefault(panel.keys[0], panel)
    return [Section(name, tuple(known.values())) for name, known in panels.items()]


def _chart(panel: Panel, of: Sequence[Curves]) -> Html | None:
    return line_chart(
        panel.name,
        [
            Line(curves.points(panel.keys[0]), f"bold run{idx % NUM_COLOURS}")
            for idx, curves in enumerate(of)
        ],
        x_label="images seen",
        from_zero=panel.from_zero,
        width_px=WIDE_PX if panel.is_wide else PLAIN_PX,
        data_panel=panel.keys[0],
    )
