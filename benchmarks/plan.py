"""Do ranks hold what `kiln plan` says, and what do logs, ledger and meters cost a step?"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Claim, Row, claim_at_most, row_of, write_result
from benchmarks.held_rank import build_counter
from trainer.config import TrainConfig
from trainer.frozen import compose
from trainer.plan import make_plan
from trainer.plan_memory import predict_memory
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.local import run_ranks

WORLDS = (1, 2, 4)
STAGES = (0, 1, 2, 3)
LARGE = (
    "model.block_channels=[128,256,512]",
    "model.norm_groups=32",
    "model.num_parameters=64548356",
)
CASES: dict[str, tuple[str, ...]] = {
    "4.8 M parameters, fp32": (),
    "4.8 M, fp32, 32 images": ("batch.micro_batch_images=32",),
}
MORE: dict[str, tuple[str, ...]] = {
    "4.8 M, bf16": ("engine.precision=bf16",),
    "4.8 M, fp32, 32 images, recomputed": (
        "batch.micro_batch_images=32",
        "engine.activation_checkpointing=true",
    ),
    "4.8 M, fp32, 2 micro-batches a step": ("batch.global_batch_images=4", "total_images=8"),
    "64.5 M, fp32": LARGE,
}
STEPS = 2
ACCOUNT_STEPS = 60
_MIB = 2**20


def words_of(world: int, stage: int, changes: Sequence[str]) -> list[str]:
    """Write a run of two steps, one micro-batch each."""
    micro = next((w.split("=")[1] for w in changes if w.startswith("batch.micro")), "1")
    batch = world * int(micro)
    return [
        "data.dataset=none",
        "batch.micro_batch_images=1",
        f"total_images={STEPS * batch}",
        f"batch.global_batch_images={batch}",
        f"cluster.ranks_per_node={world}",
        f"engine.zero_stage={stage}",
        *changes,
    ]


def held(folder: Path, counter: Path | None, words: Sequence[str], world: int) -> dict[str, float]:
    """Run real ranks; return what rank 0 wrote."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "out.json"
        told = {
            "words": [*words, f"run={scratch}"],
            "counter": str(counter) if counter else None,
            "out": str(out),
        }
        run_ranks(
            "benchmarks.held_rank",
            [json.dumps(told)],
            num_ranks=world,
            log_dir=Path(scratch),
            env={"OMP_NUM_THREADS": "1"},
        )
        found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return found


def planned_bytes(words: Sequence[str]) -> float:
    """Return what a plan says of the same run."""
    cfg = compose(TrainConfig, "train", list(words))
    return predict_memory(cfg, accumulation_steps=make_plan(cfg).accumulation_steps).device_bytes


def memory(folder: Path, counter: Path) -> tuple[list[Row], list[Claim]]:
    """Measure every stage on every number of ranks, and other cases on two."""
    rows, worst = [], 0.0
    asked = [
        (name, changes, world, stage)
        for name, changes in CASES.items()
        for world in WORLDS
        for stage in STAGES
    ]
    asked += [(name, changes, 2, stage) for name, changes in MORE.items() for stage in (1, 2, 3)]
    for name, changes, world, stage in asked:
        words = words_of(world, stage, changes)
        measured = held(folder, counter, words, world)["most_bytes"]
        planned = planned_bytes(words)
        worst = max(worst, abs(measured / planned - 1))
        case = f"{name}, {world} rank(s), ZeRO {stage}"
        for system, value in (("measured", measured), ("`kiln plan`", planned)):
            rows.append(
                row_of(
                    [value / _MIB], case=case, system=system, metric="memory per rank", unit="MiB"
                )
            )
    text = f"of {len(asked)} cases the one that is furthest from its plan: share of the plan"
    return rows, [claim_at_most(text, measured=worst, target=0.05)]


def account_costs(folder: Path) -> tuple[list[Row], list[Claim]]:
    """Measure what is written and metered beside training, on two ranks."""
    words = [
        *words_of(2, 1, ("batch.micro_batch_images=16",)),
        f"total_images={ACCOUNT_STEPS * 32}",
        "checkpoint.every_images=1000000",
        "logging.wandb=off",
        "logging.quiet=true",
    ]
    found = held(folder, None, words, 2)
    case = "the demo's network, 2 ranks"
    rows = [
        row_of([found["step_s"]], case=case, system="kiln", metric="step", unit="s"),
        row_of([found["with"]], case=case, system="kiln", metric="collectives a step", unit=""),
    ]
    return rows, [
        claim_at_most(
            "logs, ledger and meters: share of a step", measured=found["share"], target=0.01
        ),
        claim_at_most(
            "collectives that accounts add to a step",
            measured=found["with"] - found["without"],
            target=0.0,
        ),
    ]


def main() -> None:
    """Measure and write the result."""
    build_cpu_op()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, claims = memory(folder, build_counter(folder))
        more, more_claims = account_costs(folder)
    write_result("plan", question=str(__doc__), rows=[*rows, *more], claims=[*claims, *more_claims])


if __name__ == "__main__":
    main()
