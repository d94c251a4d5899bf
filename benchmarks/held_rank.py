"""One rank that trains on made-up latents: what it holds at most, and what its accounts cost.

Held are the bytes of tensors, counted where PyTorch takes and frees them, by all threads; not the
memory of the process, which has Python and libraries in it.
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_memory import Silent
from trainer.bookkeeping import Bookkeeper
from trainer.build import Built, build_loss, build_model, build_parameterization, training_times
from trainer.config import TrainConfig
from trainer.config_diffusion import DenoisingConfig
from trainer.data.sources import Batch, LatentBatch
from trainer.data.stream import State
from trainer.frozen import compose
from trainer.loop import Progress, StepFacts, train
from trainer.objectives import LatentObjective
from trainer.plan import make_plan
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema, decays
from trainer.runtime.engine import Engine
from trainer.runtime.env import RankEnv, read_rank_env
from trainer.runtime.guard import Guard
from trainer.runtime.local import die_with_parent, launcher_pid
from trainer.runtime.signals import StopFlag
from trainer.runtime.snapshot import Snapshot

_SOURCE = Path(__file__).with_name("held_bytes.cpp")
FIRST_COUNTED, LAST_COUNTED = 3, 6
"""Steps whose collectives are counted; the first is always logged."""


def build_counter(folder: Path) -> Path:
    """Compile what counts bytes; takes seconds."""
    root, library = Path(torch.__file__).parent, folder / "held_bytes.so"
    options = ["-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", f"-L{root}/lib"]
    command = ["g++", *options, str(_SOURCE), "-lc10", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


class MadeUpFeed:
    """Noise with captions of full length, without end."""

    def __init__(self, cfg: TrainConfig) -> None:
        """Take the shapes."""
        self._cfg = cfg

    def begin(self, _saved: Any) -> State:
        """Begin where all begins."""
        return State(0, (), ())

    def advance(self, state: State) -> State:
        """Go behind a step."""
        return replace(state, samples=state.samples + self._cfg.batch.global_batch_images)

    def to_json(self, state: State) -> dict[str, Any]:
        """Say where the stream stands."""
        return {"samples": state.samples}

    def exclude(self, _ids: Collection[int]) -> None:
        """Noise has no bad samples."""

    def batches(self, _state: State) -> Generator[Batch]:
        """Give micro-batches."""
        cfg = self._cfg
        assert cfg.model.kind != "autoencoder_kl"
        model, micro, tokens = (
            cfg.model,
            cfg.batch.micro_batch_images,
            cfg.encoders.text.max_tokens,
        )
        while True:
            latents = torch.randn(
                micro, model.latent_channels, model.latent_side, model.latent_side
            )
            yield LatentBatch(
                ids_B=torch.arange(micro),
                visits_B=torch.zeros(micro, dtype=torch.int64),
                mean_BCHW=latents,
                logvar_BCHW=torch.zeros_like(latents),
                text_BLD=torch.randn(micro, tokens, model.text_width),
                text_mask_BL=torch.ones(micro, tokens, dtype=torch.bool),
            )


def build_without_data(cfg: TrainConfig, comm: Comm) -> Built:
    """Assemble a run as `trainer.build` does, but for its data."""
    assert isinstance(cfg.objective, DenoisingConfig)
    assert cfg.model.kind != "autoencoder_kl"
    plan, channels = make_plan(cfg), cfg.model.latent_channels
    model = build_model(cfg)
    shapes = {name: list(param.shape) for name, param in model.named_parameters()}
    engine = Engine(model, cfg, plan, comm)
    del model
    gc.collect()
    objective = LatentObjective(
        build_loss(cfg.objective),
        training_times(cfg.objective.times, build_parameterization(cfg.objective).process),
        seed=cfg.seed,
        latent_mean_C=torch.zeros(channels),
        latent_std_C=torch.ones(channels),
        null_text_LD=torch.zeros(1, cfg.model.text_width),
        caption_dropout=cfg.objective.caption_dropout,
    )
    return Built(
        cfg=cfg,
        plan=plan,
        comm=comm,
        engine=engine,
        ema=Ema(engine.fragments, decays(cfg.ema)),
        guard=Guard(cfg.rollback),
        objective=objective,
        feed=MadeUpFeed(cfg),
        shapes=shapes,
        fingerprints=("", ""),
    )


def most_bytes(cfg: TrainConfig, comm: Comm, counter: Path) -> int:
    """Train to the end, with the copy that checkpoints are written from; return the most held."""
    library = ctypes.CDLL(str(counter))
    library.most_bytes.restype = ctypes.c_size_t
    library.count()
    library.begin_anew()
    built = build_without_data(cfg, comm)
    copy = Snapshot(built.engine.fragments, built.ema)
    train(built.parts(), Progress(State(0, (), ())), StopFlag(), Silent())
    del copy
    return int(library.most_bytes())


class Collectives:
    """Counts those of some steps that PyTorch records."""

    def __init__(self) -> None:
        self._recorder = profile(activities=[ProfilerActivity.CPU])
        self.per_step = 0.0

    def after(self, step: int) -> None:
        """Begin and end."""
        if step == FIRST_COUNTED - 1:
            self._recorder.start()
        elif step == LAST_COUNTED:
            self._recorder.stop()
            names = ("gloo:", "nccl:")
            events = self._recorder.key_averages()
            found = sum(event.count for event in events if event.key.startswith(names))
            self.per_step = found / (LAST_COUNTED - FIRST_COUNTED + 1)


class Counted(Silent):
    """Keeps no accounts."""

    def __init__(self) -> None:
        self.collectives = Collectives()

    def after_step(self, progress: Progress, _facts: StepFacts) -> None:
        """Count."""
        self.collectives.after(progress.step)


class Timed(Bookkeeper):
    """Keeps all accounts, and the time that it takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.collectives, self.spent_s, self.began_s = Collectives(), 0.0, 0.0

    def _timed(self, action: Callable[[], Any]) -> Any:
        started_s = time.perf_counter()
        result = action()
        self.spent_s += time.perf_counter() - started_s
        return result

    @contextmanager
    def span(self, bucket: str) -> Generator[None]:
        """Time entering and leaving."""
        inner: AbstractContextManager[None] = super().span(bucket)
        self._timed(inner.__enter__)
        yield
        self._timed(lambda: inner.__exit__(None, None, None))

    def at(self, phase: str) -> None:
        """Time it."""
        self._timed(lambda: Bookkeeper.at(self, phase))

    def spent_j(self) -> tuple[float, float]:
        """Time it."""
        joules, measured = self._timed(lambda: Bookkeeper.spent_j(self))
        return joules, measured

    def after_step(self, progress: Progress, facts: StepFacts) -> None:
        """Time it, from the step on that all others are like."""
        spent_s = self.spent_s
        started_s = time.perf_counter()
        super().after_step(progress, facts)
        self.spent_s = spent_s + time.perf_counter() - started_s
        self.collectives.after(progress.step)
        if progress.step == LAST_COUNTED:
            self.spent_s, self.began_s = 0.0, time.perf_counter()


