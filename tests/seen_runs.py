"""Folders of runs as jobs and `kiln train` leave them, made without either."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from slurm.attempts import Begin, End
from slurm.client import COMMENT, Queued
from slurm.runfile import append_row, write_json, write_spec
from slurm.seen import Seen
from tests.cluster.jobs import spec_of

NOW = time.time()


def metrics(run: Path, attempt: int, steps, *, began: float = NOW, **more) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "images_seen": 8 * step, "train/loss": 1.0}
            row |= {"speed/images_per_s": 12.34, "time/left_s": 90.0}
            row |= {"time_unix_s": began + step, "attempt": attempt, **more}
            file.write(json.dumps(row) + "\n")


def attempt(run: Path, number: int, *, job_id="12", nodes=("node1", "node2"), **told) -> Path:
    """An attempt of a job; `told` are fields of its begin and of its end, if it has a cause."""
    folder = run / f"attempts/{number:03d}"
    folder.mkdir(parents=True)
    began = told.get("began", NOW)
    begin = Begin(job_id=job_id, nodes=nodes, unix_s=began, saved_step=told.get("from_step", 0))
    write_json(folder / "begin.json", asdict(begin))
    if "cause" in told:
        end = End(
            cause=told["cause"],
            why=told.get("why", "words"),
            unix_s=told.get("ended", began + 60),
            saved_step=told.get("saved", 0),
            suspects=told.get("suspects", {}),
        )
        write_json(folder / "end.json", asdict(end))
    return folder


def launched(run: Path, *, total_steps=5000, logs_every=1) -> Path:
    """A run that was submitted as job 12."""
    (run / "attempts").mkdir(parents=True)
    (run / "config.yaml").write_text(f"logging:\n  every_steps: {logs_every}\n")
    write_json(run / "plan.json", {"total_steps": total_steps})
    write_spec(run, spec_of(run))
    append_row(run / "jobs.jsonl", {"job_id": "12", "unix_s": NOW - 2})
    return run


def stormy(run: Path) -> Path:
    """A run whose rank was killed in attempt 0, and whose node died in attempt 1."""
    launched(run)
    attempt(
        run,
        0,
        nodes=("node1", "node3"),
        cause="crashed",
        why="rank 2 on node3: Killed",
        ended=NOW + 4210,
        suspects={"node3": 0.5},
    )
    metrics(run, 0, range(1, 1213))
    append_row(
        run / "supervisor.jsonl",
        {"unix_s": NOW + 4211, "job_id": "12", "what": "lifted", "words": "starts at once"},
    )
    attempt(
        run,
        1,
        began=NOW + 4212,
        from_step=1000,
        cause="lost",
        why="node2 is down* (Not responding)",
        ended=NOW + 9999,
        suspects={"node2": 1.0},
    )
    metrics(run, 1, range(1001, 1101), began=NOW + 4212)
    attempt(run, 2, began=NOW + 6000, from_step=1100, nodes=("node1",))
    metrics(run, 2, range(1101, 1201), began=NOW + 6000)
    write_json(run / "saved.json", {"step": 1100, "images_seen": 8800})
    return run


def queued(folder: Path, **told) -> Queued:
    fields = dict.fromkeys(Queued.__dataclass_fields__, "")
    fields |= {"shown_id": "12", "job_id": "12", "state": "RUNNING", "nodes": "node[1-2]"}
    fields |= {"comment": f"{COMMENT}{folder}", "start": "N/A", "job_name": folder.name}
    return Queued(**{**fields, **told})


def seen(folder: Path = Path("/runs/a"), **told) -> Seen:
    """What is seen of a run that has only just been submitted, but for what is told."""
    plain = {
        "folder": folder,
        "jobs": (),
        "num_attempts": 0,
        "newest": None,
        "before": None,
        "row": None,
        "total_steps": 5000,
        "is_trained": False,
        "error": None,
        "event": None,
    }
    return Seen(**{**plain, **told})
