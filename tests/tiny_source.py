"""A tiny painted source with every fault, and the config to prepare it."""

import hashlib
import socket

from data_prep import sources
from data_prep.config import PrepareConfig, SourceConfig
from trainer.frozen import compose

NUM_PICTURES = 80
FAULTY = {  # fault -> (rows that have it, the reason they must get)
    "missing": (4, "http_404"),
    "truncated": (4, "truncated"),
    "cut": (4, "truncated"),
    "not_an_image": (4, "not_an_image"),
    "slow": (1, "timeout"),
    "opt_out": (4, "opt_out"),
    "duplicate": (4, "duplicate"),
}
NUM_REDIRECTED = 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def source_overrides(out, *more):
    fracs = [f"faults.{kind}_frac={count / NUM_PICTURES}" for kind, (count, _) in FAULTY.items()]
    return [
        "kind=scenes",
        f"out={out}",
        f"num_pictures={NUM_PICTURES}",
        "max_side_px=160",
        f"port={free_port()}",
        "processes=1",
        f"faults.redirect_frac={NUM_REDIRECTED / NUM_PICTURES}",
        "faults.slow_s=6",
        *fracs,
        *more,
    ]


def make_source(out, *more):
    cfg = compose(SourceConfig, "source", source_overrides(out, *more))
    assert sources.run(cfg) == 0
    return cfg


def prepare_overrides(source, dataset, *more):
    return [
        f"rows={source / 'rows.parquet'}",
        f"dataset={dataset}",
        "shard_rows=25",
        "image_side_px=32",
        "resize_mode=center_crop",
        "min_image_side_px=8",
        "download.allow_hosts=[127.0.0.1]",
        "download.timeout_s=2",
        "processes=1",
        "threads=16",
        *more,
    ]


def prepare_cfg(source, dataset, *more):
    return compose(PrepareConfig, "prepare", prepare_overrides(source, dataset, *more))


def tree_hashes(dataset):
    """Relative path -> sha256 of everything that a run must reproduce."""
    skip = {"ledger.jsonl", ".lock"}
    return {
        path.relative_to(dataset).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and path.name not in skip
    }
