"""One rank of DDP that trains with the fused kernels, interpreted, and plainly: fused_ranks.py OUT."""

import os
import sys
from pathlib import Path

import torch

from vidworld.model.compile import fuse
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.optim import OptimConfig
from vidworld.types import Frames, SignalLevel

SHAPE = FrameShape(views=1, channels=2, height=4, width=4, proprio_dims=3, action_dims=2)
SMALL = DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2, num_registers=1)


class Loss(torch.nn.Module):
    """A loss whose gradients differ from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CausalDiT(SMALL, SHAPE)
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    def forward(self, seed: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(2, 3, *size, generator=random)

        conditioning = Conditioning(normal(1, 2), normal() > -1, torch.zeros(2, dtype=torch.int64))
        level = SignalLevel(torch.rand(2, 3, generator=random))
        frames = Frames(normal(1, 2, 4, 4), normal(3))
        out, _ = self.net(frames, level, normal().abs(), conditioning, streams=Streams(3))
        return {"loss": out.latents_BTVChw.square().mean() + out.proprio_BTS.square().mean()}


def main() -> None:
    (out,) = sys.argv[1:]
    found = {}
    for kind in ("plain", "fused"):
        torch.manual_seed(0)
        task = Loss()
        if kind == "fused":
            fuse(task.net)
        engine = build_engine(task, EngineConfig(), OptimConfig())
        for part in range(2):
            engine.backward((10 * engine.rank + part,), 0.5, last=part == 1)
        found[kind] = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    torch.save(found, Path(out) / f"fused-{engine.rank}.pt")
    torch.distributed.barrier()
    # All is saved. Threads of gloo now and then abort a process that is on its way out.
    os._exit(0)


if __name__ == "__main__":
    main()
