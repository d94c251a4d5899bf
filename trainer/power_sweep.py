"""Measure what power limits of GPUs cost in speed and save in joules, on a training's own steps.

For each limit: set it on the GPUs of this job, take steps, and read the energy counters. The limits
are set back to what they were, also after an error, Ctrl-C or SIGTERM.
"""

import json
import logging
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from trainer.command import run_command
from trainer.config_power import PowerSweepConfig
from trainer.datasets import dataset_places, find_datasets
from trainer.errors import BadInput
from trainer.frozen import write_yaml
from trainer.observe.nvml import NvmlReader
from trainer.observe.power_limit import (
    LimitedGpus,
    Stopped,
    check_limits,
    gpus_of,
    restored,
    unusual,
)
from trainer.place import storage
from trainer.plan import Plan, make_plan
from trainer.power_points import CONFIG, RECORD, points_of, table, verdict
from trainer.runtime.ending import read_stuck
from trainer.runtime.env import visible_gpus
from trainer.runtime.local import ALLOCATOR_ENV, run_ranks
from trainer.runtime.rundir import attempt_dir, locked, new_attempt
from trainer.runtime.signals import EXIT_REQUEUE

log = logging.getLogger(__name__)


def run(cfg: PowerSweepConfig) -> int:
    """Refuse what cannot be measured here; else measure."""
    gpus = NvmlReader.open()
    if gpus is None:
        raise BadInput(
            "there is no NVIDIA driver on this machine (NVML does not open), and of other devices "
            "Kiln sets no power limit. Run this where the GPUs are: docs/cluster.md has the srun "
            "line."
        )
    if cfg.cluster.device != "cuda":
        raise BadInput(
            f"cluster.device={cfg.cluster.device}: only GPUs get a power limit. Give "
            "cluster.device=cuda."
        )
    return sweep(cfg, gpus, visible_gpus())


def sweep(
    cfg: PowerSweepConfig,
    gpus: LimitedGpus,
    visible: Sequence[str] | None,
    *,
    rank_module: str = "trainer.power_rank",
) -> int:
    """Check everything that can be checked, then start the ranks and wait for them.

    Args:
        cfg: What to measure.
        gpus: The GPUs of this machine.
        visible: Those of this job, as CUDA_VISIBLE_DEVICES names them; None: all.
        rank_module: What is run once per rank.
    """
    if cfg.cluster.kind != "local":
        raise BadInput(
            f"cluster.kind={cfg.cluster.kind}: a power sweep measures the GPUs of the machine that "
            "it runs on. Give cluster=local and what one node has of ranks; docs/cluster.md has "
            "the srun line."
        )
    plan, folder = make_plan(cfg), Path(cfg.run)
    if (folder / "config.yaml").exists():
        raise BadInput(f"run={folder} is a training run. Choose another run= for a power sweep.")
    uuids = gpus_of(gpus.uuids(), visible, num_ranks=cfg.cluster.ranks_per_node)
    check_limits(gpus, uuids, cfg.watts)
    _check_data(cfg)
    for line in unusual(gpus, uuids):
        log.warning("%s", line)
    with locked(folder, doing="measured"):
        (folder / RECORD).unlink(missing_ok=True)
        write_yaml(cfg, folder / CONFIG)
        if cfg.cluster.device == "cpu":
            from trainer.runtime.compiled import build_cpu_op  # noqa: PLC0415 - loads torch

            build_cpu_op()
        attempt = new_attempt(folder)
        try:
            with restored(gpus, uuids):
                code = _run_ranks(cfg, plan, attempt, [rank_module, str(folder), ",".join(uuids)])
        except Stopped as stopped:
            log.error("stopped by %s", stopped)
            code = EXIT_REQUEUE
    return _outcome(folder, attempt, code)


def _check_data(cfg: PowerSweepConfig) -> None:
    """Refuse data that no rank could train on."""
    from trainer.feed import check_feed  # noqa: PLC0415 - loads torch
    from trainer.train import check_latents  # noqa: PLC0415 - loads torch

    with ExitStack() as stack:
        for where in dataset_places(cfg.data):
            stack.enter_context(storage(where))
        datasets = find_datasets(cfg)
        check_feed(cfg, datasets, None, files=True)
        check_latents(cfg, datasets, None)
        if cfg.start_from is not None:
            from trainer.begin import check_begin  # noqa: PLC0415 - loads diffusers

            check_begin(cfg)


def _run_ranks(cfg: PowerSweepConfig, plan: Plan, attempt: int, command: Sequence[str]) -> int:
    return run_ranks(
        command[0],
        command[1:],
        num_ranks=plan.num_ranks,
        log_dir=attempt_dir(Path(cfg.run), attempt),
        env={
            **ALLOCATOR_ENV,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's: a rank computes on the GPU that is limited
            "KILN_ATTEMPT": str(attempt),
            "OMP_NUM_THREADS": str(cfg.engine.threads_per_rank),
        },
        # A rank has nothing to save, and limits must be set back before Slurm loses patience.
        forwards_signals=False,
    )


def _outcome(folder: Path, attempt: int, code: int) -> int:
    """Print what was measured; return the command's exit code."""
    stuck = read_stuck(attempt_dir(folder, attempt))
    if stuck is not None:
        log.error("%s The stacks of its ranks are in their logs.", stuck)
    path = folder / RECORD
    if path.exists():
        points = points_of(json.loads(path.read_text(encoding="utf-8")))
        console = Console(highlight=False)
        console.print(table(points))
        console.print(verdict(points), soft_wrap=True)
    if code != EXIT_REQUEUE:
        return code
    log.error("not all limits were measured; all GPUs have the limits again that they had before")
    return EXIT_REQUEUE if stuck is not None else 128 + signal.SIGINT


def main(argv: Sequence[str]) -> int:
    """`kiln power-sweep watts=[200,300,400] [experiment=...] [key=value ...]`."""
    return run_command(run, PowerSweepConfig, "power-sweep", argv)
