"""One task of a sweep's array: the batch script of its run, with the log in that run's folder."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm import batch
from slurm.runfile import nth_run


def main(argv: Sequence[str]) -> int:
    """`python -m slurm.sweep SWEEP FIRST`: the array's task 0 works on run FIRST."""
    run = nth_run(Path(argv[0]), int(argv[1]) + int(os.environ["SLURM_ARRAY_TASK_ID"]))
    path = run / "attempts" / f"slurm_{os.environ['SLURM_JOB_ID']}.log"
    with path.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return batch.main([str(run)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
