"""What a machine allows: its matrix products and copies, and the rollout rate that follows from them.

    bound of a pass = max(operations / matmul rate, bytes that must move / copy rate)

Counted are the weights, keys and values that each pass has to read, and the operations of matrix products and
attention; no elementwise work, no launches, no decoding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vidworld.model.dit import CausalDiT
from vidworld.model.parameters import muon_parameters


@dataclass(frozen=True)
class Machine:
    """Measured rates."""

    flops: float
    """Operations a second of a large matrix product, bfloat16 on a GPU and float32 on a CPU."""
    bytes_per_s: float
    """Bytes read and written a second by a large copy."""


def machine(device: torch.device) -> Machine:
    """Measure the device; takes about a second."""
    gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    block = torch.zeros(2**29 if gpu else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)

    def clock() -> float:
        return time.perf_counter() if gpu else time.process_time() / torch.get_num_threads()

    def best(function: Callable[[], object], repeats: int) -> float:
        taken = []
        for _ in range(repeats):
            started = clock()
            function()
            if gpu:
                torch.cuda.synchronize()
            taken.append(clock() - started)
        return min(taken)

    return Machine(
        2 * size**3 / best(lambda: a @ b, 10), 2 * len(block) / best(lambda: target.copy_(block), 10)
    )


def frames_per_s_bound(
    model: CausalDiT, batch: int, steps: int, window: int, limits: Machine, *, half: bool
) -> float:
    """Frames a second of `batch` rollouts with `steps` passes a frame, of which the first also commits."""
    config, tokens = model.config, model.tokens_per_frame
    width = 2 if half else 4
    dense = sum(parameter.numel() for parameter in muon_parameters(model))
    modulation = sum(
        p.numel() for name, p in model.named_parameters() if "modulation." in name and p.ndim == 2
    )
    timed = sum(map(config.attends_time, range(config.depth)))
    cached = timed * batch * tokens * window * 2 * config.num_kv_heads * config.head_dim * width
    per_frame = 2 * tokens * dense + 4 * config.width * (config.depth * tokens**2 + timed * tokens * window)
    seconds = 0.0
    for index in range(steps):
        frames = 2 if index == 0 else 1
        moved = dense * width + frames * cached
        operations = batch * frames * per_frame
        if index == 0:
            moved += modulation * width
            operations += batch * (steps + 1) * 2 * modulation
        seconds += max(operations / limits.flops, moved / limits.bytes_per_s)
    return batch / seconds
