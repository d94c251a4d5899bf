"""How much memory a rank takes for weights, gradients, optimizer and averages, by ZeRO stage."""

import gc
import json
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import torch

from benchmarks.harness import Claim, Row, claim_at_most, row_of
from trainer.build import build, restore
from trainer.config import TrainConfig
from trainer.frozen import compose
from trainer.loop import Mine, Progress, StepFacts, train
from trainer.plan import Plan, make_plan
from trainer.runtime.comm import Comm
from trainer.runtime.env import read_rank_env
from trainer.runtime.local import die_with_parent, run_ranks
from trainer.runtime.signals import StopFlag

MODEL = ("model.block_channels=[128,256,512]", "model.norm_groups=32")
NUM_PARAMETERS = 64_548_356
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc then gives every tensor back when it is freed, so that what is measured is what is held."""
STEPS = 3
WORLD = 2
_MIB = 2**20


class Silent:
    """Watches a training and does nothing."""

    def span(self, _bucket: str) -> AbstractContextManager[None]:
        """Account for nothing."""
        return nullcontext()

    def at(self, _phase: str) -> None:
        """Hear nothing."""

    def spent_j(self) -> tuple[float, float]:
        """Have no meter."""
        return 0.0, 0.0

    def after_step(self, _progress: Progress, _facts: StepFacts) -> None:
        """Do nothing."""

    def roll_back(self, _progress: Progress, fault: str, _mine: Mine) -> None:
        """Noise gives no reason to."""
        raise AssertionError(fault)


class Peak(Silent):
    """Looks how high memory was."""

    def __init__(self) -> None:
        self.bytes = 0

    def at(self, _phase: str) -> None:
        """Look at the memory in use."""
        self.bytes = max(self.bytes, psutil.Process().memory_full_info().uss)


def words(dataset: Path, stage: int) -> list[str]:
    """A larger network than the demo's on one image per rank, so that activations are small."""
    return [
        f"data.dataset={dataset}",
        f"total_images={STEPS * WORLD}",
        f"batch.global_batch_images={WORLD}",
        "batch.micro_batch_images=1",
        f"cluster.ranks_per_node={WORLD}",
        f"engine.zero_stage={stage}",
        f"model.num_parameters={NUM_PARAMETERS}",
        *MODEL,
    ]


def memory(dataset: Path, folder: Path) -> tuple[list[Row], list[Claim]]:
    """Measure all stages on two ranks, beside what `kiln plan` says."""
    rows, claims = [], []
    for stage in range(4):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            out = Path(scratch) / "out.json"
            told = [*words(dataset, stage), f"run={scratch}"]
            run_ranks(
                "benchmarks.train_memory",
                [json.dumps({"words": told, "out": str(out)})],
                num_ranks=WORLD,
                log_dir=Path(scratch),
                env={"OMP_NUM_THREADS": "1", **EXACT_MALLOC},
            )
            found = json.loads(out.read_text(encoding="utf-8"))
        planned = planned_mib(make_plan(compose(TrainConfig, "train", told)))
        case = f"{NUM_PARAMETERS / 1e6:.0f} M parameters, {WORLD} ranks, fp32, ZeRO {stage}"
        for system, value in (("measured", found["peak_mib"]), ("`kiln plan`", planned)):
            rows.append(_row(case, system, "memory per rank", value))
        rows.append(_row(case, "measured", "of it averages", found["ema_mib"]))
        claims.append(
            claim_at_most(
                f"ZeRO {stage}: measured memory, over that of `kiln plan`",
                measured=found["peak_mib"] / planned,
                target=1.25,
            )
        )
        claims.append(
            claim_at_most(
                f"ZeRO {stage}: averages, over 4 bytes x parameters / ranks",
                measured=found["ema_mib"] * _MIB / (4 * NUM_PARAMETERS / WORLD),
                target=1.01,
            )
        )
    return rows, claims


def planned_mib(plan: Plan) -> float:
    """What a plan says of weights, gradients, optimizer and averages."""
    return 1024 * (plan.weights_gib + plan.states_gib)


def _row(case: str, system: str, metric: str, value: float) -> Row:
    return row_of([value], case=case, system=system, metric=metric, unit="MiB")


def main() -> None:
    """Argument: a JSON of {words, out}."""
    args = json.loads(sys.argv[1])
    die_with_parent()
    env = read_rank_env()
    torch.set_num_threads(1)
    cfg = compose(TrainConfig, "train", args["words"])
    plan = make_plan(cfg)
    comm = Comm(env, "cpu")
    import deepspeed  # noqa: F401, PLC0415 - its code is not what is measured

    gc.collect()
    before = psutil.Process().memory_full_info().uss
    peak = Peak()
    built = build(cfg, plan, comm, None)
    train(built.parts(), restore(built, None), StopFlag(), peak)
    averages = [piece for pieces in built.ema.tensors().values() for piece in pieces]
    ema_mib = sum(piece.untyped_storage().nbytes() for piece in averages) / _MIB
    totals = comm.sum([(peak.bytes - before) / _MIB, ema_mib])
    if env.rank == 0:
        found = {"peak_mib": totals[0] / comm.world, "ema_mib": totals[1] / comm.world}
        Path(args["out"]).write_text(json.dumps(found), encoding="utf-8")
    comm.close()


if __name__ == "__main__":
    main()
