"""How long does a checkpoint stop training, how large is it, and how fast is it loaded?"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoint_rank import ROUNDS
from benchmarks.data_wait import publish
from benchmarks.harness import claim_at_most, row_of, write_result
from benchmarks.train_memory import MODEL, NUM_PARAMETERS
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.local import run_ranks

WORLD = 2
IMAGES = 8
PROCESSES = 3
"""Each makes rounds of its own."""
METRICS = {
    "step": ("training", "a step", "s"),
    "step_beside_writer": ("kiln", "the step beside the writer", "s"),
    "kiln_stall": ("kiln", "stall", "s"),
    "deepspeed_stall": ("DeepSpeed save_checkpoint", "stall", "s"),
    "kiln_rest": ("kiln", "rest of the writing, behind that step", "s"),
    "kiln_verify": ("kiln", "verify all hashes", "s"),
    "kiln_load": ("kiln", "load", "s"),
    "deepspeed_load": ("DeepSpeed save_checkpoint", "load", "s"),
    "kiln_bytes": ("kiln", "size, with the average", "MB"),
    "deepspeed_bytes": ("DeepSpeed save_checkpoint", "size, without an average", "MB"),
}


def rounds(dataset: Path, folder: Path) -> list[dict[str, float]]:
    """Run the ranks once."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / "out.json"
        words = [
            f"data.dataset={dataset}",
            f"run={scratch}",
            f"total_images={(2 * ROUNDS + 2) * IMAGES}",
            f"batch.global_batch_images={IMAGES}",
            f"batch.micro_batch_images={IMAGES // WORLD}",
            f"cluster.ranks_per_node={WORLD}",
            f"model.num_parameters={NUM_PARAMETERS}",
            *MODEL,
        ]
        run_ranks(
            "benchmarks.checkpoint_rank",
            [json.dumps({"words": words, "out": str(out)})],
            num_ranks=WORLD,
            log_dir=Path(scratch),
            env={"OMP_NUM_THREADS": "1"},
        )
        found: list[dict[str, float]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> int:
    """Measure, and write the result."""
    build_cpu_op()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        publish(folder / "dataset")
        found = [one for _ in range(PROCESSES) for one in rounds(folder / "dataset", folder)]
    case = f"{NUM_PARAMETERS / 1e6:.0f} M parameters, {WORLD} ranks, ZeRO 1, fp32, local disk"
    rows = []
    for key, (system, metric, unit) in METRICS.items():
        values = [one[key] / (1e6 if unit == "MB" else 1) for one in found]
        rows.append(
            row_of(
                values,
                case=case,
                system=system,
                metric=metric,
                unit=unit,
            )
        )

    def ratio(of: str, to: str) -> float:
        return statistics.median(one[of] / one[to] for one in found)

    claims = [
        claim_at_most(
            "stall, over that of DeepSpeed's save_checkpoint",
            measured=ratio("kiln_stall", "deepspeed_stall"),
            target=0.1,
        ),
        claim_at_most("stall, in steps", measured=ratio("kiln_stall", "step"), target=1.0),
        claim_at_most(
            "size, over DeepSpeed's and 4 bytes per parameter for the average",
            measured=statistics.median(
                one["kiln_bytes"] / (one["deepspeed_bytes"] + 4 * NUM_PARAMETERS) for one in found
            ),
            target=1.05,
        ),
    ]
    write_result("checkpoint", question=str(__doc__), rows=rows, claims=claims)
    return 0


if __name__ == "__main__":
    sys.exit(main())
