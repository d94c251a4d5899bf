"""One rank of `kiln power-sweep`: takes steps under one power limit after the other."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from trainer.bookkeeping import PHASES
from trainer.build import build, restore
from trainer.config_power import PowerSweepConfig
from trainer.data.publish import publish_json
from trainer.errors import BadWorld
from trainer.frozen import read_yaml
from trainer.loop import take_step
from trainer.observe.energy import gpu_meters
from trainer.observe.nvml import NvmlReader
from trainer.observe.power_limit import LimitedGpus
from trainer.plan import Plan, make_plan
from trainer.power_points import CONFIG, RECORD, Point, limit_words, measure, order, record
from trainer.runtime.comm import Comm
from trainer.runtime.env import read_rank_env
from trainer.runtime.pulse import Pulse
from trainer.runtime.rundir import attempt_dir
from trainer.runtime.signals import EXIT_REQUEUE, StopFlag
from trainer.runtime.watchdog import Watchdog
from trainer.worker import be_rank

log = logging.getLogger(__name__)


class ToldToStop(Exception):
    """Some rank heard a signal, and all agree."""


class Watched:
    """Tells the watchdog what a step does, and nobody anything else."""

    def __init__(self, pulse: Pulse) -> None:
        """Take what the watchdog watches."""
        self._pulse = pulse

    def span(self, bucket: str) -> AbstractContextManager[None]:
        """Say what is done from now on."""
        self._pulse.enter(PHASES[bucket])
        return nullcontext()

    def at(self, phase: str) -> None:
        """Say what is done from now on."""
        self._pulse.enter(phase)

    def spent_j(self) -> tuple[float, float]:
        """Account for nothing."""
        return 0.0, 0.0


class Limits:
    """The GPUs of a sweep, as its rank 0 has them in hand."""

    def __init__(self, gpus: LimitedGpus, uuids: Sequence[str]) -> None:
        """Begin to count their joules."""
        self._gpus = gpus
        self.default_w: Mapping[str, float] = {uuid: gpus.default_limit_w(uuid) for uuid in uuids}
        self._meters = gpu_meters(gpus, uuids)

    def set(self, watts: float | None) -> None:
        """Set the limit of all; None is the default of each."""
        for uuid, default_w in self.default_w.items():
            self._gpus.set_limit_w(uuid, default_w if watts is None else watts)

    def read_j(self) -> float:
        """Return their joules so far."""
        return sum(meter.read_j() for meter in self._meters)


class Training:
    """A training whose steps are taken one by one; see `trainer.power_points.Trial`."""

    def __init__(
        self,
        cfg: PowerSweepConfig,
        plan: Plan,
        comm: Comm,
        limits: Limits | None,
        *,
        stop: StopFlag,
        pulse: Pulse,
    ) -> None:
        """Build it; `limits` are rank 0's."""
        built = build(cfg, plan, comm, None)
        self._parts, self._progress = built.parts(), restore(built, None)
        self._batches = self._parts.read(self._progress.stream)
        self._comm, self._limits, self._stop, self._pulse = comm, limits, stop, pulse

    def limit(self, watts: float | None) -> None:
        """Set the limit of all GPUs; None is the default of each."""
        if self._limits is not None:
            self._limits.set(watts)
        self.agree(True)  # no rank goes on before

    def step(self) -> int:
        """Take a step; return its images.

        Raises:
            ToldToStop: A signal came.
        """
        facts, _ = take_step(
            self._parts, self._batches, self._progress, self._stop, Watched(self._pulse)
        )
        self._pulse.finish_step(self._progress.step)
        if facts.is_stopping:
            raise ToldToStop
        return self._parts.plan.images_per_step

    def read_j(self) -> float:
        """Return joules of all GPUs."""
        return 0.0 if self._limits is None else self._limits.read_j()

    def agree(self, is_true: bool) -> bool:
        """Return what rank 0 says."""
        return self._comm.from_rank_0(float(is_true)) > 0


def work(run: Path, uuids: Sequence[str], open_gpus: Callable[[], LimitedGpus]) -> int:
    """Measure under all limits; return 0, or 85 where a signal came first.

    Args:
        run: Its folder, with the frozen config; the points are written there as they come.
        uuids: Of the GPUs.
        open_gpus: Gives rank 0 what sets their limits.
    """
    stop, pulse = StopFlag(), Pulse()
    env = read_rank_env()
    cfg = read_yaml(PowerSweepConfig, run / CONFIG)
    plan = make_plan(cfg)
    with Watchdog(attempt_dir(run, env.attempt), env, cfg.watchdog, pulse):
        comm = Comm(env, cfg.cluster.device)
        limits = Limits(open_gpus(), uuids) if comm.rank == 0 else None
        training = Training(cfg, plan, comm, limits, stop=stop, pulse=pulse)
        points: list[Point] = []
        found = measure(
            training,
            order(cfg.watts),
            steps=cfg.steps,
            warmup_steps=cfg.warmup_steps,
            window_s=cfg.window_s,
        )
        try:
            for point in found:
                points.append(point)
                if limits is not None:
                    tell(run, points, limits)
        except ToldToStop:
            return EXIT_REQUEUE
        comm.close()
    return 0


def tell(run: Path, points: Sequence[Point], limits: Limits) -> None:
    """Write down the points so far, and say the last one.

    Raises:
        BadWorld: It has no joules.
    """
    point = points[-1]
    if point.joules <= 0:
        raise BadWorld(
            f"the energy counters of {', '.join(limits.default_w)} did not move in "
            f"{point.seconds:.1f} s. Give a longer window_s; where that does not help, they cannot "
            "be measured."
        )
    publish_json(run / RECORD, record(points, limits.default_w))
    log.info(
        "limit %s: %.1f images/s, %.0f W, %.3g J/image, over %d steps in %.1f s",
        limit_words(point),
        point.images_per_s,
        point.watts,
        point.j_per_image,
        point.num_steps,
        point.seconds,
    )


def main(argv: Sequence[str]) -> None:
    """`python -m trainer.power_rank RUN_DIR GPU,GPU,...`, once per rank."""
    run, uuids = Path(argv[0]), argv[1].split(",")
    be_rank(lambda: work(run, uuids, NvmlReader), run, command="power-sweep")


if __name__ == "__main__":
    main(sys.argv[1:])