def accounts(cfg: TrainConfig, comm: Comm, env: RankEnv) -> dict[str, float]:
    """Return the share of a step that accounts take, and collectives per step, without and with."""
    alone, progress = Counted(), Progress(State(0, (), ()))
    short = replace(cfg, total_images=LAST_COUNTED * cfg.batch.global_batch_images)
    train(build_without_data(short, comm).parts(), progress, StopFlag(), alone)
    progress = Progress(State(0, (), ()))
    books = Timed(cfg, make_plan(cfg), comm, env, launcher_pid=launcher_pid())
    with books:
        built = build_without_data(cfg, comm)
        books.begin(built, progress)
        train(built.parts(), progress, StopFlag(), books)
        took_s = time.perf_counter() - books.began_s
    return {
        "share": books.spent_s / took_s,
        "step_s": took_s / (make_plan(cfg).total_steps - LAST_COUNTED),
        "without": alone.collectives.per_step,
        "with": books.collectives.per_step,
    }


def main() -> None:
    """Argument: a JSON of {words, counter, out}; without a counter accounts are measured."""
    args = json.loads(sys.argv[1])
    die_with_parent()
    env = read_rank_env()
    torch.set_num_threads(1)
    cfg = compose(TrainConfig, "train", args["words"])
    comm = Comm(env, "cpu")
    if args["counter"]:
        most = most_bytes(cfg, comm, Path(args["counter"]))
        each = comm.gather_bytes(most.to_bytes(8, "little"))
        found: dict[str, float] = {"most_bytes": max(int.from_bytes(b, "little") for b in each)}
    else:
        found = accounts(cfg, comm, env)
    if env.rank == 0:
        Path(args["out"]).write_text(json.dumps(found), encoding="utf-8")
    comm.close()


if __name__ == "__main__":
    main()
