"""Show what becomes of all runs, or of one: stage, job, step, speed, time left, place in the queue.

It works without Slurm, from the runs' files alone, and needs no accounting of Slurm's.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, fields
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slurm.config import StatusConfig
from slurm.history import Chapter, read_history
from slurm.lines import Line, lines
from slurm.runfile import saved_step
from slurm.seen import Seen, Word, ask, find, goes_on, look, look_below
from slurm.words import clock, short
from trainer.command import run_command
from trainer.errors import BadInput
from trainer.observe.progress import in_words

_WIDE = 2000
_COLORS = {"running": "green", "training": "green", "finished": "green", "pending": "yellow"}
_BAD = {"crashed", "stuck", "bad_node", "lost", "refused", "gave_up"}


def table(found: Sequence[Line]) -> Table:
    """Lay lines out; columns that nobody needs are left out."""
    columns = [field.name for field in fields(Line)]
    needed = [n for n, name in enumerate(columns) if any(getattr(line, name) for line in found)]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for n in needed:
        is_number = columns[n] in {"attempt", "step", "images_per_s", "left"}
        shown.add_column(
            columns[n].replace("images_per_s", "images/s"),
            justify="right" if is_number else "left",
            no_wrap=columns[n] != "says",
            overflow="fold",
        )
    for line in found:
        cells = [Text(cell) for cell in astuple(line)]
        cells[columns.index("state")].stylize(_color(line.state))
        shown.add_row(*(cells[n] for n in needed))
    return shown


def _color(told: str) -> str:
    return "red" if told in _BAD else _COLORS.get(told.rsplit(maxsplit=1)[-1], "")


def attempts_table(chapters: Sequence[Chapter]) -> Table:
    """Lay out the attempts of a run."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("attempt", "job", "nodes", "began", "took", "from step", "to step", "lost"):
        shown.add_column(name, justify="left" if name in {"job", "nodes"} else "right")
    shown.add_column("ended", overflow="fold")
    for each in chapters:
        ended = f"{each.end.cause}: {each.end.why}" if each.end else each.error or ""
        shown.add_row(
            str(each.number),
            each.job_id,
            Text(short(each.nodes)),
            clock(each.began_unix_s) if each.began_unix_s else "",
            in_words(each.lasted_s) if each.lasted_s is not None else "",
            f"{each.from_step:,}",
            f"{each.reached_step:,}",
            f"{each.lost_steps:,}" if each.lost_steps else "",
            Text(ended),
        )
    return shown


def _one(seen: Seen, word: Word, given: Path) -> Iterator[RenderableType]:
    yield table(list(lines(seen, word, str(given))))
    saved = saved_step(seen.folder)
    yield Text(f"newest checkpoint: step {saved:,}" if saved else "no checkpoint yet")
    if seen.num_attempts:
        yield Text("")
        yield attempts_table(read_history(seen.folder, goes_on=goes_on(seen, word) is not False))
        yield Text(f"\nMore: kiln explain {given}   kiln logs {given}")


def _show(given: Path) -> RenderableType:
    root, word = given.resolve(), ask()
    if (root / "attempts").is_dir():
        shown = list(_one(look(root, word.jobs.get(root, ())), word, given))
    else:
        found = [
            line
            for seen in look_below(root, word)
            for line in lines(seen, word, str(seen.folder.relative_to(root)))
        ]
        if not found:
            raise BadInput(
                f"there is no run in {given}. Give root= the folder that `kiln launch` or "
                "`kiln train` works in, or one run."
            )
        shown = [table(found)]
    if word.problem is not None:
        shown.append(Text(f"\nFrom the runs' files alone: {word.problem}", style="yellow"))
    return Group(*shown)


def _print(console: Console, shown: RenderableType) -> None:
    """Print it; for a file or a pipe as wide as it is."""
    if console.is_terminal:
        console.print(shown)
        return
    wide = Console(highlight=False, width=_WIDE)
    with wide.capture() as captured:
        wide.print(shown)
    for line in captured.get().splitlines():
        sys.stdout.write(f"{line.rstrip()}\n")


def run(cfg: StatusConfig) -> int:
    """Show it once, or again and again until Ctrl-C."""
    root = find(cfg.root)
    if not root.is_dir():
        raise BadInput(
            f"root={cfg.root} is not there. Give the folder that `kiln launch` or `kiln train` "
            "works in, or one run."
        )
    console = Console(highlight=False)
    if cfg.watch_s is None:
        _print(console, _show(root))
        return 0
    with (
        suppress(KeyboardInterrupt),
        Live(_show(root), console=console, auto_refresh=False) as live,
    ):
        while True:
            time.sleep(cfg.watch_s)
            live.update(_show(root), refresh=True)
    return 0


def main(argv: Sequence[str]) -> int:
    """`kiln status [RUN or folder of runs] [watch_s=5]`."""
    return run_command(run, StatusConfig, "status", argv, positional="root")
