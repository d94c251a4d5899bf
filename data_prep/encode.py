"""Turn pictures and captions into latents and text states; the same command again resumes."""

import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.buckets import make_boxes, print_buckets
from data_prep.config import EncodeConfig
from data_prep.encode_batches import (
    Busy,
    Encoded,
    Encoders,
    encode_ids,
    encode_samples,
    require_finite_states,
    to_npy,
)
from data_prep.encode_loader import load_samples, run_ahead
from data_prep.encode_records import SidecarRecord, Work, is_current, retract, survey
from data_prep.encode_shard import write_sidecar
from data_prep.observed import RateLog, observed
from data_prep.prepare import locked, say
from data_prep.probe import no_room, print_costs, probe
from data_prep.publish import status_path
from trainer.command import run_command
from trainer.data.manifest import (
    ENCODING,
    Encoding,
    ShardEntry,
    check_files,
    load_manifest,
    save_encoding,
)
from trainer.data.null_text import NULL_TEXT, read_null_text
from trainer.data.publish import file_sha256, publish_bytes, publish_json
from trainer.errors import BadInput
from trainer.models.autoencoders import Statistics
from trainer.models.encoders import load_frozen_encoders, statistics_of
from trainer.observe.countdown import Countdown
from trainer.place import is_local, remove, storage

WRITE_BEHIND_IMAGES = 512  # encoded samples that may wait for the disk


def main(argv: Sequence[str]) -> int:
    """Run `kiln encode`."""
    return run_command(run, EncodeConfig, "encode", argv)


