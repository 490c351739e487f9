"""The engine over torch's FSDP2: weights, gradients and moments are cut by rows across ranks."""

import os
from typing import Any

from torch import Tensor, nn

from vidworld.errors import ConfigError, require
from vidworld.trainer.engine import (
    EngineConfig,
    PlainEngine,
    autocast_of,
    has_accelerator,
    joined,
    norm_over_ranks,
    process_group,
)
from vidworld.trainer.optim import OptimConfig, build_optimizers
from vidworld.trainer.pieces import Held, Piece


class FsdpEngine(PlainEngine):
    """Each rank holds some rows of every weight, in float32, and gathers a block's when it runs.

    The optimizers step this rank's rows as plain tensors, so that everything else is as under DDP: the finite
    check stays on the device, and nobody waits.
    """

    shards_weights = True

    def __init__(self, task: nn.Module, config: EngineConfig, optim: OptimConfig) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if "LOCAL_RANK" not in os.environ:
            raise ConfigError(
                f"engine.strategy {config.strategy!r}",
                got="a process without a launcher",
                fix="start it with: torchrun --nproc-per-node N training/train.py CONFIG",
            )
        accelerate = require("accelerate", "train")
        handlers = process_group(accelerate)
        self.accelerator = joined(
            lambda: accelerate.Accelerator(cpu=not has_accelerator(), kwargs_handlers=handlers)
        )
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.num_optimizer_shards = self.world_size
        self.optim = optim
        shapes = {name: tuple(p.shape) for name, p in task.named_parameters() if p.requires_grad}
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        self.module: Any = task.to(self.device)
        for stack in [module for module in task.modules() if isinstance(module, nn.ModuleList)]:
            for block in stack:
                fully_shard(block, mesh=mesh)
        fully_shard(task, mesh=mesh)
        self._sharded = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.parameters = []
        for name, sharded in self._sharded.items():
            rows = nn.Parameter(sharded.to_local().detach())  # type: ignore[attr-defined]
            if rows.numel():
                start = _first_row(shapes[name][0], self.rank, self.world_size) * rows[0].numel()
                piece = Piece(name, shapes[name], start, start + rows.numel())
                self.parameters.append((piece, rows))
        self.optimizers = build_optimizers([(piece.name, rows) for piece, rows in self.parameters], optim)
        self.autocast = autocast_of(config, self.device)

    def backward(self, inputs: tuple[Any, ...], share: float | Tensor, *, last: bool) -> dict[str, Tensor]:
        """Accumulate `share` of this micro-batch's gradient; ranks are joined at the last one."""
        self.module.set_requires_gradient_sync(last)
        with self.autocast():
            losses = self.module(*inputs)
        (losses["loss"] * share).backward()
        return losses

    def update(self, factor: float) -> dict[str, Tensor]:
        """Step this rank's rows, or none on any rank."""
        for piece, rows in self.parameters:
            gradient = self._sharded[piece.name].grad
            rows.grad = None if gradient is None else gradient.to_local()  # type: ignore[attr-defined]
        outcome = super().update(factor)
        for sharded in self._sharded.values():
            sharded.grad = None
        return outcome

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient from the rows of all ranks."""
        return norm_over_ranks(
            [rows.grad for _, rows in self.parameters if rows.grad is not None], self.device
        )

    def elsewhere(self) -> set[str]:
        """Parameters with fewer rows than there are ranks."""
        return {f"adamw/{name}" for name in self._sharded}

    def weights(self) -> list[Held]:
        """This rank's rows."""
        return [Held(piece, rows.detach().view(-1)) for piece, rows in self.parameters]


def _first_row(num_rows: int, rank: int, world_size: int) -> int:
    """Where a rank's rows begin: all have ceil(rows / ranks), the last ones what is left."""
    return min(num_rows, rank * -(-num_rows // world_size))
