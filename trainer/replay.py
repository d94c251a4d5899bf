"""Which samples the steps of a run took: replayed from its folder and its shards' indexes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config import TrainConfig
from trainer.data.manifest import Encoding, Manifest, list_encodings, load_manifest
from trainer.data.opening import Dataset, open_readers
from trainer.data.reader import Reader
from trainer.data.stream import Law, Slots, State, advance, from_json, step_slots
from trainer.datasets import STREAM, dataset_places, law_of
from trainer.encoded import matching_encoding
from trainer.errors import BadData, BadInput
from trainer.frozen import read_yaml
from trainer.observe.evaluations import METRICS, training_rows
from trainer.observe.jsonl import read_rows
from trainer.place import storage
from trainer.runtime.rundir import checkpoint_root, complete, step_of


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps of one size, one after the other, that no later attempt took again."""

    first: int
    """The first step: this many were done before it."""
    stop: int | None
    """The step behind the last; None: it is not known yet."""
    global_batch_images: int
    state: State
    """Of the stream before the first step."""


class Sample(NamedTuple):
    """A sample of a step."""

    member: int
    """Number of its dataset."""
    key: str
    epoch: int
    """How often the run saw it before."""
    removed: bool
    """It was taken out of the dataset since the run began; from then on others stand for it."""


@dataclass(frozen=True)
class History:
    """What a run's stream was."""

    law: Law
    stretches: tuple[Stretch, ...]
    readers: tuple[Reader, ...]
    """Of each dataset of the law; they know keys alone."""
    reached: int
    """Steps that the run is known to have done."""
    reached_by: str
    """The file that says so."""

    def steps(self, first: int, stop: int) -> Iterator[tuple[int, Slots, list[Sample]]]:
        """List what the steps from `first` to before `stop` took, in the order of positions.

        Where the stream has several buckets, or `drop` or `pad`, it goes there step by step.

        Raises:
            BadData: The index of a shard is not there, or damaged.
        """
        for stretch in self.stretches:
            begin = max(first, stretch.first)
            end = stop if stretch.stop is None else min(stop, stretch.stop)
            images = stretch.global_batch_images
            state = ahead(self.law, stretch.state, images, begin - stretch.first)
            for step in range(begin, end):
                slots = step_slots(self.law, state, images)
                yield step, slots, self.samples(slots)
                state = advance(self.law, state, images)

    def samples(self, slots: Slots) -> list[Sample]:
        """Name the samples of some slots of one step."""
        found: dict[int, Sample] = {}
        for member, reader in enumerate(self.readers):
            mine = np.flatnonzero(slots.members == member)
            if not len(mine):
                continue
            rows, epochs = self.law.orders[member][slots.bucket].at(slots.positions[mine])
            places = reader.find(slots.bucket, rows)
            for number, place, epoch in zip(mine.tolist(), places, epochs.tolist(), strict=True):
                if isinstance(place, BadData):
                    raise place
                gone = bool(place.shard.gone[place.row])
                found[number] = Sample(member, place.shard.key(place.row), epoch, gone)
        return [found[number] for number in range(len(found))]


@contextmanager
def history(run: Path) -> Iterator[History]:
    """Replay a run.

    Raises:
        BadInput: It is no run, it took no step yet, its order was not exact, or its datasets are
            not what they were.
    """
    cfg = read_yaml(TrainConfig, run / "config.yaml")
    if cfg.data.reader != "kiln":
        raise BadInput(
            f"{run} reads with data.reader={cfg.data.reader}: which samples a step got depended on "
            "ranks and time, and nobody wrote it down. Runs with data.reader=kiln can be replayed; "
            "`kiln index` makes a dataset of any tars."
        )
    record = read_rows(run / STREAM)
    if not record:
        raise BadInput(
            f"{run} has no {STREAM}: it did not begin to train yet. Give the run= of one that did; "
            "`kiln train` writes it."
        )
    with ExitStack() as stack:
        for where in dataset_places(cfg.data):
            stack.enter_context(storage(where))
        datasets = [run_dataset(cfg, where) for where in dataset_places(cfg.data)]
        law = law_of(cfg, datasets, record[0]["stream"])
        reached, reached_by = _reached(run, record)
        readers = open_readers(datasets, law, keys_only=True)
        for reader in readers:
            stack.callback(reader.close)
        yield History(law, _stretches(law, record), tuple(readers), reached, reached_by)


def ahead(law: Law, state: State, global_batch_images: int, num_steps: int) -> State:
    """Stand some steps further; at once if all samples are of one bucket and no batch is cut."""
    if len(law.buckets) == 1 and law.ending == "roll":
        more = num_steps * global_batch_images
        (tally,) = state.tallies
        tallies = (replace(tally, since=tally.since + more),)
        return replace(state, samples=state.samples + more, tallies=tallies)
    for _ in range(num_steps):
        state = advance(law, state, global_batch_images)
    return state


def quarantined(run: Path) -> dict[tuple[str, str], str]:
    """Read why samples could not be read in a run: (dataset, key) -> reason."""
    rows = [row for path in sorted(run.glob("quarantine/*.jsonl")) for row in read_rows(path)]
    return {(row["dataset"], row["key"]): row["why"] for row in rows}


def run_dataset(cfg: TrainConfig, folder: Path) -> Dataset:
    """Open the manifests that a run reads of a dataset; encoders are hashed only if they must."""
    manifest = load_manifest(folder)
    encoding = _encoding(cfg, folder, manifest) if cfg.reads_latents else None
    return Dataset(folder, manifest, encoding)


def _encoding(cfg: TrainConfig, folder: Path, manifest: Manifest) -> Encoding:
    # The encoders, whose weights would have to be hashed, are not needed where there is no choice.
    there = list_encodings(folder)
    return there[0] if len(there) == 1 else matching_encoding(cfg, folder, manifest)


def _stretches(law: Law, record: Sequence[dict[str, Any]]) -> tuple[Stretch, ...]:
    stretches: list[Stretch] = []
    for row in record:
        first = row["step"]
        stretches = [
            replace(before, stop=first if before.stop is None else min(before.stop, first))
            for before in stretches
            if before.first < first
        ]
        state = from_json(law, row["stream"])
        stretches.append(Stretch(first, None, row["global_batch_images"], state))
    return tuple(stretches)


def _reached(run: Path, record: Sequence[dict[str, Any]]) -> tuple[int, str]:
    found = [(record[-1]["step"], STREAM)]
    found += [
        (row["step"], METRICS)
        for row in training_rows(read_rows(run / METRICS))
        if row["attempt"] == record[-1]["attempt"]
    ]
    found += [(step_of(folder), folder.name) for folder in complete(checkpoint_root(run))]
    return max(found)
