"""Sequence parallelism: the ranks of a group share clips, each rank computes some frames of all of them.

Everything but time attention works on one frame at a time, so frames are cut across ranks. Around time
attention an all-to-all turns "some frames, all tokens" into "all frames, some tokens" and back, as DeepSpeed
Ulysses (arXiv 2309.14509) does with heads. Switching between the two axes of a factorised model instead
(arXiv 2403.10266) moves 2 tensors a layer in place of 4, and does not limit the ranks to the key-value heads.

Shapes: B batch, T frames of all streams, t = T / ranks, N tokens a frame, n tokens of this rank, D width.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from vidworld.errors import ConfigError


class SequenceGroup(NamedTuple):
    """The ranks that share clips, by the name of their process group."""

    name: Any
    """torch's name of the group, a string."""
    rank: int
    size: int


def sequence_groups(size: int) -> SequenceGroup:
    """Cut the world into groups of `size` neighbouring ranks; this rank's. All ranks must call it alike.

    Raises ConfigError when the world cannot be cut so.
    """
    if not dist.is_initialized() or dist.get_world_size() % size:
        world = dist.get_world_size() if dist.is_initialized() else 1
        raise ConfigError(
            "engine.sequence_parallel", got=size, expected=f"a divisor of the number of ranks = {world}"
        )
    group, _ = dist.new_subgroups(size)
    assert isinstance(group, dist.ProcessGroup)
    return SequenceGroup(group.group_name, dist.get_rank(group), size)


def frames_of(group: SequenceGroup, num_frames: int) -> slice:
    """The frames of this rank. Raises ConfigError when they cannot be shared evenly."""
    if num_frames % group.size:
        raise ConfigError(
            "frames of a clip in all its streams under sequence parallelism",
            got=num_frames,
            expected=f"a multiple of engine.sequence_parallel = {group.size}",
        )
    count = num_frames // group.size
    return slice(group.rank * count, (group.rank + 1) * count)


def token_counts(num_tokens: int, size: int) -> list[int]:
    """How many tokens each rank has while it has all frames."""
    return [num_tokens // size + (rank < num_tokens % size) for rank in range(size)]


def to_all_frames(x_BtND: Tensor, group: SequenceGroup) -> Tensor:
    """Some frames and all tokens to all frames and some tokens: [B, T, n, D]."""
    counts = token_counts(x_BtND.shape[2], group.size)
    mine = [counts[group.rank]] * group.size
    x_NBtD = x_BtND.permute(2, 0, 1, 3).contiguous()
    received = wait_tensor(all_to_all_single_autograd(x_NBtD, mine, counts, group.name))
    return received.unflatten(0, (group.size, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)


def to_all_tokens(x_BTnD: Tensor, num_tokens: int, group: SequenceGroup) -> Tensor:
    """The way back: [B, t, N, D]."""
    counts = token_counts(num_tokens, group.size)
    mine = [counts[group.rank]] * group.size
    x_RnBtD = x_BTnD.unflatten(1, (group.size, -1)).permute(1, 3, 0, 2, 4)
    x_YBtD = x_RnBtD.flatten(0, 1).contiguous()
    received = wait_tensor(all_to_all_single_autograd(x_YBtD, counts, mine, group.name))
    return received.permute(1, 2, 0, 3)


def gather_frames(x_Bt: Tensor, group: SequenceGroup) -> Tensor:
    """The frames of all ranks, [B, T, ...].

    Gradients that arrive at a frame are summed over ranks. When all compute the same loss of the whole, the
    gradient of the weights is then this rank's share times the ranks, and their mean over ranks is exact.
    """
    gathered: Tensor = _Gather.apply(x_Bt, group)  # type: ignore[assignment]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Bt: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group, ctx.frames = group, x_Bt.shape[1]
        parts = [torch.empty_like(x_Bt, memory_format=torch.contiguous_format) for _ in range(group.size)]
        dist.all_gather(parts, x_Bt.contiguous(), group=_process_group(group))
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (grad_BT,) = grads
        grad_BT = grad_BT.contiguous().clone()
        dist.all_reduce(grad_BT, group=_process_group(ctx.group))
        return grad_BT.narrow(1, ctx.group.rank * ctx.frames, ctx.frames), None


def _process_group(group: SequenceGroup) -> dist.ProcessGroup:
    return torch.distributed.distributed_c10d._resolve_process_group(group.name)


def shard_sequence(model: nn.Module, group: SequenceGroup) -> None:
    """Let a `CausalDiT` compute its training passes together with the other ranks of `group`."""
    for module in model.modules():
        if hasattr(module, "sequence"):
            setattr(module, "sequence", group)  # noqa: B010
