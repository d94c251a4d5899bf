"""Turn pictures and captions into latents and text states; the same command again resumes."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_prep.config import EncodeConfig
from data_prep.encode_shard import (
    Encoders,
    SidecarRecord,
    encode_shard,
    finished_record,
    record_path,
    to_npy,
)
from data_prep.prepare import locked, say
from trainer.command import run_command
from trainer.data.manifest import (
    ENCODING,
    Encoding,
    Manifest,
    ShardEntry,
    check_files,
    encoding_folder,
    load_encoding,
    load_manifest,
    save_encoding,
)
from trainer.data.publish import publish_bytes
from trainer.errors import BadInput
from trainer.models.autoencoders import load_autoencoder
from trainer.models.fingerprint import Identity, identify
from trainer.models.text_encoders import load_text_encoder
from trainer.observe.countdown import Countdown
from trainer.observe.ledger import accounted
from trainer.place import NUM_REQUESTS, is_local, read_bytes, remove, storage

NULL_TEXT = "null_text.npy"


def main(argv: Sequence[str]) -> int:
    """Run `kiln encode`."""
    return run_command(run, EncodeConfig, "encode", argv)


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do and what is done already."""

    folder: Path
    """The encoding's."""
    manifest: Manifest
    identity: Identity
    records: dict[str, SidecarRecord]
    """Of the finished shards, by number."""

    @property
    def todo(self) -> list[ShardEntry]:
        """Shards whose sidecar is missing, stale or damaged."""
        return [shard for shard in self.manifest.shards if shard.number not in self.records]

    @property
    def leftovers(self) -> list[str]:
        """Numbers of sidecars whose shard the dataset does not have any more."""
        there = {path.stem for path in record_path(self.folder, "x").parent.glob("*.json")}
        return sorted(there - {shard.number for shard in self.manifest.shards})


def run(cfg: EncodeConfig) -> int:
    """Publish what is missing of the encoding; print what is there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device=cuda, but torch finds no GPU here. Try device=cpu.")
    with storage(cfg.dataset):
        return _run(cfg)


def _run(cfg: EncodeConfig) -> int:
    manifest = load_manifest(cfg.dataset)
    with locked(cfg.dataset):
        work = survey(cfg, manifest)
        finished = work.folder / ENCODING
        if not work.todo and not work.leftovers and _is_current(finished, work):
            say(f"{work.folder}: nothing to do, all {len(manifest.shards)} shards are encoded.")
            return 0
        check_files(cfg.dataset, manifest.shards)
        if work.records:
            say(f"{len(work.records)} of {len(manifest.shards)} shards are encoded already.")
        remove(finished)  # without it the encoding is unfinished
        for number in work.leftovers:
            _retract(work.folder, number)
        with accounted(cfg.dataset, stage="encode", tdp_w_per_core=cfg.tdp_w_per_core):
            images_per_s = _run_todo(cfg, work)
        encoding = make_encoding(work)
        save_encoding(cfg.dataset, encoding)
    _print_encoding(encoding)
    num_images = sum(shard.count for shard in encoding.shards)
    rate = f", {images_per_s:.0f} images/s" if images_per_s else ""
    say(f"{work.folder}: {num_images} images in {len(encoding.shards)} shards{rate}.")
    return 0


def survey(cfg: EncodeConfig, manifest: Manifest) -> Work:
    """Find which shards are encoded by these encoders, with their files intact."""
    identity = identify(cfg.encoders)
    folder = encoding_folder(cfg.dataset, identity.fingerprint)
    hashes = cfg.recheck == "hashes"
    with ThreadPoolExecutor(1 if is_local(folder) else NUM_REQUESTS) as threads:
        found = threads.map(
            lambda shard: finished_record(folder, shard, hashes=hashes), manifest.shards
        )
        pairs = zip(manifest.shards, found, strict=True)
        records = {shard.number: record for shard, record in pairs if record is not None}
    return Work(folder, manifest, identity, records)


def make_encoding(work: Work) -> Encoding:
    """Put the records of all shards together."""
    records = [work.records[shard.number] for shard in work.manifest.shards]
    null_text = np.load(BytesIO(read_bytes(work.folder / NULL_TEXT)), allow_pickle=False)
    mean_C, std_C = latent_statistics(records)
    return Encoding(
        fingerprint=work.identity.fingerprint,
        dataset_fingerprint=work.manifest.shards_fingerprint,
        shards=tuple(record.shard for record in records),
        facts={
            **work.identity.facts,
            "latent_shape": list(records[0].latent_shape),
            "text_width": int(null_text.shape[1]),
            "latent_mean": mean_C,
            "latent_std": std_C,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
    )


def latent_statistics(records: Sequence[SidecarRecord]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of latents drawn from their posteriors."""
    num_values = sum(record.sums.num_values for record in records)
    means, stds = [], []
    for channel in range(records[0].latent_shape[0]):
        mean = math.fsum(record.sums.first_C[channel] for record in records) / num_values
        square = math.fsum(record.sums.second_C[channel] for record in records) / num_values
        means.append(mean)
        # A dead channel has no spread; 1 leaves it as it is.
        stds.append(math.sqrt(max(square - mean**2, 0.0)) or 1.0)
    return means, stds


