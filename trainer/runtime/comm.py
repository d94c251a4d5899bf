"""The few collectives that Kiln itself needs, on small vectors of floats."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from trainer.runtime.compiled import load_cpu_op
from trainer.runtime.env import RankEnv

_TIMEOUT = timedelta(days=7)
"""Longer than anything: the watchdog ends what hangs, and says why; a collective knows no names."""


class Comm:
    """The process group of a run; starts DeepSpeed's backend, which shares it."""

    def __init__(self, env: RankEnv, device: Literal["cpu", "cuda"]) -> None:
        """Join the group: gloo on CPU, NCCL on CUDA."""
        os.environ["DS_ACCELERATOR"] = device
        import deepspeed  # noqa: PLC0415 - reads DS_ACCELERATOR when first imported

        self.rank, self.world = env.rank, env.world
        self.device = torch.device(f"cuda:{env.local_rank}" if device == "cuda" else "cpu")
        if device == "cuda":
            torch.cuda.set_device(self.device)
        else:
            load_cpu_op()
        deepspeed.init_distributed(
            dist_backend="gloo" if device == "cpu" else "nccl",
            auto_mpi_discovery=False,
            timeout=_TIMEOUT,
            verbose=False,
        )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add `values` over all ranks, in double precision; every rank gets the sums."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def from_rank_0(self, value: float) -> float:
        """Give every rank the value of rank 0."""
        return self.sum([value if self.rank == 0 else 0.0])[0]

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Give every rank the bytes of all, in their order; equally many from each."""
        mine = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        all_ = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_, mine)
        return [bytes(each) for each in torch.stack(all_).cpu().numpy()]

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def is_echo(error: BaseException) -> bool:
    """Say whether an error only tells that another rank is gone."""
    # gloo has no error of its own; its messages begin with the path of its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
