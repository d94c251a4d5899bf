"""Which rank this process is, read once from the environment and then passed as a value."""

import os
from dataclasses import dataclass

from trainer.errors import BadWorld


@dataclass(frozen=True)
class RankEnv:
    """One process among `world`."""

    rank: int
    world: int
    local_rank: int
    attempt: int
    visible_gpus: tuple[str, ...] | None
    """The GPUs that its job may use, as CUDA_VISIBLE_DEVICES names them; None: all."""


def read_rank_env() -> RankEnv:
    """Read RANK, WORLD_SIZE, LOCAL_RANK (or Slurm's names) and export what DeepSpeed expects.

    Raises:
        BadWorld: Neither a launcher's nor Slurm's variables are set.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env:
        env.update(
            RANK=env["SLURM_PROCID"],
            WORLD_SIZE=env["SLURM_NTASKS"],
            LOCAL_RANK=env["SLURM_LOCALID"],
        )
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in env
    ]
    if missing:
        raise BadWorld(
            f"{', '.join(missing)} not set: a worker is started by `kiln train`, by torchrun or "
            "by the script of `kiln launch`, not by hand."
        )
    return RankEnv(
        rank=int(env["RANK"]),
        world=int(env["WORLD_SIZE"]),
        local_rank=int(env["LOCAL_RANK"]),
        attempt=int(env.get("KILN_ATTEMPT", env.get("SLURM_RESTART_COUNT", "0"))),
        visible_gpus=visible_gpus(),
    )


def visible_gpus() -> tuple[str, ...] | None:
    """Return the GPUs that this job may use, as CUDA_VISIBLE_DEVICES names them; None: all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else tuple(filter(None, visible.split(",")))
