"""One rank that trains on made-up latents, and how many bytes of tensors it holds at most.

Not the memory of its process, which has Python, libraries and what the allocator keeps in it.
"""

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_memory import Silent
from trainer.build import (
    build_loss,
    build_model,
    build_parameterization,
    learning_rate,
    training_times,
)
from trainer.config import TrainConfig
from trainer.config_diffusion import DenoisingConfig
from trainer.data.sources import Batch, LatentBatch
from trainer.data.stream import State
from trainer.frozen import compose
from trainer.loop import Parts, Progress, train
from trainer.objectives import LatentObjective
from trainer.plan import make_plan
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema, decays
from trainer.runtime.engine import Engine
from trainer.runtime.env import read_rank_env
from trainer.runtime.guard import Guard
from trainer.runtime.local import die_with_parent
from trainer.runtime.signals import StopFlag
from trainer.runtime.snapshot import Snapshot


def made_up(cfg: TrainConfig) -> LatentBatch:
    """Make a micro-batch of noise with captions of full length."""
    assert cfg.model.kind != "autoencoder_kl"
    model, micro, tokens = cfg.model, cfg.batch.micro_batch_images, cfg.encoders.text.max_tokens
    latents = torch.randn(micro, model.latent_channels, model.latent_side, model.latent_side)
    return LatentBatch(
        ids_B=torch.arange(micro),
        visits_B=torch.zeros(micro, dtype=torch.int64),
        mean_BCHW=latents,
        logvar_BCHW=torch.zeros_like(latents),
        text_BLD=torch.randn(micro, tokens, model.text_width),
        text_mask_BL=torch.ones(micro, tokens, dtype=torch.bool),
    )


def objective(cfg: TrainConfig) -> LatentObjective:
    """Make the objective of a run, without the statistics of a dataset."""
    assert isinstance(cfg.objective, DenoisingConfig)
    assert cfg.model.kind != "autoencoder_kl"
    channels = cfg.model.latent_channels
    return LatentObjective(
        build_loss(cfg.objective),
        training_times(cfg.objective.times, build_parameterization(cfg.objective).process),
        seed=cfg.seed,
        latent_mean_C=torch.zeros(channels),
        latent_std_C=torch.ones(channels),
        null_text_LD=torch.zeros(1, cfg.model.text_width),
        caption_dropout=cfg.objective.caption_dropout,
    )


def hold(cfg: TrainConfig, comm: Comm) -> Any:  # noqa: ANN401
    """Train from nothing to the last step, with the copy that checkpoints are written from."""
    plan = make_plan(cfg)
    engine = Engine(build_model(cfg), cfg, plan, comm)
    ema = Ema(engine.fragments, decays(cfg.ema))
    snapshot = Snapshot(engine.fragments, ema)

    def read(_state: State) -> Generator[Batch]:
        while True:
            yield made_up(cfg)

    parts = Parts(
        plan=plan,
        total_images=cfg.total_images,
        engine=engine,
        ema=ema,
        guard=Guard(cfg.rollback),
        objective=objective(cfg),
        read=read,
        advance=lambda state: state,
        learning_rate=learning_rate(cfg.optim, cfg.total_images),
        comm=comm,
        flops=lambda _batch: 0.0,
    )
    train(parts, Progress(State(0, (), ())), StopFlag(), Silent())
    return engine, ema, snapshot


def peak_bytes(cfg: TrainConfig, comm: Comm) -> int:
    """Return the most bytes of tensors that a training of this rank holds at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = hold(cfg, comm)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted(
        (each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    del held
    return most


def main() -> None:
    """Argument: a JSON of {words, out}."""
    args = json.loads(sys.argv[1])
    die_with_parent()
    env = read_rank_env()
    torch.set_num_threads(1)
    cfg = compose(TrainConfig, "train", args["words"])
    comm = Comm(env, "cpu")
    most = max(comm.gather(peak_bytes(cfg, comm))) if False else peak_bytes(cfg, comm)
    total = comm.sum([float(most == 0), float(most)])
    if env.rank == 0:
        Path(args["out"]).write_text(json.dumps({"peak_bytes": total[1] / comm.world}))
    comm.close()


if __name__ == "__main__":
    main()
