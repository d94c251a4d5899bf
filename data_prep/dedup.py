"""Find exact and near-duplicate pictures across shards and datasets; keep one, or weigh all.

Two pictures are duplicates if their stored bytes are equal, or their perceptual hashes differ in at
most max_distance bits. What a chain of duplicates connects is one cluster.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.config_curate import DedupConfig
from data_prep.dedup_page import PAGE, Cluster, Findings, Member, render
from data_prep.near import components, find_pairs, flat_sql
from data_prep.prepare import locked, say
from data_prep.rows import connect
from trainer.command import run_command
from trainer.data.manifest import Manifest, ShardEntry, load_manifest
from trainer.data.publish import publish_bytes
from trainer.data.shards import Shard, read_index
from trainer.data.tombstones import (
    add_tombstones,
    find_sorted,
    is_weighed,
    key_numbers,
    read_cluster_weights,
    read_tombstones,
    save_cluster_weights,
    save_state,
    weigh,
)
from trainer.errors import BadInput
from trainer.observe.countdown import Countdown
from trainer.place import storage

_COLUMNS = (
    "key",
    "width",
    "height",
    "original_width",
    "original_height",
    "caption_chars",
    "image_sha256",
    "phash",
)
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("dataset", pa.int16()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("key", pa.uint64()),
        ("sha", pa.binary(32)),
        ("phash", pa.uint64()),
        ("pixels", pa.int64()),
        ("caption_chars", pa.int64()),
    ]
)
_ORDERS = {"largest": "pixels DESC, caption_chars DESC, key, id", "oldest": "id"}
_MOST_SHOWN_MEMBERS = 12
_QUOTED_CHARS = 200


def main(argv: Sequence[str]) -> int:
    """Run `kiln dedup`."""
    return run_command(run, DedupConfig, "dedup", argv)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A published dataset that takes part."""

    folder: Path
    manifest: Manifest


def run(cfg: DedupConfig) -> int:
    """Find duplicates, remove or weigh them, and write the page that shows them."""
    with storage(cfg.dataset), locked(cfg.dataset, make=False):
        datasets = _open(cfg)
        scratch = _make_scratch(cfg.scratch)
        threads = cfg.processes or len(os.sched_getaffinity(0))
        try:
            with connect(scratch, memory_gb=cfg.memory_gb, threads=threads) as connection:
                find_clusters(connection, cfg, datasets)
                findings = _findings(connection, cfg, datasets)
                page = cfg.dataset / PAGE
                # After a removal nothing is left to show: the page keeps what was removed.
                if findings.clusters or not page.exists():
                    publish_bytes(page, render(findings).encode())
                after = _apply(connection, cfg, datasets)
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            raise BadInput(
                f"the search needs more than memory_gb={cfg.memory_gb:g}, or more room than is "
                f"free in {scratch.parent} ({str(error).splitlines()[0][:_QUOTED_CHARS]}). Try "
                f"memory_gb={max(1.0, 2 * cfg.memory_gb):g}, or scratch=DIR on a larger disk."
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _say(cfg, findings, datasets[0].manifest, after)
    return 0


def _make_scratch(folder: Path | None) -> Path:
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="kiln-dedup-", dir=folder))
    except OSError as error:
        raise BadInput(
            f"scratch={folder} cannot be written ({error.strerror}). Give a local folder that can."
        ) from error


def _open(cfg: DedupConfig) -> list[Dataset]:
    datasets = [Dataset(folder, load_manifest(folder)) for folder in (cfg.dataset, *cfg.against)]
    own, *others = datasets
    for other in others:
        if other.manifest.shards_fingerprint == own.manifest.shards_fingerprint:
            raise BadInput(
                f"against={other.folder} has the same shards as {own.folder}: every sample would "
                "be a duplicate. Leave it out: a dataset is always compared with itself."
            )
    return datasets


