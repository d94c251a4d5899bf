"""Tell a step that went wrong: numbers that are not finite, and losses that leap."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from trainer.config_engine import RollbackConfig

_SIGMA_PER_MAD = 1.4826
"""Standard deviation over median absolute deviation of a normal law."""


class Guard:
    """Judges losses that are equal on all ranks, so that all ranks judge alike."""

    def __init__(self, cfg: RollbackConfig, recent: Iterable[float] = ()) -> None:
        """Begin with what a checkpoint remembers of the steps before it.

        Args:
            cfg: When a loss is a spike.
            recent: Losses of the last good steps, the newest last.
        """
        self._cfg = cfg
        self.forget(recent)

    @property
    def recent(self) -> list[float]:
        """Losses of the last good steps."""
        return list(self._recent)

    def forget(self, recent: Iterable[float]) -> None:
        """Remember these steps, and none of later ones."""
        self._recent = deque(recent, maxlen=self._cfg.window_steps)

    def judge(self, loss: float, grad_norm: float, *, overflowed: bool) -> str | None:
        """Say what is wrong with a step; None, and it is remembered, if nothing is.

        Args:
            loss: Mean over the step's images.
            grad_norm: Of its mean gradient, before clipping.
            overflowed: The step was skipped because fp16 could not hold its scaled gradients,
                which the loss scale deals with.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss:g}"
        if not math.isfinite(grad_norm) and not overflowed:
            return f"the gradient's norm is {grad_norm:g}"
        limit = self.limit()
        if loss > limit:
            return f"the loss leapt to {loss:.4g}, above {limit:.4g}"
        self._recent.append(loss)
        return None

    def limit(self) -> float:
        """Largest loss that is no spike; infinite until enough steps were seen."""
        sigmas, recent = self._cfg.spike_sigmas, self._recent
        if sigmas is None or len(recent) < self._cfg.window_steps:
            return math.inf
        median = statistics.median(recent)
        deviation = statistics.median(abs(loss - median) for loss in recent)
        return median + sigmas * _SIGMA_PER_MAD * deviation
