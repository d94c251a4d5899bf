"""Take samples down by key, URL or image hash, with a proof; tars stay, readers skip them."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from data_prep.config_curate import RemoveConfig
from data_prep.dedup_page import PAGE
from data_prep.prepare import locked, say
from trainer.command import run_command
from trainer.data.manifest import Manifest, ShardEntry, load_manifest
from trainer.data.publish import publish_json
from trainer.data.shards import Shard, read_index
from trainer.data.tombstones import (
    REMOVAL_SCHEMA,
    add_tombstones,
    find_sorted,
    is_weighed,
    key_numbers,
    read_tombstones,
    save_state,
    weigh,
)
from trainer.errors import BadInput
from trainer.observe.countdown import Countdown
from trainer.place import remove as remove_file
from trainer.place import storage

_KINDS = {"key": re.compile(r"[0-9a-f]{16}"), "sha256": re.compile(r"[0-9a-f]{64}")}
_MOST_PRINTED = 50


@dataclass(frozen=True, slots=True, order=True)
class Asked:
    """One thing that is to go."""

    kind: str
    """'key', 'sha256' or 'url'."""
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """One sample that was asked for."""

    asked: tuple[str, ...]
    """The values that mean it."""
    key: str
    url: str | None
    shard: str | None
    """Its tar; None if the sample was planned and is not stored."""
    row: int | None
    """Its place there."""
    state: str
    """'removed now', 'removed before', or 'not stored, and will not be'."""


def main(argv: Sequence[str]) -> int:
    """Run `kiln remove`."""
    return run_command(run, RemoveConfig, "remove", argv)


def run(cfg: RemoveConfig) -> int:
    """Remove what is there of what was asked, print the proof; 1 if something was not found."""
    asked = read_asked(cfg)
    with storage(cfg.dataset), locked(cfg.dataset, make=False):
        before = load_manifest(cfg.dataset)
        search = Search(cfg.dataset, before, asked)
        samples = search.results()
        missing = sorted(asked - {one for found in search.asked_by.values() for one in found})
        after = before if cfg.dry_run else _remove(cfg, before, samples)
    _print(samples, missing)
    if cfg.proof:
        proof = {
            "dataset": str(cfg.dataset),
            "why": cfg.why,
            "fingerprint_before": before.fingerprint,
            "fingerprint_after": after.fingerprint,
            "removal_version": after.removal_version,
            "samples": [asdict(sample) for sample in samples],
            "not_found": [asdict(one) for one in missing],
        }
        try:
            publish_json(cfg.proof, proof)
        except OSError as error:
            raise BadInput(
                f"proof={cfg.proof} cannot be written ({error}), but everything else is done. Give "
                "the command again with another proof=."
            ) from error
    say(_summary(cfg, before, after, samples))
    return 1 if missing else 0


def read_asked(cfg: RemoveConfig) -> set[Asked]:
    """Gather what is to go from the keys of the config and the lines of the file.

    Raises:
        BadInput: There is nothing, or something is neither a key, a hash nor a URL.
    """
    asked = {Asked("url", url.strip()) for url in cfg.urls}
    for kind, values in (("key", cfg.keys), ("sha256", cfg.sha256)):
        for value in values:
            if not _KINDS[kind].fullmatch(value.lower()):
                digits = 16 if kind == "key" else 64
                raise BadInput(f"{kind}={value} is none: need {digits} hex digits.")
            asked.add(Asked(kind, value.lower()))
    if cfg.file:
        asked |= set(_lines(cfg.file))
    if not asked:
        raise BadInput("nothing is to be removed: give keys=, urls=, sha256= or file=.")
    return asked


def _lines(path: Path) -> Iterator[Asked]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"file={path} cannot be read ({error}).") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        kinds = [kind for kind, form in _KINDS.items() if form.fullmatch(line.lower())]
        if kinds:
            yield Asked(kinds[0], line.lower())
        elif "://" in line:
            yield Asked("url", line)
        else:
            raise BadInput(
                f"{path}:{number} is neither a key (16 hex digits), a hash (64) nor a URL: {line}"
            )


class Search:
    """Finds the samples that were asked for: in the plan, in the indexes, last in every json."""

    def __init__(self, dataset: Path, manifest: Manifest, asked: Iterable[Asked]) -> None:
        """Search; the indexes are read once, the tars only for what is not found there."""
        self._dataset, self._manifest = dataset, manifest
        self.asked_by: dict[int, set[Asked]] = defaultdict(set)
        """Key -> what was asked that means it."""
        self._urls: dict[int, str] = {}
        self._places: dict[int, tuple[ShardEntry, int]] = {}
        by_kind: dict[str, set[str]] = defaultdict(set)
        for one in asked:
            by_kind[one.kind].add(one.value)
        planned = self._search_plan(by_kind["url"], {int(key, 16) for key in by_kind["key"]})
        self._search_indexes(by_kind)
        found = {one for some in self.asked_by.values() for one in some}
        deep = {one for one in asked if one.kind == "sha256" and one not in found}
        if not planned:
            deep |= {one for one in asked if one.kind == "url" and one not in found}
        if deep:
            self._search_jsons(deep)

    def results(self) -> list[Removed]:
        """Give what was found, in order of keys, with what becomes of it."""
        gone = set(read_tombstones(self._dataset, ["key"])["key"].to_pylist())
        return [self._result(key, gone) for key in sorted(self.asked_by)]

    def _result(self, key: int, gone: set[int]) -> Removed:
        entry, row = self._places.get(key, (None, None))
        if key in gone:
            state = "removed before"
        else:
            state = "removed now" if entry else "not stored, and will not be"
        return Removed(
            asked=tuple(one.value for one in sorted(self.asked_by[key])),
            key=f"{key:016x}",
            url=self._urls.get(key),
            shard=entry.name if entry else None,
            row=row,
            state=state,
        )

    def _search_plan(self, urls: set[str], keys: set[int]) -> bool:
        """Search the rows that were ever planned, and those rejected by a rule; False: no plan."""
        url_set, key_set = pa.array(sorted(urls), pa.string()), pa.array(sorted(keys), pa.uint64())
        paths = [
            path
            for pattern in ("plan/*.parquet", "quarantine/plan-*.parquet")
            for path in sorted(self._dataset.glob(pattern))
        ]
        for path in paths if urls or keys else ():
            with path.open("rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(columns=["key", "url"]):
                    by_url = pc.is_in(batch["url"], value_set=url_set)
                    hits = batch.filter(pc.or_(by_url, pc.is_in(batch["key"], value_set=key_set)))
                    for key, url in zip(
                        hits["key"].to_pylist(), hits["url"].to_pylist(), strict=True
                    ):
                        self._urls[key] = url
                        if url in urls:
                            self.asked_by[key].add(Asked("url", url))
                        if key in keys:
                            self.asked_by[key].add(Asked("key", f"{key:016x}"))
        return bool(paths)

    def _search_indexes(self, by_kind: dict[str, set[str]]) -> None:
        keys = {int(key, 16) for key in by_kind["key"]}
        wanted = np.array(sorted({*self.asked_by, *keys}), np.uint64)
        hashes = pa.array(sorted(by_kind["sha256"]), pa.string())
        with Countdown("searching", self._manifest.rows_kept) as progress:
            for entry in self._manifest.shards:
                index = read_index(entry.index(self._dataset), columns=["key", "image_sha256"])
                numbers = key_numbers(index)
                for row in find_sorted(numbers, wanted)[0].tolist():
                    key = int(numbers[row])
                    self._places[key] = (entry, row)
                    if key in keys:
                        self.asked_by[key].add(Asked("key", f"{key:016x}"))
                if len(hashes) and "image_sha256" in index.column_names:
                    same = pc.is_in(index["image_sha256"], value_set=hashes).to_numpy()
                    for row in np.flatnonzero(same).tolist():
                        key = int(numbers[row])
                        self._places[key] = (entry, row)
                        self.asked_by[key].add(Asked("sha256", index["image_sha256"][row].as_py()))
                progress.advance(entry.count)
            progress.finish()
        self._read_urls()

    def _read_urls(self) -> None:
        """Read the URL of what the plan did not tell it of."""
        for key, (entry, row) in self._places.items():
            if key not in self._urls:
                with self._open(entry) as shard:
                    url = _facts(shard, row).get("url")
                if isinstance(url, str):
                    self._urls[key] = url

    def _search_jsons(self, deep: set[Asked]) -> None:
        """Search every sample's json for its URL and for the hash of the downloaded file."""
        with Countdown("searching every json", self._manifest.rows_kept) as progress:
            for entry in self._manifest.shards:
                with self._open(entry) as shard:
                    for row, key in enumerate(shard.keys):
                        facts = _facts(shard, row)
                        about = {
                            Asked("sha256", str(facts.get("source_sha256"))),
                            Asked("url", str(facts.get("url"))),
                        }
                        if hits := about & deep:
                            self.asked_by[int(key, 16)] |= hits
                            self._places[int(key, 16)] = (entry, row)
                            if isinstance(url := facts.get("url"), str):
                                self._urls[int(key, 16)] = url
                progress.advance(entry.count)
            progress.finish()

    def _open(self, entry: ShardEntry) -> Shard:
        return Shard(entry.tar(self._dataset), read_index(entry.index(self._dataset)))


