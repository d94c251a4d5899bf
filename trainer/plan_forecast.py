"""All predictions of a run together: what a page shows, and what RUN/plan.json keeps."""

import logging
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from slurm.attempts import Cause
from slurm.history import Chapter, read_history
from slurm.runfile import run_folders
from trainer.config import TrainConfig
from trainer.errors import BadInput
from trainer.hardware import Accelerator
from trainer.observe.carbon import Rate, rates
from trainer.plan import Plan, make_plan
from trainer.plan_memory import GIB, Memory, predict_memory
from trainer.plan_needs import RESTART_S, Failures, Needs, predict_needs
from trainer.plan_options import what_fits
from trainer.plan_speed import Speed, accelerator_of, predict_speed

log = logging.getLogger(__name__)

RSC_MTTF_GPU_H = 7.9 * 1024
"""Meta's research clusters: a failure every 7.9 hours of a job on 1,024 GPUs (Kokolis et al. 2024,
arXiv 2410.21680)."""
LEAST_FAILURES = 5
"""So many in earlier runs say more than a published figure."""
_RUNS_DEPTH = 2
"""Of a runs folder: runs, and those in sweeps and pipelines."""
_S_PER_H = 3600.0
_FAILURES: frozenset[Cause] = frozenset({"lost", "stuck"})
"""What hardware or a site may cause. A rank that crashed is left out: most often it met a bug, and
meets it again at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one run."""

    plan: Plan
    memory: Memory
    speed: Speed | None
    """None where nothing is known of the device, or of the network's speed on it."""
    gpu: Accelerator | None
    failures: Failures
    needs: Needs | None
    """None also where the run never ends with these failures."""
    carbon: Rate | None
    price: Rate | None


def forecast(cfg: TrainConfig) -> Forecast:
    """Predict all that can be.

    Raises:
        BadInput: The run cannot work; says with which value it would.
    """
    return _forecast(cfg, check_run(cfg))


def _forecast(cfg: TrainConfig, plan: Plan) -> Forecast:
    memory = predict_memory(cfg, accumulation_steps=plan.accumulation_steps)
    speed, gpu = predict_speed(cfg, accumulation_steps=plan.accumulation_steps), accelerator_of(cfg)
    carbon, price = rates(cfg.accounts)
    failures = failures_of(cfg, Path(cfg.run).parent)
    needs = None
    if speed is not None and gpu is not None:
        needs = predict_needs(
            cfg, speed, gpu, failures, steps=plan.total_steps, carbon=carbon, price=price
        )
    return Forecast(
        plan=plan,
        memory=memory,
        speed=speed,
        gpu=gpu,
        failures=failures,
        needs=needs,
        carbon=carbon,
        price=price,
    )


def check_run(cfg: TrainConfig) -> Plan:
    """Make a plan, and refuse what `make_plan` leaves to predictions.

    That is activations that do not fit, jobs that are too short, and rates that cannot be read.

    Raises:
        BadInput: It cannot work; says with which value it would.
    """
    plan = make_plan(cfg)
    for rate in rates(cfg.accounts):
        if rate is not None:
            rate.overall_mean()
    _check_memory(cfg, plan)
    _check_time_to_train(cfg, predict_speed(cfg, accumulation_steps=plan.accumulation_steps))
    return plan


def _check_memory(cfg: TrainConfig, plan: Plan) -> None:
    memory = predict_memory(cfg, accumulation_steps=plan.accumulation_steps)
    limit_gib = cfg.cluster.device_memory_gib
    if memory.device_bytes > limit_gib * GIB:
        raise BadInput(
            f"batch.micro_batch_images={cfg.batch.micro_batch_images} takes "
            f"{memory.device_bytes / GIB:.1f} GiB per rank, {memory.activations_bytes / GIB:.1f} "
            f"of it activations, and cluster.device_memory_gib={limit_gib:g}. {what_fits(cfg)}"
        )


