"""One rank of DDP that compares gradients which travelled in float32 and in bfloat16: reduce_ranks.py OUT."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.optim import OptimConfig


class Square(nn.Module):
    """A loss whose gradients differ from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 24))

    def forward(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(values).square().mean()}


def main() -> None:
    (out,) = sys.argv[1:]
    found = {}
    for reduce in ("fp32", "bf16"):
        torch.manual_seed(0)
        task = Square()
        engine = build_engine(task, EngineConfig(reduce=reduce), OptimConfig())
        for part in range(2):
            values = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * engine.rank + part))
            engine.backward((values,), 0.5, last=part == 1)
        found[reduce] = [parameter.grad.clone() for parameter in task.parameters()]
    torch.save(found, Path(out) / f"reduce-{engine.rank}.pt")
    torch.distributed.barrier()
    # All is saved. Threads of gloo now and then abort a process that is on its way out.
    os._exit(0)


if __name__ == "__main__":
    main()
