"""From the config of a run to the stream of its samples."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from trainer.config import TrainConfig
from trainer.config_data import DataConfig
from trainer.data import stream
from trainer.data.cache import Cache
from trainer.data.foreign import foreign_batches
from trainer.data.loader import Pace, micro_batches
from trainer.data.manifest import check_files
from trainer.data.opening import Dataset, open_readers
from trainer.data.quarantine import Quarantine
from trainer.data.sources import (
    Batch,
    CaptionedSource,
    LatentSource,
    PictureSource,
    Samples,
    Source,
)
from trainer.data.stream import Law, State
from trainer.data.tars import list_tars
from trainer.datasets import begin, find_law, weights_of
from trainer.runtime.comm import Comm
from trainer.runtime.rollback import excluded_ids


class Feed(Protocol):
    """Where the loop's batches come from."""

    def begin(self, saved: Mapping[str, Any] | None) -> State:
        """Stand where a saved state says, or at the first sample."""

    def advance(self, state: State) -> State:
        """Stand behind the next global step."""

    def to_json(self, state: State) -> dict[str, Any]:
        """Describe a state."""

    def batches(self, state: State) -> Generator[Batch]:
        """Yield this rank's micro-batches from `state` on."""

    @property
    def exclude(self) -> Callable[[Collection[int]], None] | None:
        """Leaves samples out from now on, by id; None where that cannot be."""


@dataclass(frozen=True)
class KilnFeed:
    """The exact stream."""

    source: Source
    weights: tuple[float, ...]
    pace: Pace

    @property
    def law(self) -> Law:
        """What the order depends on."""
        return self.source.samples.law

    def begin(self, saved: Mapping[str, Any] | None) -> State:
        """Stand where a saved state says, with the weights of the config."""
        return begin(self.law, self.weights, saved)

    def advance(self, state: State) -> State:
        """Stand behind the next global step."""
        return stream.advance(self.law, state, self.pace.global_batch_images)

    def to_json(self, state: State) -> dict[str, Any]:
        """Describe a state in less than 1 kB."""
        return stream.to_json(self.law, state)

    def batches(self, state: State) -> Generator[Batch]:
        """Yield this rank's micro-batches."""
        return micro_batches(self.source, state, self.pace)

    @property
    def exclude(self) -> Callable[[Collection[int]], None]:
        """Replace samples like removed ones."""
        return self.source.samples.exclude


@dataclass(frozen=True)
class ForeignFeed:
    """A plain webdataset pipeline over tars without an index: resumed only roughly."""

    cfg: TrainConfig
    comm: Comm

    def begin(self, saved: Mapping[str, Any] | None) -> State:
        """Count on from a saved state."""
        return State(saved["samples"] if saved else 0, (), ())

    def advance(self, state: State) -> State:
        """Count a global step."""
        return replace(state, samples=state.samples + self.cfg.batch.global_batch_images)

    def to_json(self, state: State) -> dict[str, Any]:
        """Describe a state."""
        return {"schema": stream.SCHEMA, "reader": "webdataset", "samples": state.samples}

    exclude = None

    def batches(self, state: State) -> Generator[Batch]:
        """Yield this rank's micro-batches."""
        cfg = self.cfg
        assert cfg.data.epoch_images is not None
        return foreign_batches(
            [cfg.data.dataset],
            seed=cfg.seed,
            images_seen=state.samples,
            rank=self.comm.rank,
            world=self.comm.world,
            micro_batch_images=cfg.batch.micro_batch_images,
            epoch_images=cfg.data.epoch_images,
            side_px=cfg.encoders.image_side_px,
            device=self.comm.device,
            max_bad_frac=cfg.data.max_bad_frac,
        )


def check_feed(
    cfg: TrainConfig,
    datasets: Sequence[Dataset],
    saved: Mapping[str, Any] | None,
    *,
    files: bool = False,
) -> None:
    """Refuse what the ranks would refuse, before they are started.

    Args:
        cfg: Of the run.
        datasets: Of the run; none where webdataset reads.
        saved: State of the stream in the run's checkpoint, if there is one.
        files: Also ask for every file of the datasets, and its size.

    Raises:
        BadInput: Files are not there or damaged, or the stream would not continue.
    """
    if cfg.data.reader == "webdataset":
        list_tars(cfg.data.dataset)
        return
    law = find_law(cfg, datasets, saved)
    begin(law, weights_of(cfg.data), saved)
    if files:
        for reader in open_readers(datasets, law):
            check_files(reader.folder, reader.entries)


def open_cache(cfg: DataConfig) -> Cache | None:
    """Open the node's cache, if the config has one."""
    if cfg.cache is None:
        return None
    return Cache(Path(cfg.cache).expanduser(), max_bytes=int(cfg.cache_gb * 1e9))


def open_feed(
    cfg: TrainConfig, datasets: Sequence[Dataset], comm: Comm, saved: Mapping[str, Any] | None
) -> Feed:
    """Open the stream on one rank."""
    if cfg.data.reader == "webdataset":
        return ForeignFeed(cfg, comm)
    law = find_law(cfg, datasets, saved)
    quarantine = Quarantine(
        Path(cfg.run) / "quarantine" / f"rank_{comm.rank:05d}.jsonl",
        max_bad_frac=cfg.data.max_bad_frac,
    )
    readers = open_readers(datasets, law, cache=open_cache(cfg.data))
    samples = Samples(law, readers, quarantine, excluded=excluded_ids(Path(cfg.run)))
    source = _source(cfg, samples, comm.device)
    pace = Pace(
        rank=comm.rank,
        world=comm.world,
        global_batch_images=cfg.batch.global_batch_images,
        micro_batch_images=cfg.batch.micro_batch_images,
        threads=cfg.data.threads,
        prefetch_batches=cfg.data.prefetch_batches,
    )
    return KilnFeed(source, weights_of(cfg.data), pace)


def _source(cfg: TrainConfig, samples: Samples, device: torch.device) -> Source:
    if cfg.model.kind == "autoencoder_kl":
        return PictureSource(samples, side_px=cfg.encoders.image_side_px, device=device)
    if cfg.data.latents == "online":
        return CaptionedSource(samples, side_px=cfg.encoders.image_side_px, device=device)
    return LatentSource(samples, device=device)
