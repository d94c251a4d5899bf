"""The stages of a pipeline as commands: which words each gets, and whether they are right."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_prep.config import EncodeConfig, PrepareConfig
from data_prep.config_curate import DedupConfig
from trainer.command import long_words
from trainer.config import TrainConfig
from trainer.config_cluster import ClusterConfig
from trainer.config_pipeline import (
    ArrayConfig,
    GatesConfig,
    PipelineConfig,
    ShardsConfig,
    StageConfig,
    TrainStageConfig,
)
from trainer.config_tools import (
    SHORT_KEYS,
    EvaluateConfig,
    ExportConfig,
    ReportConfig,
    SampleConfig,
)
from trainer.errors import BadInput
from trainer.frozen import compose, compose_dict, freeze, thaw, write_yaml
from trainer.launch import snapshot
from trainer.place import is_local

PIPELINE = "pipeline"
"""In the folder of a run: scripts, logs and records of its pipeline."""
FROZEN = "pipeline.yaml"
"""Beside it: the pipeline as it was given last."""

CONFIGS: Mapping[str, type] = {
    "prepare": PrepareConfig,
    "dedup": DedupConfig,
    "encode": EncodeConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}
_PROCESSES, _THREADS = {"prepare", "dedup"}, {"encode", "evaluate", "sample"}
# What the pipeline decides, or what makes no sense in one.
_NOT_WORDS = {
    "parts",
    "part",
    "recheck",
    "retry",
    "dry_run",
    "processes",
    "device",
    "cluster",
    "serve",
    "port",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a pipeline."""

    name: str
    """The command's."""
    words: tuple[str, ...]
    """As a user would type them."""
    config: StageConfig | TrainStageConfig
    """What it may take."""
    gates: GatesConfig
    """What must hold before it."""

    @property
    def has_gates(self) -> bool:
        """Whether anything must hold before it."""
        return self.gates != GatesConfig()

    @property
    def max_tasks(self) -> int:
        """Tasks that may share it."""
        return self.config.max_tasks if isinstance(self.config, ArrayConfig) else 1

    @property
    def is_counted(self) -> bool:
        """Whether its tasks are counted before it begins."""
        rechecks = isinstance(self.config, ShardsConfig) and self.config.recheck == "hashes"
        return self.max_tasks > 1 or rechecks

    def part(self, number: str, width: int) -> tuple[str, ...]:
        """Return the words of one task of so many; tasks of `evaluate` share without any."""
        if width == 1 or not isinstance(self.config, ShardsConfig):
            return self.words
        return (*self.words, f"parts={width}", f"part={number}")


def stages_of(cfg: PipelineConfig) -> tuple[Stage, ...]:
    """List the stages of a pipeline.

    Raises:
        BadInput: A stage is given words that are the pipeline's to give.
    """
    dataset, run = _word("dataset", cfg.dataset), _word("run", cfg.run)
    wiring: Mapping[str, tuple[str, ...]] = {
        "prepare": (_word("rows", cfg.rows), dataset),
        "dedup": (dataset,),
        "encode": (dataset, *cfg.encoders),
        "train": (run, f"data.{dataset}", *cfg.encoders, *_cluster_words(cfg.cluster)),
        "evaluate": (run,),
        "sample": (run,),
        "export": (run, _word("out", f"{cfg.run}/export")),
        "report": (run,),
    }
    found = []
    for name in cfg.stages:
        section: StageConfig | TrainStageConfig = getattr(cfg, name)
        _check_given(name, section.words, wiring[name])
        words = (*wiring[name], *_resource_words(name, section), *section.words)
        gates = cfg.gates.get(name, GatesConfig())
        found.append(Stage(name=name, words=words, config=section, gates=gates))
    return tuple(found)


def composed(stage: Stage, more: Sequence[str] = ()) -> Any:  # noqa: ANN401 - of its own class
    """Return the config of a stage's command.

    Raises:
        BadInput: The command does not know or take its words.
    """
    short = SHORT_KEYS if stage.name in {"evaluate", "sample"} else {}
    words = long_words((*stage.words, *more), positional=None, short=short)
    try:
        return compose(CONFIGS[stage.name], stage.name, words)
    except BadInput as error:
        raise BadInput(f"{stage.name}.words: {error}") from error


def train_config(cfg: PipelineConfig, stage: Stage) -> TrainConfig:
    """Return the config of the training, on the pipeline's machines."""
    config: TrainConfig = composed(stage)
    return freeze(TrainConfig, thaw(config) | {"cluster": thaw(cfg.cluster)})


def freeze_pipeline(cfg: PipelineConfig) -> None:
    """Write what the stages will read: config and code; edits of the repository do not reach them.

    The code stays what it was at first; each command itself knows which words it takes later.
    """
    (cfg.folder / PIPELINE / "logs").mkdir(parents=True, exist_ok=True)
    snapshot(cfg.folder)
    write_yaml(cfg, cfg.folder / FROZEN)


def absolute(cfg: PipelineConfig) -> PipelineConfig:
    """Return the config with paths that hold wherever its jobs run."""
    dataset = cfg.dataset.resolve() if is_local(cfg.dataset) else cfg.dataset
    rows = cfg.rows
    if rows is not None and "://" not in rows:
        rows = str(Path(rows).absolute())
    return replace(cfg, run=str(Path(cfg.run).resolve()), dataset=dataset, rows=rows)


def _word(key: str, value: object) -> str:
    """Write key=value as it must be typed."""
    text = str(value)
    if re.fullmatch(r"[\w./:@*?+~-]+", text) is None:
        text = "'" + text.replace("'", "\\'") + "'"
    return f"{key}={text}"


def _resource_words(name: str, section: StageConfig | TrainStageConfig) -> list[str]:
    if isinstance(section, TrainStageConfig):
        return []
    words = []
    if section.cpus is not None and name in _PROCESSES:
        words.append(f"processes={section.cpus}")
    if section.cpus is not None and name in _THREADS:
        words.append(f"threads={section.cpus}")
    if section.gpus and name in _THREADS:
        words.append("device=cuda")
    return words


def _cluster_words(cluster: ClusterConfig) -> list[str]:
    """Write what differs from cluster=local as words; of Slurm's clusters the config tells."""
    if cluster.kind != "local":
        return []
    usual = compose_dict("train", ["data.dataset=-", "cluster=local"])["cluster"]
    names = (field.name for field in fields(cluster) if field.name != "slurm")
    changed = [name for name in names if getattr(cluster, name) != usual[name]]
    return ["cluster=local", *(f"cluster.{name}={getattr(cluster, name)}" for name in changed)]


def _check_given(name: str, words: Sequence[str], wiring: Sequence[str]) -> None:
    taken = _NOT_WORDS | {word.partition("=")[0] for word in wiring}
    for word in words:
        key = word.partition("=")[0]
        if key in taken or key.startswith("cluster."):
            raise BadInput(
                f"{name}.words has {word}, which a pipeline decides for all its stages. Take it "
                "out; `kiln pipeline --help` lists the pipeline's own keys for rows, dataset, "
                "encoders, machines, cores and tasks."
            )
