"""Charts with error bars, and labelled grids of pictures, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from trainer.data.publish import published
from trainer.observe.report_numbers import score_label
from trainer.sampler import Pixels

Cells = dict[tuple[str, str], list[Pixels]]
"""(row, column) -> up to four pictures."""

_SHARE = "_frac"
_TILE_PX, _GAP_PX, _LABEL_PX, _LINE_PX = 96, 10, 110, 15
_PANELS = 3
_INK = (40, 40, 40)


def draw_chart(
    path: Path, series: Mapping[str, Sequence[Mapping[str, Any]]], *, x_label: str
) -> None:
    """Draw one panel per score, one line per series, with the intervals as error bars.

    Args:
        path: The PNG.
        series: Name -> points with `x` and `scores`, name -> value, low, high.
        x_label: Of the x axis, which is logarithmic.
    """
    names = list(dict.fromkeys(name for rows in series.values() for row in rows
                               for name in row["scores"]))  # fmt: skip
    columns = max(1, min(_PANELS, len(names)))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * max(1, lines)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, number + 1)
        scale = 100 if name.endswith(_SHARE) else 1
        for label, rows in series.items():
            told = sorted((row["x"], row["scores"][name]) for row in rows if name in row["scores"])
            xs = [x for x, _ in told]
            ys = [scale * score["value"] for _, score in told]
            below = [max(0.0, y - scale * s["low"]) for y, (_, s) in zip(ys, told, strict=True)]
            above = [max(0.0, scale * s["high"] - y) for y, (_, s) in zip(ys, told, strict=True)]
            axes.errorbar(xs, ys, yerr=[below, above], marker="o", capsize=3, label=label)
        _label(axes, name, sorted({row["x"] for rows in series.values() for row in rows}), x_label)
    with published(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _label(axes: Any, name: str, xs: Sequence[float], x_label: str) -> None:  # noqa: ANN401
    if xs[0] > 0 and len(xs) > 1:
        axes.set_xscale("log")
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    unit = " (%)" if name.endswith(_SHARE) else ""
    axes.set_title(f"{score_label(name)}{unit}", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)


def draw_grid(cells: Cells, *, x_label: str, captions: Sequence[str]) -> Image.Image:
    """Lay pictures out: rows and columns have their names beside them, captions stand below.

    Args:
        cells: Pictures of each row and column, up to four of them in a square.
        x_label: What the columns are.
        captions: Of the pictures in each cell, row by row.
    """
    rows, columns = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    step = 2 * _TILE_PX + _GAP_PX
    width = max(_LABEL_PX + len(columns) * step + _GAP_PX, 520)
    height = 3 * _LINE_PX + len(rows) * step + (len(captions) + 1) * _LINE_PX
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    draw.text((_GAP_PX, _LINE_PX), x_label, fill=_INK, font=font)
    for number, column in enumerate(columns):
        draw.text((_LABEL_PX + number * step, _LINE_PX), column, fill=_INK, font=font)
    top = 2 * _LINE_PX + _GAP_PX
    for line, row in enumerate(rows):
        draw.text((_GAP_PX, top + line * step), row, fill=_INK, font=font)
        for number, column in enumerate(columns):
            for tile, picture in enumerate(cells.get((row, column), [])):
                x = _LABEL_PX + number * step + tile % 2 * _TILE_PX
                y = top + line * step + tile // 2 * _TILE_PX
                small = Image.fromarray(picture).resize((_TILE_PX, _TILE_PX))
                sheet.paste(small, (x, y))
    for number, caption in enumerate(captions):
        y = top + len(rows) * step + number * _LINE_PX
        draw.text((_GAP_PX, y), caption, fill=_INK, font=font)
    return sheet
