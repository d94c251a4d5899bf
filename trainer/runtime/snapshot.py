"""A copy in host memory of all that training changes: to be saved, and to go back to."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.runtime.checkpoint import Kind, Tensors, TrainState
from trainer.runtime.ema import Ema
from trainer.runtime.fragments import FragmentReader


def live_tensors(fragments: FragmentReader, ema: Ema) -> dict[Kind, dict[str, Tensor]]:
    """Name this rank's share of weights, averages and moments; views, not copies."""
    named: dict[Kind, dict[str, Tensor]] = {"weight": {}, "ema": {}, "optim": {}}
    for number, fragment in enumerate(fragments):
        place = f"{fragment.name}@{fragment.start}"
        named["weight"][place] = fragment.weight
        for average, tensors in ema.tensors().items():
            named["ema"][f"{average}/{place}"] = tensors[number]
        for moment, tensor in fragment.moments.items():
            named["optim"][f"{moment}/{place}"] = tensor
    return named


class Snapshot:
    """Of one rank; its memory is taken once and used again."""

    def __init__(self, fragments: FragmentReader, ema: Ema) -> None:
        """Make room for as many bytes as the rank's share has; pinned where a GPU copies to it."""
        self._fragments, self._ema = fragments, ema
        self._copies: dict[Kind, dict[str, Tensor]] = {
            kind: {
                name: torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                )
                for name, tensor in named.items()
            }
            for kind, named in live_tensors(fragments, ema).items()
        }
        self.state: TrainState | None = None
        """Where training stood when it was taken."""
        self.scalars: dict[str, float] = {}

    @property
    def tensors(self) -> Tensors:
        """What was taken; valid until the next time."""
        return self._copies

    @torch.no_grad()
    def take(self, state: TrainState) -> None:
        """Copy everything as it is now."""
        for live, copy in self._pairs():
            copy.copy_(live.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.state, self.scalars = state, self._fragments.scalars()

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything as it was when it was taken."""
        for live, copy in self._pairs():
            live.copy_(copy)
        self._fragments.publish()
        self._fragments.set_scalars(self.scalars)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for kind, named in live_tensors(self._fragments, self._ema).items():
            for name, live in named.items():
                yield live, self._copies[kind][name]
