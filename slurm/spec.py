"""What a Slurm job is: facts with units, checked when made."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One multi-node job whose tasks are the ranks of a run."""

    name: str
    """Job name."""
    num_nodes: int
    """Nodes."""
    ranks_per_node: int
    """Tasks per node."""
    gpus_per_node: int
    """GPUs per node; 0 for none."""
    threads_per_rank: int
    """Cores per task."""
    time_limit_min: int
    """Walltime."""
    warn_before_kill_s: int
    """The ranks get SIGUSR2 this long before the walltime ends, to save."""
    partition: str
    """Empty for the site's default."""
    python: Path
    """The interpreter, visible on all nodes."""
    code: Path
    """First on PYTHONPATH: the code as it was when the job was made."""
    run: Path
    """Run directory, on a file system that all nodes share."""

    def __post_init__(self) -> None:
        """Refuse a warning that would come before the start."""
        if self.warn_before_kill_s >= self.time_limit_min * 60:
            raise ValueError(
                f"warn_before_kill_s={self.warn_before_kill_s} is not below time_limit_min="
                f"{self.time_limit_min} ({self.time_limit_min * 60} s). Try "
                f"{max(1, self.time_limit_min * 6)}."
            )