def _run_todo(cfg: EncodeConfig, work: Work) -> float:
    """Encode the missing shards; add their records to `work.records`; return images/s."""
    device = torch.device(cfg.device)
    encoders = Encoders(
        autoencoder=load_autoencoder(cfg.encoders.autoencoder).to(device),
        text=load_text_encoder(cfg.encoders.text).to(device),
        image_side_px=cfg.encoders.image_side_px,
        batch_images=cfg.batch_images,
        device=device,
        threads=cfg.threads,
    )
    (null_text_LD,) = encoders.text.encode([""])
    publish_bytes(work.folder / NULL_TEXT, to_npy(null_text_LD.numpy().astype(np.float16)))
    num_images = sum(shard.count for shard in work.todo)
    started_s, done = time.monotonic(), 0
    with Countdown("encoding", num_images) as progress:

        def on_images(more: int) -> None:
            nonlocal done
            done += more
            progress.update(done)

        progress.update(0)
        for shard in work.todo:
            work.records[shard.number] = encode_shard(
                cfg.dataset, shard, work.folder, encoders, on_images=on_images
            )
        progress.finish()
    return num_images / (time.monotonic() - started_s)


def _is_current(path: Path, work: Work) -> bool:
    if not path.exists() or not (path.parent / NULL_TEXT).exists():
        return False
    try:
        there = load_encoding(path.parent)
    except BadInput:
        return False
    records = [work.records[shard.number] for shard in work.manifest.shards]
    return there.dataset_fingerprint == work.manifest.shards_fingerprint and there.shards == tuple(
        record.shard for record in records
    )


def _retract(folder: Path, number: str) -> None:
    """Remove a sidecar, its record first."""
    remove(record_path(folder, number))
    remove(folder / f"{number}.tar")
    remove(folder / "index" / f"{number}.parquet")


def _print_encoding(encoding: Encoding) -> None:
    table = Table("what", "value", title=f"Encoding {encoding.fingerprint}")
    for what, value in _lines(encoding.facts):
        table.add_row(what, value)
    num_bytes = sum(shard.bytes for shard in encoding.shards)
    table.add_row("bytes", f"{num_bytes / 1e6:,.1f} MB")
    Console().print(table)


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    channels, height, width = facts["latent_shape"]
    yield "autoencoder", facts["paths"]["autoencoder"]
    yield "text encoder", facts["paths"]["text"]
    yield "picture", f"{facts['image_side_px']} px"
    yield "latent", f"{channels} x {height} x {width}"
    yield "latent mean", " ".join(f"{value:.2f}" for value in facts["latent_mean"])
    yield "latent std", " ".join(f"{value:.2f}" for value in facts["latent_std"])
    yield "text width", str(facts["text_width"])
