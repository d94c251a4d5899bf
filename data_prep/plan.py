"""Decide once which rows are downloaded and in which unit; write it down, and only ever add to it.

`plan/000.parquet` has the rows to download in order of their ids, one row group per unit. More rows
make `plan/001.parquet` with further units; what was planned before stays as it is.
"""

import hashlib
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from data_prep.config import PrepareConfig
from data_prep.policy import (
    Policy,
    Rule,
    broken_rule_sql,
    check_safety,
    identifier,
    load_lists,
    make_rules,
    unheeded_rules,
)
from data_prep.quarantine import Reason
from data_prep.rows import (
    Row,
    SourceFile,
    connect,
    open_source,
    rows_sql,
    source_files,
    unreadable,
)
from trainer.data.publish import file_sha256, publish_json, published
from trainer.data.tombstones import removed_urls
from trainer.errors import BadInput
from trainer.frozen import thaw
from trainer.observe.ledger import accounted
from trainer.place import open_sparsely, read_bytes, remove

BATCH_ROWS = 10_000
_SOURCES = "sources.json"
_REJECTED = pa.schema([("key", pa.uint64()), ("url", pa.string()), ("reason", pa.string())])

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one source added to the plan: `plan/000.json`, written when the parquet is whole."""

    number: int
    """From 0."""
    rules_sha256: str
    """Hash of the policy, the columns and the rows per unit."""
    rows_in: int
    """Rows that the source had and the plan did not know: planned + rejected."""
    rejected: dict[str, int]
    """Reason -> rows in `quarantine/plan-000.parquet`."""
    first_unit: int
    """Number of the first unit."""
    unit_rows: tuple[int, ...]
    """Rows of each unit."""
    plan_sha256: str
    """Hash of the parquet: equal rows and rules give equal bytes."""
    quarantine_sha256: str
    """Hash of the rejected rows."""
    moved: dict[str, int] = field(default_factory=dict)
    """Only for a second try of rows that failed: unit -> rows that moved here from it."""

    @property
    def rows_new(self) -> int:
        """Rows that no earlier generation had."""
        return self.rows_in - sum(self.moved.values())


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of work that is done or not done; its kept rows become one shard."""

    number: int
    """From 0; the name of its files."""
    rows: int
    """How many."""
    generation: int
    """Whose parquet has them."""
    group: int
    """Row group there."""
    plan_sha256: str
    """Hash of that parquet."""

    @property
    def name(self) -> str:
        """The number as the files have it."""
        return f"{self.number:05d}"

    def input_sha256(self, rules_sha256: str) -> str:
        """Hash everything that decides what this unit publishes, besides the network."""
        text = f"{rules_sha256}\0{self.plan_sha256}\0{self.group}"
        return hashlib.sha256(text.encode()).hexdigest()


def plan_path(dataset: Path, generation: int) -> Path:
    """Where the rows of a generation lie."""
    return dataset / "plan" / f"{generation:03d}.parquet"


def plan_quarantine_path(dataset: Path, generation: int) -> Path:
    """Where the rows lie that were rejected by their metadata."""
    return dataset / "quarantine" / f"plan-{generation:03d}.parquet"


def read_generations(dataset: Path, *, first: int = 0) -> list[Generation]:
    """Read the plan's records from number `first` on; an unfinished generation is none."""
    found = []
    for number in itertools.count(first):
        path = dataset / "plan" / f"{number:03d}.json"
        try:
            found.append(TypeAdapter(Generation).validate_json(read_bytes(path)))
        except FileNotFoundError:
            break
        except ValidationError as error:
            raise _damaged(path, error) from error
    return found


def list_units(generations: Sequence[Generation]) -> list[Unit]:
    """List all units of the plan, in order of their numbers."""
    return [
        Unit(plan.first_unit + group, rows, plan.number, group, plan.plan_sha256)
        for plan in generations
        for group, rows in enumerate(plan.unit_rows)
    ]


def read_rows(dataset: Path, unit: Unit) -> list[Row]:
    """Read the rows of one unit, in order of their keys."""
    with open_sparsely(plan_path(dataset, unit.generation)) as file:
        table = pq.ParquetFile(file).read_row_group(unit.group)
    extras = [name for name in table.column_names if name.startswith("extra.")]
    keys, urls, captions = (table[name].to_pylist() for name in ("key", "url", "caption"))
    values = [table[name].to_pylist() for name in extras]
    names = [name.removeprefix("extra.") for name in extras]
    return [
        Row(f"{key:016x}", url, caption, _present(names, extra))
        for key, url, caption, *extra in zip(keys, urls, captions, *values, strict=True)
    ]


def moved_keys(dataset: Path, unit: Unit) -> set[str]:
    """Give the keys of a unit's rows that a later generation tries again."""
    later = read_generations(dataset, first=unit.generation + 1)
    later = [plan for plan in later if unit.name in plan.moved]
    if not later:
        return set()
    moved: set[str] = set()
    with open_sparsely(plan_path(dataset, unit.generation)) as file:
        own = pq.ParquetFile(file).read_row_group(unit.group, columns=["key"])["key"]
    for plan in later:
        with open_sparsely(plan_path(dataset, plan.number)) as file:
            keys = pq.ParquetFile(file).read(columns=["key"])["key"]
        both = own.filter(pc.is_in(own, value_set=keys.combine_chunks()))
        moved.update(f"{key:016x}" for key in both.to_pylist())
    return moved


