"""A function of fixed buffers as one CUDA graph: the host pays for one launch and not for thousands."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP_CALLS = 3
"""Calls before the capture: compilation, autotuning and library handles must be done with by then."""


def captured(function: Callable[[], None], changes: Sequence[Tensor], *, name: str) -> Callable[[], None]:
    """A CUDA graph of `function`, which takes its inputs from buffers and leaves its results in buffers.

    changes: every buffer that it changes; they are as before when this returns, since warming up runs it.
    What cannot be captured warns and is returned as it is.
    """
    saved = [buffer.clone() for buffer in changes]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
        run: Callable[[], None] = graph.replay
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = " ".join(str(error).split())[:300]
        warnings.warn(f"{name} cannot be captured as a CUDA graph and runs without: {reason}", stacklevel=2)
        run = function
    for buffer, content in zip(changes, saved, strict=True):
        buffer.copy_(content)
    return run
