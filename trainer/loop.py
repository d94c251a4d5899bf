"""The training loop, and where a run stands."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.data.sources import Batch
from trainer.data.stream import State
from trainer.plan import Plan
from trainer.runtime.comm import Comm
from trainer.runtime.ema import Ema
from trainer.runtime.engine import Engine
from trainer.runtime.guard import Guard
from trainer.runtime.signals import StopFlag

Objective = Callable[[nn.Module, Batch, int], Tensor]
"""(network, micro-batch, images seen before this step) -> one loss per sample."""

Span = Callable[[str], AbstractContextManager[None]]
"""Accounts the time inside to a bucket of the ledger."""

Encode = Callable[[Batch, Span], Batch]
"""(micro-batch of pictures and captions, where its time is accounted) -> of latents."""


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
    is_stopping: bool
    """Some rank was told to stop."""
    flops: float
    """Floating point operations of the network, over all ranks; 0 where nobody counts them."""
    joules: float
    """What the meters of all nodes counted since the step before."""
    measured_joules: float
    """What of it was measured, and not modelled."""


@dataclass(frozen=True)
class Mine:
    """This rank's samples of a step."""

    ids: Tensor
    """``(N,)`` int64."""
    losses: Tensor
    """``(N,)`` fp32."""


class StepObserver(Protocol):
    """Hears what a step consists of."""

    def span(self, bucket: str) -> AbstractContextManager[None]:
        """Account the time inside to a bucket of the ledger."""

    def at(self, phase: str) -> None:
        """Hear what this rank does from now on, of what a step consists of."""

    def spent_j(self) -> tuple[float, float]:
        """Return the joules that this rank has to tell of since the last call.

        Returns:
            All of them, and how many were measured.
        """


class Observer(StepObserver, Protocol):
    """What happens beside training: accounts, checkpoints, rollbacks; each knows if it is due."""

    def after_step(self, progress: Progress, facts: StepFacts) -> None:
        """Hear of a finished step."""

    def roll_back(self, progress: Progress, fault: str, mine: Mine) -> None:
        """Bring everything, `progress` too, back to the last good state, or end the run."""


@dataclass(frozen=True)
class Parts:
    """Everything the loop needs, assembled by `trainer.build`."""

    plan: Plan
    total_images: int
    engine: Engine
    ema: Ema
    guard: Guard
    objective: Objective
    read: Callable[[State], Generator[Batch]]
    """Where the stream stands -> this rank's micro-batches from there on."""
    advance: Callable[[State], State]
    """State of the stream before a step -> behind it."""
    learning_rate: Callable[[int], float]
    """Images seen -> rate."""
    comm: Comm
    flops: Callable[[Batch], float]
    """Counts what a micro-batch of latents costs the network."""
    encode: Encode | None = None
    """Where the micro-batches are pictures and captions: makes latents of them."""


def train(parts: Parts, progress: Progress, stop: StopFlag, observer: Observer) -> bool:
    """Train until all images are seen; return False when a stop signal ended it earlier.

    Raises:
        BadWorld: The run is not getting over a fault; all ranks agree and stop.
    """
    batches = parts.read(progress.stream)
    while progress.images_seen < parts.total_images:
        facts, mine = take_step(parts, batches, progress, stop, observer)
        fault = parts.guard.judge(facts.loss, facts.grad_norm, overflowed=parts.engine.overflowed)
        if fault is not None:
            batches.close()
            observer.roll_back(progress, fault, mine)
            batches = parts.read(progress.stream)
            continue
        observer.after_step(progress, facts)
        if facts.is_stopping:
            return False
    return True


def take_step(
    parts: Parts,
    batches: Iterator[Batch],
    progress: Progress,
    stop: StopFlag,
    observer: StepObserver,
) -> tuple[StepFacts, Mine]:
    """Take one optimizer step, and move `progress` behind it."""
    plan, engine = parts.plan, parts.engine
    rate = parts.learning_rate(progress.images_seen)
    engine.set_learning_rate(rate)
    ids, losses, flops = [], [], 0.0
    for _ in range(plan.accumulation_steps):
        with observer.span("data_stall"):
            batch = next(batches)
        if parts.encode is not None:
            batch = parts.encode(batch, observer.span)
        observer.at("forward")
        loss_B = parts.objective(engine.model, batch, progress.images_seen)
        observer.at("backward")
        engine.backward(loss_B.mean())
        observer.at("update")
        engine.micro_step()
        flops += parts.flops(batch)
        ids.append(batch.ids_B)
        losses.append(loss_B.detach())
    mine = Mine(torch.cat(ids), torch.cat(losses))

    progress.step += 1
    progress.images_seen += plan.images_per_step
    progress.stream = parts.advance(progress.stream)
    parts.ema.update(images_per_step=plan.images_per_step, images_seen=progress.images_seen)
    observer.at("agreement")
    # One small collective a step: what is summed over all ranks, and whether any was told to stop.
    loss_sum, was_told = float(mine.losses.sum()), float(stop.received is not None)
    total, stopping, *spent = parts.comm.sum([loss_sum, was_told, flops, *observer.spent_j()])
    loss = total / plan.images_per_step
    return StepFacts(loss, engine.grad_norm, rate, stopping > 0, *spent), mine
