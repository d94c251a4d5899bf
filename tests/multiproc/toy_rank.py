"""One rank of a toy training, run by test_runtime.py: a real engine on a network of odd sizes.

Argument: a JSON of {run, stage, accumulate, steps, save_at, keep}. Resumes what lies in the run.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from tests.tiny import tiny_config
from trainer.plan import make_plan
from trainer.runtime.checkpoint import TrainState, load, newest_valid, save
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema
from trainer.runtime.engine import Engine
from trainer.runtime.env import read_rank_env
from trainer.runtime.local import die_with_parent

GLOBAL = 8


def network() -> nn.Module:
    torch.manual_seed(0)
    # Sizes that divide by neither 2 nor 3, so that shards are uneven and padded.
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 11, bias=False), nn.Linear(11, 1))


def sample(step: int, slot: int) -> torch.Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(1000 * step + slot))


def main() -> None:
    args = json.loads(sys.argv[1])
    die_with_parent()
    env = read_rank_env()
    torch.set_num_threads(1)
    micro = GLOBAL // env.world // args["accumulate"]
    cfg = tiny_config(
        engine__zero_stage=args["stage"],
        cluster__ranks_per_node=env.world,
        batch__global_batch_images=GLOBAL,
        batch__micro_batch_images=micro,
    )
    comm = Comm(env, "cpu")
    plan = make_plan(cfg)
    model = network()
    shapes = {name: list(param.shape) for name, param in model.named_parameters()}
    engine = Engine(model, cfg, plan, comm)
    ema = Ema(engine.fragments, half_life_images=16, warmup_ratio=1.0)
    root = Path(args["run"]) / "checkpoints"
    folder = newest_valid(root)
    step = load(folder, engine.fragments, ema).step if folder else 0
    losses = []
    while step < args["steps"]:
        mine = list(range(env.rank, GLOBAL, env.world))
        loss_sum = 0.0
        for first in range(0, len(mine), micro):
            x = torch.stack([sample(step, slot) for slot in mine[first : first + micro]])
            loss_B = (engine.model(x)[:, 0] - x.sum(1)).square()
            engine.backward(loss_B.mean())
            engine.micro_step()
            loss_sum += float(loss_B.detach().sum())
        step += 1
        ema.update(images_per_step=GLOBAL, images_seen=step * GLOBAL)
        losses.append(comm.sum([loss_sum])[0] / GLOBAL)
        if step in {args["save_at"], args["steps"]}:
            state = TrainState(step, step * GLOBAL, 1, "d", "e", {})
            save(root, state, engine.fragments, ema, comm, shapes=shapes, keep_last=args["keep"])
    if env.rank == 0:
        (Path(args["run"]) / "losses.json").write_text(json.dumps(losses))
    comm.close()


if __name__ == "__main__":
    main()
