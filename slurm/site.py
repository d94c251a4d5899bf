"""What a site has, beside what a job asks for: Slurm queues jobs that can never begin."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from slurm import client
from slurm.spec import JobSpec

_GPUS = re.compile(r"gpu:(?:([^:(),]+):)?(\d+)")


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of one partition."""

    partition: str
    is_default: bool
    num_nodes: int
    cores: int
    memory_mb: int
    gres: str
    """As Slurm writes it: gpu:a100:8(S:0-1)."""
    limit: str
    """Longest walltime, D-HH:MM:SS or infinite."""

    def num_gpus(self, kind: str) -> int:
        """Count GPUs of a kind, or all where none is asked for."""
        found = _GPUS.findall(self.gres)
        return sum(int(count) for name, count in found if not kind or name in {kind, ""})

    def __str__(self) -> str:
        gpus = self.gres.split("(")[0] or "no GPUs"
        return (
            f"partition {self.partition}: {self.num_nodes} nodes with {self.cores} cores, "
            f"{self.memory_mb} MB, {gpus}; time limit {self.limit}"
        )


def site_nodes() -> list[Nodes]:
    """Ask Slurm which nodes there are.

    Raises:
        client.SlurmError: It does not say.
    """
    told = client.run("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G|%l")
    found = []
    for line in told.splitlines():
        name, count, cores, memory_mb, gres, limit = line.split("|")
        found.append(
            Nodes(
                partition=name.rstrip("*"),
                is_default=name.endswith("*"),
                num_nodes=int(count),
                cores=int(cores.rstrip("+")),
                memory_mb=int(memory_mb.rstrip("+")),
                gres="" if gres == "(null)" else gres,
                limit=limit,
            )
        )
    return found


def misfit(job: JobSpec, there: Sequence[Nodes]) -> str | None:
    """Say why a job can never begin on the partitions that it asks for; None when it can.

    A partition that is not there is left to Slurm's own message.
    """
    names = job.site.partition.split(",") if job.site.partition else ()
    asked = [
        nodes for nodes in there if nodes.partition in names or (not names and nodes.is_default)
    ]
    if not asked:
        return None
    cores = job.tasks_per_node * job.cpus_per_task
    fitting = [
        nodes
        for nodes in asked
        if nodes.cores >= cores and nodes.num_gpus(job.site.gpu_kind) >= job.gpus_per_node
    ]
    if not fitting:
        gpus = f" and {job.gpus_per_node} GPUs" if job.gpus_per_node else ""
        return (
            f"{cores} cores ({job.tasks_per_node} ranks x {job.cpus_per_task}){gpus} on each node"
        )
    num_nodes = max(_of(fitting, name) for name in {nodes.partition for nodes in fitting})
    if num_nodes < job.num_nodes:
        return f"{job.num_nodes} such nodes"
    limits_s = [client.seconds(nodes.limit) for nodes in fitting]
    if all(limit_s is not None and limit_s < 60 * job.time_limit_min for limit_s in limits_s):
        return f"a walltime of {job.time_limit_min} min"
    return None


def _of(there: Sequence[Nodes], partition: str) -> int:
    return sum(nodes.num_nodes for nodes in there if nodes.partition == partition)


def advice() -> str:
    """Say which partitions and accounts there are, as far as Slurm tells."""
    lines = []
    with suppress(client.SlurmError):
        lines += sorted({f"  {nodes}" for nodes in site_nodes()})
    with suppress(client.SlurmError):
        told = client.run(
            *("sacctmgr", "--noheader", "--parsable2", "show", "user", "withassoc"),
            "format=account",
        )
        lines += [f"  account {account}" for account in sorted(set(told.split()))]
    return "\nThis site has:\n" + "\n".join(lines) if lines else ""