def find_clusters(
    connection: duckdb.DuckDBPyConnection, cfg: DedupConfig, datasets: Sequence[Dataset]
) -> None:
    """Fill the table `members` with all samples that have duplicates, one row each.

    Columns: cluster, place (1 is the one to keep), size, dataset (0 is the own), shard, row, key,
    distance (bits, to the one to keep), exact (its bytes are those of the one to keep), kept_key,
    kept_dataset. A member of another dataset comes before all own ones.
    """
    _load(connection, datasets)
    for name, column, where in (("same_bytes", "sha", "true"), ("same_hash", "phash", _NOT_FLAT)):
        connection.execute(
            f"CREATE TEMP TABLE {name} AS SELECT {column}, min(id) AS id, count(*) AS num, "
            f"bool_or(dataset = 0) AS own FROM images WHERE {where} GROUP BY {column}"
        )
    connection.execute("CREATE TEMP TABLE hashes AS SELECT phash, own FROM same_hash")
    with Countdown("comparing", 1, unit="joins") as progress:
        find_pairs(connection, cfg.max_distance, on_join=progress.of)
        progress.finish()
    edges = connection.execute(
        "SELECT s.id AS a, i.id AS b FROM images i JOIN same_bytes s USING (sha) "
        "WHERE s.num > 1 AND s.own AND s.id <> i.id UNION ALL "
        "SELECT s.id, i.id FROM images i JOIN same_hash s USING (phash) "
        "WHERE s.num > 1 AND s.own AND s.id <> i.id UNION ALL "
        "SELECT x.id, y.id FROM pairs JOIN same_hash x ON a = x.phash "
        "JOIN same_hash y ON b = y.phash"
    ).fetchnumpy()
    nodes, clusters = components(np.asarray(edges["a"]), np.asarray(edges["b"]))
    connection.register("clustered", pa.table({"id": nodes, "cluster": clusters}))
    connection.execute(
        "CREATE TEMP TABLE members AS WITH judged AS ("
        "SELECT *, row_number() OVER kept AS place, count(*) OVER whole AS size, "
        "first_value(key) OVER kept AS kept_key, first_value(dataset) OVER kept AS kept_dataset, "
        "first_value(phash) OVER kept AS kept_phash, first_value(sha) OVER kept AS kept_sha "
        "FROM clustered JOIN images USING (id) WINDOW whole AS (PARTITION BY cluster), "
        f"kept AS (PARTITION BY cluster ORDER BY dataset = 0, {_ORDERS[cfg.keep]})) "
        "SELECT cluster, place, size, dataset, shard, row, key, kept_key, kept_dataset, "
        "bit_count(xor(phash, kept_phash)) AS distance, sha = kept_sha AS exact FROM judged"
    )


_NOT_FLAT = f"NOT {flat_sql('phash')}"


def _load(connection: duckdb.DuckDBPyConnection, datasets: Sequence[Dataset]) -> None:
    total = sum(one.manifest.rows_kept for one in datasets)
    with Countdown("reading indexes", total) as progress:
        connection.register("one_shard", _SCHEMA.empty_table())
        connection.execute("CREATE TEMP TABLE images AS SELECT * FROM one_shard")
        for images in _live_images(datasets, progress.advance):
            connection.register("one_shard", images)
            connection.execute("INSERT INTO images SELECT * FROM one_shard")
        progress.finish()


def _live_images(datasets: Sequence[Dataset], on_rows: Callable[[int], None]) -> Iterator[pa.Table]:
    """Yield the live samples of each shard; ids count them.

    The tombstones say who is dead: they are right also after a kill in mid-weighing.
    """
    first = 0
    for number, one in enumerate(datasets):
        dead = np.sort(read_tombstones(one.folder, ["key"])["key"].to_numpy())
        for place, entry in enumerate(one.manifest.shards):
            index = _read(one, entry)
            is_live = np.ones(len(index), bool)
            is_live[find_sorted(key_numbers(index), dead)[0]] = False
            live = np.flatnonzero(is_live)
            index = index.take(pa.array(live))
            facts = {
                "id": np.arange(first, first + len(live)),
                "dataset": np.full(len(live), number, np.int16),
                "shard": np.full(len(live), place, np.int32),
                "row": live.astype(np.int32),
                "key": key_numbers(index),
                "sha": _hashes(index),
                "phash": index["phash"],
                "pixels": _pixels(index),
                "caption_chars": index["caption_chars"].cast(pa.int64()),
            }
            first += len(live)
            yield pa.table(facts, schema=_SCHEMA)
            on_rows(entry.count)


def _read(one: Dataset, entry: ShardEntry) -> pa.Table:
    path = entry.index(one.folder)
    index = read_index(path, columns=_COLUMNS)
    for name in ("image_sha256", "phash"):
        if name not in index.column_names:
            raise BadInput(
                f"{path} has no column {name}: an older Kiln made the dataset, or `kiln "
                "index`, which reads no picture. Give its rows to `kiln prepare`, into another "
                "dataset=."
            )
    return index


def _hashes(index: pa.Table) -> pa.Array:
    content = bytes.fromhex("".join(index["image_sha256"].to_pylist()))
    return pa.Array.from_buffers(pa.binary(32), len(index), [None, pa.py_buffer(content)])


def _pixels(index: pa.Table) -> NDArray[np.int64]:
    there = "original_width" in index.column_names
    width, height = ("original_width", "original_height") if there else ("width", "height")
    sides = (index[name].to_numpy().astype(np.int64) for name in (width, height))
    pixels: NDArray[np.int64] = np.prod(list(sides), axis=0)
    return pixels


