"""This rank's slice of every trained parameter and of its moments, for every ZeRO stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """A range of one flattened parameter that this rank owns; the tensors are views, not copies."""

    name: str
    start: int
    numel: int
    weight: Tensor
    """``(numel,)`` fp32 master weights."""
    moments: dict[str, Tensor]
    """What the optimizer remembers of it by name, flattened fp32: AdamW's exp_avg and exp_avg_sq
    ``(numel,)``; Adafactor's row_var and col_var, which are shorter, or variance."""


class FragmentReader:
    """Finds the fragments of a DeepSpeed engine; one iterator for stages 0 to 3."""

    def __init__(self, engine: Any, *, rank: int, world: int) -> None:  # noqa: ANN401 - untyped
        """Make the optimizer's states exist, so that views of them do."""
        self._engine, self._rank, self._world = engine, rank, world
        self._stage = engine.zero_optimization_stage()
        self._zero = engine.optimizer if self._stage else None
        self._optimizer: torch.optim.Optimizer = (
            self._zero.optimizer if self._zero else engine.optimizer
        )
        self._owners = _owners([p.numel() for _, p in self._named_parameters()], world)
        for tensor in self._flat_tensors():
            state = self._optimizer.state[tensor]
            if not state:
                state["step"] = torch.zeros(
                    (), dtype=torch.float32, device=_step_device(self._optimizer, tensor)
                )
                state.update(_moments(self._optimizer, tensor))
        if self._stage in {1, 2}:
            assert self._zero is not None
            self._zero._lazy_init_hp_params_optimizer_state()

    def scalars(self) -> dict[str, float]:
        """Read what the optimizer counts: its steps, and the state of fp16's loss scale."""
        steps = max(
            (float(self._optimizer.state[t]["step"]) for t in self._flat_tensors()), default=0.0
        )
        found = {"steps": steps}
        if self._scaler is not None:
            found |= {name: float(getattr(self._scaler, name)) for name in _SCALER}
        return found

    def set_scalars(self, scalars: Mapping[str, float]) -> None:
        """Write what `scalars` read; a loss scale only where there is one."""
        for tensor in self._flat_tensors():
            self._optimizer.state[tensor]["step"].fill_(scalars["steps"])
        if self._scaler is not None:
            for name in _SCALER:
                if name in scalars:
                    kept = getattr(self._scaler, name)
                    setattr(self._scaler, name, type(kept)(scalars[name]))

    @property
    def _scaler(self) -> Any:  # noqa: ANN401 - untyped
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def __iter__(self) -> Iterator[Fragment]:
        """Yield this rank's fragments in the order of the model's parameters."""
        for index, (name, param) in enumerate(self._named_parameters()):
            if self._stage == 0:
                # Every rank holds everything; share the work of saving and averaging it out.
                if self._owners[index] == self._rank:
                    yield self._whole(name, param)
            elif self._stage == 3:
                yield from self._stage_3(name, param)
            elif param._hp_mapping is not None:  # type: ignore[attr-defined]
                yield self._mapped(name, param)

    def publish(self) -> None:
        """Copy master weights that were written through fragments back into the network."""
        if self._stage == 0:
            for index, (_, param) in enumerate(self._named_parameters()):
                torch.distributed.broadcast(param.data, src=self._owners[index])
                for moment in self._moments_of(param).values():
                    torch.distributed.broadcast(moment, src=self._owners[index])
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

    def _moments_of(self, tensor: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state[tensor]
        return {key: value for key, value in state.items() if key != "step"}

    def _whole(self, name: str, param: nn.Parameter) -> Fragment:
        moments = {key: moment.view(-1) for key, moment in self._moments_of(param).items()}
        return Fragment(name, 0, param.numel(), param.data.view(-1), moments)

    def _mapped(self, name: str, param: nn.Parameter) -> Fragment:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        place = mapping.lp_fragment_address
        moments = dict(mapping.optim_fragment)
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
        moments = {
            key: moment.narrow(0, offset, numel) for key, moment in self._moments_of(flat).items()
        }
        yield Fragment(name, start, numel, flat.data.narrow(0, offset, numel), moments)


def _owners(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Share tensors out to ranks, the largest first, each to the one that has the least so far."""
    owners, held = [0] * len(sizes), [0] * num_ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(num_ranks), key=held.__getitem__)
        held[owners[index]] += sizes[index]
    return owners


def _step_device(optimizer: torch.optim.Optimizer, tensor: Tensor) -> torch.device:
    """Fused AdamW keeps its step counter beside the parameter, the others on the host."""
    return tensor.device if optimizer.defaults.get("fused") else torch.device("cpu")


def _moments(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Give an optimizer's memory of a tensor as it makes it at its first step."""
    if not isinstance(optimizer, torch.optim.Adafactor):
        return {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
    if tensor.dim() < 2:
        return {"variance": torch.zeros_like(tensor)}
    *outer, rows, columns = tensor.shape
    return {
        "row_var": tensor.new_zeros((*outer, rows, 1)),
        "col_var": tensor.new_zeros((*outer, 1, columns)),
    }
