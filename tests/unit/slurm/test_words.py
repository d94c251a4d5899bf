import re
import time

from hypothesis import given
from hypothesis import strategies as st

from slurm.words import clock, from_slurm, short


def written_out(told: str) -> set[str]:
    found = set()
    for prefix, spans, alone in re.findall(r"([a-z-]+)\[([\d,-]+)\]|([a-z-]+\d*)", told):
        for span in filter(None, spans.split(",")):
            first, _, last = span.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            found |= {f"{prefix}{number:0{len(first)}d}" for number in numbers}
        found |= {alone} if alone else set()
    return found


def test_nodes_are_written_as_slurm_does():
    assert short(["node017", "node016", "node001", "login"]) == "login,node[001,016-017]"
    assert short(["node2"]) == "node2"
    assert short([]) == ""


@given(st.sets(st.from_regex(r"(node|gpu-)([0-9]|[0-9]{3})", fullmatch=True)))
def test_no_node_is_lost_or_added(nodes):
    assert written_out(short(nodes)) == nodes


def test_moments_of_today_need_no_day():
    noon_unix_s = time.mktime((2026, 11, 28, 12, 1, 3, 0, 0, -1))
    assert clock(noon_unix_s, noon_unix_s + 60) == "12:01:03"
    assert clock(noon_unix_s, noon_unix_s + 86400) == "28 Nov 12:01:03"
    assert from_slurm("2026-11-28T12:01:03") == noon_unix_s
    assert from_slurm("N/A") is None
