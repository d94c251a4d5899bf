"""Train a latent diffusion model or its autoencoder; the same command again resumes."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.command import run_command
from trainer.config import TrainConfig
from trainer.data.opening import Dataset
from trainer.data.publish import publish_json
from trainer.datasets import dataset_places, find_datasets
from trainer.encoded import check_encoders, require_record
from trainer.errors import BadInput
from trainer.feed import check_feed
from trainer.place import storage
from trainer.plan import Plan, make_plan, rows
from trainer.plan_forecast import predictions
from trainer.runtime.checkpoint import TrainState, newest_valid, read_state
from trainer.runtime.compiled import build_cpu_op
from trainer.runtime.ending import read_stuck
from trainer.runtime.local import ALLOCATOR_ENV, run_ranks
from trainer.runtime.rundir import (
    attempt_dir,
    checkpoints_of,
    config_changes,
    freeze_config,
    locked,
    new_attempt,
)
from trainer.runtime.signals import EXIT_REQUEUE

log = logging.getLogger(__name__)


def run(cfg: TrainConfig) -> int:
    """Check everything that can be checked, freeze the run, start its ranks and wait for them."""
    plan = make_plan(cfg)
    if cfg.cluster.kind != "local":
        raise BadInput(
            f"cluster.kind={cfg.cluster.kind}: these {plan.num_ranks} ranks need "
            f"{cfg.cluster.num_nodes} nodes. `kiln launch` renders their sbatch script; for this "
            "machine give cluster=local."
        )
    folder = Path(cfg.run)
    with ExitStack() as stack:
        for where in (*dataset_places(cfg.data), checkpoints_of(cfg)):
            stack.enter_context(storage(where))
        datasets = find_datasets(cfg)
        check_feed(cfg, datasets, None)
        with locked(folder):
            changes = config_changes(folder, cfg)
            newest = newest_valid(checkpoints_of(cfg))
            state = read_state(newest) if newest else None
            check_feed(cfg, datasets, state.stream if state else None, files=state is None)
            check_latents(cfg, datasets, state)
            if cfg.start_from is not None and (state is None or cfg.lora is not None):
                from trainer.begin import check_begin  # noqa: PLC0415 - loads diffusers

                check_begin(cfg)
            for line in changes:
                log.warning("changed since the run began: %s", line)
            freeze_config(folder, cfg)
            if state is None:
                return _start(folder, cfg, plan)
            if state.images_seen >= cfg.total_images:
                log.info("%s: nothing to do, all %d steps are done", folder, state.step)
                return 0
            plan = make_plan(cfg, step=state.step, images_seen=state.images_seen)
            return _start(folder, cfg, plan)


def check_latents(cfg: TrainConfig, datasets: Sequence[Dataset], state: TrainState | None) -> None:
    """Refuse encoders that a run cannot be trained with, or was not trained with until now."""
    found = ""
    if cfg.data.latents == "online":
        from trainer.online import check_online  # noqa: PLC0415 - loads diffusers

        found = check_online(cfg, datasets)
        if state is not None:
            require_record(Path(cfg.run))
    elif datasets and datasets[0].encoding is not None:
        found = datasets[0].encoding.fingerprint
    if state is not None:
        check_encoders(state.encoding_fingerprint, found)


def _start(folder: Path, cfg: TrainConfig, plan: Plan) -> int:
    predicted = recorded_predictions(cfg)
    if cfg.cluster.device == "cpu":
        build_cpu_op()
    attempt = new_attempt(folder)
    publish_json(folder / "plan.json", asdict(plan) | predicted)
    if not cfg.logging.quiet:
        for what, how_much in rows(cfg, plan):
            log.info("  %-16s %s", what, how_much)
    code = run_ranks(
        "trainer.worker",
        [str(folder)],
        num_ranks=plan.num_ranks,
        log_dir=attempt_dir(folder, attempt),
        env={
            **{name: os.environ.get(name, value) for name, value in ALLOCATOR_ENV.items()},
            "KILN_ATTEMPT": str(attempt),
            "OMP_NUM_THREADS": str(cfg.engine.threads_per_rank),
        },
    )
    if code != EXIT_REQUEUE:
        return code
    stuck = read_stuck(attempt_dir(folder, attempt))
    if stuck is not None:
        log.error("%s The stacks of its ranks are in their logs.", stuck)
    log.info("the same command continues: kiln train %s", " ".join(sys.argv[2:]))
    return 128 + signal.SIGINT if stuck is None else EXIT_REQUEUE


def recorded_predictions(cfg: TrainConfig) -> dict[str, Any]:
    """Predict for the plan's record; a run that can be trained needs no prediction."""
    try:
        return {"predicted": predictions(cfg)}
    except BadInput as error:
        log.warning("nothing is predicted of this run: %s", error)
        return {}


def main(argv: Sequence[str]) -> int:
    """`kiln train [experiment=...] [key=value ...]`."""
    return run_command(run, TrainConfig, "train", argv)
