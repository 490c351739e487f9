"""Compile the transformer's blocks, and know how many graphs that makes."""

from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vidworld.model.dit import Block, CausalDiT
from vidworld.model.layers import SelfAttention, SwiGLU

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


# What `fuse` can change, for measurements of one without the other.
KERNELS = ("heads", "mlp", "residual", "attention")


def fuse(model: CausalDiT, kernels: Collection[str] = KERNELS) -> CausalDiT:
    """Let the blocks run the kernels of `fused`, `fused_attention` and `fused_residual`: to train on CUDA.

    The numbers are those of the plain code but for rounding. Nothing happens where there is no Triton, and
    none to heads whose halves are no power of two.
    """
    if find_spec("triton") is None:
        return model
    import vidworld.model.fused
    import vidworld.model.fused_attention
    import vidworld.model.fused_attention_long
    import vidworld.model.fused_residual  # noqa: F401

    half = model.config.head_dim // 2
    for module in model.modules():
        if isinstance(module, Block):
            module.fused = "residual" in kernels
        elif isinstance(module, SwiGLU):
            module.fused = "mlp" in kernels
        elif isinstance(module, SelfAttention):
            fits = half >= 8 and half & (half - 1) == 0
            module.fused = "heads" in kernels and fits
            module.fused_attention = "attention" in kernels and fits
    return model
