"""`kiln power-sweep` with GPUs that the test plays, and real ranks on the CPU: parent and rank."""

import logging
import os
import sys
from pathlib import Path

from tests.recorded_gpus import SharedGpus
from trainer.config_power import PowerSweepConfig
from trainer.frozen import compose
from trainer.power_rank import work
from trainer.power_sweep import sweep
from trainer.worker import be_rank

UUIDS = ("GPU-a", "GPU-b")


def parent(words: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    cfg = compose(PowerSweepConfig, "power-sweep", words)
    gpus = SharedGpus(Path(cfg.run).parent)
    return sweep(cfg, gpus, None, rank_module="tests.multiproc.power_sweep")


if __name__ == "__main__":
    if "RANK" in os.environ:
        run = Path(sys.argv[1])
        be_rank(
            lambda: work(run, sys.argv[2].split(","), lambda: SharedGpus(run.parent)),
            run,
            command="power-sweep",
        )
    sys.exit(parent(sys.argv[1:]))
