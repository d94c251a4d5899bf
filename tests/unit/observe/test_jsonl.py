import resource
import signal

import pytest

from trainer.errors import BadInput
from trainer.observe.jsonl import JsonLines, read_rows


def append(path, *rows):
    file = JsonLines(path)
    file.append(rows)
    file.close()


def test_a_kill_at_any_byte_loses_at_most_the_last_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "loss": 1 / (step + 1)} for step in range(3)]
    append(path, *rows)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        survivors = rows[: whole[:cut].count(b"\n")]
        assert read_rows(path) == survivors
        append(path, {"step": 99})
        assert read_rows(path) == [*survivors, {"step": 99}]


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "rows.jsonl") == []


def test_numbers_that_json_cannot_write_become_null(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, {"loss": float("nan"), "grad_norm": float("inf"), "step": 1})
    assert read_rows(path) == [{"loss": None, "grad_norm": None, "step": 1}]


@pytest.mark.parametrize("line", [b"{not json}\n", b"3\n"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
    with pytest.raises(BadInput, match=r"rows.jsonl:2 is .*Remove that line"):
        read_rows(path)


def test_a_full_disk_leaves_whole_rows_and_room_for_the_next_try(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = JsonLines(path)
    file.append([{"step": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError, match=r"large|space"):
            file.append([{"step": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    file.append([{"step": 3}])
    file.close()
    assert read_rows(path) == [{"step": 1}, {"step": 3}]
