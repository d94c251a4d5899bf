"""Run a command on the frozen config that its key=value words compose to."""

import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import getdoc
from types import ModuleType
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from trainer.frozen import compose, compose_dict, dotted_values, field_help

T = TypeVar("T")
NO_SHORT_KEYS: Mapping[str, str] = {}


def run_command(
    run: Callable[[T], int],
    cls: type[T],
    primary: str,
    argv: Sequence[str],
    *,
    name: str | None = None,
    positional: str | None = None,
    short: Mapping[str, str] = NO_SHORT_KEYS,
) -> int:
    """Compose and freeze `conf/<primary>.yaml` with `argv`, then run; `--help` teaches instead.

    Args:
        run: The command; takes the frozen config, returns the exit code.
        cls: The config dataclass.
        primary: Name of the primary YAML in `conf/`.
        argv: Hydra overrides (`key=value`), or `--help`.
        name: The command's name where it is not the YAML's.
        positional: The key that the first word without '=' gives.
        short: Short names of keys; the long ones go on working.
    """
    if "-h" in argv or "--help" in argv:
        usage = f"{name or primary}{f' {positional.upper()}' if positional else ''}"
        print_help(run, cls, primary, usage=usage, short=short)
        return 0
    words = long_words(argv, positional=positional, short=short)
    return run(compose(cls, primary, words, command=name))


def long_words(
    argv: Sequence[str], *, positional: str | None, short: Mapping[str, str] = NO_SHORT_KEYS
) -> list[str]:
    """Write a command's words in full: `RUN steps=20` as `run='RUN' sampling.num_steps=20`."""
    words = []
    for word in argv:
        key, is_pair, value = word.partition("=")
        if positional and not is_pair and not word.startswith("~"):
            quoted = word.replace("'", "\\'")
            words.append(f"{positional}='{quoted}'")
            positional = None
        else:
            words.append(f"{short.get(key, key)}{is_pair}{value}")
    return words


def print_help(
    run: Callable[[T], int],
    cls: type[T],
    primary: str,
    *,
    usage: str,
    short: Mapping[str, str] = NO_SHORT_KEYS,
) -> None:
    """Print what the command does and every key with its value and meaning."""
    module: ModuleType = sys.modules[run.__module__]
    values = dict(dotted_values(compose_dict(primary, [], require_all=False)))
    table = Table("key", "value", "meaning", box=None, pad_edge=False)
    for key, meaning in field_help(cls):
        if key in values or meaning:
            table.add_row(key, values.get(key, ""), meaning)
    console = Console()
    console.print(f"[bold]kiln {usage}[/] key=value ...\n\n{getdoc(module)}\n", highlight=False)
    console.print(table)
    if short:
        names = ", ".join(f"{key} is {full}" for key, full in short.items())
        console.print(f"\nShort: {names}.", highlight=False)
