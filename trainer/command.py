"""Run a command on the frozen config that its key=value words compose to."""

import sys
from collections.abc import Callable, Sequence
from inspect import getdoc
from types import ModuleType
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from trainer.frozen import compose, compose_dict, dotted_values, field_help

T = TypeVar("T")


def run_command(
    run: Callable[[T], int],
    cls: type[T],
    primary: str,
    argv: Sequence[str],
    *,
    name: str | None = None,
) -> int:
    """Compose and freeze `conf/<primary>.yaml` with `argv`, then run; `--help` teaches instead.

    Args:
        run: The command; takes the frozen config, returns the exit code.
        cls: The config dataclass.
        primary: Name of the primary YAML in `conf/`.
        argv: Hydra overrides (`key=value`), or `--help`.
        name: The command's name where it is not the YAML's.
    """
    if "-h" in argv or "--help" in argv:
        print_help(run, cls, primary, name=name or primary)
        return 0
    return run(compose(cls, primary, argv))


def print_help(run: Callable[[T], int], cls: type[T], primary: str, *, name: str) -> None:
    """Print what the command does and every key with its value and meaning."""
    module: ModuleType = sys.modules[run.__module__]
    values = dict(dotted_values(compose_dict(primary, [], require_all=False)))
    table = Table("key", "value", "meaning", box=None, pad_edge=False)
    for key, meaning in field_help(cls):
        if key in values or meaning:
            table.add_row(key, values.get(key, ""), meaning)
    console = Console()
    console.print(f"[bold]kiln {name}[/] key=value ...\n\n{getdoc(module)}\n", highlight=False)
    console.print(table)
