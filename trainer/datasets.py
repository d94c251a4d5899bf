"""Which datasets a run reads, and the law of their order: from its config alone, without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.config_data import DataConfig
from trainer.data import stream
from trainer.data.manifest import load_manifest
from trainer.data.opening import Dataset, Layout, make_law
from trainer.data.stream import Law, State
from trainer.encoded import matching_encoding
from trainer.place import place

STREAM = "stream.jsonl"
"""In a run's folder: where its stream went on at the beginning of each attempt."""


def dataset_places(cfg: DataConfig) -> list[Path]:
    """List where the datasets of a run lie."""
    return [place(where) for where in (cfg.dataset, *(other.dataset for other in cfg.mix))]


def find_datasets(cfg: TrainConfig) -> list[Dataset]:
    """Read the manifests of a run's datasets, and find the encodings that its encoders made.

    Raises:
        BadInput: A dataset is not there, or has no latents of these encoders.
    """
    found: list[Dataset] = []
    if cfg.data.reader == "webdataset":
        return found
    for folder in dataset_places(cfg.data):
        manifest = load_manifest(folder)
        encoding = matching_encoding(cfg, folder, manifest) if cfg.reads_latents else None
        found.append(Dataset(folder, manifest, encoding))
    return found


def find_law(cfg: TrainConfig, datasets: Sequence[Dataset], saved: Mapping[str, Any] | None) -> Law:
    """Fix the order of a run's samples, and refuse steps that it does not allow.

    Raises:
        BadInput: The config asks for an order or a batch that cannot be had.
    """
    law = law_of(cfg, datasets, saved)
    stream.check_step(law, cfg.batch.global_batch_images)
    return law


def law_of(cfg: TrainConfig, datasets: Sequence[Dataset], saved: Mapping[str, Any] | None) -> Law:
    """Fix the order of a run's samples, as a saved state of it counts them."""
    layout = Layout(
        seed=cfg.seed,
        mode=cfg.data.order,
        streams=cfg.data.canonical_streams,
        window_shards=cfg.data.window_shards,
        ending=cfg.data.ending,
    )
    versions = stream.removal_versions(saved) if saved else None
    if versions is not None and len(versions) != len(datasets):
        versions = None  # `begin` says what is wrong
    return make_law(datasets, layout, removal_versions=versions)


def begin(law: Law, weights: Sequence[float], saved: Mapping[str, Any] | None) -> State:
    """Stand where a saved state says, with these weights from here on, or at the first sample."""
    if saved is None:
        return stream.begin(law, weights)
    return stream.remix(law, stream.from_json(law, saved), weights)


def weights_of(cfg: DataConfig) -> tuple[float, ...]:
    """List the weights of the datasets."""
    return (cfg.weight, *(other.weight for other in cfg.mix))
