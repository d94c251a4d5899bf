"""The accounts of an attempt: seconds and joules of each node, and what rank 0 tells of it all."""

import logging
import resource
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch

from trainer.config import TrainConfig
from trainer.frozen import thaw
from trainer.loop import Progress, StepFacts
from trainer.model_flops import peak_flops
from trainer.observe.energy import Provenance, open_meters
from trainer.observe.evaluations import METRICS, Merger, hold_metrics
from trainer.observe.idle import measure_idle_w
from trainer.observe.ledger import Ledger
from trainer.observe.meters import Throughput
from trainer.observe.sinks import Sinks
from trainer.plan import Plan
from trainer.runtime.comm import is_echo
from trainer.runtime.ending import cause, node_name, read_failures, read_stuck
from trainer.runtime.env import RankEnv
from trainer.runtime.rundir import attempt_dir
from trainer.runtime.saver import Superseded

log = logging.getLogger(__name__)

MERGE_EVERY_S = 30.0
"""How often training looks for evaluations that finished meanwhile."""


def idle_w_of(cfg: TrainConfig, env: RankEnv) -> dict[Provenance, float]:
    """Measure the idle power of this node, on the first of its ranks; none elsewhere.

    The others wait for it where all meet. Nothing of this job is on the GPUs before that.
    """
    if env.local_rank:
        return {}
    return measure_idle_w(open_meters(tdp_w_per_core=0, gpus=_gpus(cfg, env)))


def _gpus(cfg: TrainConfig, env: RankEnv) -> Sequence[str] | None:
    return env.visible_gpus if cfg.cluster.device == "cuda" else ()


def open_ledger(
    run: Path,
    cfg: TrainConfig,
    env: RankEnv,
    *,
    launcher_pid: int | None,
    idle_w: Mapping[Provenance, float],
) -> Ledger | None:
    """Open the account of this node, on the first of its ranks; the others keep none.

    Args:
        run: The run.
        cfg: Of the run.
        env: Of this rank.
        launcher_pid: The `kiln train` that started all ranks; None on a cluster.
        idle_w: What its meters showed before; see `idle_w_of`.
    """
    if env.local_rank:
        return None
    parent = _step_daemon() if launcher_pid is None else psutil.Process(launcher_pid)
    is_local = cfg.cluster.kind == "local"
    # On a cluster an orphan may go on for a while beside the next attempt, so each has a file.
    name = "ledger.jsonl" if is_local else f"ledger/train-{env.attempt:03d}-{node_name()}.jsonl"
    ledger = Ledger(
        run / name,
        stage="train",
        attempt=env.attempt,
        rank=env.rank,
        node=node_name(),
        meters=open_meters(
            tdp_w_per_core=cfg.logging.tdp_w_per_core,
            root_pid=parent.pid if parent else None,
            gpus=_gpus(cfg, env),
        ),
        # The parent was born for this attempt: its imports and its ranks' are `init`.
        started_unix_s=parent.create_time() if parent else None,
    )
    if idle_w:
        ledger.tell_idle(idle_w)
    return ledger


def _step_daemon() -> psutil.Process | None:
    """Find the process whose children are all ranks that srun started on this node."""
    parents = psutil.Process().parents()
    return next((each for each in parents if each.name() == "slurmstepd"), None)


