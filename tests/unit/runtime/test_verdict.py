"""Whom everybody waits for, from heartbeats alone."""

from dataclasses import replace

import pytest

from trainer.runtime.beats import Beat, beat_path, read_beat, write_beat
from trainer.runtime.verdict import judge

WAITING = Beat(9, "n1", 17, "backward", 601.0, 600.0, "nccl:all_reduce", begun=40)
FREE = replace(WAITING, node="n2", phase="data", waits_in=None)


@pytest.mark.parametrize(
    ("beats", "silent_s", "guilty", "said"),
    [
        ([WAITING, FREE], {}, (1,), "rank 1 on n2, in data of step 17, for 601 s"),
        ([FREE, WAITING], {}, (0,), "Waiting: 1 rank in nccl:all_reduce (backward of step 17)"),
        ([WAITING, replace(FREE, elapsed_s=3)], {1: 31}, (1,), "no sign of life for 31 s or more"),
        ([WAITING, None], {1: 31}, (1,), "rank 1, which was never heard of"),
        # The heart of one stopped: what another one does may come of that.
        ([WAITING, FREE, FREE], {2: 31}, (2,), "(last in data of step 17)"),
        ([WAITING, replace(WAITING, begun=39)], {}, (1,), "rank 1 on n1, in nccl:all_reduce, back"),
        ([WAITING, WAITING], {}, (), "no rank alone: the network, or a GPU that hangs. Waiting: 2"),
        ([FREE] * 10, {}, tuple(range(10)), "and 2 more"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_found(beats, silent_s, guilty, said):
    verdict = judge(dict(enumerate(beats)), silent_s)
    assert verdict.ranks == guilty
    assert said in verdict.message


@pytest.mark.parametrize("phase", ["checkpoint", "restore"])
def test_who_still_has_time_is_waited_for(phase):
    saving = replace(FREE, phase=phase, limit_s=1800.0)
    assert judge({0: WAITING, 1: saving}, {}) is None
    assert judge({0: WAITING, 1: saving, 2: FREE}, {}).ranks == (2,)


def test_a_beat_is_read_as_it_was_written_and_half_a_one_is_none(tmp_path):
    path = beat_path(tmp_path, 3)
    assert read_beat(path) is None
    path.parent.mkdir()
    for beat in (WAITING, FREE):
        write_beat(path, beat)
        assert read_beat(path) == beat
    path.write_bytes(path.read_bytes()[:40])
    assert read_beat(path) is None
