"""Where the logs of a run are: of its ranks, by attempt, and of its jobs' scripts."""

from pathlib import Path
from typing import Literal

from slurm.attempts import Attempt, attempt_folders, read_attempt
from slurm.config import LogsConfig
from slurm.render import ranges
from slurm.runfile import JOBS, read_spec
from trainer.errors import BadInput
from trainer.observe.jsonl import read_rows

_CHUNK_BYTES = 1 << 16


def find(run: Path, cfg: LogsConfig) -> Path | None:
    """Return the log that is asked for; None when it is not there yet, but may come.

    Raises:
        BadInput: It will never be there, with what there is instead.
    """
    folder = attempt_folder(run, cfg.attempt)
    if folder is None:
        found = scripts(run)
        return found[-1] if found and cfg.rank in {None, "batch"} else None
    attempt = read_attempt(folder)
    script = run / "attempts" / f"slurm_{attempt.begin.job_id}.log" if attempt else None
    if cfg.rank != "batch":
        path = folder / f"rank_{cfg.rank or 0:05d}.log"
        if path.exists():
            return path
        _check_rank(run, folder, attempt, cfg.rank)
    if cfg.rank in {None, "batch"} and script is not None and script.exists():
        return script
    return None


def attempt_folder(run: Path, number: int | None) -> Path | None:
    """Return the folder of an attempt, by default of the newest; None before the first.

    Raises:
        BadInput: It has none of this number.
    """
    folders = attempt_folders(run)
    if number is None:
        return folders[-1] if folders else None
    found = [folder for folder in folders if int(folder.name) == number]
    if not found:
        there = ranges([int(folder.name) for folder in folders]) or "none"
        raise BadInput(f"{run} has no attempt {number}. There are: {there}.")
    return found[0]


def scripts(run: Path) -> list[Path]:
    """List the logs of a run's jobs' scripts, oldest first."""
    paths = [run / "attempts" / f"slurm_{row['job_id']}.log" for row in read_rows(run / JOBS)]
    return [path for path in paths if path.exists()]


def _check_rank(
    run: Path, folder: Path, attempt: Attempt | None, rank: int | Literal["batch"] | None
) -> None:
    """Refuse a rank whose log can never be there."""
    spec, number = read_spec(run), int(folder.name)
    if attempt is not None and spec is not None and isinstance(rank, int):
        num_ranks = spec.ranks_per_node * len(attempt.begin.nodes)
        if rank >= num_ranks:
            raise BadInput(
                f"attempt {number} of {run} has no rank {rank}. It has {num_ranks} ranks, 0 to "
                f"{num_ranks - 1}."
            )
    if attempt is not None or spec is not None:  # a job's, which has just begun
        return
    there = sorted(int(path.stem.removeprefix("rank_")) for path in folder.glob("rank_*.log"))
    others = f" Of the others give --rank: {ranges(there)}." if there else ""
    if rank in {None, 0}:
        raise BadInput(
            f"attempt {number} of {run} is of `kiln train`, whose rank 0 wrote to the terminal."
            f"{others}"
        )
    raise BadInput(f"attempt {number} of {run} has no log of rank {rank}.{others}")


def start_of_last(path: Path, lines: int | None) -> int:
    """Return where the last lines of a file begin; None is all of them."""
    if lines is None:
        return 0
    with path.open("rb") as file:
        start = end = file.seek(0, 2)
        while start > 0:
            stop, start = start, max(0, start - _CHUNK_BYTES)
            file.seek(start)
            data = file.read(stop - start)
            at = len(data) - 1 if stop == end else len(data)
            while (at := data.rfind(b"\n", 0, at)) >= 0:
                lines -= 1
                if lines == 0:
                    return start + at + 1
    return 0
