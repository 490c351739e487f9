"""The moving average against its closed form, in bfloat16 too, and across a save."""

import copy

import pytest
import torch
from torch import nn

from vidworld.trainer.ema import EMA


def walk(module: nn.Module, ema: EMA, steps: int, delta: float) -> list[torch.Tensor]:
    """Move every weight by `delta` a step; returns the weights seen."""
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += delta
        ema.update(module)
        seen.append(next(module.parameters()).detach().double().clone())
    return seen


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_equals_the_closed_form(decay: float) -> None:
    module = nn.Linear(3, 2)
    start = module.weight.detach().double().clone()
    ema = EMA(module, decay)
    seen = walk(module, ema, 40, 0.01)
    expected = start
    for n, weights in enumerate(seen):
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * weights
    torch.testing.assert_close(ema.module.weight.double(), expected, atol=1e-6, rtol=0)
    assert ema.updates == 40


def test_does_not_freeze_under_bfloat16_weights() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(module.weight, 1.0)
    ema = EMA(module, 0.999)
    ema.updates = 10**6
    frozen = copy.deepcopy(module.weight.detach())
    with torch.no_grad():
        module.weight.fill_(1.5)
    for _ in range(1000):
        ema.update(module)
        frozen.lerp_(module.weight.detach(), 0.001)
    assert ema.module.weight.dtype == torch.float32
    assert abs(ema.module.weight.item() - (1.5 - 0.5 * 0.999**1000)) < 1e-3
    assert frozen.item() == 1.0, "the negative control: a bfloat16 average stands still"


def test_the_counter_matters_after_a_restart() -> None:
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.999)
    walk(module, ema, 5, 0.1)
    kept, lost = EMA(ema.module, 0.999), EMA(ema.module, 0.999)
    kept.load(ema.state())
    walk(module, ema, 1, 0.1)
    for other in (kept, lost):
        other.update(module)
    assert torch.equal(kept.module.weight, ema.module.weight)
    assert not torch.equal(lost.module.weight, ema.module.weight)


def test_buffers_follow_the_module() -> None:
    module = nn.BatchNorm1d(2)
    ema = EMA(module, 0.9)
    ema.module._apply(torch.clone)  # as a move to another device does: new buffers
    module.running_mean.fill_(3.0)
    ema.update(module)
    assert torch.equal(ema.module.running_mean, module.running_mean)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
