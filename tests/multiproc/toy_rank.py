"""One rank of a toy training, run by the tests beside this: the real loop, engine and bookkeeping
on a network of odd sizes and a stream of made-up samples; or a small autoencoder, on noise.

Resumes what lies in the run.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from tests.tiny import tiny_config
from trainer.bookkeeping import Bookkeeper
from trainer.build import Built, build_model, build_reconstruction, find_checkpoint, restore
from trainer.data.sources import PictureBatch
from trainer.data.stream import State
from trainer.frozen import write_yaml
from trainer.loop import train
from trainer.plan import make_plan
from trainer.runtime.checkpoint import read_state
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema, decays
from trainer.runtime.engine import Engine
from trainer.runtime.env import read_rank_env
from trainer.runtime.guard import Guard
from trainer.runtime.rollback import excluded_ids
from trainer.runtime.rundir import checkpoints_of
from trainer.runtime.signals import EXIT_REQUEUE, StopFlag

GLOBAL = 8
REPLACED = 1_000_000


def network() -> nn.Module:
    torch.manual_seed(0)
    # Sizes that divide by neither 2 nor 3, so that shards are uneven and padded.
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 11, bias=False), nn.Linear(11, 1))


class ToyFeed:
    """Sample n is a draw keyed by n; one that is left out is replaced by number n + REPLACED."""

    def __init__(self, rank, world, micro, excluded, shape):
        self._rank, self._world, self._micro, self._shape = rank, world, micro, shape
        self._excluded = set(excluded)

    def begin(self, saved):
        return State(saved["samples"] if saved else 0, (), ())

    def advance(self, state):
        return replace(state, samples=state.samples + GLOBAL)

    def to_json(self, state):
        return {"samples": state.samples}

    def exclude(self, ids):
        self._excluded |= set(ids)

    def batches(self, state):
        while True:
            mine = range(state.samples + self._rank, state.samples + GLOBAL, self._world)
            for first in range(0, len(mine), self._micro):
                ids = [
                    n + REPLACED if n in self._excluded else n
                    for n in mine[first : first + self._micro]
                ]
                x = torch.stack(
                    [
                        torch.randn(self._shape, generator=torch.Generator().manual_seed(n))
                        for n in ids
                    ]
                )
                yield PictureBatch(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.int64), x)
            state = self.advance(state)


class ToyObjective:
    """Learn the sum of five numbers; some samples have no finite loss, or one that is far off."""

    def __init__(self, *, nan_ids=(), wild_ids=(), told=None):
        self._nan_ids, self._wild_ids = (
            torch.tensor(list(ids), dtype=torch.int64) for ids in (nan_ids, wild_ids)
        )
        self._told = told

    def __call__(self, model, batch, _images_seen):
        if self._told and self._told[0] in batch.ids_B.tolist():
            os.kill(os.getpid(), self._told[1])
        x = batch.pictures_BCHW
        dtype = next(model.parameters()).dtype
        target_B = x.sum(1) + 1000 * torch.isin(batch.ids_B, self._wild_ids)
        loss_B = (model(x.to(dtype))[:, 0].float() - target_B).square()
        return loss_B * torch.where(torch.isin(batch.ids_B, self._nan_ids), torch.nan, 1.0)


def train_toy(folder, steps, changes, *, told=None, allow_fp16=False, **faults):
    """Be one rank of a run.

    Args:
        folder: Of the run.
        steps: To train in all.
        changes: Config keys and their values.
        told: A sample and a signal: the rank that meets the sample gets the signal.
        allow_fp16: See below.
        faults: Of `ToyObjective`.

    Returns:
        0 when all steps are done, 85 when the run should be started again.
    """
    if allow_fp16:  # DeepSpeed refuses it where it is slow, not where it is wrong
        get_accelerator().is_fp16_supported = lambda: True
    env = read_rank_env()
    torch.set_num_threads(1)
    stop = StopFlag()
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    cfg = tiny_config(
        run=str(folder),
        total_images=steps * GLOBAL,
        cluster__ranks_per_node=env.world,
        batch__global_batch_images=GLOBAL,
        **{"batch__micro_batch_images": GLOBAL // env.world, **changes},
    )
    run = Path(cfg.run)
    if env.rank == 0:
        write_yaml(cfg, run / "config.yaml")
    comm, plan = Comm(env, "cpu"), make_plan(cfg)
    with Bookkeeper(cfg, plan, comm, attempt=env.attempt, launcher_pid=None) as books:
        model, objective, shape = network(), ToyObjective(told=told, **faults), (5,)
        if cfg.model.kind == "autoencoder_kl":
            model, objective = build_model(cfg), build_reconstruction(cfg, comm.device)
            shape = (3, cfg.encoders.image_side_px, cfg.encoders.image_side_px)
        shapes = {name: list(param.shape) for name, param in model.named_parameters()}
        engine = Engine(model, cfg, plan, comm)
        checkpoint = find_checkpoint(checkpoints_of(cfg), comm)
        recent = read_state(checkpoint).losses if checkpoint else []
        built = Built(
            cfg=cfg,
            plan=plan,
            comm=comm,
            engine=engine,
            ema=Ema(engine.fragments, decays(cfg.ema)),
            guard=Guard(cfg.rollback, recent),
            objective=objective,
            feed=ToyFeed(
                env.rank, env.world, cfg.batch.micro_batch_images, excluded_ids(run), shape
            ),
            shapes=shapes,
            fingerprints=("dataset", "encoding"),
        )
        progress = restore(built, checkpoint)
        books.begin(built, progress)
        finished = train(built.parts(), progress, stop, books)
        books.finish(progress)
    comm.close()
    return 0 if finished else EXIT_REQUEUE
