"""Ranks that end in every way, and what the process that started them says of it."""

import time

import psutil
import pytest

from trainer.errors import BadWorld
from trainer.runtime.ending import read_stuck
from trainer.runtime.local import run_ranks

pytestmark = pytest.mark.multiproc


def launch(how, folder):
    started_s = time.monotonic()
    try:
        return run_ranks(
            "tests.multiproc.light_rank", [how, str(folder)], num_ranks=2, log_dir=folder, env={}
        )
    finally:
        assert time.monotonic() - started_s < 15
        mine = psutil.Process().children(recursive=True)
        assert not [p for p in mine if "tests.multiproc.light_rank" in p.cmdline()]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies_unheard", r"rank 1 of 2 ended with code 1;.*rank 1 is on fire"),
        ("fails_slowly", r"rank 1 of 2 ended with code 1;.*\nRuntimeError: .* rank 1 is on fire"),
        ("rank_0_fails", r"rank 0 of 2 ended with code 1;.*above.\nRuntimeError: .* is on fire"),
        ("is_killed", r"rank 1 of 2 ended with signal SIGKILL;.*rank_00001.log"),
    ],
)
def test_the_rank_that_failed_first_has_the_last_word(tmp_path, how, said):
    with pytest.raises(BadWorld, match=rf"(?s)\A{said}\Z"):
        launch(how, tmp_path)


def test_what_all_ranks_refuse_alike_is_not_said_again(tmp_path):
    assert launch("refuses", tmp_path) == 2


def test_a_stopped_rank_is_ended_and_the_others_word_stands(tmp_path):
    assert launch("is_stuck", tmp_path) == 85
    assert read_stuck(tmp_path) == "rank 1 was stuck"
