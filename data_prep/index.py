"""Make a dataset of tars that others wrote, where they lie; the same command again resumes."""

from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from data_prep.config import IndexConfig
from data_prep.prepare import locked, print_yield, say
from data_prep.publish import quarantine_path
from data_prep.quarantine import Rejected, write_quarantine
from trainer.command import run_command
from trainer.data.index import Left, Window, scan_foreign, with_prefix
from trainer.data.manifest import MANIFEST, Manifest, ShardEntry
from trainer.data.publish import file_sha256, publish_json, published
from trainer.data.shards import Blob, read_index
from trainer.data.tars import list_tars
from trainer.data.tombstones import find_sorted, key_numbers, save_state, weigh
from trainer.errors import BadInput
from trainer.observe.countdown import Countdown
from trainer.place import (
    NUM_REQUESTS,
    file_version,
    is_local,
    read_bytes,
    remove,
    sizes_bytes,
    storage,
    storage_errors,
)

REPAIR = "Put it right, take it out of tars=, or leave broken ones out with accept_broken=true."
_EARLY_TARS = 8
_SHARE_SAMPLES = 50_000_000
_MOST_SAID = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TarRecord:
    """Says that a tar is indexed, and as what: `indexed/00000.json` in a dataset."""

    at: str
    """Where the tar lies, as in its ShardEntry."""
    version: str | None
    """What changes when it is written again."""
    rules: str
    """How it was indexed: `keys` and `hash` of the command."""
    shard: ShardEntry | None
    """None: it has no sample that can be used."""
    rejected: dict[str, int]
    """Reason -> samples in quarantine for it."""


