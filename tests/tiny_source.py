"""A tiny painted source with every fault, and the config to prepare it."""

import hashlib
import random
import shutil
import socket
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import sources
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.plan import list_units, make_plan
from data_prep.policy import load_policy
from data_prep.prepare import hash_rules, make_manifest, make_work, rules
from data_prep.publish import UnitRecord, publish_unit
from trainer.data.tombstones import save_state
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
    """Find a port for a server, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


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
        "wandb=off",
        *more,
    ]


def prepare_cfg(source, dataset, *more):
    return compose(PrepareConfig, "prepare", prepare_overrides(source, dataset, *more))


def tree_hashes(dataset):
    """Relative path -> sha256 of everything that a run must reproduce."""
    skip = {"ledger.jsonl", "sources.json"}
    return {
        path.relative_to(dataset).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
        and path.name not in skip
        and not {"status", "observe", "ledger"} & set(path.relative_to(dataset).parts)
        and not path.name.startswith(".")
    }


def plan_units(cfg):
    """Plan the source of a config; give its units."""
    policy = load_policy(cfg.policy)
    return list_units(make_plan(cfg, policy, cfg.scratch_folder))


def publish_here(cfg):
    """Publish a dataset in this process, unit after unit."""
    work = make_work(cfg, load_policy(cfg.policy))
    for unit in work.todo:
        record = publish_unit(unit, cfg, work.rules_sha256, lambda kept: None)
        assert isinstance(record, UnitRecord)
        work.records[unit.name] = record
    save_state(cfg.dataset, make_manifest(cfg, work), why="kiln prepare")
    shutil.rmtree(cfg.scratch_folder)


def rules_hash(cfg):
    """The hash of a config's rules."""
    return hash_rules(rules(cfg, load_policy(cfg.policy)))


def write_rows(path, *rows):
    """Write (url, caption) pairs, and dicts of further columns, as a source; give its path."""
    full = [{"URL": url, "TEXT": text, **(more[0] if more else {})} for url, text, *more in rows]
    names = dict.fromkeys(name for row in full for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in full] for name in names}), path)
    return path
