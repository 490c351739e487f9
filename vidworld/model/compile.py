"""Compile the transformer's blocks, one graph each."""

from typing import Any

from vidworld.model.dit import CausalDiT


def compile_blocks(model: CausalDiT, **options: Any) -> CausalDiT:
    """Compile every block in place, whole and for fixed shapes; names in the state dict stay as they are.

    `options` go to torch.compile.
    """
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, **options)
    return model
