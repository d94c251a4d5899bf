"""One rank that trains with Kiln and saves; and with DeepSpeed, which saves in its own way."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_memory import Silent
from trainer.build import Built, build, find_checkpoint, restore
from trainer.config import TrainConfig
from trainer.frozen import compose
from trainer.loop import Progress, take_step
from trainer.plan import make_plan
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.comm import Comm
from trainer.runtime.env import read_rank_env
from trainer.runtime.local import die_with_parent
from trainer.runtime.rundir import checkpoints_of, complete
from trainer.runtime.saver import Saver
from trainer.runtime.signals import StopFlag
from trainer.runtime.snapshot import Snapshot

ROUNDS = 6
"""The first does not count: it makes the buffers."""


class Rounds:
    """Trains, saves in both ways, loads in both ways; all ranks together."""

    def __init__(self, cfg: TrainConfig, comm: Comm, scratch: Path) -> None:
        """Build, and take the first step."""
        self._cfg, self._comm, self._scratch = cfg, comm, scratch
        self._built, self._progress, self._step = _trained(cfg, comm)
        theirs, _, _ = _trained(cfg, comm)  # DeepSpeed's loading leaves no fragments behind
        self._theirs: Any = theirs.engine.model
        self._saver = Saver(
            checkpoints_of(cfg),
            Snapshot(self._built.engine.fragments, self._built.ema),
            comm,
            cfg.checkpoint,
            attempt=0,
            shapes=self._built.shapes,
            averages=list(self._built.ema.tensors()),
        )

    def round(self) -> dict[str, float]:
        """Save and load once in each way; return seconds and bytes."""
        step_s = self._timed(self._step)
        stall_s = self._timed(lambda: self._saver.save(self._state()))
        beside_s = self._timed(self._step)
        self._saver.poll()
        finish_s = self._timed(self._saver.finish)
        engine, theirs = self._theirs, self._scratch / "deepspeed"
        save_s = self._timed(lambda: engine.save_checkpoint(theirs, tag="it"))
        root = checkpoints_of(self._cfg)
        newest = complete(root)[-1]
        found = {
            "step": step_s,
            "kiln_stall": stall_s,
            "step_beside_writer": beside_s,
            "kiln_rest": finish_s,
            "deepspeed_stall": save_s,
            "kiln_verify": self._timed(lambda: find_checkpoint(root, self._comm)),
            "kiln_load": self._timed(lambda: restore(self._built, newest)),
            "deepspeed_load": self._timed(lambda: engine.load_checkpoint(theirs, tag="it")),
        }
        found["kiln_bytes"] = float(_bytes_under(newest))
        found["deepspeed_bytes"] = float(_bytes_under(theirs))
        self._comm.sum([0.0])
        if self._comm.rank == 0:
            shutil.rmtree(theirs)
        return found

    def _state(self) -> TrainState:
        dataset, encoding = self._built.fingerprints
        return TrainState(
            step=self._progress.step,
            images_seen=self._progress.images_seen,
            seed=self._cfg.seed,
            dataset_fingerprint=dataset,
            encoding_fingerprint=encoding,
            stream=self._built.feed.to_json(self._progress.stream),
            losses=[],
        )

    def _timed(self, action: Callable[[], object]) -> float:
        """Seconds until the last rank is done, if all begin together."""
        self._comm.sum([0.0])
        began_s = time.perf_counter()
        action()
        self._comm.sum([0.0])
        return time.perf_counter() - began_s


def _trained(cfg: TrainConfig, comm: Comm) -> tuple[Built, Progress, Callable[[], object]]:
    """Build, take the first step, and return what takes more."""
    built = build(cfg, make_plan(cfg), comm, None)
    progress, parts = restore(built, None), built.parts()
    batches = parts.read(progress.stream)

    def step() -> None:
        take_step(parts, batches, progress, StopFlag(), Silent())

    step()
    return built, progress, step


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Argument: a JSON of {words, out}."""
    args = json.loads(sys.argv[1])
    die_with_parent()
    env = read_rank_env()
    torch.set_num_threads(1)
    cfg = compose(TrainConfig, "train", args["words"])
    comm = Comm(env, "cpu")
    out = Path(args["out"])
    rounds = Rounds(cfg, comm, out.parent)
    found = [rounds.round() for _ in range(ROUNDS)][1:]
    if env.rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    comm.close()


if __name__ == "__main__":
    main()
