"""This rank's slice of every trained parameter and of its AdamW moments, for every ZeRO stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A range of one flattened parameter that this rank owns; the tensors are views, not copies."""

    name: str
    start: int
    numel: int
    weight: Tensor
    """``(numel,)`` fp32 master weights."""
    moments: dict[str, Tensor]
    """``(numel,)`` fp32 each: exp_avg and exp_avg_sq."""


class FragmentReader:
    """Finds the fragments of a DeepSpeed engine; one iterator for stages 0 to 3."""

    def __init__(self, engine: Any, *, rank: int, world: int) -> None:  # noqa: ANN401 - untyped
        """Make the optimizer's states exist, so that views of them do."""
        self._engine, self._rank, self._world = engine, rank, world
        self._stage = engine.zero_optimization_stage()
        self._zero = engine.optimizer if self._stage else None
        self._adam: torch.optim.Optimizer = self._zero.optimizer if self._zero else engine.optimizer
        for tensor in self._flat_tensors():
            state = self._adam.state[tensor]
            if not state:
                state["step"] = torch.zeros(
                    (), dtype=torch.float32, device=_step_device(self._adam, tensor)
                )
                state.update({key: torch.zeros_like(tensor) for key in MOMENTS})
        if self._stage in {1, 2}:
            assert self._zero is not None
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def adam_steps(self) -> int:
        """Optimizer steps that AdamW's bias correction has counted."""
        return max((int(self._adam.state[t]["step"]) for t in self._flat_tensors()), default=0)

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for tensor in self._flat_tensors():
            self._adam.state[tensor]["step"].fill_(steps)

    def __iter__(self) -> Iterator[Fragment]:
        """Yield this rank's fragments in the order of the model's parameters."""
        for index, (name, param) in enumerate(self._named_parameters()):
            if self._stage == 0:
                # Every rank holds everything; share the work of saving and averaging it out.
                if index % self._world == self._rank:
                    yield self._whole(name, param)
            elif self._stage == 3:
                yield from self._stage_3(name, param)
            elif param._hp_mapping is not None:  # type: ignore[attr-defined]
                yield self._mapped(name, param)

    def publish(self) -> None:
        """Copy master weights that were written through fragments back into the network."""
        if self._stage == 0:
            for index, (_, param) in enumerate(self._named_parameters()):
                torch.distributed.broadcast(param.data, src=index % self._world)
                for key in MOMENTS:
                    torch.distributed.broadcast(
                        self._adam.state[param][key], src=index % self._world
                    )
            return
        assert self._zero is not None
        if self._stage == 3:
            for group, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                self._zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
                self._zero._unflatten_partitioned_parameters(group)
        else:
            self._zero.update_lp_params()

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        module: nn.Module = self._engine.module
        return ((n, p) for n, p in module.named_parameters() if p.requires_grad)

    def _flat_tensors(self) -> list[Tensor]:
        if self._stage == 3:
            assert self._zero is not None
            return list(self._zero.fp32_partitioned_groups_flat)
        if self._stage in {1, 2}:
            assert self._zero is not None
            return list(self._zero.single_partition_of_fp32_groups)
        return [param for _, param in self._named_parameters()]

    def _whole(self, name: str, param: nn.Parameter) -> Fragment:
        state = self._adam.state[param]
        moments = {key: state[key].view(-1) for key in MOMENTS}
        return Fragment(name, 0, param.numel(), param.data.view(-1), moments)

    def _mapped(self, name: str, param: nn.Parameter) -> Fragment:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        place = mapping.lp_fragment_address
        moments = {key: mapping.optim_fragment[key] for key in MOMENTS}
        return Fragment(name, place.start, place.numel, mapping.hp_fragment.data, moments)

    def _stage_3(self, name: str, param: nn.Parameter) -> Iterator[Fragment]:
        assert self._zero is not None
        zero = self._zero
        total = param.ds_numel  # type: ignore[attr-defined]
        part = -(-total // self._world)
        start = min(self._rank * part, total)
        numel = min(part, total - start)
        if numel == 0:
            return
        group, offset, _ = zero.grad_position[zero.get_param_id(param)]
        flat = zero.fp32_partitioned_groups_flat[group]
        state = self._adam.state[flat]
        moments = {key: state[key].narrow(0, offset, numel) for key in MOMENTS}
        yield Fragment(name, start, numel, flat.data.narrow(0, offset, numel), moments)


def _step_device(adam: torch.optim.Optimizer, tensor: Tensor) -> torch.device:
    """Fused AdamW keeps its step counter beside the parameter, the others on the host."""
    return tensor.device if adam.defaults.get("fused") else torch.device("cpu")
