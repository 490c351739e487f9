"""One member of a shared network as a network of its own."""

from dataclasses import replace

import torch
from torch import Tensor

from vidworld.model.dit import CausalDiT
from vidworld.model.members import MemberLinear
from vidworld.quantize import MEMBER_CHANGES

PREVIOUS_FRAME = ("token_embedding.previous_", "copy_head.")
"""Weights that begin so read the frame before, or copy from it."""


def merge_member(model: CausalDiT, member: int) -> CausalDiT:
    """The network of one member, with its changes added to the trunk's matrices; nothing is shared."""
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away, and must not move the stream
        merged = CausalDiT(replace(model.config, members=0), model.shape)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    for name, part in model.named_modules():
        if isinstance(part, MemberLinear) and part.members:
            weights[f"{name}.weight"] = part.merged(member)
            del weights[f"{name}.in_JrI"], weights[f"{name}.out_JOr"]
    merged.load_state_dict(weights, assign=True)
    return merged.to(next(model.parameters()).device).requires_grad_(False).train(model.training)


def first_member(model: CausalDiT) -> CausalDiT:
    """The first member of a shared network, or a network without members as it is."""
    return merge_member(model, 0) if model.config.members else model


def with_fresh_parts(weights: dict[str, Tensor], model: CausalDiT) -> dict[str, Tensor]:
    """Weights to begin a network from: those of one with fewer parts, or with members where it has none.

    A network without members begins as the first of theirs. Members and what reads the previous frame are
    fresh where the weights lack them. Those that read the previous frame are zero, and the gate that copies
    it is nearly closed, so that the network still computes what it did, or within 2 % of it with the gate.
    """
    if not model.config.members:
        weights = _of_first(weights)
    fresh = {
        name: weight
        for name, weight in model.state_dict().items()
        if (name.endswith(MEMBER_CHANGES) or name.startswith(PREVIOUS_FRAME)) and name not in weights
    }
    return weights | fresh


def _of_first(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first member's matrices, without any member's changes."""
    merged = {name: weight for name, weight in weights.items() if not name.endswith(MEMBER_CHANGES)}
    into, out = MEMBER_CHANGES
    for name in (name.removesuffix(into) for name in weights if name.endswith(into)):
        change = weights[name + out][0] @ weights[name + into][0]
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + change
    return merged