def _apply(
    connection: duckdb.DuckDBPyConnection, cfg: DedupConfig, datasets: Sequence[Dataset]
) -> Manifest:
    """Write tombstones or weights, and the manifest that knows them; return it."""
    own = datasets[0]
    if cfg.dry_run:
        return own.manifest
    before = read_cluster_weights(own.folder)
    if cfg.outcome == "remove":
        weights = before.slice(0, 0)
        tombstones, version = _tombstones(connection, datasets), own.manifest.removal_version + 1
        changed = add_tombstones(own.folder, tombstones, version=version) > 0
    else:
        weights = _fetch(
            connection,
            "SELECT key, (1 / size)::FLOAT AS weight FROM members WHERE dataset = 0 ORDER BY key",
        ).cast(before.schema)
        changed = False
    if not weights.equals(before):
        save_cluster_weights(own.folder, weights)
        changed = True
    if not changed and is_weighed(own.folder, own.manifest):
        return own.manifest
    with Countdown("weighing", own.manifest.rows_kept) as progress:
        after = weigh(own.folder, own.manifest, on_shard=progress.advance)
        progress.finish()
    why = f"kiln dedup: outcome={cfg.outcome} max_distance={cfg.max_distance}"
    save_state(own.folder, after, why=why, parent=own.manifest.fingerprint)
    return after


def _tombstones(connection: duckdb.DuckDBPyConnection, datasets: Sequence[Dataset]) -> pa.Table:
    names = ["", *(f" in dataset {one.manifest.fingerprint[:12]}" for one in datasets[1:])]
    connection.register("names", pa.table({"dataset": range(len(names)), "name": names}))
    return _fetch(
        connection,
        "SELECT key, NULL::VARCHAR AS url, if(exact, 'exact', 'near') || '_duplicate of ' || "
        "lower(lpad(to_hex(kept_key), 16, '0')) || name AS why FROM members "
        "JOIN names ON kept_dataset = names.dataset "
        "WHERE members.dataset = 0 AND place > 1 ORDER BY key",
    )


def _fetch(connection: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    return connection.sql(query).to_arrow_table()


def _findings(
    connection: duckdb.DuckDBPyConnection, cfg: DedupConfig, datasets: Sequence[Dataset]
) -> Findings:
    def number(query: str) -> int:
        return int(connection.execute(f"SELECT {query}").fetchall()[0][0])

    own = "FROM members WHERE dataset = 0"
    sizes = connection.execute(
        "SELECT size, count(*) FROM members WHERE place = 1 GROUP BY size ORDER BY size"
    ).fetchall()
    return Findings(
        name=cfg.dataset.name,
        outcome=cfg.outcome,
        keep=cfg.keep,
        max_distance=cfg.max_distance,
        images=number("count(*) FROM images WHERE dataset = 0"),
        others=number("count(*) FROM images WHERE dataset > 0"),
        flat=number(f"count(*) FROM images WHERE dataset = 0 AND NOT ({_NOT_FLAT})"),
        exact=number(f"count(*) {own} AND place > 1 AND exact"),
        near=number(f"count(*) {own} AND place > 1 AND NOT exact"),
        weighted=number(f"count(*) {own}"),
        sizes={int(size): int(count) for size, count in sizes},
        clusters=list(_largest(connection, cfg, datasets)),
    )


def _largest(
    connection: duckdb.DuckDBPyConnection, cfg: DedupConfig, datasets: Sequence[Dataset]
) -> Iterator[Cluster]:
    """Read the pictures of the largest clusters; the order depends on the samples alone."""
    rows = connection.execute(
        "WITH largest AS (SELECT cluster, row_number() OVER (ORDER BY size DESC, kept_key) AS nth "
        f"FROM members WHERE place = 1 ORDER BY nth LIMIT {cfg.report_clusters}) "
        "SELECT nth, size, place, dataset, shard, row, distance, exact FROM members "
        f"JOIN largest USING (cluster) WHERE place <= {_MOST_SHOWN_MEMBERS} ORDER BY nth, place"
    ).fetchall()
    clusters: dict[int, Cluster] = {}
    for nth, size, place, dataset, shard, row, distance, exact in rows:
        cluster = clusters.setdefault(nth, Cluster(size=size, members=[]))
        one = datasets[dataset]
        entry = one.manifest.shards[shard]
        with Shard(entry.tar(one.folder), read_index(entry.index(one.folder))) as opened:
            member = Member.read(
                opened,
                row,
                place=place,
                distance=distance,
                exact=exact,
                dataset=one.folder.name if dataset else "",
            )
        cluster.members.append(member)
    yield from clusters.values()


def _say(cfg: DedupConfig, found: Findings, before: Manifest, after: Manifest) -> None:
    say(
        f"{cfg.dataset}: {found.images} images, {found.num_clusters} clusters with "
        f"{found.exact} exact and {found.near} near-duplicates; {found.flat} flat pictures were "
        "compared by their bytes alone."
    )
    if cfg.dry_run:
        say(f"Dry run: nothing was changed. See {cfg.dataset / PAGE}.")
    elif before.fingerprint == after.fingerprint:
        say(f"Nothing to do; the fingerprint stays {after.fingerprint}.")
    else:
        done = (
            f"{after.rows_removed - before.rows_removed} samples removed"
            if cfg.outcome == "remove"
            else f"{after.rows_weighted} samples share the weight of {found.num_clusters}"
        )
        say(
            f"{done}; {after.rows_live} are left. The fingerprint was {before.fingerprint}, now it "
            f"is {after.fingerprint}. Encodings stay valid. See {cfg.dataset / PAGE}."
        )
