"""What a command says about its progress where there is no terminal."""

import re

from trainer import countdown
from trainer.countdown import Countdown


def test_a_line_now_and_then_says_how_far_and_how_long(capsys, monkeypatch):
    monkeypatch.setattr(countdown, "LINE_EVERY_S", 0.0)
    with Countdown("sampling", 4) as progress:
        progress.advance(1)
        progress.advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"sampling: 1/4, \d+ s left", lines[0])
    assert lines[1] == "sampling: 4/4, 0 s left"


def test_quick_work_says_nothing(capsys):
    with Countdown("sampling", 2) as progress:
        progress.advance(2)
    assert capsys.readouterr().err == ""