def run(cfg: EncodeConfig) -> int:
    """Publish what is missing of the encoding; print what is there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device=cuda, but torch finds no GPU here. Try device=cpu.")
    with storage(cfg.dataset):
        return _run(cfg)


def _run(cfg: EncodeConfig) -> int:
    manifest = load_manifest(cfg.dataset)
    if not manifest.shards:
        raise BadInput(
            f"{cfg.dataset} has no samples: all of its {manifest.rows_in} rows were rejected, and "
            f"there is nothing to encode. `kiln stats dataset={cfg.dataset}` counts the reasons; "
            "change the rules or the source, and give the `kiln prepare` command again."
        )
    shared = cfg.parts > 1
    with locked(cfg.dataset, wait=shared):
        work = survey(cfg, manifest)
        if cfg.dry_run:
            _print_costs(cfg, work, load_encoders(cfg))
            return 0
        finished = work.folder / ENCODING
        if not work.todo and not work.leftovers and is_current(finished, work):
            say(f"{work.folder}: nothing to do, all {len(manifest.shards)} shards are encoded.")
            return 0
        check_files(cfg.dataset, manifest.shards)
        if work.records:
            say(f"{len(work.records)} of {len(manifest.shards)} shards are encoded already.")
        remove(finished)  # without it the encoding is unfinished
        for number in work.leftovers:
            retract(work.folder, number)
        if not shared:
            _do(cfg, work)
            return _finish(cfg, work)
    with locked(cfg.dataset, f".lock-encode-part-{cfg.part:04d}"):
        _do(cfg, work)
    with locked(cfg.dataset, wait=True):
        return _finish(cfg, survey(cfg, manifest))


def make_encoding(work: Work) -> Encoding:
    """Put the records of all shards together."""
    records = [work.records[shard.number] for shard in work.manifest.shards]
    buckets = sorted({bucket for record in records for bucket in record.buckets})
    null_text_LD = read_null_text(work.folder)
    mean_C, std_C = latent_statistics(records)
    return Encoding(
        fingerprint=work.identity.fingerprint,
        dataset_fingerprint=work.manifest.shards_fingerprint,
        shards=tuple(record.shard for record in records),
        bucket_counts={
            bucket: [record.buckets.get(bucket, 0) for record in records] for bucket in buckets
        },
        facts={
            **work.identity.facts,
            "latent_shape": list(records[0].latent_shape),
            "text_width": int(null_text_LD.shape[1]),
            "null_text_sha256": file_sha256(work.folder / NULL_TEXT),
            "latent_mean": mean_C,
            "latent_std": std_C,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
    )


def latent_statistics(records: Sequence[SidecarRecord]) -> Statistics:
    """Return mean and standard deviation per channel of latents drawn from their posteriors."""
    num_values = sum(record.sums.num_values for record in records)
    first_C = map(math.fsum, zip(*(record.sums.first_C for record in records), strict=True))
    second_C = map(math.fsum, zip(*(record.sums.second_C for record in records), strict=True))
    return statistics_of(num_values, list(first_C), list(second_C))


def _do(cfg: EncodeConfig, work: Work) -> None:
    """Encode the missing shards of this part, and the empty caption."""
    todo = [shard for shard in work.todo if int(shard.number) % cfg.parts == cfg.part]
    # One part alone writes the empty caption, for they would be in each other's way; anew each
    # time, for nothing vouches for its bytes while there is no encoding.json.
    if not todo and cfg.part:
        return
    encoders = load_encoders(cfg)
    if cfg.part == 0:
        (null_text_LD,) = encode_ids(encoders.text.tokens([""]), encoders)
        require_finite_states(null_text_LD, "")
        publish_bytes(work.folder / NULL_TEXT, to_npy(null_text_LD))
    if not todo:
        return
    if cfg.probe_s and (problem := _print_costs(cfg, work, encoders)):
        raise BadInput(problem)
    with observed(cfg, stage="encode") as rates:
        _run_todo(cfg, work, todo, encoders, rates)


def load_encoders(cfg: EncodeConfig) -> Encoders:
    """Load the models.

    Raises:
        BadInput: There are no such models, or they do not fit the configuration.
    """
    device = torch.device(cfg.device)
    torch.backends.cudnn.deterministic = True  # equal pictures give equal bits
    models = load_frozen_encoders(cfg.encoders, device)
    return Encoders(
        autoencoder=models.autoencoder,
        text=models.text,
        boxes=make_boxes(cfg.encoders),
        batch_images=cfg.batch_images,
        batch_tokens=cfg.batch_tokens,
        device=device,
        threads=cfg.threads,
    )


def _print_costs(cfg: EncodeConfig, work: Work, encoders: Encoders) -> str | None:
    """Print what the cache costs; say by how much it does not fit."""
    found = probe(
        cfg.dataset,
        work.manifest.shards[0],
        encoders,
        side_px=cfg.encoders.image_side_px,
        probe_s=cfg.probe_s,
    )
    free_bytes = shutil.disk_usage(cfg.dataset).free if is_local(cfg.dataset) else None
    print_costs(found, work.manifest, work.todo, device=cfg.device, free_bytes=free_bytes)
    return no_room(found, work.todo, free_bytes)


def _run_todo(
    cfg: EncodeConfig,
    work: Work,
    todo: Sequence[ShardEntry],
    encoders: Encoders,
    rates: RateLog,
) -> None:
    """Read ahead of the encoders and write behind them; add the records to `work.records`."""
    num_images = sum(shard.count for shard in todo)
    side_px = cfg.encoders.image_side_px
    blank_BCHW = torch.zeros(1, 3, side_px, side_px, device=encoders.device)
    channels, rows, columns = encoders.autoencoder.moments(blank_BCHW)[0].shape[1:]
    busy, started_s = Busy(), time.monotonic()
    with (
        Countdown("encoding", num_images, unit="images") as progress,
        closing(
            load_samples(cfg.dataset, todo, encoders.boxes, threads=cfg.decode_threads)
        ) as chunks,
        closing(run_ahead(encode_samples(chunks, encoders, busy), WRITE_BEHIND_IMAGES)) as samples,
    ):
        progress.update(0)
        counted = _counted(samples, progress, rates)
        for shard in todo:
            work.records[shard.number] = write_sidecar(
                work.folder,
                shard,
                islice(counted, shard.count),
                latent_shape=(channels, rows, columns),
            )
        progress.finish()
    elapsed_s = time.monotonic() - started_s
    busy_frac = busy.frac(threads=encoders.threads, wall_s=elapsed_s)
    rates.finish({"encoder_busy_frac": busy_frac})
    say(
        f"encoded {num_images} images in {elapsed_s:.1f} s, {num_images / elapsed_s:.1f} images/s; "
        f"encoder_busy_frac {busy_frac:.3f} ({_by_kind(busy)})"
    )
    publish_json(
        status_path(cfg.dataset, f"encode-{work.identity.fingerprint}-{cfg.part:04d}"),
        {
            "state": "done",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "images": num_images,
            "elapsed_s": round(elapsed_s, 3),
            "images_per_s": round(num_images / elapsed_s, 3),
            "encoder_busy_frac": round(busy_frac, 4),
            "encoder_busy_s": {kind: round(s, 3) for kind, s in sorted(busy.seconds.items())},
        },
    )


def _counted(samples: Iterable[Encoded], progress: Countdown, rates: RateLog) -> Iterator[Encoded]:
    for done, sample in enumerate(samples, start=1):
        progress.update(done)
        rates.update(done, done)
        yield sample


def _by_kind(busy: Busy) -> str:
    return ", ".join(
        f"{busy.items[kind]} {kind} in {seconds:.1f} s of the encoders"
        for kind, seconds in sorted(busy.seconds.items(), reverse=True)
    )


def _finish(cfg: EncodeConfig, work: Work) -> int:
    """Write encoding.json if all shards are there, and say what there is."""
    if work.todo or not _has_null_text(work.folder):
        num_shards = len(work.manifest.shards)
        say(
            f"{work.folder}: part {cfg.part} of {cfg.parts} is done; {len(work.records)} of "
            f"{num_shards} shards are encoded."
        )
        return 0
    encoding = make_encoding(work)
    save_encoding(cfg.dataset, encoding)
    _print_encoding(encoding)
    if cfg.encoders.buckets is not None:
        print_buckets(encoding.bucket_totals)
    num_images = sum(shard.count for shard in encoding.shards)
    say(f"{work.folder}: {num_images} images in {len(encoding.shards)} shards.")
    return 0


def _has_null_text(folder: Path) -> bool:
    try:
        read_null_text(folder)
    except BadInput:
        return False
    return True


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
