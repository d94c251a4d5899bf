"""What a Slurm job is: facts with units, checked when made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

# Times at which Slurm may give its warning early: sbatch(1), --signal.
EARLY_WARNING_S = 60

_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.I)


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is asked of a site; an empty string leaves the choice to it."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    licenses: str = ""
    constraint: str = ""
    exclude: tuple[str, ...] = ()
    gpu_kind: str = ""
    modules: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse secrets: scripts are kept, and Slurm shows them to others."""
        for name, value in self.env.items():
            if _SECRET_NAME.search(name):
                raise ValueError(
                    f"env has {name}, which looks like a secret, and sbatch scripts are kept and "
                    "shown. Leave it out, and export it in the shell that submits: jobs inherit it."
                )
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"env has {name!r}, which no shell takes for a variable.")
            if any(not char.isprintable() for char in value):
                raise ValueError(f"env has {name} with a value of more than one line.")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job, or an array of equal ones."""

    name: str
    """Job name."""
    comment: str
    """Tells Kiln's commands whose job this is: kiln:FOLDER."""
    log: Path
    """Where the batch script's own output goes, with sbatch's patterns (%j)."""
    num_nodes: int
    """Nodes."""
    tasks_per_node: int
    """Tasks per node, of those that srun starts."""
    cpus_per_task: int
    """Cores per task."""
    gpus_per_node: int
    """GPUs per node; 0 for none."""
    memory_gb: int | None
    """Per node; None is all of it, where nodes are exclusive, else the site's default."""
    exclusive: bool
    """No other job on the nodes."""
    time_limit_min: int
    """Walltime."""
    warn_before_kill_s: int
    """The signal comes this long before the walltime ends."""
    stop_signal: Literal["USR1", "USR2"]
    """Which."""
    warns: Literal["tasks", "batch"]
    """Whom Slurm sends it to: the tasks that srun started, or the batch script."""
    site: Site
    """What is asked of the site."""
    code: Path
    """First on PYTHONPATH: the code as it was when the job was made."""
    command: tuple[str, ...]
    """What the batch script becomes."""
    array: tuple[int, ...] = ()
    """Numbers of an array's tasks."""
    at_once: int | None = None
    """Most of them at the same time."""
    begin: datetime | None = None
    """Not before this, in local time and without zone, as sbatch takes it; None is at once."""

    def __post_init__(self) -> None:
        """Refuse a warning that would come before the start, or too late."""
        limit_s = self.time_limit_min * 60
        if self.warn_before_kill_s + EARLY_WARNING_S >= limit_s:
            raise ValueError(
                f"warn_before_kill_s={self.warn_before_kill_s}, and Slurm may warn "
                f"{EARLY_WARNING_S} s early: nothing is left of time_limit_min="
                f"{self.time_limit_min} ({limit_s} s). Try "
                f"time_limit_min={-(-2 * (self.warn_before_kill_s + EARLY_WARNING_S) // 60)}."
            )
        for what in (self.name, self.comment, str(self.log), str(self.code)):
            if any(not char.isprintable() for char in what):
                raise ValueError(f"{what!r} has characters that no sbatch script can hold.")


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What preflight asks of a node."""

    folders: tuple[str, ...]
    """Local folders that need room."""
    min_free_gb: float
    """How much, in each of them."""
    max_clock_skew_s: float
    """Between the node's clock and that of the batch script."""
    timeout_s: int
    """For all answers."""
    gpus: int
    """GPUs that must be there and idle."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What the batch script of a training run needs; it lies in the run's folder."""

    ranks_per_node: int
    """Tasks that srun starts on each node."""
    cores_per_rank: int
    """Of each."""
    node_counts: tuple[int, ...]
    """With how many nodes it may run, the most first."""
    exclude: tuple[str, ...]
    """Nodes that it never uses."""
    worker: tuple[str, ...]
    """Command of a rank."""
    meet: tuple[str, ...]
    """Command of a small all-reduce, one task per node."""
    srun: tuple[str, ...]
    """Options of srun for these, e.g. for a container."""
    env: Mapping[str, str]
    """Set for them."""
    max_restarts: int
    no_progress_attempts: int
    warn_before_kill_s: int
    stop_signal: Literal["USR1", "USR2"]
    shrink_after_s: float
    checks: Checks | None
    """None: no preflight."""
