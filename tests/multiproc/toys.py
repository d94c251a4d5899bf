"""Toy trainings for the tests of the runtime: started, read, cut short."""

import shutil
from collections import defaultdict
from functools import partial

import torch

from tests.forked import run_forked
from tests.multiproc.toy_rank import train_toy
from trainer.observe.jsonl import read_rows
from trainer.runtime.checkpoint import read_record
from trainer.runtime.rundir import complete, step_folder
from trainer.runtime.tensors import read_wanted, stored_tensors

STEPS = 4


def run_toy(run, stage, world, *, steps=STEPS, code=0, faults=(), **changes):
    """Train, expect an exit code of all ranks, and return the losses by step.

    `faults` are options of `train_toy`, `changes` keys of the config.
    """
    run.mkdir(exist_ok=True)
    settings = {"checkpoint.every_images": 16, **changes, "engine.zero_stage": stage}
    main = partial(train_toy, **dict(faults))
    codes = run_forked(main, run, steps, settings, num_ranks=world, log_dir=run)
    assert codes == [code] * world, log(run)
    return losses(run)


def log(run, rank=0):
    """Read what a rank said."""
    return (run / f"rank_{rank}.log").read_text()[-3000:]


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


def everything(run):
    """Read the newest checkpoint whole, whatever its layout, as kind/name -> tensor."""
    folder = complete(run / "checkpoints")[-1]
    record = read_record(folder)
    pieces = defaultdict(list)
    for file in record.files:
        for key, stored in stored_tensors(folder / file.name).items():
            name, _, start = key.rpartition("@")
            piece = torch.empty(stored.shape, dtype=stored.dtype)
            read_wanted([stored.range(0, piece)])
            pieces[f"{file.kind}/{name}"].append((int(start), piece))
    whole = {name: [piece for _, piece in sorted(some)] for name, some in pieces.items()}
    return {name: torch.cat(some) for name, some in whole.items()}, record


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
