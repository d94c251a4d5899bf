"""What happens beside training: accounts, checkpoints and rollbacks, each when it is due."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

from trainer.accounting import Metrics, open_ledger
from trainer.build import Built
from trainer.config import TrainConfig
from trainer.data.publish import publish_json
from trainer.datasets import STREAM
from trainer.errors import BadWorld
from trainer.loop import Mine, Progress, StepFacts
from trainer.observe.energy import Provenance
from trainer.observe.evaluations import best_images
from trainer.observe.idle import UNKNOWN_IDLE_W
from trainer.observe.jsonl import JsonLines
from trainer.plan import Plan
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.comm import Comm
from trainer.runtime.env import RankEnv
from trainer.runtime.pulse import Pulse
from trainer.runtime.rollback import Rollback
from trainer.runtime.rundir import SAVED, checkpoints_of, is_superseded
from trainer.runtime.saver import Saver, Superseded
from trainer.runtime.snapshot import Snapshot
from trainer.runtime.stragglers import Stragglers

PHASES = {
    "data_stall": "data",
    "encoding": "encode",
    "checkpoint_stall": "checkpoint",
    "restore": "restore",
}
"""What a rank does in the time that goes to these buckets of the ledger."""


class Bookkeeper:
    """The loop's observer on every rank."""

    def __init__(
        self,
        cfg: TrainConfig,
        plan: Plan,
        comm: Comm,
        env: RankEnv,
        *,
        launcher_pid: int | None,
        idle_w: Mapping[Provenance, float] = UNKNOWN_IDLE_W,
        pulse: Pulse | None = None,
    ) -> None:
        """Open the accounts.

        Args:
            cfg: Of the run.
            plan: Of the run.
            comm: Of all ranks.
            env: Of this rank.
            launcher_pid: The process whose children all ranks are; None if there is none.
            idle_w: What this node's meters showed before there was any work.
            pulse: What a watchdog watches, if there is one.
        """
        self._run, self._cfg, self._plan, self._comm = Path(cfg.run), cfg, plan, comm
        self._attempt, self._pulse = env.attempt, pulse or Pulse()
        self._stragglers = Stragglers(
            comm,
            self._pulse,
            slow_rank_ratio=cfg.watchdog.slow_rank_ratio,
            is_forward_own=cfg.engine.zero_stage < 3,
        )
        self._ledger = open_ledger(self._run, cfg, env, launcher_pid=launcher_pid, idle_w=idle_w)
        self._metrics = None if comm.rank else Metrics(self._run, cfg, plan, attempt=env.attempt)
        self._told_j = (0.0, 0.0)
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
            if self._ledger:
                stack.enter_context(self._ledger.span(bucket))
            if self._metrics:
                stack.enter_context(self._metrics.timed(bucket))
            yield

    def at(self, phase: str) -> None:
        """Tell the watchdog what this rank does, and how long it did what it did before."""
        self._pulse.enter(phase)
        self._stragglers.enter(phase)

    def spent_j(self) -> tuple[float, float]:
        """Return the joules that this node's meters counted since the last call."""
        if self._ledger is None:
            return 0.0, 0.0
        before, self._told_j = self._told_j, (self._ledger.total_j, self._ledger.measured_j)
        return self._told_j[0] - before[0], self._told_j[1] - before[1]

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
        if self._ledger:
            self._ledger.resume_at(progress.step)
            self._ledger.switch("productive")
            self.spent_j()  # what was drawn so far is no step's
        if self._metrics:
            self._record_stream(progress)
            self._metrics.begin()
        self._pulse.step = progress.step + 1
        self._pulse.enter("log")

    def after_step(self, progress: Progress, facts: StepFacts) -> None:
        """Log the step; save when due."""
        self._pulse.finish_step(progress.step)
        self.at("log")
        if self._ledger:
            self._ledger.reach(progress.step)
        if self._metrics:
            self._metrics.count(facts)
        last = progress.step == self._plan.total_steps
        if progress.step % self._cfg.logging.every_steps == 0 or progress.step == 1 or last:
            slowest = self._stragglers.compare()
            if self._metrics:
                if is_superseded(self._run, self._attempt):
                    raise Superseded(f"another attempt of {self._run} has begun; this one ends.")
                ranks = self._stragglers
                self._metrics.log_step(progress, facts, slowest, ranks.split_s, ranks.slow)
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
        if self._ledger:
            self._ledger.reach(progress.step)
            self._ledger.resume_at(state.step)
        if self._metrics:
            self._metrics.rolled_back(progress.step, fault, state.step)
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
        if self._ledger:
            self._ledger.switch("drain")
        with ExitStack() as stack:
            if self._ledger:
                stack.callback(self._ledger.close)
            if self._metrics:
                self._metrics.close(error)
