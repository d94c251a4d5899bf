"""One rank that trains with Kiln, and after each of its steps lets every peer take one.

So a slow moment of the machine meets all alike, and steps are compared in pairs.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_peers import Step, make_step
from trainer.bookkeeping import Bookkeeper
from trainer.build import Built, build, restore
from trainer.config import TrainConfig
from trainer.diffusion import philox
from trainer.frozen import compose, write_yaml
from trainer.loop import Progress, StepFacts, train
from trainer.plan import make_plan
from trainer.runtime.comm import Comm
from trainer.runtime.env import RankEnv, read_rank_env
from trainer.runtime.local import die_with_parent, launcher_pid
from trainer.runtime.pulse import Pulse
from trainer.runtime.rundir import attempt_dir
from trainer.runtime.signals import StopFlag
from trainer.runtime.watchdog import Watchdog

WARMUP_STEPS = 4


class InTurn(Bookkeeper):
    """All that Kiln does beside training, and then the peers."""

    def __init__(self, *args: Any, peers: dict[str, Step], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peers = peers
        self.seconds: dict[str, list[float]] = {name: [] for name in ("kiln", *peers)}
        self._began_s = 0.0

    def begin(self, built: Built, progress: Progress) -> None:
        """Begin to time."""
        super().begin(built, progress)
        self._began_s = time.perf_counter()

    def after_step(self, progress: Progress, facts: StepFacts) -> None:
        """Time the step, and then those of the peers."""
        super().after_step(progress, facts)
        self.seconds["kiln"].append(time.perf_counter() - self._began_s)
        for name, step in self._peers.items():
            began_s = time.perf_counter()
            step()
            self.seconds[name].append(time.perf_counter() - began_s)
        self._began_s = time.perf_counter()


def measure(
    cfg: TrainConfig, comm: Comm, env: RankEnv, peers: dict[str, Step], pulse: Pulse
) -> dict[str, dict[str, float]]:
    """Train; return medians over the steps after the warm-up.

    Returns:
        step_s: of each system. ratio: of Kiln's step to each peer's beside it. share: of the
        averages and of the random numbers in Kiln's step. collectives: of an update of averages.
    """
    plan = make_plan(cfg)
    books = InTurn(cfg, plan, comm, env, launcher_pid=launcher_pid(), pulse=pulse, peers=peers)
    with books:
        built = build(cfg, plan, comm, None)
        progress = restore(built, None)
        books.begin(built, progress)
        train(built.parts(), progress, StopFlag(), books)
    times_s = {
        name: torch.tensor(found, dtype=torch.float64)[WARMUP_STEPS:]
        for name, found in books.seconds.items()
    }
    step_s = float(times_s["kiln"].median())
    seen = {"images_per_step": plan.images_per_step, "images_seen": cfg.total_images}
    draws_s = plan.accumulation_steps * _median_s(lambda: _draw(cfg))
    return {
        "step_s": {name: float(found.median()) for name, found in times_s.items()},
        "ratio": {name: float((times_s["kiln"] / times_s[name]).median()) for name in peers},
        "share": {
            "moving average": _median_s(lambda: built.ema.update(**seen)) / step_s,
            "random numbers": draws_s / step_s,
        },
        "collectives": {"moving average": _collectives(lambda: built.ema.update(**seen))},
    }


def _collectives(action: Callable[[], None]) -> float:
    """Count the collectives that PyTorch records."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        action()
    names = ("gloo:", "nccl:", "c10d::")
    return float(
        sum(event.count for event in recorded.key_averages() if event.key.startswith(names))
    )


def _draw(cfg: TrainConfig) -> None:
    """Draw what a micro-batch of latents needs."""
    model, micro = cfg.model, cfg.batch.micro_batch_images
    assert model.kind == "unet"
    shape = (model.latent_channels, model.latent_side, model.latent_side)
    num_words = philox.words_of_normals(shape)
    counts = {philox.LATENT: num_words, philox.NOISE: num_words}
    counts |= {philox.TIME: 1, philox.CAPTION_DROPOUT: 1}
    visits_B = torch.zeros(micro, dtype=torch.int64)
    words = philox.words(cfg.seed, torch.arange(micro), visits_B, counts=counts)
    for purpose in (philox.LATENT, philox.NOISE):
        philox.as_normals(words[purpose], shape)
    for purpose in (philox.TIME, philox.CAPTION_DROPOUT):
        philox.as_uniforms(words[purpose])


def _median_s(action: Callable[[], None], times: int = 20) -> float:
    done_s = [time.perf_counter()]
    for _ in range(times):
        action()
        done_s.append(time.perf_counter())
    return float(torch.tensor(done_s, dtype=torch.float64).diff().median())


def main() -> None:
    """Argument: a JSON of {words, peers, files, out}."""
    args = json.loads(sys.argv[1])
    die_with_parent()
    env, pulse = read_rank_env(), Pulse()
    torch.set_num_threads(1)
    cfg = compose(TrainConfig, "train", args["words"])
    run = Path(cfg.run)
    if env.rank == 0:
        run.mkdir()
        write_yaml(cfg, run / "config.yaml")
    comm = Comm(env, "cpu")
    with Watchdog(attempt_dir(run, env.attempt), env, cfg.watchdog, pulse):
        files = Path(args["files"]) if args["files"] else None
        peers = {name: make_step(name, cfg, comm, files) for name in args["peers"]}
        found = measure(cfg, comm, env, peers, pulse)
    if env.rank == 0:
        Path(args["out"]).write_text(json.dumps(found), encoding="utf-8")
    comm.close()


if __name__ == "__main__":
    main()
