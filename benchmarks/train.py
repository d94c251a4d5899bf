"""What does a step of Kiln cost beside one of a bare PyTorch loop, and of DDP?"""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.data_wait import publish
from benchmarks.harness import Case, Row, claim_at_most, measure, write_result
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.local import run_ranks

ALLOCATOR_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Makes glibc keep what a step freed for the next one. By default it gives large blocks back to the
kernel, which then zeroes their pages again, every step."""

IMAGES = 32
STEPS = 14
REPETITIONS = 5
PACKAGES = ("torch", "deepspeed")


@dataclass(frozen=True)
class Setup:
    """A system, and how many ranks it has."""

    name: str
    system: str
    world: int
    stage: int = 0
    tuned: bool = False
    """With ALLOCATOR_ENV."""


SETUPS = (
    Setup("bare PyTorch loop", "bare", 1),
    Setup("bare PyTorch loop, allocator settings", "bare", 1, tuned=True),
    Setup("plain DeepSpeed, ZeRO 1", "deepspeed", 1),
    Setup("kiln, ZeRO 0", "kiln", 1, 0),
    Setup("kiln, ZeRO 0, allocator settings", "kiln", 1, 0, tuned=True),
    Setup("kiln, ZeRO 1", "kiln", 1, 1),
    Setup("PyTorch DDP", "ddp", 2),
    Setup("PyTorch DDP, allocator settings", "ddp", 2, tuned=True),
    Setup("plain DeepSpeed, ZeRO 1", "deepspeed", 2),
    Setup("kiln, ZeRO 1", "kiln", 2, 1),
)


class Bench:
    """Runs setups on one dataset, and keeps what they tell besides the time of a step."""

    def __init__(self, folder: Path) -> None:
        """Publish the dataset."""
        self._folder = folder
        self.told: dict[Setup, list[dict[str, float]]] = {}
        publish(folder / "dataset")

    def step_ms(self, setup: Setup) -> float:
        """Run a few steps; return the median."""
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            out = Path(scratch) / "out.json"
            words = [
                f"data.dataset={self._folder}/dataset",
                f"run={scratch}/run",
                f"total_images={STEPS * IMAGES}",
                f"batch.micro_batch_images={IMAGES // setup.world}",
                f"cluster.ranks_per_node={setup.world}",
                f"engine.zero_stage={setup.stage}",
                "checkpoint.every_images=1000000",
                "logging.wandb=off",
                "logging.quiet=true",
                "data.threads=1",
            ]
            run_ranks(
                "benchmarks.train_rank",
                [json.dumps({"system": setup.system, "words": words, "out": str(out)})],
                num_ranks=setup.world,
                log_dir=Path(scratch),
                env={"OMP_NUM_THREADS": "1", **(ALLOCATOR_ENV if setup.tuned else {})},
            )
            found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
        self.told.setdefault(setup, []).append(found)
        return 1000 * found["step_s"]


def shares(bench: Bench) -> list[Row]:
    """Say what of a step of Kiln the averages and the random numbers are."""
    rows = []
    for setup, told in bench.told.items():
        if setup.system == "kiln":
            for name, metric in (("ema_s", "moving average"), ("draws_s", "random numbers")):
                values = sorted(100 * found[name] / found["step_s"] for found in told)
                rows.append(
                    Row(
                        case=case(setup),
                        system=setup.name,
                        metric=f"{metric}, of a step",
                        unit="%",
                        median=values[len(values) // 2],
                        min=values[0],
                        max=values[-1],
                        repetitions=len(values),
                    )
                )
    return rows


def case(setup: Setup) -> str:
    """Name what all systems of a world do."""
    return f"{IMAGES} images, the demo's network, {setup.world} rank(s) of one thread"


def main() -> int:
    """Measure, and write the result."""
    build_cpu_op()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = measure(
            [
                Case(
                    case=case(setup),
                    system=setup.name,
                    metric="step",
                    unit="ms",
                    run=lambda setup=setup: bench.step_ms(setup),  # type: ignore[misc]
                    packages=PACKAGES,
                )
                for setup in SETUPS
            ],
            repetitions=REPETITIONS,
        )
    median = {(row.case, row.system): row.median for row in rows}
    of_step = shares(bench)
    one, two = (case(replace(SETUPS[0], world=world)) for world in (1, 2))
    best = min(median[one, f"kiln, ZeRO {stage}"] for stage in (0, 1))
    claims = [
        claim_at_most(
            "one rank: a step of Kiln, over one of the bare loop",
            measured=best / median[one, "bare PyTorch loop"],
            target=1.05,
        ),
        claim_at_most(
            "two ranks: a step of Kiln, over one of DDP",
            measured=median[two, "kiln, ZeRO 1"] / median[two, "PyTorch DDP"],
            target=1.05,
        ),
        *(
            claim_at_most(
                f"{row.case}, {row.system}: {row.metric}, %", measured=row.median, target=1.0
            )
            for row in of_step
        ),
    ]
    write_result(
        "train",
        question="What does a step of Kiln cost beside one of a bare PyTorch loop, and of DDP?",
        rows=[*rows, *of_step],
        claims=claims,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
