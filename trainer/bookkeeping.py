"""What happens beside training: ledger, metrics, progress and checkpoints, each when it is due."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import psutil

from trainer.build import Built
from trainer.config import TrainConfig
from trainer.data.publish import publish_json
from trainer.datasets import STREAM
from trainer.errors import BadWorld
from trainer.frozen import thaw
from trainer.loop import Mine, Progress, StepFacts
from trainer.observe.energy import open_meters
from trainer.observe.evaluations import METRICS, Merger, best_images, hold_metrics
from trainer.observe.jsonl import JsonLines
from trainer.observe.ledger import Ledger
from trainer.observe.meters import Throughput
from trainer.observe.sinks import Sinks
from trainer.plan import Plan
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.comm import Comm
from trainer.runtime.pulse import Pulse
from trainer.runtime.rollback import Rollback
from trainer.runtime.rundir import SAVED, checkpoints_of, is_superseded
from trainer.runtime.saver import Saver, Superseded
from trainer.runtime.snapshot import Snapshot
from trainer.runtime.stragglers import Stragglers

log = logging.getLogger(__name__)

MERGE_EVERY_S = 30.0
"""How often training looks for evaluations that finished meanwhile."""

PHASES = {
    "data_stall": "data",
    "encoding": "encode",
    "checkpoint_stall": "checkpoint",
    "restore": "restore",
}
"""What a rank does in the time that goes to these buckets of the ledger."""


class Accounts:
    """Seconds, joules and metrics of one attempt; rank 0 keeps them, the others keep none."""

    def __init__(
        self, run: Path, cfg: TrainConfig, plan: Plan, *, attempt: int, launcher_pid: int | None
    ) -> None:
        """Open ledger and sinks; the joules count the whole tree of `launcher_pid`, all ranks."""
        self._merger, self._merged_s = Merger(run), -MERGE_EVERY_S
        self._held = hold_metrics(run)
        if self._held is None:  # a node that is dead may hold it on NFS: no reason not to train
            log.warning(
                "%s cannot be locked: is this run trained twice, or has its file system no locks?",
                run / METRICS,
            )
        meters = open_meters(tdp_w_per_core=cfg.logging.tdp_w_per_core, root_pid=launcher_pid)
        # The launcher was born for this attempt: its imports and its ranks' are `init`.
        born = psutil.Process(launcher_pid).create_time() if launcher_pid else None
        self.ledger = Ledger(
            run / "ledger.jsonl",
            stage="train",
            attempt=attempt,
            meters=meters,
            started_unix_s=born,
        )
        self._sinks = Sinks.open(
            run,
            attempt=attempt,
            total_steps=plan.total_steps,
            config=thaw(cfg),
            wandb=cfg.logging.wandb,
            project=cfg.logging.wandb_project,
            progress="quiet" if cfg.logging.quiet else "auto",
        )
        self._plan = plan
        self._speed = Throughput()
        self._encodes = cfg.data.latents == "online"
        self._spent_s: defaultdict[str, float] = defaultdict(float)
        self._last_spent_s = self._spent_s

    @contextmanager
    def span(self, bucket: str) -> Iterator[None]:
        """Account the time inside to a bucket."""
        started_s = time.monotonic()
        with self.ledger.span(bucket):
            yield
        self._spent_s[bucket] += time.monotonic() - started_s

    def begin(self, progress: Progress) -> None:
        """Training starts or goes on from here."""
        self.ledger.resume_at(progress.step)
        self.ledger.switch("productive")
        self._speed = Throughput()

    def count(self, progress: Progress) -> None:
        """Count a step."""
        self.ledger.reach(progress.step)
        self._last_spent_s, self._spent_s = self._spent_s, defaultdict(float)
        waited_s = self._last_spent_s["data_stall"]
        self._speed.add(images=self._plan.images_per_step, data_wait_s=waited_s)

    def log_step(self, progress: Progress, facts: StepFacts, slowest: float | None) -> None:
        """Log a step that was counted; `slowest` is how many times the median rank needs."""
        encoding = {"time/encoding_s": self._last_spent_s["encoding"]} if self._encodes else {}
        self._sinks.log(
            {
                "step": progress.step,
                "images_seen": progress.images_seen,
                "train/loss": facts.loss,
                "train/grad_norm": facts.grad_norm,
                "train/lr": facts.learning_rate,
                "speed/images_per_s": self._speed.images_per_s,
                "speed/data_wait_frac": self._speed.data_wait_frac,
                "speed/slowest_rank_ratio": slowest,
                "time/data_wait_s": self._last_spent_s["data_stall"],
                **encoding,
                "time/left_s": self._speed.time_left_s(
                    (self._plan.total_steps - progress.step) * self._plan.images_per_step
                ),
            }
        )
        if time.monotonic() - self._merged_s >= MERGE_EVERY_S:
            self._merge_evaluations()

    def roll_back(self, step: int, back_to_step: int) -> None:
        """Count the steps up to `step` behind `back_to_step` as lost."""
        self.ledger.reach(step)
        self.ledger.resume_at(back_to_step)

    def close(self, *, exit_code: int) -> None:
        """Close ledger and sinks."""
        self.ledger.switch("drain")
        self._merge_evaluations()
        self._sinks.close(exit_code=exit_code)
        if self._held is not None:
            self._held.close()
        self.ledger.close()

    def _merge_evaluations(self) -> None:
        """Log what `kiln evaluate` found meanwhile: nobody else may write metrics.jsonl now."""
        self._merged_s = time.monotonic()
        for row in self._merger.rows():
            self._sinks.log(row)


class Bookkeeper:
    """The loop's observer on every rank."""

    def __init__(
        self,
        cfg: TrainConfig,
        plan: Plan,
        comm: Comm,
        *,
        attempt: int,
        launcher_pid: int | None,
        pulse: Pulse | None = None,
    ) -> None:
        """Open the accounts on rank 0.

        Args:
            cfg: Of the run.
            plan: Of the run.
            comm: Of all ranks.
            attempt: Number of the attempt.
            launcher_pid: The process whose children all ranks are; None if there is none.
            pulse: What a watchdog watches, if there is one.
        """
        self._run, self._cfg, self._plan, self._comm = Path(cfg.run), cfg, plan, comm
        self._attempt, self._pulse = attempt, pulse or Pulse()
        self._stragglers = Stragglers(
            comm,
            self._pulse,
            slow_rank_ratio=cfg.watchdog.slow_rank_ratio,
            is_forward_own=cfg.engine.zero_stage < 3,
        )
        self._accounts = (
            Accounts(self._run, cfg, plan, attempt=attempt, launcher_pid=launcher_pid)
            if comm.rank == 0
            else None
        )
        self._saved_step = self._recorded_step = -1

    @contextmanager
    def span(self, bucket: str) -> Iterator[None]:
        """Account the time inside to a bucket of the ledger."""
        before = self._pulse.enter(PHASES[bucket])
        with self._accounted(bucket):
            yield
        self._pulse.enter(before)

    @contextmanager
    def _accounted(self, bucket: str) -> Iterator[None]:
        with ExitStack() as stack:
            if self._accounts:
                stack.enter_context(self._accounts.span(bucket))
            yield

    def at(self, phase: str) -> None:
        """Tell the watchdog what this rank does, and how long it did what it did before."""
        self._pulse.enter(phase)
        self._stragglers.enter(phase)

    def begin(self, built: Built, progress: Progress) -> None:
        """Training of what was built starts or goes on from `progress`."""
        snapshot = Snapshot(built.engine.fragments, built.ema)
        self._built = built
        self._saver = Saver(
            checkpoints_of(self._cfg),
            snapshot,
            self._comm,
            self._cfg.checkpoint,
            attempt=self._attempt,
            shapes=built.shapes,
            averages=list(built.ema.tensors()),
            best=partial(best_images, self._run, self._cfg.checkpoint.keep_best),
        )
        self._rollback = Rollback(
            self._run,
            snapshot,
            self._comm,
            max_tries=self._cfg.rollback.max_tries,
            attempt=self._attempt,
        )
        snapshot.take(self._state(progress))
        self._saved_step = progress.step
        if self._accounts:
            self._record_stream(progress)
            self._accounts.begin(progress)
        self._pulse.step = progress.step + 1
        self._pulse.enter("log")

    def after_step(self, progress: Progress, facts: StepFacts) -> None:
        """Log the step; save when due."""
        self._pulse.finish_step(progress.step)
        self.at("log")
        if self._accounts:
            self._accounts.count(progress)
        last = progress.step == self._plan.total_steps
        if progress.step % self._cfg.logging.every_steps == 0 or progress.step == 1 or last:
            slowest = self._stragglers.compare()
            if self._accounts:
                if is_superseded(self._run, self._attempt):
                    raise Superseded(f"another attempt of {self._run} has begun; this one ends.")
                self._accounts.log_step(progress, facts, slowest)
        with self._accounted("checkpoint_stall"):  # no wait for a disk, so nothing to be patient of
            self._saver.poll()
        self._record_saved()
        if progress.step % self._plan.checkpoint_every_steps == 0:
            self.save(progress)

    def roll_back(self, progress: Progress, fault: str, mine: Mine) -> None:
        """Bring everything back to the last good state, without the samples that led away."""
        with self.span("checkpoint_stall"):
            self._saver.finish()  # so that it is there, should this be the end
        with self.span("restore"):
            state = self._rollback(
                step=progress.step,
                fault=fault,
                ids=mine.ids,
                losses=mine.losses,
                exclude=self._built.feed.exclude,
            )
        if self._accounts:
            self._accounts.roll_back(progress.step, state.step)
        progress.stream = self._built.feed.begin(state.stream)
        progress.step, progress.images_seen = state.step, state.images_seen
        self._pulse.step = state.step + 1
        self._built.guard.forget(state.losses)

    def save(self, progress: Progress) -> None:
        """Begin to save a checkpoint of this step, unless there is one already."""
        if progress.step == self._saved_step:
            return
        with self.span("checkpoint_stall"):
            self._saver.save(self._state(progress))
        self._saved_step = progress.step

    def finish(self, progress: Progress) -> None:
        """Save where training ends, and wait until that is on disk.

        Raises:
            BadWorld: It could not be saved.
        """
        self.save(progress)
        with self.span("checkpoint_stall"):
            saved = self._saver.finish()
        self._record_saved()
        if not saved:
            raise BadWorld(
                f"the last checkpoint of {self._run} could not be saved; the log says why. Older "
                "ones are untouched; make room, or give another checkpoint.folder=, then give the "
                "same command again."
            )

    def _state(self, progress: Progress) -> TrainState:
        dataset, encoding = self._built.fingerprints
        return TrainState(
            step=progress.step,
            images_seen=progress.images_seen,
            seed=self._cfg.seed,
            dataset_fingerprint=dataset,
            encoding_fingerprint=encoding,
            stream=self._built.feed.to_json(progress.stream),
            losses=self._built.guard.recent,
        )

    def _record_saved(self) -> None:
        """Say where the newest checkpoint stands to those who cannot list its place."""
        state = self._saver.published
        if self._comm.rank or state is None or state.step == self._recorded_step:
            return
        content = {"step": state.step, "images_seen": state.images_seen}
        publish_json(self._run / SAVED, {**content, "unix_s": time.time()})
        self._recorded_step = state.step

    def _record_stream(self, progress: Progress) -> None:
        """Write down which samples all later steps take: what `kiln order` reads."""
        row = {
            "attempt": self._attempt,
            "step": progress.step,
            "global_batch_images": self._plan.images_per_step,
            "stream": self._built.feed.to_json(progress.stream),
        }
        record = JsonLines(self._run / STREAM)
        record.append([row])
        record.close()

    def __enter__(self) -> "Bookkeeper":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pulse.enter("end")
        if self._accounts:
            self._accounts.close(exit_code=0 if kind is None else 1)
