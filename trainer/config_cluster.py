"""What a run may be told of the machines it runs on, and of the Slurm that lends them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.frozen import config

Name = Annotated[str, Field(pattern=r"^[^\s=]*$")]


@config
class ContainerConfig:
    """A container for the ranks; the batch script itself stays outside."""

    kind: Literal["pyxis", "apptainer"]
    """pyxis: srun's --container-image; apptainer: `apptainer exec` under srun."""
    image: str
    """Absolute path of a .sqsh (pyxis) or .sif (apptainer) that all nodes see."""
    mounts: tuple[str, ...]
    """FROM:TO, both absolute; the run's folder is mounted in any case."""
    python: str
    """The interpreter inside, with everything that pyproject.toml asks for."""


@config
class PreflightConfig:
    """What every node is asked before its ranks start."""

    folders: tuple[Path, ...]
    """Local folders that need room."""
    min_free_gb: NonNegativeFloat
    """How much, in each of them."""
    max_clock_skew_s: PositiveFloat
    """Most that a node's clock may differ from the first node's."""
    timeout_s: PositiveInt
    """A node that has not answered by then is bad."""


@config
class SlurmConfig:
    """How a site's Slurm is asked; empty strings leave a choice to the site."""

    partition: Name
    """Partition."""
    account: Name
    """Account that is charged."""
    qos: Name
    """Quality of service."""
    reservation: Name
    """Reservation."""
    licenses: Name
    """Licences, as --licenses takes them."""
    constraint: Name
    """Features that nodes need, as --constraint takes them."""
    exclude: tuple[Name, ...]
    """Nodes that are never used."""
    exclusive: bool
    """No other job on the nodes."""
    memory_gb: PositiveInt | None
    """Memory per node; null is all that it has."""
    gpu_kind: Name
    """Kind of GPU as the site calls it, e.g. a100; empty where there is one kind."""
    modules: tuple[Name, ...]
    """Loaded before anything else: `module load NAME`."""
    env: dict[str, str]
    """Set for all ranks, e.g. {NCCL_SOCKET_IFNAME: ib0}; no secrets: those come with the
    environment that submits."""
    container: ContainerConfig | None
    """null runs the ranks with the interpreter that submits."""
    stop_signal: Literal["USR1", "USR2"]
    """What ranks hear warn_before_kill_s before the end; NCCL may catch USR1."""
    max_restarts: NonNegativeInt
    """Attempts of a job beyond the first; then it ends."""
    no_progress_attempts: PositiveInt
    """So many attempts in a row without a new checkpoint end the job, too."""
    min_nodes: PositiveInt | None
    """`kiln supervise` may shrink a waiting job to so few nodes, at the same global batch; null
    waits for all of them."""
    shrink_after_min: PositiveFloat
    """How long it waits for nodes before that."""
    write_mb_per_s: PositiveFloat
    """What one node writes to the runs' file system; a checkpoint must fit twice into
    warn_before_kill_s."""
    preflight: PreflightConfig | None
    """null starts ranks on whatever nodes come."""


@config
class ClusterConfig:
    """Where the ranks run."""

    kind: Literal["local", "slurm"]
    """local: processes on this machine; slurm: jobs that `kiln launch` submits."""
    num_nodes: PositiveInt
    """Machines."""
    ranks_per_node: PositiveInt
    """Processes per machine; one per GPU, or per share of the cores."""
    device: Literal["cpu", "cuda"]
    """cpu uses gloo, cuda uses NCCL."""
    device_memory_gib: PositiveFloat
    """Memory of one rank's device; plans are refused when a run cannot fit."""
    time_limit_min: PositiveInt
    """Walltime of one Slurm job, in minutes."""
    warn_before_kill_s: PositiveInt
    """Slurm's warning signal comes this long before the end."""
    accelerator: str | None = None
    """What each rank computes on, a key of trainer.hardware.ACCELERATORS such as a100_80gb; null is
    unknown, and then no speed, cost or energy is planned."""
    network_gb_per_s: PositiveFloat | None = None
    """Bandwidth of one node to the others, in one direction: 25 for one port of 200 Gb/s; null is
    what the accelerator's reference system has."""
    mttf_gpu_h: PositiveFloat | None = None
    """Hours until one GPU ends a run, with all that stands behind it; null: as other runs in the
    runs folder had it, or as published."""
    slurm: SlurmConfig | None = None
    """kind=slurm: what the site is asked for."""

    def __post_init__(self) -> None:
        if self.kind == "slurm" and self.slurm is None:
            raise ValueError(
                "kind=slurm needs the section slurm. Take cluster=example, or give slurm={}."
            )
        least = self.slurm.min_nodes if self.slurm else None
        if least is not None and least > self.num_nodes:
            raise ValueError(
                f"slurm.min_nodes={least} is more than num_nodes={self.num_nodes}. "
                f"Try slurm.min_nodes={self.num_nodes}."
            )
