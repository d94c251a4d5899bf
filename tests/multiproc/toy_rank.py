"""One rank of a toy training, run by the tests beside this: the real loop, engine and bookkeeping
on a network of odd sizes and a stream of made-up samples; or a small autoencoder, or adapters of a
denoiser, on noise.

Resumes what lies in the run.
"""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from tests.tiny import tiny_config
from trainer.begin import hold_base
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
from trainer.runtime.pulse import Pulse
from trainer.runtime.rollback import excluded_ids
from trainer.runtime.rundir import attempt_dir, checkpoints_of
from trainer.runtime.signals import EXIT_REQUEUE, StopFlag
from trainer.runtime.watchdog import Watchdog
from trainer.worker import ended

GLOBAL = 8
REPLACED = 1_000_000


def network() -> nn.Module:
    torch.manual_seed(0)
    # Sizes that divide by neither 2 nor 3, so that shards are uneven and padded.
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 11, bias=False), nn.Linear(11, 1))


def act(acts, ids):
    """Do what is to be done when a sample is met."""
    for number in ids:
        if number in acts:
            acts[number]()


class SlowToSave(Bookkeeper):
    """Needs a while for every checkpoint."""

    save_s = 0.0

    def save(self, progress):
        with self.span("checkpoint_stall"):
            time.sleep(self.save_s)
        super().save(progress)


class ToyFeed:
    """Sample n is a draw keyed by n; one that is left out is replaced by number n + REPLACED."""

    def __init__(self, pace, excluded, shape, acts, device):
        self._rank, self._world, self._micro = pace
        self._device = device
        self._shape, self._excluded, self._acts = shape, set(excluded), acts

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
                act(self._acts, ids)
                x = torch.stack(
                    [
                        torch.randn(self._shape, generator=torch.Generator().manual_seed(n))
                        for n in ids
                    ]
                )
                visits = torch.zeros(len(ids), dtype=torch.int64)
                yield PictureBatch(*(t.to(self._device) for t in (torch.tensor(ids), visits, x)))
            state = self.advance(state)


class ToyObjective:
    """Learn the sum of five numbers; some samples have no finite loss, or one that is far off."""

    def __init__(self, *, nan_ids=(), wild_ids=(), told=None, acts=()):
        self._nan_ids, self._wild_ids = (
            torch.tensor(list(ids), dtype=torch.int64) for ids in (nan_ids, wild_ids)
        )
        self._told, self._acts = told, dict(acts)

    def __call__(self, model, batch, _images_seen):
        if self._told and self._told[0] in batch.ids_B.tolist():
            os.kill(os.getpid(), self._told[1])
        act(self._acts, batch.ids_B.tolist())
        x = batch.pictures_BCHW
        dtype = next(model.parameters()).dtype
        is_nan_B, is_wild_B = (
            torch.isin(batch.ids_B, ids.to(x.device)) for ids in (self._nan_ids, self._wild_ids)
        )
        target_B = x.sum(1) + 1000 * is_wild_B
        loss_B = (model(x.to(dtype))[:, 0].float() - target_B).square()
        return loss_B * torch.where(is_nan_B, torch.nan, 1.0)


class ToyDenoising:
    """Learn to halve a latent, whatever the text and the time."""

    def __init__(self, text_width):
        self._text_width = text_width

    def __call__(self, model, batch, _images_seen):
        x = batch.pictures_BCHW
        text = x.flatten(1)[:, : 3 * self._text_width].unflatten(1, (3, self._text_width))
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        return (model(x, batch.ids_B % 1000, text, mask) - x / 2).square().mean((1, 2, 3))


def train_toy(folder, steps, changes, **faults):
    """Be one rank of a run.

    Args:
        folder: Of the run.
        steps: To train in all.
        changes: Config keys and their values.
        faults: Of `_train` below.

    Returns:
        0 when all steps are done, 85 when the run should be started again.
    """
    return ended(partial(_train, folder, steps, changes, **faults), Path(folder))


def _train(
    folder,
    steps,
    changes,
    *,
    told=None,
    allow_fp16=False,
    feed_acts=(),
    save_s=0.0,
    **faults,
):
    """Train.

    Args:
        folder: Of the run.
        steps: To train in all.
        changes: Config keys and their values.
        told: A sample and a signal: the rank that meets the sample gets the signal.
        allow_fp16: DeepSpeed refuses it where it is slow, not where it is wrong.
        feed_acts: Sample -> what happens when it is read.
        save_s: What a checkpoint takes longer than it does.
        faults: Of `ToyObjective`; its `acts` are what happens in the forward pass.
    """
    if allow_fp16:
        get_accelerator().is_fp16_supported = lambda: True
    env = read_rank_env()
    torch.set_num_threads(1)
    stop, pulse = StopFlag(), Pulse()
    changes = {key.replace(".", "__"): value for key, value in changes.items()}
    cfg = tiny_config(
        run=str(folder),
        total_images=steps * GLOBAL,
        cluster__ranks_per_node=env.world,
        batch__global_batch_images=GLOBAL,
        **{"batch__micro_batch_images": GLOBAL // env.world, **changes},
    )
    run, plan = Path(cfg.run), make_plan(cfg)
    if env.rank == 0:
        write_yaml(cfg, run / "config.yaml")
    with Watchdog(attempt_dir(run, env.attempt), env, cfg.watchdog, pulse):
        comm = Comm(env, cfg.cluster.device)
        SlowToSave.save_s = save_s
        with SlowToSave(cfg, plan, comm, env, launcher_pid=None, pulse=pulse) as books:
            model, objective, shape = network(), ToyObjective(told=told, **faults), (5,)
            if cfg.model.kind == "autoencoder_kl":
                model, objective = build_model(cfg), build_reconstruction(cfg, comm.device)
                shape = (3, cfg.encoders.image_side_px, cfg.encoders.image_side_px)
            if cfg.lora is not None:
                hold_base(cfg, comm)
                model, objective = build_model(cfg), ToyDenoising(cfg.model.text_width)
                shape = (cfg.model.latent_channels, *[cfg.model.latent_side] * 2)
            pace = (env.rank, env.world, cfg.batch.micro_batch_images)
            feed = ToyFeed(pace, excluded_ids(run), shape, dict(feed_acts), comm.device)
            built, progress = assemble(cfg, plan, comm, model, objective, feed)
            books.begin(built, progress)
            finished = train(built.parts(), progress, stop, books)
            books.finish(progress)
        comm.close()
    return 0 if finished else EXIT_REQUEUE


def assemble(cfg, plan, comm, model, objective, feed):
    """Build the toy, and bring it to where its newest checkpoint stands."""
    shapes = {n: list(param.shape) for n, param in model.named_parameters() if param.requires_grad}
    engine = Engine(model.to(comm.device), cfg, plan, comm)
    checkpoint = find_checkpoint(checkpoints_of(cfg), comm)
    built = Built(
        cfg=cfg,
        plan=plan,
        comm=comm,
        engine=engine,
        ema=Ema(engine.fragments, decays(cfg.ema)),
        guard=Guard(cfg.rollback, read_state(checkpoint).losses if checkpoint else []),
        objective=objective,
        feed=feed,
        shapes=shapes,
        fingerprints=("dataset", "encoding"),
    )
    return built, restore(built, checkpoint)