class Result(NamedTuple):
    """What became of a tar."""

    record: TarRecord | None
    """None: it is broken."""
    why: str = ""
    """What is wrong with it."""
    num_requests: int = 0
    num_read_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do and what is done already."""

    tars: dict[str, Path]
    """Shard number -> tar, in order."""
    records: dict[str, TarRecord]
    """Of the tars that are indexed, by number."""

    @property
    def todo(self) -> list[str]:
        """Numbers of the tars that are not indexed, or changed since."""
        return [number for number in self.tars if number not in self.records]


def main(argv: Sequence[str]) -> int:
    """Run `kiln index`."""
    return run_command(run, IndexConfig, "index", [_quoted(word) for word in argv])


def _quoted(word: str) -> str:
    # Braces without quotes are a mapping to Hydra.
    name, _, value = word.partition("=")
    plain = name == "tars" and "{" in value and not set(value) & {"'", '"'}
    return f"tars='{value}'" if plain else word


def run(cfg: IndexConfig) -> int:
    """Index what is missing, write the manifest; 1 if a tar is broken and that is not accepted."""
    with storage(cfg.dataset), locked(cfg.dataset):
        if (cfg.dataset / "plan").exists():
            raise BadInput(
                f"dataset={cfg.dataset} was made by `kiln prepare`, which has indexes. Give "
                "another folder."
            )
        return _run(cfg, list_tars(cfg.tars))


def _run(cfg: IndexConfig, tars: Sequence[Path]) -> int:
    work, leftovers = survey(cfg, tars)
    if not work.todo and not leftovers and (cfg.dataset / MANIFEST).exists():
        say(f"{cfg.dataset}: nothing to do, all {len(tars)} tars are indexed.")
        return 0
    remove(cfg.dataset / MANIFEST)  # without it the dataset is unfinished
    for number in leftovers:
        _retract(cfg.dataset, number)
    if work.records:
        say(f"{len(work.records)} of {len(tars)} tars are indexed already.")
    broken = _do(cfg, work)
    for number, why in list(broken.items())[:_MOST_SAID]:
        say(f"- {number}: {why}")
    if len(broken) == len(tars):
        raise BadInput(f"tars={cfg.tars}: none can be indexed. {broken[min(broken)]}")
    if broken and not cfg.accept_broken:
        say(
            f"{cfg.dataset}: {len(broken)} of {len(tars)} tars are broken, the others are indexed. "
            "The dataset has no manifest yet: put them right and give the same command again, or "
            "leave them out with accept_broken=true."
        )
        return 1
    manifest = make_manifest(cfg, work, broken)
    _check_keys(cfg.dataset, manifest.shards)
    save_state(cfg.dataset, manifest, why="kiln index")
    print_yield(manifest)
    say(f"{cfg.dataset}: {manifest.rows_live} samples in {len(manifest.shards)} shards.")
    return 0


def survey(cfg: IndexConfig, tars: Sequence[Path]) -> tuple[Work, list[str]]:
    """Number the tars, and find those that are indexed as they are now.

    Returns:
        The work, and the numbers of tars that were indexed and are not meant any more. A tar keeps
        its number for ever.
    """
    paths = sorted((cfg.dataset / "indexed").glob("*.json"))
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        pairs = zip(paths, threads.map(_read_record, paths), strict=True)
        read = {path.stem: record for path, record in pairs if record}
        by_place = {record.at: number for number, record in read.items()}
        free = (f"{number:05d}" for number in count())
        new = (number for number in free if number not in read)
        places = [(by_place.get(_place_in(cfg.dataset, tar)) or next(new), tar) for tar in tars]
        numbered = dict(sorted(places, key=lambda pair: (len(pair[0]), pair[0])))
        records = {number: record for number in numbered if (record := read.get(number))}
        versions = threads.map(lambda number: file_version(numbered[number]), records)
        entries = [record.shard for record in records.values() if record.shard]
        sizes = sizes_bytes([entry.index(cfg.dataset) for entry in entries])
        wrong = {
            entry.number
            for entry, size in zip(entries, sizes, strict=True)
            if size != entry.index_bytes
        }
        done = {
            number: record
            for (number, record), version in zip(records.items(), versions, strict=True)
            if number not in wrong and (record.version, record.rules) == (version, _rules(cfg))
        }
    return Work(numbered, done), sorted({path.stem for path in paths} - set(numbered))


def index_tar(cfg: IndexConfig, number: str, tar: Path) -> Result:
    """Index one tar and publish index, quarantine and, last, the record."""
    try:
        with storage_errors(tar):
            version = file_version(tar)
            with Blob(tar, whole=cfg.hash, repair=REPAIR) as blob:
                window = Window(blob, skip_bytes=cfg.skip_bytes)
                scan = scan_foreign(window, repair=REPAIR)
                sha256 = blob.sha256() if cfg.hash else scan.sha256
    except BadInput as error:
        return Result(None, str(error))
    except (PermissionError, IsADirectoryError) as error:
        return Result(None, f"{tar} cannot be read ({error.strerror}). {REPAIR}")
    shard = None
    if scan.index.num_rows:
        shard = ShardEntry(
            name=f"shards/{number}.tar",
            at=_place_in(cfg.dataset, tar),
            bytes=window.num_bytes,
            sha256=sha256,
            count=scan.index.num_rows,
            **_publish_index(cfg, number, scan.index),
        )
    _publish_left(cfg.dataset, number, scan.left)
    record = TarRecord(
        at=_place_in(cfg.dataset, tar),
        version=version,
        rules=_rules(cfg),
        shard=shard,
        rejected=dict(sorted(Counter(left.reason for left in scan.left).items())),
    )
    publish_json(_record_path(cfg.dataset, number), asdict(record))
    return Result(record, "", window.num_requests, window.num_read_bytes)


def make_manifest(cfg: IndexConfig, work: Work, broken: Collection[str]) -> Manifest:
    """Add up the records of all tars."""
    records = [work.records[number] for number in work.tars if number in work.records]
    shards = tuple(record.shard for record in records if record.shard)
    rejected: Counter[str] = Counter()
    for record in records:
        rejected.update(record.rejected)
    if not shards:
        raise BadInput(
            f"tars={cfg.tars}: no sample can be used; "
            f"{', '.join(f'{number} {reason}' for reason, number in rejected.items()) or 'none'}. "
            "A sample is KEY.jpg (or jpeg, png, webp) with KEY.txt or KEY.json next to it."
        )
    rows_kept = sum(shard.count for shard in shards)
    manifest = Manifest(
        shards=shards,
        rows_in=rows_kept + rejected.total(),
        rows_kept=rows_kept,
        rejected=dict(sorted(rejected.items())),
        provenance={
            "made_by": "kiln index",
            "tars": cfg.tars,
            "keys": cfg.keys,
            "hash": cfg.hash,
            "broken": sorted(_place_in(cfg.dataset, work.tars[number]) for number in broken),
        },
    )
    return weigh(cfg.dataset, manifest)


def _do(cfg: IndexConfig, work: Work) -> dict[str, str]:
    """Index what is to do, add it to `work.records`; return the numbers of broken tars, and why."""
    todo, broken, num_requests, num_read_bytes = work.todo, dict[str, str](), 0, 0
    threads = ThreadPoolExecutor(cfg.threads, "index")
    try:
        with Countdown("indexing", len(todo), unit="tars") as progress:
            results = threads.map(lambda number: index_tar(cfg, number, work.tars[number]), todo)
            for done, (number, result) in enumerate(zip(todo, results, strict=True), start=1):
                num_requests += result.num_requests
                num_read_bytes += result.num_read_bytes
                if result.record:
                    work.records[number] = result.record
                else:
                    broken[number] = result.why
                    _retract(cfg.dataset, number)
                if done == _EARLY_TARS:
                    _check_keys(cfg.dataset, [r.shard for r in work.records.values() if r.shard])
                progress.update(done)
            progress.finish()
    finally:
        threads.shutdown(cancel_futures=True)
    if todo:
        whole = " and then the tars" if cfg.hash else ""
        say(f"read {num_read_bytes / 1e6:,.1f} MB in {num_requests:,} reads of headers{whole}.")
    return broken


def _check_keys(dataset: Path, shards: Sequence[ShardEntry]) -> None:
    """Raise BadInput if a key is in more than one shard."""
    # Only a share of the ids is in memory at a time.
    num_shares = 1 + sum(shard.count for shard in shards) // _SHARE_SAMPLES
    for share in range(num_shares):
        ids = [_keys(dataset, shard)[1] for shard in shards]
        own = np.sort(np.concatenate([some[some % num_shares == share] for some in ids]))
        repeated = np.unique(own[1:][own[1:] == own[:-1]])
        found: dict[str, ShardEntry] = {}
        for shard in shards if len(repeated) else ():
            keys, numbers = _keys(dataset, shard)
            for row in find_sorted(numbers, repeated)[0].tolist():
                if keys[row] in found:  # else the ids are equal by chance
                    raise BadInput(
                        f"{found[keys[row]].at} and {shard.at} both have a sample "
                        f"{keys[row]!r}, and there are more such names: {len(repeated)} or more. "
                        "If they are different pictures, give keys=by_tar; if they are the same, "
                        "take a tar out of tars=."
                    )
                found[keys[row]] = shard


def _keys(dataset: Path, shard: ShardEntry) -> tuple[list[str], NDArray[np.uint64]]:
    index = read_index(shard.index(dataset), columns=["key"])
    return index["key"].to_pylist(), key_numbers(index)


def _publish_index(cfg: IndexConfig, number: str, index: pa.Table) -> dict[str, Any]:
    if cfg.keys == "by_tar":
        index = with_prefix(index, number)
    path = cfg.dataset / "index" / f"{number}.parquet"
    with published(path) as partial:
        pq.write_table(index, partial, compression="zstd")
        return {"index_bytes": partial.stat().st_size, "index_sha256": file_sha256(partial)}


def _publish_left(dataset: Path, number: str, left: Sequence[Left]) -> None:
    path = quarantine_path(dataset, number)
    if not left:
        remove(path)
        return
    write_quarantine(
        path,
        (
            Rejected(key=one.key, url=None, stage="index", reason=one.reason, detail=one.detail)
            for one in left
        ),
    )


def _retract(dataset: Path, number: str) -> None:
    """Remove what was published of a tar, its record first."""
    remove(_record_path(dataset, number))
    remove(quarantine_path(dataset, number))
    remove(dataset / "index" / f"{number}.parquet")


def _read_record(path: Path) -> TarRecord | None:
    try:
        return TypeAdapter(TarRecord).validate_json(read_bytes(path))
    except ValidationError:
        return None


def _record_path(dataset: Path, number: str) -> Path:
    return dataset / "indexed" / f"{number}.json"


def _rules(cfg: IndexConfig) -> str:
    return f"keys={cfg.keys} hash={cfg.hash}"


def _place_in(dataset: Path, tar: Path) -> str:
    """Say where a tar lies, so that a dataset with its tars inside can be moved."""
    inside = is_local(tar) and is_local(dataset) and tar.is_relative_to(dataset.absolute())
    return str(tar.relative_to(dataset.absolute()) if inside else tar)
