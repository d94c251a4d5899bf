import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.observe import tail
from trainer.observe.tail import Span, newest_row, spans


def write(run: Path, rows, torn: str = "") -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines + torn)


def training(rows):
    return [row for row in rows if "attempt" in row and "eval/fid" not in row]


@st.composite
def histories(draw):
    """Rows of several attempts with evaluations among them, which come when they come."""
    rows = []
    for attempt in draw(st.lists(st.integers(0, 2), max_size=6)):
        number = attempt + (rows[-1]["number"] if rows else 0)
        for step in range(draw(st.integers(0, 5))):
            kind = draw(st.sampled_from(["step", "step", "merged", "while training"]))
            row = {"step": step, "number": number, "text": "x" * draw(st.integers(0, 300))}
            row |= {} if kind == "merged" else {"attempt": number}
            row |= {} if kind == "step" else {"eval/fid": 3.0}
            rows.append(row)
    return rows


@settings(deadline=None)
@given(histories(), st.sampled_from(["", '{"step": 7, "attem']), st.sampled_from([7, 100, 1 << 16]))
def test_the_newest_row_and_the_rows_of_attempts_are_those_of_the_whole_file(
    tmp_path_factory, rows, torn, chunk_bytes
):
    run = tmp_path_factory.mktemp("run")
    write(run, rows, torn)
    own = training(rows)
    attempts = {row["attempt"]: row for row in own}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "_CHUNK_BYTES", chunk_bytes)
        assert newest_row(run) == (own[-1] if own else None)
        assert spans(run) == {
            number: Span(next(row for row in own if row["attempt"] == number), last)
            for number, last in attempts.items()
        }


def test_a_run_without_metrics_has_no_rows(tmp_path):
    assert newest_row(tmp_path) is None
    assert spans(tmp_path) == {}


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_of_a_long_file_little_is_read(tmp_path):
    rows = ({"step": n, "attempt": n // 50_000, "train/loss": 0.5} for n in range(400_000))
    write(tmp_path, rows)
    assert (tmp_path / "metrics.jsonl").stat().st_size > 19e6
    before = _read_bytes()
    assert newest_row(tmp_path)["step"] == 399_999
    assert _read_bytes() - before < 1e5
    found = spans(tmp_path)
    assert [(span.first["step"], span.last["step"]) for span in found.values()] == [
        (n * 50_000, n * 50_000 + 49_999) for n in range(8)
    ]
    assert _read_bytes() - before < 4e6
