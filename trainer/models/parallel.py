"""Run inference on several cores: whole batches side by side, one core each.

Splitting every operation over cores instead makes them wait for each other thousands of times a
second: seen ten times slower on two cores that something else was using, too. And so the number
of workers changes no bit of a result.
"""

from concurrent.futures import ThreadPoolExecutor

import torch


def one_core_workers(num_workers: int) -> ThreadPoolExecutor:
    """Return threads in which torch uses one core each; this process's other threads likewise."""
    torch.set_num_threads(1)
    # OpenMP keeps the number per thread, so each one has to be told.
    return ThreadPoolExecutor(
        num_workers, "inference", initializer=torch.set_num_threads, initargs=(1,)
    )
