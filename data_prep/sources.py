"""Make a source: a folder of captioned pictures, a parquet of their URLs, and a list of faults."""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import FaultsConfig, SourceConfig
from data_prep.pictures import Picture, make_pictures
from data_prep.prepare import say
from data_prep.serve import HOST
from trainer.command import run_command
from trainer.data.publish import publish_json, published
from trainer.errors import BadInput
from trainer.frozen import differences, thaw

FAULTS = ("missing", "truncated", "cut", "not_an_image", "slow", "redirect", "opt_out")
_DONE = "source.json"
# Where the source lies and how many processes paint it change nothing in it.
_NO_IDENTITY = ("out", "processes")


def main(argv: Sequence[str]) -> int:
    """Run `kiln source`."""
    return run_command(run, SourceConfig, "source", argv)


def run(cfg: SourceConfig) -> int:
    """Make the source unless it is there; print what it has."""
    identity = {name: value for name, value in thaw(cfg).items() if name not in _NO_IDENTITY}
    if _is_made(cfg.out, identity):
        say(f"{cfg.out}: nothing to do, the source is there.")
        return 0
    pictures = make_pictures(cfg, cfg.out / "pictures")
    faults = choose_faults([picture.name for picture in pictures], cfg.faults, seed=cfg.seed)
    port = free_port(cfg.port)
    num_rows = write_rows(cfg.out / "rows.parquet", pictures, cfg, port)
    publish_json(cfg.out / "faults.json", faults)
    publish_json(cfg.out / _DONE, {"port": port, "num_rows": num_rows, "config": identity})
    counts = Counter(fault["kind"] for fault in faults.values())
    named = ", ".join(f"{counts[kind]} {kind}" for kind in FAULTS if counts[kind]) or "none"
    say(f"{cfg.out}: {len(pictures)} pictures, {num_rows} rows; faults: {named}.")
    say(f"Serve it:  kiln serve source={cfg.out}")
    return 0


def _is_made(out: Path, identity: dict[str, Any]) -> bool:
    try:
        made = json.loads((out / _DONE).read_text())["config"]
    except FileNotFoundError:
        return False
    changes = list(differences(made, identity))
    if changes:
        raise BadInput(
            f"{out} has a source made with other settings ({'; '.join(changes)}). "
            "Choose another folder with out=, or remove this one."
        )
    return True


def choose_faults(
    names: Sequence[str], cfg: FaultsConfig, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Give each fault to its share of the pictures, none to two; a function of names and seed.

    Returns:
        URL path -> {"kind": one of FAULTS}, slow ones with "seconds".
    """
    fracs = {kind: getattr(cfg, f"{kind}_frac") for kind in FAULTS}
    if sum(fracs.values()) > 1:
        raise BadInput(f"faults: the shares add up to {sum(fracs.values()):g}, may be at most 1.")
    left = iter(sorted(names, key=lambda name: _shuffle_key(name, seed)))
    faults: dict[str, dict[str, Any]] = {}
    for kind, frac in fracs.items():
        for name in islice(left, int(frac * len(names))):
            faults[f"/{name}"] = {"kind": kind}
            if kind == "slow":
                faults[f"/{name}"]["seconds"] = cfg.slow_s
    return faults


def _shuffle_key(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()


def write_rows(path: Path, pictures: Sequence[Picture], cfg: SourceConfig, port: int) -> int:
    """Write the LAION-style parquet; return its number of rows, duplicates included."""
    by_hash = sorted(pictures, key=lambda picture: _shuffle_key(picture.name, cfg.seed + 1))
    twice = by_hash[: int(cfg.faults.duplicate_frac * len(pictures))]
    rows = [*pictures, *twice]
    table = pa.table(
        {
            "URL": [f"http://{HOST}:{port}/{row.name}" for row in rows],
            "TEXT": [row.caption for row in rows],
            "width": pa.array([row.width for row in rows], pa.int32()),
            "height": pa.array([row.height for row in rows], pa.int32()),
            "punsafe": pa.array([0.0] * len(rows), pa.float32()),
            "similarity": pa.array([1.0] * len(rows), pa.float32()),
        }
    )
    with published(path) as partial:
        pq.write_table(table, partial)
    return len(rows)


def free_port(wanted: int) -> int:
    """Give `wanted`, or a free loopback port if it is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("the system gives a free port for 0")
