"""A small all-reduce with one rank per node: do the nodes find each other, and add right?"""

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from trainer.runtime.env import read_rank_env
from trainer.runtime.signals import EXIT_REQUEUE, STOP_SIGNALS

_NUMBERS = 1 << 20
_SAY_WHERE_AFTER_S = 30


def main(argv: Sequence[str]) -> None:
    """`python -m trainer.runtime.meet cpu|cuda`, once per node."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_REQUEUE))
    faulthandler.dump_traceback_later(_SAY_WHERE_AFTER_S)
    device = argv[0]
    env = read_rank_env()
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", rank=env.rank, world_size=env.world
    )
    numbers = torch.full((_NUMBERS,), float(env.rank + 1), device=device)
    dist.all_reduce(numbers)
    expected = env.world * (env.world + 1) / 2
    wrong = int((numbers != expected).sum())
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"{wrong} of {_NUMBERS} sums are not {expected}")


if __name__ == "__main__":
    main(sys.argv[1:])
