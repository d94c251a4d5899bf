"""Count each device once, where several accounts of a node read its counter at the same time."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Span = tuple[float, float]
"""Begin and end, in Unix seconds."""
_Writer = tuple[str, int, int]
_Kind = tuple[str, str]
"""Node and provenance."""


def each_device_once(rows: Sequence[Row]) -> list[Row]:
    """Take away the joules that another account of the same node counted at the same time.

    A counter tells of its device, not of who asks: two commands on one GPU both read all of it.
    The account that began first keeps the joules. Where two accounts share some of their devices
    only, these count as equal parts of the later one's joules.

    Args:
        rows: Of ledgers that may have been written at the same time.
    """
    ends = period_ends(rows)
    others = _earlier_readers(rows, _spans(rows, ends))
    found: list[Row] = []
    for row in rows:
        readers = others.get((writer_of(row), (row.get("node", ""), row["provenance"])), ())
        if any(readers):
            start_s = row["start_unix_s"]
            period = (start_s, ends[writer_of(row), start_s])
            left_frac = 1 - sum(covered_frac(period, spans) for spans in readers) / len(readers)
            found.append({**row, "joules": row["joules"] * left_frac})
        else:
            found.append(row)
    return found


def writer_of(row: Row) -> _Writer:
    """Say which attempt of which process a row is of."""
    return row["stage"], row["rank"], row["attempt"]


def covered_frac(period: Span, spans: Sequence[Span]) -> float:
    """Return the share of a period that spans, in order of their begin, cover; 0 of no time."""
    reached, end_s = period
    covered_s = 0.0
    for begin_s, span_end_s in spans:
        low_s, high_s = max(begin_s, reached), min(span_end_s, end_s)
        if high_s > low_s:
            covered_s += high_s - low_s
            reached = high_s
    return covered_s / (end_s - period[0]) if end_s > period[0] else 0.0


def period_ends(rows: Iterable[Row]) -> dict[tuple[_Writer, float], float]:
    """Return when each period ended, by who wrote it and when it began."""
    ends: dict[tuple[_Writer, float], float] = {}
    for row in rows:
        key = (writer_of(row), row["start_unix_s"])
        ends[key] = ends.get(key, row["start_unix_s"]) + row["seconds"]
    return ends


def _spans(rows: Iterable[Row], ends: Mapping[tuple[_Writer, float], float]) -> dict[_Writer, Span]:
    """Return from when to when each account read its devices; what was before has no joules."""
    last_s: defaultdict[_Writer, float] = defaultdict(float)
    for (writer, _), end_s in ends.items():
        last_s[writer] = max(last_s[writer], end_s)
    begin_s = {writer_of(row): row["start_unix_s"] for row in rows if "devices" in row}
    return {writer: (start_s, last_s[writer]) for writer, start_s in begin_s.items()}


def _earlier_readers(
    rows: Iterable[Row], spans: Mapping[_Writer, Span]
) -> dict[tuple[_Writer, _Kind], list[list[Span]]]:
    """Return, for each device of each account, when accounts that began before it read it."""
    devices: defaultdict[_Writer, dict[_Kind, Sequence[str]]] = defaultdict(dict)
    for row in rows:
        for provenance, names in row.get("devices", {}).items():
            devices[writer_of(row)][row["node"], provenance] = names
    read: defaultdict[tuple[_Kind, str], list[Span]] = defaultdict(list)
    found = {}
    for writer in sorted(devices, key=lambda writer: spans[writer]):
        for kind, names in devices[writer].items():
            found[writer, kind] = [
                [span for span in read[kind, name] if span[1] > spans[writer][0]] for name in names
            ]
            for name in names:
                read[kind, name].append(spans[writer])
    return found
