"""What DeepSpeed does in every step and need not: shortcuts that change no number."""

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
