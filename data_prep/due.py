"""Find once, by content, which units of a dataset or an encoding are missing or damaged."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data_prep.config import EncodeConfig, PrepareConfig
from data_prep.encode_records import is_current, retract, survey
from data_prep.policy import load_policy
from data_prep.prepare import locked, make_work
from data_prep.publish import retract_unit
from trainer.data.manifest import ENCODING, MANIFEST, load_manifest
from trainer.place import remove, storage

Recheck = Literal["sizes", "hashes"]


@dataclass(frozen=True)
class Due:
    """What there is to do."""

    units: Sequence[int]
    """Numbers of the units that are missing or were damaged; none of these is there any more."""
    total: int
    """Units that there should be."""
    is_finished: bool
    """Nothing is left to do, not even the list of all units."""


def due_rows(cfg: PrepareConfig, recheck: Recheck) -> Due:
    """Plan a source and find what `kiln prepare` has to do; take back damaged units.

    After that the commands that share the work need only look at sizes.
    """
    with storage(cfg.dataset), locked(cfg.dataset, wait=True):
        work = make_work(replace(cfg, recheck=recheck), load_policy(cfg.policy))
        for unit in work.todo:
            retract_unit(cfg.dataset, unit.name)
        shutil.rmtree(cfg.scratch_folder, ignore_errors=True)
        return Due(
            [unit.number for unit in work.todo],
            len(work.units),
            is_finished=not work.todo and (cfg.dataset / MANIFEST).exists(),
        )


def due_latents(cfg: EncodeConfig, recheck: Recheck) -> Due:
    """Find what `kiln encode` has to do; take back damaged sidecars."""
    with storage(cfg.dataset), locked(cfg.dataset, wait=True, make=False):
        manifest = load_manifest(cfg.dataset)
        work = survey(replace(cfg, recheck=recheck), manifest)
        finished = work.folder / ENCODING
        if work.todo:
            remove(finished)
        for shard in work.todo:
            retract(work.folder, shard.number)
        return Due(
            [int(shard.number) for shard in work.todo],
            len(manifest.shards),
            is_finished=not work.todo and not work.leftovers and is_current(finished, work),
        )
