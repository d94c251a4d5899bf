"""The training loop, and where a run stands."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from trainer.data.sources import Batch
from trainer.data.stream import State
from trainer.errors import BadWorld
from trainer.plan import Plan
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema
from trainer.runtime.engine import Engine
from trainer.runtime.signals import StopFlag

Objective = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Progress:
    """Counted in images; the only state that changes while training besides the tensors."""

    stream: State
    """Where the data stream goes on."""
    step: int = 0
    images_seen: int = 0


@dataclass(frozen=True)
class StepFacts:
    """What one optimizer step was like, averaged over its images and equal on all ranks."""

    loss: float
    grad_norm: float
    learning_rate: float


class Observer(Protocol):
    """What happens beside training: accounts, progress, checkpoints; each knows if it is due."""

    def span(self, bucket: str) -> AbstractContextManager[None]:
        """Account the time inside to a bucket of the ledger."""

    def after_step(self, progress: Progress, facts: StepFacts) -> None:
        """Hear of a finished step."""


@dataclass(frozen=True)
class Parts:
    """Everything the loop needs, assembled by `trainer.build`."""

    plan: Plan
    total_images: int
    engine: Engine
    ema: Ema
    objective: Objective
    batches: Iterator[Batch]
    advance: Callable[[State], State]
    """State of the stream before a step -> behind it."""
    learning_rate: Callable[[int], float]
    """Images seen -> rate."""
    comm: Comm


def train(parts: Parts, progress: Progress, stop: StopFlag, observer: Observer) -> bool:
    """Train until all images are seen; return False when a stop signal ended it earlier.

    Raises:
        BadWorld: The loss is not finite; all ranks agree and stop.
    """
    plan, engine, comm = parts.plan, parts.engine, parts.comm
    while progress.images_seen < parts.total_images:
        rate = parts.learning_rate(progress.images_seen)
        engine.set_learning_rate(rate)
        loss_sum = 0.0
        for _ in range(plan.accumulation_steps):
            with observer.span("data_stall"):
                batch = next(parts.batches)
            loss_B = parts.objective(engine.model, batch)
            engine.backward(loss_B.mean())
            engine.micro_step()
            loss_sum += float(loss_B.detach().sum())

        progress.step += 1
        progress.images_seen += plan.images_per_step
        progress.stream = parts.advance(progress.stream)
        parts.ema.update(images_per_step=plan.images_per_step, images_seen=progress.images_seen)
        # One small collective a step: the loss over all ranks, and whether any was told to stop.
        total, stopping = comm.sum([loss_sum, float(stop.received is not None)])
        loss = total / plan.images_per_step
        if not math.isfinite(loss):
            raise BadWorld(
                f"the loss is {loss} at step {progress.step} (images {progress.images_seen}). "
                "The last checkpoint stands; a lower optim.learning_rate or a smaller "
                "optim.clip_grad_norm may help."
            )
        observer.after_step(progress, StepFacts(loss, engine.grad_norm, rate))
        if stopping:
            return False
    return True