def _check_time_to_train(cfg: TrainConfig, speed: Speed | None) -> None:
    """Refuse Slurm jobs that end before they have trained."""
    if speed is None or cfg.cluster.kind != "slurm":
        return
    least_s = RESTART_S + cfg.cluster.warn_before_kill_s + speed.step_s.mid
    if cfg.cluster.time_limit_min * 60 < least_s:
        raise BadInput(
            f"cluster.time_limit_min={cfg.cluster.time_limit_min} leaves no time for a step: ranks "
            f"start in {RESTART_S:g} s (assumed), a step takes {speed.step_s.mid:.3g} s, and "
            f"cluster.warn_before_kill_s={cfg.cluster.warn_before_kill_s} are kept for the last "
            f"checkpoint. Try cluster.time_limit_min={ceil(2 * least_s / 60)}."
        )


def predictions(cfg: TrainConfig) -> dict[str, Any]:
    """Say what can be compared with what is measured later, for RUN/plan.json.

    Raises:
        BadInput: As `forecast`, but for what does not fit.
    """
    plan = make_plan(cfg)
    memory = predict_memory(cfg, accumulation_steps=plan.accumulation_steps)
    found: dict[str, Any] = {
        "tensors_gib": (memory.device_bytes - memory.runtime_bytes) / GIB,
        "on_host": memory.on_host,
    }
    if accelerator_of(cfg) is None:
        return found
    made = _forecast(cfg, plan)
    if made.speed is not None:
        rate = made.speed.images_per_s
        found |= {
            "images_per_s": [rate.low, rate.mid, rate.high],
            "mfu_frac": made.speed.mfu_frac.mid,
        }
    if made.needs is not None:
        kwh = made.needs.kwh.mid / cfg.accounts.pue
        found |= {
            "j_per_image": kwh * 3.6e6 / (plan.total_steps * plan.images_per_step),
            "wall_h": made.needs.wall_h.mid,
        }
    return found


def in_short(cfg: TrainConfig) -> str:
    """Say in a line what a run takes.

    Raises:
        BadInput: As `forecast`.
    """
    made = forecast(cfg)
    found = [
        f"{made.memory.device_bytes / GIB:,.2f} GiB of {cfg.cluster.device_memory_gib:g} per rank"
    ]
    if made.speed is not None:
        found.append(f"{made.speed.images_per_s} images/s")
        if made.needs is None:
            found.append(f"does not finish with its failures ({made.failures.words})")
    if made.needs is not None:
        found += [
            f"{made.needs.wall_h} h with queues",
            f"{made.needs.gpu_hours} GPU h",
        ]
    return "; ".join(found)


def failures_of(cfg: TrainConfig, runs: Path) -> Failures:
    """Return what is stated, or measured in a runs folder, or published."""
    stated = cfg.cluster.mttf_gpu_h
    if stated is not None:
        return Failures(stated, f"cluster.mttf_gpu_h={stated:g}, stated")
    node_hours, found = measured_failures(runs)
    if found >= LEAST_FAILURES:
        gpu_hours = node_hours * cfg.cluster.ranks_per_node
        words = f"{found} failures in {gpu_hours:,.0f} GPU h of the runs in {runs}"
        return Failures(gpu_hours / found, words)
    words = "7.9 h at 1,024 GPUs, published of Meta's clusters (arXiv 2410.21680)"
    return Failures(RSC_MTTF_GPU_H, words)


def measured_failures(runs: Path) -> tuple[float, int]:
    """Return node hours and failures of the runs in a folder, from their attempts.

    What cannot be read, as it is torn, foreign or of another Kiln, does not count.
    """
    node_hours, failures = 0.0, 0
    for folder in _readable_runs(runs):
        try:
            chapters = read_history(folder, goes_on=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("failures of %s are not counted, it cannot be read: %s", folder, error)
            continue
        node_hours += sum((each.lasted_s or 0.0) / _S_PER_H * len(each.nodes) for each in chapters)
        failures += sum(map(_is_failure, chapters))
    return node_hours, failures


def _readable_runs(runs: Path) -> list[Path]:
    try:
        return list(run_folders(runs, depth=_RUNS_DEPTH)) if runs.is_dir() else []
    except OSError as error:
        log.warning("no failures are counted, %s cannot be read: %s", runs, error)
        return []


def _is_failure(chapter: Chapter) -> bool:
    """Say whether it ended what was training already."""
    if chapter.reached_step <= chapter.from_step:
        return False
    return chapter.end is not None and chapter.end.cause in _FAILURES
