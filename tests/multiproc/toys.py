"""Toy trainings for the tests of the runtime: started, read, cut short."""

import shutil

import torch

from tests.forked import run_forked
from tests.multiproc.toy_rank import train_toy
from trainer.observe.jsonl import read_rows
from trainer.runtime.checkpoint import Record, load, read_record
from trainer.runtime.rundir import complete, step_folder

STEPS = 4


def run_toy(run, stage, world, *, steps=STEPS, nan_ids=(), **changes):
    """Train to the end; return the losses by step."""
    run.mkdir(exist_ok=True)
    settings = {"checkpoint.every_images": 16, **changes, "engine.zero_stage": stage}
    codes = run_forked(train_toy, run, steps, list(nan_ids), settings, num_ranks=world, log_dir=run)
    assert codes == [0] * world, (run / "rank_0.log").read_text()[-3000:]
    return losses(run)


def losses(run):
    """Read the loss of every step; of a step that was done twice, the last one."""
    found = {row["step"]: row["train/loss"] for row in read_rows(run / "metrics.jsonl")}
    return [found[step] for step in sorted(found)]


def interrupted(source, target, step):
    """Make a run that stopped at a step of the given one."""
    shutil.copytree(
        step_folder(source / "checkpoints", step), step_folder(target / "checkpoints", step)
    )
    return target


def everything(run, step=None):
    """Read a checkpoint whole, whatever its layout: kind/name -> tensor; and its record."""
    there = complete(run / "checkpoints")
    folder = there[-1] if step is None else step_folder(run / "checkpoints", step)
    record: Record = read_record(folder)
    tensors = {
        kind: {
            f"{which}{name}@0": torch.empty(shape).view(-1)
            for name, shape in record.shapes.items()
            for which in prefixes
        }
        for kind, prefixes in {
            "weight": [""],
            "ema": [f"{average}/" for average in record.averages],
            "optim": ["exp_avg/", "exp_avg_sq/"],
        }.items()
    }
    load(folder, tensors, record.shapes)
    flat = {f"{kind}/{name}": t for kind, named in tensors.items() for name, t in named.items()}
    return flat, record


def assert_equal(run, other, *, exact=False):
    """Compare all that two runs ended with."""
    (mine, record), (theirs, their_record) = everything(run), everything(other)
    assert mine.keys() == theirs.keys()
    assert record.scalars == their_record.scalars
    for name, tensor in mine.items():
        if exact:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