def _peak_gib(on_gpu: bool) -> float:
    """Return the most that this rank held: tensors on its GPU, or its process, libraries too."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """What is told of an attempt while it trains; rank 0 tells it."""

    def __init__(self, run: Path, cfg: TrainConfig, plan: Plan, *, attempt: int) -> None:
        """Open the sinks."""
        self._merger, self._merged_s = Merger(run), -MERGE_EVERY_S
        self._held = hold_metrics(run)
        if self._held is None:  # a node that is dead may hold it on NFS: no reason not to train
            log.warning(
                "%s cannot be locked: is this run trained twice, or has its file system no locks?",
                run / METRICS,
            )
        self._folder = attempt_dir(run, attempt)
        self._sinks = Sinks.open(
            run,
            attempt=attempt,
            total_steps=plan.total_steps,
            config=thaw(cfg),
            wandb=cfg.logging.wandb,
            project=cfg.logging.wandb_project,
            progress="quiet" if cfg.logging.quiet else "auto",
            stuck=partial(read_stuck, self._folder),
        )
        self._plan = plan
        self._peak = peak_flops(cfg)
        self._on_gpu = cfg.cluster.device == "cuda"
        self._speed = Throughput()
        self._encodes = cfg.data.latents == "online"
        self._spent_s: defaultdict[str, float] = defaultdict(float)
        self._last_spent_s = self._spent_s

    @contextmanager
    def timed(self, bucket: str) -> Iterator[None]:
        """Measure the time inside."""
        started_s = time.monotonic()
        yield
        self._spent_s[bucket] += time.monotonic() - started_s

    def begin(self) -> None:
        """Training starts or goes on."""
        self._speed = Throughput()

    def count(self, facts: StepFacts) -> None:
        """Count a step."""
        self._last_spent_s, self._spent_s = self._spent_s, defaultdict(float)
        waited_s = self._last_spent_s["data_stall"]
        images = self._plan.images_per_step
        self._speed.add(
            images=images,
            data_wait_s=waited_s,
            joules=facts.joules,
            measured_joules=facts.measured_joules,
            flops=facts.flops,
        )

    def log_step(
        self,
        progress: Progress,
        facts: StepFacts,
        slowest: float | None,
        split_s: Mapping[str, float],
        slow: Sequence[str] = (),
    ) -> None:
        """Log a step that was counted.

        Args:
            progress: Where the run stands.
            facts: Of the step.
            slowest: How many times what the median rank needs the slowest one does.
            split_s: Seconds per step of this rank by phase, since the last row.
            slow: Ranks that all others wait for, in words.
        """
        if slow:
            self._sinks.alert("slow rank", f"all wait for {', '.join(slow)}", level="WARN")
        encoding = {"time/encoding_s": self._last_spent_s["encoding"]} if self._encodes else {}
        self._sinks.log(
            {
                "step": progress.step,
                "images_seen": progress.images_seen,
                "train/loss": facts.loss,
                "train/grad_norm": facts.grad_norm,
                "train/lr": facts.learning_rate,
                "speed/images_per_s": self._speed.images_per_s,
                "speed/images_per_s_per_rank": self._speed.images_per_s / self._plan.num_ranks,
                **self._compute(),
                "memory/peak_gib": _peak_gib(self._on_gpu),
                "speed/data_wait_frac": self._speed.data_wait_frac,
                "speed/slowest_rank_ratio": slowest,
                "time/data_wait_s": self._last_spent_s["data_stall"],
                **encoding,
                **{f"time/{phase}_s": seconds for phase, seconds in split_s.items()},
                "energy/w": self._speed.watts,
                "energy/j_per_image": self._speed.j_per_image,
                "energy/measured_frac": self._speed.measured_frac,
                "time/left_s": self._speed.time_left_s(
                    (self._plan.total_steps - progress.step) * self._plan.images_per_step
                ),
            }
        )
        if time.monotonic() - self._merged_s >= MERGE_EVERY_S:
            self._merge_evaluations()

    def _compute(self) -> dict[str, float]:
        """Say how many operations a rank's device does, and which share of its peak that is."""
        flops_per_s = self._speed.flops_per_s
        if flops_per_s is None:
            return {}
        per_rank = flops_per_s / self._plan.num_ranks
        share = {} if self._peak is None else {"speed/mfu_frac": per_rank / self._peak}
        return {"speed/tflops_per_rank": per_rank / 1e12, **share}

    def rolled_back(self, step: int, fault: str, back_to_step: int) -> None:
        """Tell of a rollback."""
        text = f"{fault} at step {step}, back to step {back_to_step}"
        self._sinks.alert("rollback", text, level="WARN")

    def close(self, error: BaseException | None) -> None:
        """Close the sinks; tell of the error that ended the attempt, if one did."""
        with ExitStack() as stack:
            if self._held is not None:
                stack.callback(self._held.close)
            stack.callback(self._sinks.close, exit_code=0 if error is None else 1)
            if error is not None and not isinstance(error, Superseded):
                self._sinks.alert("failed", self._why(error), level="ERROR")
            self._merge_evaluations()

    def _why(self, error: BaseException) -> str:
        first = cause(read_failures(self._folder).values()) if is_echo(error) else None
        return str(first or traceback.format_exception_only(error)[-1].strip())

    def _merge_evaluations(self) -> None:
        """Log what `kiln evaluate` found meanwhile: nobody else may write metrics.jsonl now."""
        self._merged_s = time.monotonic()
        for row in self._merger.rows():
            self._sinks.log(row)