def _present(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in zip(names, values, strict=True)
        # JSON has neither NaN nor infinity.
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def plan_rules(cfg: PrepareConfig, policy: Policy) -> str:
    """Hash what decides which rows are planned and how they are cut."""
    facts = {
        "policy": policy.facts,
        "columns": thaw(cfg)["columns"],
        "shard_rows": cfg.shard_rows,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_plan(cfg: PrepareConfig, policy: Policy, scratch: Path) -> list[Generation]:
    """Plan the rows of the source that are not planned yet; return all generations.

    Other rules for the plan replace it as a whole, which is possible as long as all of it came
    from this source.

    Args:
        cfg: The source, its columns and the rows per unit.
        policy: The rules.
        scratch: Local folder for what DuckDB spills.

    Raises:
        BadInput: The source cannot be read or is refused, or other sources were planned before.
    """
    files, rules_sha256 = source_files(cfg.rows), plan_rules(cfg, policy)
    generations = read_generations(cfg.dataset)
    known = _read_sources(cfg.dataset)
    if generations and generations[0].rules_sha256 != rules_sha256:
        others = sorted({file.name for file in known} - {file.name for file in files})
        if others:
            raise BadInput(
                f"{cfg.dataset} has rows of {others[0]}, which rows={cfg.rows} does not have, and "
                "was planned with another policy, columns or shard_rows. Give rows= for all of "
                "them, or the former rules, or another dataset=."
            )
        for plan in reversed(generations):
            remove(plan_path(cfg.dataset, plan.number).with_suffix(".json"))
        generations, known = [], []
    if generations and set(files) <= set(known):
        return generations
    part = cfg.part if cfg.parts > 1 else None
    with (
        accounted(cfg.dataset, stage="plan", part=part, tdp_w_per_core=cfg.tdp_w_per_core),
        connect(
            scratch / "duckdb", memory_gb=cfg.plan_memory_gb, threads=cfg.num_processes
        ) as connection,
    ):
        added = _add_generation(connection, cfg, policy, files, generations)
    if added.rows_in:
        generations = [*generations, added]
    elif not generations:
        raise BadInput(f"rows={cfg.rows} has no rows: nothing to download. Give another source.")
    publish_json(
        cfg.dataset / "plan" / _SOURCES,
        [asdict(file) for file in sorted({*files, *known}, key=lambda file: file.name)],
    )
    return generations


def _read_sources(dataset: Path) -> list[SourceFile]:
    path = dataset / "plan" / _SOURCES
    try:
        return TypeAdapter(list[SourceFile]).validate_json(read_bytes(path))
    except FileNotFoundError:
        return []
    except ValidationError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: ValidationError) -> BadInput:
    return BadInput(
        f"{path} is damaged ({error.errors()[0]['msg']}). Remove the folder {path.parent}: the "
        "same command plans again, and keeps what is downloaded."
    )


def _add_generation(
    connection: duckdb.DuckDBPyConnection,
    cfg: PrepareConfig,
    policy: Policy,
    files: Sequence[SourceFile],
    before: Sequence[Generation],
) -> Generation:
    found = open_source(connection, files, cfg.columns)
    check_safety(policy, [file.name for file in files], found)
    load_lists(connection, policy)
    rules = [*make_rules(policy, found), *_removed_rule(connection, cfg.dataset)]
    for name in unheeded_rules(rules):
        log.warning("policy: %s rejects nothing: the source has no such column", name)
    query = rows_sql(cfg.columns, found, broken_rule_sql(rules))
    if before:
        _load_known_keys(connection, cfg.dataset, before)
        query = f"SELECT * FROM ({query}) WHERE key NOT IN (SELECT key FROM known_keys)"
    batches = _sorted_batches(connection, query, files)
    return write_generation(
        cfg, rules_sha256=plan_rules(cfg, policy), before=before, batches=batches
    )


def _removed_rule(connection: duckdb.DuckDBPyConnection, dataset: Path) -> list[Rule]:
    """What was taken out of the dataset does not come back with other rows."""
    urls = removed_urls(dataset)
    if not urls:
        return []
    connection.register("removed", pa.table({"url": urls}))
    return [Rule(Reason.REMOVED, "kiln_url IN (SELECT url FROM removed)")]


def write_generation(
    cfg: PrepareConfig,
    *,
    rules_sha256: str,
    before: Sequence[Generation],
    batches: Iterator[pa.RecordBatch],
    moved: dict[str, int] | None = None,
) -> Generation:
    """Write the next generation, its record last; without rows nothing is left of it.

    Args:
        cfg: Names the dataset and the rows per unit.
        rules_sha256: Of the rules that chose the rows.
        before: The generations that are there.
        batches: key, url, caption, reason and more, in order of keys; the first one is empty.
        moved: Unit -> rows of it that get a second try here.
    """
    plan = plan_path(cfg.dataset, len(before))
    quarantine = plan_quarantine_path(cfg.dataset, len(before))
    remove(plan.with_suffix(".json"))
    tally = Counter[str]()
    with published(plan) as kept_file, published(quarantine) as rejected_file:
        unit_rows = _write(batches, kept_file, rejected_file, cfg.shard_rows, tally)
        plan_sha256, quarantine_sha256 = file_sha256(kept_file), file_sha256(rejected_file)
    added = Generation(
        number=len(before),
        rules_sha256=rules_sha256,
        rows_in=sum(unit_rows) + tally.total(),
        rejected=dict(sorted(tally.items())),
        first_unit=before[-1].first_unit + len(before[-1].unit_rows) if before else 0,
        unit_rows=tuple(unit_rows),
        plan_sha256=plan_sha256,
        quarantine_sha256=quarantine_sha256,
        moved=moved or {},
    )
    if added.rows_in:
        publish_json(plan.with_suffix(".json"), asdict(added))
    else:
        remove(plan)
        remove(quarantine)
    return added


def _load_known_keys(
    connection: duckdb.DuckDBPyConnection, dataset: Path, before: Sequence[Generation]
) -> None:
    connection.execute("CREATE OR REPLACE TEMP TABLE known_keys (key UBIGINT)")
    for plan in before:
        for path in (plan_path, plan_quarantine_path):
            with open_sparsely(path(dataset, plan.number)) as file:
                for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=["key"]):
                    keys = pa.table({"key": batch["key"]})
                    connection.register("more_keys", keys)
                    connection.execute("INSERT INTO known_keys SELECT key FROM more_keys")


