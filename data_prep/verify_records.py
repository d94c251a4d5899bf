"""Check a dataset's records: plan, units, history and manifest agree, and no file is foreign."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from data_prep.plan import (
    Generation,
    list_units,
    plan_path,
    plan_quarantine_path,
    read_generations,
)
from data_prep.publish import quarantine_path, read_record, record_path
from trainer.data.manifest import (
    ENCODING,
    MANIFEST,
    REPAIR_ENCODING,
    Encoding,
    Manifest,
    ShardEntry,
    encoding_folder,
)
from trainer.data.tombstones import HISTORY, row_weights_path
from trainer.errors import BadInput
from trainer.place import read_bytes

REPAIR = "Give its `kiln prepare` command again with recheck=hashes: it replaces what is wrong."
REPAIR_PLAN = (
    "Remove the dataset's folder plan/ and give its `kiln prepare` command again: it plans again, "
    "and keeps what is downloaded."
)


def record_problems(dataset: Path, manifest: Manifest) -> Iterator[str]:
    """Compare plan and unit records with the manifest; one that no plan made has neither.

    Args:
        dataset: The folder or URL.
        manifest: What the records must lead to.
    """
    planned = manifest.provenance.get("plan_sha256")
    if planned is None:
        return
    try:
        generations = read_generations(dataset)
    except BadInput as error:
        yield str(error)
        return
    if [plan.plan_sha256 for plan in generations] != planned:
        yield f"{dataset / 'plan'} is not the plan that the manifest was made from. {REPAIR_PLAN}"
    for plan in generations:
        yield from _plan_problems(dataset, plan)
    yield from _unit_problems(dataset, manifest, generations)


def _plan_problems(dataset: Path, plan: Generation) -> Iterator[str]:
    for path, expected in (
        (plan_path(dataset, plan.number), plan.plan_sha256),
        (plan_quarantine_path(dataset, plan.number), plan.quarantine_sha256),
    ):
        yield from hash_problems(path, expected, repair=REPAIR_PLAN)


def _unit_problems(
    dataset: Path, manifest: Manifest, generations: list[Generation]
) -> Iterator[str]:
    """Compare the record of each unit with its plan, its quarantine and the manifest."""
    listed = {shard.number: shard for shard in manifest.shards}
    units = list_units(generations)
    recorded = {path.stem for path in record_path(dataset, "x").parent.glob("*.json")}
    for name in sorted(recorded - {unit.name for unit in units}):
        yield f"{record_path(dataset, name)} is of no unit of the plan. {REPAIR}"
    for unit in units:
        path, record = record_path(dataset, unit.name), read_record(dataset, unit.name)
        if record is None:
            yield f"{path} is missing or damaged. {REPAIR}"
            continue
        if record.rows_in != unit.rows or record.shard != listed.get(unit.name):
            yield f"{path} does not agree with the plan and the manifest. {REPAIR}"
        if record.rows_in != record.rows_kept + sum(record.rejected.values()):
            yield f"{path} does not add up. {REPAIR}"
        quarantine = quarantine_path(dataset, unit.name)
        yield from hash_problems(quarantine, record.quarantine_sha256, repair=REPAIR)


def state_problems(dataset: Path, manifest: Manifest) -> Iterator[str]:
    """Compare the fingerprints that are written down with the one that the shards have."""
    written = json.loads(read_bytes(dataset / MANIFEST)).get("fingerprint")
    if written != manifest.fingerprint:
        yield (
            f"{dataset / MANIFEST} says that its fingerprint is {written}; its shards and weights "
            f"make {manifest.fingerprint}. {REPAIR}"
        )
    path = dataset / HISTORY
    try:
        lines = [json.loads(line) for line in read_bytes(path).splitlines()]
        last = lines[-1]["fingerprint"] if lines else None
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        yield f"{path} is damaged ({error}): put it back from a copy, or remove the wrong line."
        return
    if last != manifest.fingerprint:
        yield (
            f"{path} ends with fingerprint {last}, the manifest has {manifest.fingerprint}: a "
            "command was broken off, which you give again, or put it back from a copy."
        )


def sidecar_problems(dataset: Path, encoding: Encoding) -> Iterator[str]:
    """Compare the records of one encoding's shards with its manifest."""
    folder = encoding_folder(dataset, encoding.fingerprint)
    for entry in encoding.shards:
        path = folder / "units" / f"{entry.number}.json"
        try:
            found = TypeAdapter(ShardEntry).validate_python(json.loads(read_bytes(path))["shard"])
        except FileNotFoundError:
            continue  # `kiln encode` alone would miss it
        except (ValueError, TypeError, KeyError):
            yield f"{path} is damaged. {REPAIR_ENCODING}"
            continue
        if found != entry:
            yield f"{path} does not agree with {folder / ENCODING}. {REPAIR_ENCODING}"


def foreign_files(
    dataset: Path, manifest: Manifest, encodings: Sequence[Encoding]
) -> Iterator[str]:
    """Name files where readers of tars may look that no manifest lists."""
    listed = {row_weights_path(dataset, number) for number in manifest.weights}
    patterns = ["shards/*.tar", "index/*.parquet", "weights/*.npy"]
    folders = [(dataset, manifest.shards)]
    for encoding in encodings:
        own = f"encodings/{encoding.fingerprint}"
        patterns += [f"{own}/*.tar", f"{own}/index/*.parquet"]
        folders.append((dataset / own, encoding.shards))
    for folder, shards in folders:
        listed |= {path for shard in shards for path in (shard.tar(folder), shard.index(folder))}
    names = {str(path) for path in listed}
    for pattern in patterns:
        for path in sorted(dataset.glob(pattern)):
            if str(path) not in names:
                yield f"{path} is in no manifest, and readers may take it: remove it."


def hash_problems(path: Path, expected: str, *, repair: str) -> Iterator[str]:
    """Compare a file with the hash that is on record."""
    try:
        found = hashlib.sha256(read_bytes(path)).hexdigest()
    except FileNotFoundError:
        yield f"{path} is not there. {repair}"
        return
    if found != expected:
        yield f"{path} has sha256 {found[:16]}..., its record says {expected[:16]}... {repair}"
