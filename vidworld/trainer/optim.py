"""Optimizers that never let a bad gradient through, and the warmup-stable-decay schedule.

Both optimizers read two device tensors that the loop sets before a step, as torch.amp.GradScaler does:
`grad_scale` (gradients are divided by it) and `found_inf` (1: leave everything as it is). So clipping and
skipping cost no pass over the gradients and no wait for the accelerator.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidworld.errors import ConfigError

# Quintic Newton-Schulz coefficients (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class OptimConfig:
    """Which optimizer, how fast, and how the rate rises and falls."""

    name: Literal["muon", "adamw"] = "adamw"
    """`muon`: Muon on the matrices inside blocks, AdamW on everything else."""
    lr: float = 3e-4
    """AdamW's rate on the plateau."""
    muon_lr: float = 0.02
    """Muon's rate on the plateau."""
    muon_momentum: float = 0.95
    muon_sharded: bool = False
    """Under DDP each rank orthogonalises its share of Muon's matrices and sends the result to the others,
    instead of all of them doing all: worth it where the links are fast and matrices large."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    """Decoupled; on matrices and kernels only."""
    warmup_steps: int = 200
    """Steps of linear rise."""
    decay_fraction: float = 0.3
    """The share of training, at its end, over which the rate falls linearly to zero."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError("optim.decay_fraction", got=self.decay_fraction, expected="0 to 1")
        if min(self.lr, self.muon_lr, self.clip, self.weight_decay, self.warmup_steps) < 0:
            raise ConfigError("optim", got=self, expected="no negative number")


def rate_factor(config: OptimConfig, step: int, progress: float) -> float:
    """Warmup-stable-decay: the share of the plateau's rate at `step` (from 0) and `progress` in [0, 1].

    Warmup counts steps and the decay counts progress, so that a run limited by minutes decays in time.
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = min(1.0, max(0.0, 1.0 - progress) / config.decay_fraction) if config.decay_fraction else 1.0
    return rise * fall


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices of hidden layers (Jordan et al. 2024).

    The mathematics of `torch.optim.Muon` with its "original" rate adjustment, sqrt(max(1, rows / columns)).
    Here matrices of one shape share each Newton-Schulz product, and `grad_scale` and `found_inf` are obeyed.
    With `sharded`, ranks that hold the same gradients share out the matrices of each shape (as Distributed
    Muon does, Liu et al. 2025, section 2.3, for sharded weights); all ranks have to step.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        newton_schulz_steps: int = 5,
        *,
        sharded: bool = False,
    ) -> None:
        self.sharded = sharded
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "newton_schulz_steps": newton_schulz_steps,
        }
        super().__init__(parameters, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.ndim == 2, "Muon is for matrices"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for matrices in same_shape.values():
                self._step_stack(group, matrices)

    def _step_stack(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        buffers = [self._buffer(matrix) for matrix in matrices]
        grad_NRC = torch.stack([matrix.grad for matrix in matrices])  # type: ignore[misc]
        momentum_NRC = torch.stack(buffers)
        rate: float | Tensor = group["lr"]
        if self.grad_scale is not None:
            grad_NRC = grad_NRC / self.grad_scale
        if self.found_inf is not None:
            skip = self.found_inf > 0
            # Where, not a product: 0 x NaN is NaN.
            grad_NRC = torch.where(skip, torch.zeros_like(grad_NRC), grad_NRC)
            moved_NRC = torch.where(skip, momentum_NRC, momentum_NRC.lerp(grad_NRC, 1 - group["momentum"]))
            rate = rate * (1 - self.found_inf)
        else:
            moved_NRC = momentum_NRC.lerp(grad_NRC, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(moved_NRC.unbind()))
        shared_out = orthogonalise_together if self.sharded else orthogonalise
        update_NRC = shared_out(
            grad_NRC.lerp(moved_NRC, group["momentum"]), steps=group["newton_schulz_steps"]
        )
        rows, columns = update_NRC.shape[1:]
        step_NRC = update_NRC.to(grad_NRC.dtype) * (rate * max(1.0, rows / columns) ** 0.5)
        torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(matrices, list(step_NRC.unbind()))

    def _buffer(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonalise(matrices_NRC: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Push the singular values of each matrix [N, R, C] towards 1, keeping its singular vectors.

    Newton-Schulz in bfloat16 on an accelerator, in float32 on a CPU, where bfloat16 products are slow.
    """
    rows, columns = matrices_NRC.shape[-2:]
    a, b, c = NEWTON_SCHULZ
    x = matrices_NRC if matrices_NRC.device.type == "cpu" else matrices_NRC.bfloat16()
    if rows > columns:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if rows > columns else x


def orthogonalise_together(matrices_NRC: Tensor, steps: int = 5) -> Tensor:
    """`orthogonalise` by all ranks of the process group, which hold the same matrices: a share of N each.

    Every rank gets the same bits. Without a process group this rank does all.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalise(matrices_NRC, steps)
    share = -(-len(matrices_NRC) // dist.get_world_size())
    begin = share * dist.get_rank()
    mine_NRC = orthogonalise(matrices_NRC[begin : begin + share], steps)
    # The last ranks may have less or nothing to do; all have to send as much.
    sent_NRC = mine_NRC.new_zeros(share, *matrices_NRC.shape[1:])
    sent_NRC[: len(mine_NRC)] = mine_NRC
    all_NRC = sent_NRC.new_empty(share * dist.get_world_size(), *matrices_NRC.shape[1:])
    dist.all_gather_into_tensor(all_NRC, sent_NRC)
    return all_NRC[: len(matrices_NRC)]


def build_optimizers(
    named_parameters: Sequence[tuple[str, nn.Parameter]],
    config: OptimConfig,
    matrices: Iterable[nn.Parameter] = (),
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers by name: `adamw`, and `muon` for `matrices` when the config asks for it.

    Vectors and scalars (biases, gains) are never decayed.
    """
    chosen = {id(matrix) for matrix in matrices} if config.name == "muon" else set()
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    rest = [parameter for parameter in trained if id(parameter) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=True
        )
    }
    stacked = [parameter for parameter in trained if id(parameter) in chosen]
    if stacked:
        optimizers["muon"] = Muon(
            stacked,
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            sharded=config.muon_sharded,
        )
    return optimizers


def set_rates(optimizers: dict[str, torch.optim.Optimizer], config: OptimConfig, factor: float) -> None:
    """Give every group its plateau rate times `factor`."""
    for name, optimizer in optimizers.items():
        plateau = config.muon_lr if name == "muon" else config.lr
        for group in optimizer.param_groups:
            group["lr"] = plateau * factor
