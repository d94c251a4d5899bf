import importlib

import pytest

from trainer.cli import COMMANDS, main
from trainer.errors import disk_full


def test_usage_names_every_command(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    assert main(["trian"]) == 2
    assert "got the command 'trian'; known: demo" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches(name, capsys):
    importlib.import_module(COMMANDS[name][0])
    assert main([name, "--help"]) == 0
    assert f"kiln {name}" in capsys.readouterr().out


def test_user_errors_are_one_message_without_a_traceback(capsys):
    assert main(["plan", "data.dataset=x", "sede=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kiln plan: got the key 'sede'")
    assert "Traceback" not in err


def test_a_full_disk_says_where_and_what_stands():
    said = disk_full(OSError(28, "No space left on device", "/data/shards/00001.tar"))
    assert "/data/shards/00001.tar" in said
    assert "same command again" in said