def _facts(shard: Shard, row: int) -> dict[str, object]:
    if "json" not in shard.extensions(row):
        return {}
    facts = json.loads(shard.read(row, "json"))
    return facts if isinstance(facts, dict) else {}


def _remove(cfg: RemoveConfig, before: Manifest, samples: Sequence[Removed]) -> Manifest:
    columns = {
        "key": [int(sample.key, 16) for sample in samples],
        "url": [sample.url for sample in samples],
        "why": [cfg.why] * len(samples),
    }
    was_live = any(sample.state == "removed now" for sample in samples)
    num_new = add_tombstones(
        cfg.dataset,
        pa.table(columns, REMOVAL_SCHEMA),
        version=before.removal_version + was_live,
    )
    if not num_new and is_weighed(cfg.dataset, before):
        return before
    # It shows pictures; `kiln dedup dry_run=true` makes it anew, without what is gone.
    remove_file(cfg.dataset / PAGE)
    with Countdown("weighing", before.rows_kept) as progress:
        after = weigh(cfg.dataset, before, on_shard=progress.advance)
        progress.finish()
    save_state(cfg.dataset, after, why=f"kiln remove: {cfg.why}", parent=before.fingerprint)
    return after


def _print(samples: Sequence[Removed], missing: Sequence[Asked]) -> None:
    console = Console(soft_wrap=True)
    table = Table("asked", "key", "shard", "row", "state", title="What was asked for")
    for sample in samples[:_MOST_PRINTED]:
        where = (sample.shard or "-", "-" if sample.row is None else str(sample.row))
        table.add_row("\n".join(sample.asked), sample.key, *where, sample.state)
    console.print(table)
    if len(samples) > _MOST_PRINTED:
        say(f"... and {len(samples) - _MOST_PRINTED} more; proof=FILE has all of them.")
    for one in missing:
        say(f"- not found: {one.kind} {one.value}")


def _summary(
    cfg: RemoveConfig, before: Manifest, after: Manifest, samples: Sequence[Removed]
) -> str:
    count = {
        state: sum(sample.state == state for sample in samples)
        for state in ("removed now", "removed before", "not stored, and will not be")
    }
    said = ", ".join(f"{number} {state}" for state, number in count.items() if number) or "nothing"
    said = f"{cfg.dataset}: {said}"
    if cfg.dry_run:
        return f"{said} (dry run: nothing was changed)."
    if before.fingerprint == after.fingerprint:
        return f"{said}; the fingerprint stays {after.fingerprint}."
    text = (
        f"{said}; {after.rows_live} samples are left. The fingerprint was {before.fingerprint}, "
        f"now it is {after.fingerprint}; the removal version is {after.removal_version}. Encodings "
        "stay valid, and runs that began before keep their order."
    )
    if after.rows_weighted:
        text += " Weights of clusters are as before: `kiln dedup outcome=weight` brings them up."
    return text
