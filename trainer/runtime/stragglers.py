"""Which ranks are slow by themselves: the time that each does not spend on waiting for others."""

import logging
import statistics
import struct
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.runtime.comm import Comm
from trainer.runtime.ending import node_name
from trainer.runtime.pulse import Pulse

log = logging.getLogger(__name__)

WARN_EVERY_S = 60.0
_WORTH_FRAC = 0.05
"""What a rank differs by, if it is less of a step than this, does not count."""
_FACTS = struct.Struct("<dd64s")


@dataclass(frozen=True)
class Share:
    """A rank's part in the time of a step."""

    own_s: float
    """What it needed by itself."""
    step_s: float
    """The whole step, waiting included."""
    node: str

    def pack(self) -> bytes:
        """Write it in as many bytes as any other."""
        return _FACTS.pack(self.own_s, self.step_s, self.node.encode())

    @classmethod
    def unpack(cls, told: bytes) -> "Share":
        """Read what `pack` wrote."""
        own_s, step_s, node = _FACTS.unpack(told)
        return cls(own_s, step_s, node.rstrip(b"\0").decode(errors="replace"))


def rank_ratios(shares: Sequence[Share], *, is_forward_own: bool) -> list[float]:
    """Divide each rank's own time by the median; 1 if that costs next to nothing of the step.

    Args:
        shares: Of all ranks.
        is_forward_own: If not, all time besides `own_s` is taken to be the same on all ranks.
    """
    step_s = min(share.step_s for share in shares)
    owns_s = [share.own_s for share in shares]
    shared_s = 0.0 if is_forward_own else max(0.0, step_s - max(owns_s))
    # Of two ranks the faster one: a straggler must not be its own measure.
    median_s = statistics.median_low(owns_s)
    return [
        (own_s + shared_s) / max(median_s + shared_s, 1e-9)
        if abs(own_s - median_s) > _WORTH_FRAC * step_s
        else 1.0
        for own_s in owns_s
    ]


class Stragglers:
    """Compares the ranks from time to time; all call together."""

    def __init__(
        self, comm: Comm, pulse: Pulse, *, slow_rank_ratio: float, is_forward_own: bool
    ) -> None:
        """Take the pulse to measure.

        Args:
            comm: Of all ranks.
            pulse: Of this rank.
            slow_rank_ratio: From how many times the median on a rank is slow.
            is_forward_own: No rank waits for another in the forward pass. It does under ZeRO
                stage 3, where only the wait for data, and encoding, tell ranks apart.
        """
        self._comm, self._pulse = comm, pulse
        self._slow_rank_ratio, self._is_forward_own = slow_rank_ratio, is_forward_own
        self._forward = _GpuForward() if comm.device.type == "cuda" else None
        self._since: tuple[float, int] | None = None
        self._warned_s = -WARN_EVERY_S
        self.split_s: dict[str, float] = {}
        """Seconds per step that this rank spent in each phase, between the last two comparisons."""
        self.slow: list[str] = []
        """Slow ranks at the last comparison, in words."""

    def enter(self, phase: str) -> None:
        """Hear of a new phase; GPUs compute behind what the training thread does."""
        if self._forward is not None:
            self._forward.enter(phase)

    def compare(self) -> float | None:
        """Warn of slow ranks; return the slowest one's ratio, None at the first comparison."""
        since, self._since = self._since, (time.monotonic(), self._pulse.steps_done)
        spent_s = self._take_spent_s()
        if since is None:
            return None
        steps = self._since[1] - since[1]
        self.split_s = {phase: seconds / steps for phase, seconds in spent_s.items()}
        own_s = spent_s["data"] + spent_s["encode"]
        if self._is_forward_own:
            own_s += spent_s["forward"]
        mine = Share(own_s / steps, (self._since[0] - since[0]) / steps, node_name())
        shares = [Share.unpack(told) for told in self._comm.gather_bytes(mine.pack())]
        ratios = rank_ratios(shares, is_forward_own=self._is_forward_own)
        self.slow = [
            f"rank {rank} on {share.node} ({ratio:.1f} x)"
            for rank, (share, ratio) in enumerate(zip(shares, ratios, strict=True))
            if ratio > self._slow_rank_ratio
        ]
        if self.slow and self._since[0] - self._warned_s >= WARN_EVERY_S:
            self._warned_s = self._since[0]
            log.warning(
                "step %d: slower than the median rank by itself, so that all wait for it: %s",
                self._pulse.step - 1,
                ", ".join(self.slow),
            )
        return max(ratios)

    def _take_spent_s(self) -> defaultdict[str, float]:
        spent_s = self._pulse.take_spent_s()
        if self._forward is not None:
            spent_s["forward"] = self._forward.take_s()
        return spent_s


class _GpuForward:
    """Seconds of forward passes between events on the stream that computes them."""

    def __init__(self) -> None:
        self._pairs: list[list[torch.cuda.Event]] = []
        self._is_inside = False

    def enter(self, phase: str) -> None:
        if phase == "forward":
            self._pairs.append([])
        if phase == "forward" or self._is_inside:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._pairs[-1].append(event)
        self._is_inside = phase == "forward"

    def take_s(self) -> float:
        """Sum them since the last call; the loop has waited for its GPU at the end of the step."""
        pairs, self._pairs = self._pairs, []
        return sum(float(start.elapsed_time(end)) for start, end in pairs) / 1000
