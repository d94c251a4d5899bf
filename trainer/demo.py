"""Take image-text URLs all the way to generated pictures and a report, with everyday commands."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from trainer.command import run_command
from trainer.config import DemoConfig
from trainer.errors import BadInput, BadWorld

log = logging.getLogger(__name__)

# Combinations that the painter holds out: training never sees them.
_WISHES = (
    "a large orange cross in the middle, on a black background",
    "a small yellow ring on the right, on a blue background",
    "a large black star in the middle, on a white background",
    "a large white triangle on the left, on a blue background",
)


@dataclass(frozen=True)
class Step:
    """One command of the demo, as a user would type it."""

    command: str
    args: tuple[str, ...]
    about_s: float
    """Roughly how long it takes on two cores; only for the estimate of the time left."""


def steps(cfg: DemoConfig) -> Iterator[Step]:
    """Yield the commands between making the source and reading the report."""
    out = out_dir(cfg)
    source, dataset, run = out / "source", out / "dataset", out / "run"
    autoencoder = cfg.first_stage or ("scenes" if cfg.data == "scenes" else "emoji")
    data = (f"autoencoder={autoencoder}", f"encoders.image_side_px={cfg.image_side_px}")
    yield Step(
        "prepare",
        (
            f"rows={source}/rows.parquet",
            f"dataset={dataset}",
            f"image_side_px={cfg.image_side_px}",
            f"shard_rows={cfg.shard_rows}",
            "min_image_side_px=16",
            "resize_mode=center_crop",
            "encode_format=png",
            # The demo's own server; loopback addresses are refused otherwise.
            "download.allow_hosts=[127.0.0.1]",
            "download.timeout_s=2",
        ),
        60,
    )
    yield Step("encode", (f"dataset={dataset}", *data), 90)
    yield Step(
        "train",
        (
            f"run={run}",
            f"data.dataset={dataset}",
            *data,
            f"total_images={cfg.total_images}",
            *cfg.train,
        ),
        420,
    )
    yield Step("evaluate", (f"run={run}", *cfg.evaluate), 90)
    wishes = f"prompts=[{','.join(map(repr, _WISHES))}]" if cfg.data == "scenes" else ""
    yield Step("sample", (f"run={run}", f"out={run}/wishes", *([wishes] if wishes else [])), 15)
    yield Step("report", (f"run={run}",), 5)


def run(cfg: DemoConfig) -> int:
    """Run every step; what is finished says so and is not repeated."""
    out = out_dir(cfg)
    console = Console(stderr=True, highlight=False)
    started_s = time.monotonic()
    _step(console, Step("source", (*source_args(cfg), f"out={out / 'source'}"), 20), left_s=680)
    console.print(f"\n[bold]$ kiln serve source={out / 'source'} &[/]")
    with serving(out / "source"):
        todo = list(steps(cfg))
        for number, step in enumerate(todo):
            _step(console, step, left_s=sum(s.about_s for s in todo[number:]))
    minutes = (time.monotonic() - started_s) / 60
    console.print(
        f"\nDone in {minutes:.1f} minutes. The report: {(out / 'run/report.html').resolve()}"
    )
    return 0


def out_dir(cfg: DemoConfig) -> Path:
    """Where everything goes."""
    return Path(cfg.out) if cfg.out else Path("demo") / Path(cfg.data).resolve().name


def source_args(cfg: DemoConfig) -> tuple[str, ...]:
    """Return the words of `kiln source` that make the demo's pictures."""
    if cfg.data in {"scenes", "emoji"}:
        return (f"kind={cfg.data}", f"num_pictures={cfg.num_pictures}")
    if not Path(cfg.data).is_dir():
        raise BadInput(
            f"data={cfg.data} is neither scenes, emoji nor a folder. Give a folder of pictures "
            "with captions in X.txt beside X.jpg, or in captions.csv."
        )
    return ("kind=folder", f"pictures={cfg.data}", f"num_pictures={cfg.num_pictures}")


def _step(console: Console, step: Step, *, left_s: float) -> None:
    line = " ".join(["kiln", step.command, *step.args])
    console.print(f"\n[bold]$ {line}[/]   [dim]about {max(1, round(left_s / 60))} min left[/]")
    process = _start(step)
    code = _wait_passing_signals(process)
    if code == 0:
        return
    if code in {128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM}:
        raise KeyboardInterrupt
    raise BadWorld(
        f"`{line}` ended with code {code}; its message is above. What was finished stands: "
        "the same command continues."
    )


def _start(step: Step) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own commands, no shell
        [sys.executable, "-m", "trainer.cli", step.command, *step.args], start_new_session=True
    )


def _wait_passing_signals(process: subprocess.Popen[bytes]) -> int:
    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def serving(source: Path) -> Iterator[None]:
    """Serve a source on loopback meanwhile."""
    server = _start(Step("serve", (f"source={source}",), 0))
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def main(argv: Sequence[str]) -> int:
    """`kiln demo [data=scenes|emoji|FOLDER] [key=value ...]`."""
    return run_command(run, DemoConfig, "demo", argv)
