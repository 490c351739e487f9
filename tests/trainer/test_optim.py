"""Optimizers against PyTorch's own, their skip, and the schedule."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vidworld.errors import ConfigError
from vidworld.trainer.optim import Muon, OptimConfig, build_optimizers, orthogonalise, rate_factor, set_rates

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_muon_equals_pytorchs() -> None:
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(5):
        for parameter, other, gradient in zip(ours, theirs, gradients(step), strict=True):
            parameter.grad, other.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    start = matrices()
    for parameter, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        # The reference orthogonalises in bfloat16.
        assert (parameter - other).norm() < 0.02 * moved
    for parameter, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine.state[parameter]["momentum_buffer"], reference.state[other]["momentum_buffer"]
        )


def test_ranks_share_out_the_work_and_get_the_same(tmp_path: Path, start_ranks: Any) -> None:
    script = Path(__file__).with_name("muon_ranks.py")
    for how in ("whole", "sharded"):
        start_ranks(2, tmp_path / how, str(tmp_path), how, script=script).finished()
    whole, first, second = (
        torch.load(tmp_path / f"{name}.pt") for name in ("whole-0", "sharded-0", "sharded-1")
    )
    for kind in ("weights", "moments"):
        for mine, other, alone in zip(first[kind], second[kind], whole[kind], strict=True):
            assert torch.equal(mine, other), "ranks stay together, bit by bit"
            # Products of other batch sizes may round otherwise.
            torch.testing.assert_close(mine, alone, atol=1e-6, rtol=1e-5)
    # Eight matrices in four steps: 3 + 1 + 1 a step here, 2 + 0 + 1 there, all eight where not shared.
    assert (whole["done"], first["done"], second["done"]) == (32, 20, 12)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    stack = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))
    one_by_one = torch.stack([orthogonalise(matrix[None])[0] for matrix in stack])
    torch.testing.assert_close(orthogonalise(stack), one_by_one)
    torch.testing.assert_close(orthogonalise(stack.mT), orthogonalise(stack).mT)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_bad_gradient_changes_nothing(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    chosen = [model[0].weight] if kind == "muon" else []
    optimizers = build_optimizers(list(model.named_parameters()), OptimConfig(name=kind, lr=0.1), chosen)
    assert set(optimizers) == {"adamw", kind}

    def step(value: float) -> None:
        bad = not torch.isfinite(torch.tensor(value))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        for optimizer in optimizers.values():
            optimizer.found_inf = torch.tensor(float(bad))
            optimizer.grad_scale = torch.tensor(value if bad else 2.0)
            optimizer.step()

    def snapshot() -> list[torch.Tensor]:
        state = [
            value.clone()
            for optimizer in optimizers.values()
            for moments in optimizer.state.values()
            for value in moments.values()
        ]
        return [parameter.detach().clone() for parameter in model.parameters()] + state

    step(1.0)
    before = snapshot()
    for bad in (float("nan"), float("inf")):
        step(bad)
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    step(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before[:4], snapshot()[:4], strict=True))


def test_grad_scale_divides_gradients() -> None:
    scaled, plain = matrices(), matrices()
    first, second = Muon(scaled, lr=0.1), Muon(plain, lr=0.1)
    first.grad_scale = torch.tensor(4.0)
    for parameter, other, gradient in zip(scaled, plain, gradients(0), strict=True):
        parameter.grad, other.grad = gradient * 4, gradient.clone()
    first.step()
    second.step()
    for parameter, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(parameter, other)


def test_vectors_are_not_decayed() -> None:
    model = nn.Linear(4, 4)
    optimizers = build_optimizers(list(model.named_parameters()), OptimConfig(lr=0.1, weight_decay=0.5))
    before = model.weight.detach().clone(), model.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers["adamw"].step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias.detach(), before[1])


def test_schedule_rises_stays_and_falls() -> None:
    config = OptimConfig(warmup_steps=10, decay_fraction=0.2)
    factors = [rate_factor(config, step, step / 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == pytest.approx([1.0] * 72)
    assert factors[90] == pytest.approx(0.5)
    assert rate_factor(config, 100, 1.0) == 0.0
    assert all(a >= b for a, b in itertools.pairwise(factors[80:]))
    assert rate_factor(OptimConfig(warmup_steps=0, decay_fraction=0), 0, 0.99) == 1.0


def test_each_optimizer_has_its_own_plateau() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    config = OptimConfig(name="muon", lr=1e-3, muon_lr=0.02)
    optimizers = build_optimizers(list(model.named_parameters()), config, [model[0].weight])
    set_rates(optimizers, config, 0.5)
    assert optimizers["muon"].param_groups[0]["lr"] == 0.01
    assert optimizers["adamw"].param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize("wrong", [{"decay_fraction": 1.5}, {"lr": -1.0}])
def test_bad_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**wrong)
