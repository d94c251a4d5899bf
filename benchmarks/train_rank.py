"""One rank of a training that `benchmarks.train` times; writes the seconds of its steps as JSON."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.bookkeeping import Bookkeeper
from trainer.build import build, build_model, restore
from trainer.config import TrainConfig
from trainer.data.sources import LatentBatch
from trainer.datasets import find_datasets
from trainer.diffusion import philox
from trainer.feed import open_feed
from trainer.frozen import compose, write_yaml
from trainer.loop import Progress, StepFacts, train
from trainer.plan import make_plan
from trainer.runtime.comm import Comm
from trainer.runtime.env import read_rank_env
from trainer.runtime.local import die_with_parent
from trainer.runtime.signals import StopFlag

WARMUP_STEPS = 4
IN_MEMORY = 8
"""Micro-batches that the bare loops go round."""


class Timed(Bookkeeper):
    """All that happens beside training, and when each step was done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.done_s = [time.perf_counter()]

    def after_step(self, progress: Progress, facts: StepFacts) -> None:
        """Take the time."""
        super().after_step(progress, facts)
        self.done_s.append(time.perf_counter())


def kiln(cfg: TrainConfig, comm: Comm) -> dict[str, float]:
    """Train with everything that `kiln train` does beside it."""
    plan = make_plan(cfg)
    books = Timed(cfg, plan, comm, attempt=0, launcher_pid=None)
    with books:
        built = build(cfg, plan, comm, None)
        progress = restore(built, None)
        books.begin(built, progress)
        train(built.parts(), progress, StopFlag(), books)
    found = {"step_s": median_step_s(books.done_s)}
    seen = {"images_per_step": plan.images_per_step, "images_seen": cfg.total_images}
    found["ema_s"] = median_s(lambda: built.ema.update(**seen))
    micro = cfg.batch.micro_batch_images
    shape = latent_shape(cfg)
    who = (cfg.seed, torch.arange(micro), torch.zeros(micro, dtype=torch.int64))

    def draw() -> None:
        for purpose in (philox.LATENT, philox.NOISE):
            philox.normals(*who, purpose=purpose, shape=shape)
        for purpose in (philox.TIME, philox.CAPTION_DROPOUT):
            philox.uniforms(*who, purpose=purpose, count=1)

    found["draws_s"] = plan.accumulation_steps * median_s(draw)
    return found


def bare(cfg: TrainConfig, comm: Comm, *, how: str) -> dict[str, float]:
    """Train the same network in a plain loop, alone or under DDP or DeepSpeed, from memory."""
    network = build_model(cfg)
    batches = cycle(islice(_batches(cfg, comm), IN_MEMORY))
    params = list(network.parameters())
    adam = torch.optim.AdamW(
        params, cfg.optim.learning_rate, cfg.optim.betas, weight_decay=0.01, fused=True
    )
    step = _plain_step(network, params, adam, cfg)
    if how == "ddp":
        step = _plain_step(nn.parallel.DistributedDataParallel(network), params, adam, cfg)
    elif how == "deepspeed":
        step = _deepspeed_step(network, adam, cfg)
    done_s = [time.perf_counter()]
    for _ in range(make_plan(cfg).total_steps):
        step(next(batches))
        done_s.append(time.perf_counter())
    return {"step_s": median_step_s(done_s)}


def _plain_step(
    network: nn.Module,
    params: list[nn.Parameter],
    adam: torch.optim.Optimizer,
    cfg: TrainConfig,
) -> Callable[[LatentBatch], None]:
    def step(batch: LatentBatch) -> None:
        torch.autograd.backward(flow_loss(network, batch))
        nn.utils.clip_grad_norm_(params, cfg.optim.clip_grad_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def _deepspeed_step(
    network: nn.Module, adam: torch.optim.Optimizer, cfg: TrainConfig
) -> Callable[[LatentBatch], None]:
    import deepspeed  # noqa: PLC0415 - Comm chooses the accelerator before the first import

    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=adam,
        config={
            "train_batch_size": cfg.batch.global_batch_images,
            "train_micro_batch_size_per_gpu": cfg.batch.micro_batch_images,
            "gradient_clipping": cfg.optim.clip_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )

    def step(batch: LatentBatch) -> None:
        engine.backward(flow_loss(engine, batch))
        engine.step()

    return step


def flow_loss(network: nn.Module, batch: LatentBatch) -> Tensor:
    """Rectified flow with logit-normal times, as short as it can be written."""
    x0 = batch.mean_BCHW + (0.5 * batch.logvar_BCHW).exp() * torch.randn_like(batch.mean_BCHW)
    noise = torch.randn_like(x0)
    t = torch.sigmoid(torch.randn(len(x0), 1, 1, 1))
    x_t = (1 - t) * x0 + t * noise
    out: Tensor = network(x_t, 1000 * t.flatten(), batch.text_BLD, batch.text_mask_BL)
    return nn.functional.mse_loss(out, noise - x0)


def _batches(cfg: TrainConfig, comm: Comm) -> Iterator[LatentBatch]:
    feed = open_feed(cfg, find_datasets(cfg), comm, None)
    for batch in feed.batches(feed.begin(None)):
        assert isinstance(batch, LatentBatch)
        yield batch


def latent_shape(cfg: TrainConfig) -> tuple[int, int, int]:
    """Of one sample."""
    assert cfg.model.kind == "unet"
    return cfg.model.latent_channels, cfg.model.latent_side, cfg.model.latent_side


def median_step_s(done_s: list[float]) -> float:
    """Median over the steps behind the warm-up."""
    steps_s = torch.tensor(done_s, dtype=torch.float64).diff()[WARMUP_STEPS:]
    return float(steps_s.median())


def median_s(action: Callable[[], None], times: int = 20) -> float:
    """Median time of something done again and again."""
    done_s = [time.perf_counter()]
    for _ in range(times):
        action()
        done_s.append(time.perf_counter())
    return float(torch.tensor(done_s, dtype=torch.float64).diff().median())


def main() -> None:
    """Argument: a JSON of {system, words, out}."""
    args = json.loads(sys.argv[1])
    die_with_parent()
    env = read_rank_env()
    torch.set_num_threads(1)
    cfg = compose(TrainConfig, "train", args["words"])
    comm = Comm(env, "cpu")
    if env.rank == 0:
        Path(cfg.run).mkdir()
        write_yaml(cfg, Path(cfg.run) / "config.yaml")
    system = args["system"]
    found = kiln(cfg, comm) if system == "kiln" else bare(cfg, comm, how=system)
    if env.rank == 0:
        Path(args["out"]).write_text(json.dumps(found), encoding="utf-8")
    comm.close()


if __name__ == "__main__":
    main()
