"""Jobs that wait for one another: cut arrays to what Slurm takes, and find who waits for a job."""

import re
from collections.abc import Iterator, Sequence

from slurm import client
from slurm.client import Queued


def split(tasks: Sequence[int], most: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Cut the tasks of a stage into arrays; give each one's first number, and its tasks from 0.

    Args:
        tasks: Numbers, in order.
        most: No array may have a number like this or a greater one.
    """
    blocks: dict[int, list[int]] = {}
    for task in tasks:
        blocks.setdefault(task // most, []).append(task % most)
    for block, numbers in blocks.items():
        yield block * most, tuple(numbers)


def after(job_ids: Sequence[str]) -> tuple[str, ...]:
    """Return the options of a job that begins when these have ended well, and goes if they fail."""
    if not job_ids:
        return ()
    return (f"--dependency=afterok:{':'.join(job_ids)}", "--kill-on-invalid-dep=yes")


def waiting_for(job_id: str, queue: Sequence[Queued]) -> list[Queued]:
    """List the jobs that begin when a job has ended well."""
    return [job for job in queue if re.search(rf"\bafterok:{job_id}(?!\d)", job.dependency)]


def repoint(jobs: Sequence[Queued], to: Sequence[str]) -> None:
    """Let jobs wait for others instead."""
    for job in jobs:
        client.update(job.job_id, Dependency=f"afterok:{':'.join(to)}")
