"""What a pipeline may be told: its stages, what each may take, and what must hold before it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from trainer.config import RunName
from trainer.config_cluster import ClusterConfig, Name
from trainer.config_diffusion import Fraction
from trainer.frozen import config
from trainer.place import Place

StageName = Literal["prepare", "dedup", "encode", "train", "evaluate", "sample", "export", "report"]


@config
class GatesConfig:
    """What must hold before a stage begins."""

    min_kept_frac: Fraction | None = None
    """Share of the source's rows that became samples, at least."""
    max_duplicate_frac: Fraction | None = None
    """Share of the samples that `kiln dedup` found to be another one's duplicate, at most."""
    integrity: bool = False
    """All shards that the dataset's manifest names are there with the hashes it gives; before
    training also those of the latents. Reads them all."""


@config
class TrainStageConfig:
    """The training: a run as `kiln launch` submits it, or `kiln train` here."""

    words: tuple[str, ...]
    """key=value words for `kiln train`; its machines are those of `cluster`."""


@config
class StageConfig:
    """One command, and what it may take."""

    words: tuple[str, ...]
    """More key=value words for the command."""
    cpus: PositiveInt | None
    """Cores, and the command's processes or threads; null leaves these to the command, and is one
    core on Slurm."""
    gpus: NonNegativeInt
    """GPUs; with one the command's networks run there."""
    memory_gb: PositiveInt | None
    """Memory on Slurm; null is the site's default."""
    time_limit_min: PositiveInt
    """Walltime on Slurm; what is not finished by then goes on in the job's next attempt."""
    partition: Name
    """Partition on Slurm; empty is cluster.slurm.partition."""


@config
class ArrayConfig(StageConfig):
    """A command that several tasks share; how many is counted when their turn has come."""

    max_tasks: PositiveInt
    """Tasks at most. Here as many of them run at once as `cpus` leaves room for."""
    units_per_task: PositiveInt
    """Fewer tasks if there are not so many units for each: shards, or checkpoints to evaluate."""


@config
class ShardsConfig(ArrayConfig):
    """An array whose units are shards."""

    recheck: Literal["sizes", "hashes"]
    """How shards that are there are judged before the tasks are counted; hashes reads them all."""


@config
class CoordinatorConfig:
    """The small jobs on Slurm that check gates, count units and submit arrays: one core each."""

    memory_gb: PositiveInt | None
    """Memory; null is the site's default."""
    time_limit_min: PositiveInt
    """Walltime; hashing a large dataset takes its time."""
    partition: Name
    """Partition; empty is cluster.slurm.partition."""


@config
class PipelineConfig:
    """`kiln pipeline`."""

    name: RunName
    """Of the pipeline, of its run and of their jobs."""
    run: str
    """Folder of the training run, and of all that belongs to the pipeline."""
    dry_run: bool
    """Print what would be run or submitted, and touch nothing."""
    rows: str | None
    """The source, as for `kiln prepare`."""
    dataset: Place
    """Folder or URL of the dataset."""
    encoders: tuple[str, ...]
    """Words for both `kiln encode` and `kiln train`, e.g. ['autoencoder=sd','text=t5_base']."""
    cluster: ClusterConfig
    """cluster=local runs everything here, in processes; else Slurm does. As for `kiln train`."""
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)]
    """What is done, in this order: each stage begins when the one before it is finished."""
    gates: dict[StageName, GatesConfig]
    """What must hold before a stage begins, by its name; null and false let everything pass."""
    prepare: ShardsConfig
    dedup: StageConfig
    encode: ShardsConfig
    train: TrainStageConfig
    evaluate: ArrayConfig
    sample: StageConfig
    export: StageConfig
    report: StageConfig
    coordinator: CoordinatorConfig

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages=[{','.join(self.stages)}] has one twice. Take one out.")
        if "prepare" in self.stages and self.rows is None:
            raise ValueError(
                "rows is null, and the stage prepare needs a source. Give rows=FILES, or leave "
                "prepare out of stages= if the dataset is there."
            )

    @property
    def folder(self) -> Path:
        """Where everything of the pipeline lies."""
        return Path(self.run)
