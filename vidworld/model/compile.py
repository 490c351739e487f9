"""Compile the transformer's blocks, and know how many graphs that makes."""

from typing import Any

import torch
from torch import nn

from vidworld.model.dit import CausalDiT

# A process meets a few clip lengths, with and without gradients, on all rows and on subsets, for two kinds of
# block. torch gives up at 8 versions of one function, which with fullgraph is an error.
MAX_GRAPHS = 64


def compile_blocks(model: CausalDiT, **options: Any) -> CausalDiT:
    """Compile every block in place, whole and for fixed shapes; names in the state dict stay as they are.

    Blocks of a kind share their graphs, so a shape costs two compilations whatever the depth. Keep the shapes
    few: a rollout whose cache still grows has one a frame, so run it under
    `torch.compiler.set_stance("force_eager")`. `options` go to torch.compile. Raises torch's process-wide
    limit on graphs of one function.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, **options)
    return model


def compile_without_hooks(block: nn.Module) -> None:
    """Of a block that is compiled, compile `forward` only: hooks that others put on it stay outside."""
    if block._compiled_call_impl is None:
        return
    block._compiled_call_impl = None
    block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