def _sorted_batches(
    connection: duckdb.DuckDBPyConnection, query: str, files: Sequence[SourceFile]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows in an order that depends on the rows alone; a good row before its twins.

    The first batch is empty, and says what the columns are.
    """
    try:
        relation = connection.sql(f"SELECT * FROM ({query})")
        names = [identifier(name) for name in relation.columns if name not in {"key", "reason"}]
        order = ", ".join(["key", "reason NULLS FIRST", *names])
        reader = relation.order(order).to_arrow_reader(BATCH_ROWS)
        yield pa.RecordBatch.from_pylist([], reader.schema)
        yield from reader
    except duckdb.Error as error:
        raise unreadable(files, error) from error


def _write(
    batches: Iterator[pa.RecordBatch],
    kept_file: Path,
    rejected_file: Path,
    shard_rows: int,
    tally: Counter[str],
) -> list[int]:
    """Part rows into those of units and rejected ones; return the rows of each unit.

    Args:
        batches: key, url, caption, reason and more, in order; the first one is empty.
        kept_file: Gets all columns but `reason`, a row group per unit.
        rejected_file: Gets key, url and reason.
        shard_rows: Rows per unit.
        tally: Gets the number of rejected rows for each reason.
    """
    unit_rows: list[int] = []
    columns = next(batches).schema
    plan_schema = columns.remove(columns.get_field_index("reason"))
    with (
        pq.ParquetWriter(kept_file, plan_schema, compression="zstd") as kept_writer,
        pq.ParquetWriter(rejected_file, _REJECTED, compression="zstd") as rejected_writer,
    ):
        pending = pa.Table.from_batches([], plan_schema)
        last_key: int | None = None
        for batch in batches:
            kept, rejected = _part(batch, last_key)
            last_key = batch["key"][-1].as_py()
            tally.update(rejected["reason"].to_pylist())
            rejected_writer.write_table(rejected)
            pending = pa.concat_tables([pending, kept.drop_columns("reason")])
            while len(pending) >= shard_rows:
                kept_writer.write_table(pending.slice(0, shard_rows), row_group_size=shard_rows)
                unit_rows.append(shard_rows)
                pending = pending.slice(shard_rows)
        if len(pending):
            kept_writer.write_table(pending, row_group_size=shard_rows)
            unit_rows.append(len(pending))
    return unit_rows


def _part(batch: pa.RecordBatch, last_key: int | None) -> tuple[pa.Table, pa.Table]:
    """Part one batch into kept and rejected; of rows with the same key the first may be kept."""
    table = pa.Table.from_batches([batch])
    keys = table["key"].to_numpy()
    repeated = np.empty(len(keys), bool)
    repeated[1:] = keys[1:] == keys[:-1]
    repeated[:1] = [last_key is not None and key == last_key for key in keys[:1].tolist()]
    reasons = pc.if_else(
        pc.and_(pc.is_null(table["reason"]), pa.array(repeated)),
        str(Reason.DUPLICATE),
        table["reason"],
    )
    is_kept = pc.is_null(reasons)
    rejected = pa.table({"key": table["key"], "url": table["url"], "reason": reasons})
    return table.filter(is_kept), rejected.filter(pc.invert(is_kept)).cast(_REJECTED)
