"""What a command says about its progress where there is no terminal."""

import re

from trainer.observe import countdown
from trainer.observe.countdown import Countdown


def test_a_line_now_and_then_says_how_far_how_fast_and_how_long(capsys, monkeypatch):
    monkeypatch.setattr(countdown, "_LINE_EVERY_S", 0.0)
    with Countdown("sampling", 4, unit="steps") as progress:
        progress.advance(1)
        progress.advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"sampling: 1/4 steps, \d+ steps/s, \d+ s left", lines[0])
    assert re.fullmatch(r"sampling: 4/4 steps, \d+ steps/s, 0 s left", lines[1])


def test_the_share_kept_is_of_what_is_done(capsys):
    with Countdown("downloading", 10) as progress:
        progress.update(8, 6)
        progress.finish()
    assert "8/10 rows" in (said := capsys.readouterr().err)
    assert "75.0 % kept" in said


def test_quick_work_says_nothing(capsys):
    with Countdown("sampling", 2) as progress:
        progress.advance(2)
    assert capsys.readouterr().err == ""
