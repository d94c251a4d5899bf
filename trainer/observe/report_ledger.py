"""Draw an account: joules by bucket and provenance, and attempts over time by bucket."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.observe.accounts import Total, attributed
from trainer.observe.charts import WIDE_PX, round_ticks, short_number
from trainer.observe.html import Html, join, tag
from trainer.observe.ledger import Bucket
from trainer.observe.merging import Row, period_ends, writer_of
from trainer.observe.report_data import spread
from trainer.observe.report_numbers import duration, in_joules
from trainer.observe.story import Story

_ROW_PX, _BAR_PX, _AXIS_PX = 30, 20, 40
_LEFT_PX, _RIGHT_PX = 34, 240
_SLOT_PX = 3
_S_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Strip:
    """What one attempt of training did, in slots of about equal length."""

    attempt: int
    edges_s: Sequence[float]
    """Of the slots, since training began."""
    seconds: Mapping[Bucket, Sequence[float]]
    """Of all nodes, in each slot."""
    ending: str

    @property
    def goodput_frac(self) -> float:
        """Share of its seconds that is in the result."""
        whole_s = sum(map(sum, self.seconds.values()))
        return sum(self.seconds.get(Bucket.PRODUCTIVE, ())) / whole_s if whole_s else 0.0


def energy_bars(buckets: Mapping[Bucket, Total]) -> list[Html]:
    """Draw the joules of each bucket, stacked by how they are known; nothing without joules."""
    spent = {bucket: total for bucket, total in buckets.items() if total.joules > 0}
    if not spent:
        return []
    most_j = max(total.joules for total in spent.values())
    rows = []
    for bucket, total in spent.items():
        parts = [
            tag("i", class_=f"p-{provenance}", style=f"width:{100 * joules / most_j:.2f}%",
                title=f"{in_joules(joules)}, {provenance}")
            for provenance, joules in total.joules_by.items()
            if joules > 0
        ]  # fmt: skip
        rows.append(
            tag(
                "tr",
                tag("th", bucket.value.replace("_", " "), scope="row"),
                tag("td", tag("div", *parts, class_="stack"), class_="stacked"),
                tag("td", in_joules(total.joules), class_="num"),
            )
        )
    kinds = dict.fromkeys(kind for total in spent.values() for kind in total.known_by)
    chart = tag("table", tag("tbody", *rows), class_="bars")
    title = tag("figcaption", "Energy by bucket, and how it is known")
    return [tag("figure", title, chart, _legend("p", kinds), class_="chart energy")]


def attempt_rows(story: Story) -> list[Html]:
    """Draw each attempt of training as a row over time, coloured by bucket, with how it ended."""
    strips = attempt_strips(story.ledger, story.endings)
    if not strips:
        return []
    end_s = max(strip.edges_s[-1] for strip in strips) or 1.0
    height_px = _ROW_PX * len(strips) + _AXIS_PX
    px_per_s = (WIDE_PX - _LEFT_PX - _RIGHT_PX) / end_s
    parts = [*_time_axis(end_s, px_per_s, height_px)]
    parts += [_strip(strip, idx * _ROW_PX, px_per_s) for idx, strip in enumerate(strips)]
    title = "Attempts of training over time, and the share of each that is in the result"
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDE_PX} {height_px}", role="img", aria_label=title)
    used = [bucket for bucket in Bucket if any(bucket in strip.seconds for strip in strips)]
    legend = _legend("b", [bucket.value for bucket in used])
    return [tag("figure", tag("figcaption", title), svg, legend, class_="chart wide attempts")]


def attempt_strips(ledger: Sequence[Row], endings: Mapping[int, str]) -> list[Strip]:
    """Cut the attempts of training into slots.

    Args:
        ledger: Rows of an account.
        endings: Why attempts ended, where a job wrote it down.
    """
    rows = [row for row in ledger if row["stage"] == "train"]
    if not rows:
        return []
    ends = period_ends(rows)
    spans: defaultdict[int, defaultdict[Bucket, list[tuple[float, float, float]]]]
    spans = defaultdict(lambda: defaultdict(list))
    begun_s = min(row["start_unix_s"] for row in rows)
    for row, bucket, seconds, _ in attributed(rows):
        start_s = row["start_unix_s"]
        span = (start_s - begun_s, ends[writer_of(row), start_s] - begun_s, seconds)
        spans[row["attempt"]][bucket].append(span)
    closed = {row["attempt"] for row in rows if row.get("closed")}
    whole_s = max(ends.values()) - begun_s
    return [
        _slotted(attempt, spans[attempt], whole_s, endings.get(attempt, _ending(attempt, closed)))
        for attempt in sorted(spans)
    ]


def _ending(attempt: int, closed: set[int]) -> str:
    return "ended properly" if attempt in closed else "running or killed"


def _slotted(
    attempt: int,
    spans: Mapping[Bucket, Sequence[tuple[float, float, float]]],
    whole_s: float,
    ending: str,
) -> Strip:
    begin_s = min(span[0] for of in spans.values() for span in of)
    end_s = max(span[1] for of in spans.values() for span in of)
    num_in_all = (WIDE_PX - _LEFT_PX - _RIGHT_PX) / _SLOT_PX
    num_slots = max(1, round(num_in_all * (end_s - begin_s) / (whole_s or 1.0)))
    edges_s = np.linspace(begin_s, end_s, num_slots + 1)
    seconds = {}
    for bucket in sorted(spans, key=list(Bucket).index):
        begins, stops, amounts = np.array(spans[bucket]).T
        come = spread(begins, stops, amounts, edges_s)
        come[-1] = amounts.sum()
        seconds[bucket] = np.diff(come).tolist()
    return Strip(attempt, edges_s.tolist(), seconds, ending)


def _strip(strip: Strip, top_px: float, px_per_s: float) -> Html:
    good = f"{100 * strip.goodput_frac:.0f} % in the result"
    sums = {bucket: sum(seconds) for bucket, seconds in strip.seconds.items()}
    told = ", ".join(
        f"{bucket.value.replace('_', ' ')} {duration(s)}" for bucket, s in sums.items()
    )
    middle = top_px + _BAR_PX - 6
    return tag(
        "g",
        tag("title", f"attempt {strip.attempt}: {told}; {strip.ending}"),
        _text(str(strip.attempt), _LEFT_PX - 10, middle, "end"),
        *_slots(strip, top_px, px_per_s),
        _text(f"{good}, {strip.ending}", WIDE_PX - _RIGHT_PX + 8, middle, "start"),
    )


def _slots(strip: Strip, top_px: float, px_per_s: float) -> Iterator[Html]:
    for idx, (begin_s, end_s) in enumerate(zip(strip.edges_s, strip.edges_s[1:], strict=False)):
        whole_s = sum(seconds[idx] for seconds in strip.seconds.values())
        y = top_px
        for bucket, seconds in strip.seconds.items():
            height = _BAR_PX * seconds[idx] / whole_s if whole_s > 0 else 0.0
            if height >= 0.1:
                yield tag(
                    "rect",
                    x=f"{_LEFT_PX + begin_s * px_per_s:.1f}",
                    width=f"{max(0.5, (end_s - begin_s) * px_per_s + 0.3):.1f}",
                    y=f"{y:.1f}",
                    height=f"{height:.1f}",
                    class_=f"b-{bucket.value}",
                )
            y += height


def _time_axis(end_s: float, px_per_s: float, height_px: float) -> Iterator[Html]:
    unit, unit_s = ("hours", _S_PER_HOUR) if end_s >= 2 * _S_PER_HOUR else ("minutes", 60.0)
    for tick in round_ticks(0.0, end_s / unit_s, 7):
        if tick * unit_s <= end_s:
            x = _LEFT_PX + tick * unit_s * px_per_s
            yield _text(short_number(tick), x, height_px - 24, "middle")
    middle = (_LEFT_PX + WIDE_PX - _RIGHT_PX) / 2
    yield _text(f"{unit} since training began", middle, height_px - 6, "middle")


def _text(text: str, x: float, y: float, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _legend(prefix: str, names: Sequence[str] | Mapping[str, object]) -> Html:
    entries = [
        tag("span", join((tag("i", class_=f"swatch {prefix}-{name}"), name.replace("_", " "))))
        for name in names
    ]
    return tag("div", *entries, class_="legend")
