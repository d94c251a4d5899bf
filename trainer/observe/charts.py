"""Draw charts that take their colours from the page, so that they suit dark and light."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.observe.html import Html, tag

Point = tuple[float, float]

WIDE_PX, PLAIN_PX = 960, 470
_HEIGHT_PX = 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 42
_MOST_POINTS = 360
FRAME = {"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM, "height": _HEIGHT_PX}
"""What a chart leaves around its curves, and its height, for those who draw into it again."""


@dataclass(frozen=True)
class Line:
    """One curve; `style` is a class of the page's style sheet: `bold`, `faint` or `alt`."""

    points: Sequence[Point]
    style: str


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels and has round ticks."""

    low: float
    high: float
    start_px: float
    end_px: float
    ticks: Sequence[float]

    def px(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start_px + share * (self.end_px - self.start_px)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    from_zero: bool = False,
    width_px: int = PLAIN_PX,
    **attributes: str,
) -> Html | None:
    """Draw curves over a common x axis; None when there are fewer than two points to draw.

    Args:
        title: Stands above, and is what a screen reader says.
        lines: Points in order of x; not finite ones are left out. Long ones are thinned to means.
        x_label: Name and unit of the x axis.
        from_zero: Whether the y axis must show 0.
        width_px: Width at which text has its natural size.
        attributes: Of the figure.
    """
    thinned = [Line(thin(line.points), line.style) for line in lines]
    points = [point for line in thinned for point in line.points]
    if len({x for x, _ in points}) < 2:
        return None
    x_axis = _axis([x for x, _ in points], _LEFT, width_px - _RIGHT, num_ticks=7, snug=True)
    ys = [y for _, y in points] + ([0.0] if from_zero else [])
    y_axis = _axis(ys, _HEIGHT_PX - _BOTTOM, _TOP, num_ticks=5, snug=False)
    parts = [*_y_ticks(y_axis, width_px), *_x_ticks(x_axis), _x_title(x_label, width_px)]
    parts += [_polyline(line, x_axis, y_axis) for line in thinned if line.points]
    svg = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width_px} {_HEIGHT_PX}",
        role="img",
        aria_label=title,
    )
    return tag(
        "figure",
        tag("figcaption", title),
        svg,
        class_="chart wide" if width_px == WIDE_PX else "chart",
        **attributes,
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> Html:
    """Draw one horizontal bar for each (name, number), in the order given.

    Args:
        title: Stands above.
        bars: Numbers >= 0; the longest bar is the largest of them.
    """
    most = max((value for _, value in bars), default=0) or 1
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", tag("i", style=f"width:{100 * value / most:.2f}%"), class_="track"),
            tag("td", f"{value:,.0f}", class_="num"),
        )
        for name, value in bars
    ]
    chart = tag("table", tag("tbody", *rows), class_="bars")
    return tag("figure", tag("figcaption", title), chart, class_="chart")


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Average neighbouring points until at most `most` are left; broken numbers are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    per_group = math.ceil(len(finite) / most) if finite else 1
    groups = [finite[idx : idx + per_group] for idx in range(0, len(finite), per_group)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def smooth(points: Sequence[Point], *, num_points: int) -> list[Point]:
    """Average each y with up to `num_points` before it, without a start that leans to zero."""
    window = max(1, num_points)
    means = []
    for idx, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, idx - window + 1) : idx + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def round_ticks(low: float, high: float, num_ticks: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten that reach from `low` to `high`."""
    span = high - low
    power = 10 ** math.floor(math.log10(span / num_ticks))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def short_number(value: float) -> str:
    """Write a tick: 64000 as 64k, 0.0010 as 0.001."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.3g}"


def _axis(
    values: Sequence[float], start_px: float, end_px: float, *, num_ticks: int, snug: bool
) -> _Axis:
    low, high = min(values), max(values)
    if high - low <= 1e-6 * max(abs(high), abs(low)):  # a flat curve runs through the middle
        pad = abs(high) / 2 or 0.5
        low, high = low - pad, high + pad
    ticks = round_ticks(low, high, num_ticks)
    if snug:
        return _Axis(low, high, start_px, end_px, [t for t in ticks if low <= t <= high])
    return _Axis(ticks[0], ticks[-1], start_px, end_px, ticks)


def _y_ticks(axis: _Axis, width_px: int) -> list[Html]:
    parts = []
    for value in axis.ticks:
        y = f"{axis.px(value):.1f}"
        parts.append(
            tag("line", x1=str(_LEFT), x2=str(width_px - _RIGHT), y1=y, y2=y, class_="grid")
        )
        parts.append(_label(short_number(value), x=_LEFT - 8, y=axis.px(value) + 4, anchor="end"))
    return parts


def _x_ticks(axis: _Axis) -> list[Html]:
    return [
        _label(short_number(value), x=axis.px(value), y=_HEIGHT_PX - _BOTTOM + 17, anchor="middle")
        for value in axis.ticks
    ]


def _x_title(text: str, width_px: int) -> Html:
    return _label(text, x=(_LEFT + width_px - _RIGHT) / 2, y=_HEIGHT_PX - 5, anchor="middle")


def _label(text: str, *, x: float, y: float, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _polyline(line: Line, x_axis: _Axis, y_axis: _Axis) -> Html:
    at: Callable[[Point], str] = lambda p: f"{x_axis.px(p[0]):.1f},{y_axis.px(p[1]):.1f}"  # noqa: E731
    return tag("polyline", points=" ".join(map(at, line.points)), class_=line.style)
