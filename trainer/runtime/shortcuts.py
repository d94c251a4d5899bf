"""What DeepSpeed does in every step and need not: shortcuts with the same result."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def keep_views(zero: Any) -> None:  # noqa: ANN401 - untyped
    """Leave the weights of ZeRO 1 and 2 the views of the flat weights that they are.

    After each update DeepSpeed makes these views again, parameter by parameter, "just to be safe".
    """
    zero._update_model_bit16_weights = _nothing


def gather_by_broadcast(stage_1_and_2: Any) -> None:  # noqa: ANN401 - a module of DeepSpeed
    """Let each rank send its updated shard to all others straight into their flat weights.

    gloo gathers into a buffer of its own, and copies from there; broadcasts do not.
    """
    stage_1_and_2.all_gather_dp_groups = _broadcast_shards


def reduce_to_owners(zero: Any) -> None:  # noqa: ANN401 - untyped
    """Send the gradients of ZeRO 1 only to the rank that owns them, all in one exchange.

    DeepSpeed gives the sum of all gradients to all ranks, and copies it back into each.
    """
    all_reduce = zero.allreduce_no_retain
    (params,) = zero.bit16_groups
    num_numbers = sum(param.numel() for param in params)

    def reduce(bucket: Sequence[Tensor], *args: object, **kwargs: object) -> None:
        if sum(gradient.numel() for gradient in bucket) == num_numbers:
            _exchange(params, zero.partition_size[0], zero.dp_process_group)
        else:  # some of a large network's, or not all weights were used
            all_reduce(bucket, *args, **kwargs)

    zero.allreduce_no_retain = reduce


def _exchange(params: Sequence[Tensor], owned: int, group: torch.distributed.ProcessGroup) -> None:
    """Average the gradients that this rank owns; those of others become useless."""
    rank, world = group.rank(), group.size()
    gradients = [param.grad for param in params if param.grad is not None]
    flat, received = torch.empty(2, world, owned, dtype=gradients[0].dtype)
    ours, padding = flat.view(-1).tensor_split([sum(param.numel() for param in params)])
    torch.cat([gradient.reshape(-1) for gradient in gradients], out=ours)
    padding.zero_()
    torch.distributed.all_to_all_single(received, flat, group=group)
    torch.mean(received, dim=0, out=flat[rank])
    pieces = ours.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.data = piece.view_as(gradient)


def norms_at_once(zero: Any) -> None:  # noqa: ANN401 - untyped
    """Take the norms of all gradients of ZeRO 1 and 2 in one call, in the gradients' precision.

    DeepSpeed takes them one by one, and on a CPU makes a float64 copy of each.
    """
    zero.get_grad_norm_direct = partial(_grad_norm, zero.dp_process_group)


def _grad_norm(
    group: torch.distributed.ProcessGroup, gradients: Sequence[Tensor], _params: object
) -> Tensor:
    """Return the L2 norm over all ranks' gradients; -1 if it is not finite, as DeepSpeed does."""
    norms = torch._foreach_norm(list(gradients))  # what is padded is zero
    squared = torch.stack(norms).double().square().sum()
    torch.distributed.all_reduce(squared, group=group)
    return torch.where(squared.isfinite(), squared.sqrt(), -1.0).float()


def _nothing(_group: int) -> None:
    pass


def _broadcast_shards(
    *,
    partitioned_param_groups: Sequence[Sequence[Tensor]],
    dp_process_group: Sequence[torch.distributed.ProcessGroup],
    **_of_gathering: object,
) -> None:
    for shards, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        if len(shards) > 1:
            works = [
                torch.distributed.broadcast(shard, group=group, group_src=rank, async_op=True)
                for rank, shard in enumerate(shards)
            ]
            for work in works:
                work.wait()
