"""The late phase of training on imagined histories, in the task: exactly what a rollout gives."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.diffusion.energy import EnergyConfig
from vidworld.diffusion.history import draw_starts
from vidworld.diffusion.objective import ObjectiveConfig, context_levels, noise_like
from vidworld.diffusion.path import constant_level, mix
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape
from vidworld.model.normalizer import Normalizer
from vidworld.model.two_stream import cached_predictor, ingest
from vidworld.trainer.tasks import Moment, WorldTask
from vidworld.types import Batch, Frames

A, S, T, ROWS = 3, 2, 6, 4
LATE = Moment(0.9, 3)


def contract(name: str) -> ActionContract:
    rng = np.random.default_rng(len(name))
    action, proprio = (tuple(Dimension(f"d{n}", "rad", "velocity") for n in range(count)) for count in (A, S))
    return ActionContract(
        *(name, 10.0, action, proprio),
        Statistics.of(rng.normal(2, 5, (200, A))),
        Statistics.of(rng.normal(-1, 3, (200, S))),
    )


CONTRACTS = (contract("one"), contract("three"))


def make_task(stride: int = 1, *, previous_frame: bool = False, **objective: Any) -> WorldTask:
    torch.manual_seed(0)
    shape = FrameShape.from_contracts(
        CONTRACTS, views=2, channels=4, height=4, width=4, actions_per_frame=stride
    )
    config = DiTConfig(
        width=32,
        depth=4,
        num_heads=2,
        num_kv_heads=1,
        time_every=2,
        noise_dims=3,
        previous_frame=previous_frame,
    )
    model = CausalDiT(config, shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    settings: dict[str, Any] = {"resample_fraction": 0.5, "resample_start": 0.7} | objective
    return WorldTask(model, Normalizer(CONTRACTS), ObjectiveConfig(**settings))


def make_batch(stride: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(0)
    frames = 1 + (T - 1) * stride
    return Batch(
        ids=tuple(f"e{row}@0" for row in range(ROWS)),
        actions_BTA=torch.randn(ROWS, frames, A, generator=generator) * 5,
        proprio_BTS=torch.randn(ROWS, frames, S, generator=generator) * 3,
        embodiment_B=torch.arange(ROWS) % 2,
        latents_BTVChw=torch.randn(ROWS, T, 2, 4, 4, 4, generator=generator).half(),
    )


def losses_of(task: WorldTask, moment: Moment, seed: int = 1) -> dict[str, torch.Tensor]:
    return task(make_batch(), torch.Generator().manual_seed(seed), moment)


@pytest.mark.parametrize("kind", ["shortcut", "regression", "energy"])
def test_none_and_not_yet_are_bit_by_bit_the_plain_loss(kind: Any) -> None:
    plain = losses_of(make_task(kind=kind, resample_fraction=0.0), LATE)
    not_yet = losses_of(make_task(kind=kind, resample_start=0.95), LATE)
    begun = losses_of(make_task(kind=kind), LATE)
    assert all(torch.equal(plain[name], not_yet[name]) for name in plain)
    assert not torch.equal(begun["loss"], plain["loss"]), "negative control"


HALF_B11 = torch.tensor([0.0, 1.0])[:, None, None]
"""Of the two imagined rows the second is a sample."""


def _times(tensor: torch.Tensor, factor_B11: torch.Tensor) -> torch.Tensor:
    return tensor * factor_B11.view(-1, *[1] * (tensor.ndim - 1))


def parts(task: WorldTask, batch: Batch) -> tuple[Frames, Frames, Any]:
    """Clean frames, context noise and levels."""
    generator = torch.Generator().manual_seed(7)
    clean = task.clean(batch)
    return (
        clean,
        noise_like(clean, generator=generator),
        context_levels(clean, task.objective, generator=generator),
    )


@pytest.mark.parametrize(
    ("kind", "stride", "previous_frame", "mean_weight"),
    [
        ("shortcut", 1, False, 0.0),
        ("regression", 1, False, 0.0),
        ("energy", 1, False, 0.0),
        ("energy", 1, False, 2.0),
        ("shortcut", 2, False, 0.0),
        ("shortcut", 1, True, 0.0),
    ],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_the_imagined_frames_are_those_of_a_cached_rollout(
    kind: Any, stride: int, previous_frame: bool, mean_weight: float, passes: int
) -> None:
    """The first `passes` of them: what a rollout makes of the same context, noise and actions.

    Where the mean is learnt too, every other row has no noise.
    """
    task = make_task(
        stride,
        previous_frame=previous_frame,
        kind=kind,
        resample_passes=passes,
        energy=EnergyConfig(mean_weight=mean_weight),
    )
    batch = make_batch(stride)
    clean, noise, level = parts(task, batch)
    history = task.history(batch, clean, noise, level, torch.Generator().manual_seed(5), LATE)

    # The draws of the task, in its order.
    generator = torch.Generator().manual_seed(5)
    xi_BTX = torch.zeros(2, T, 3) if kind == "shortcut" else torch.randn(2, T, 3, generator=generator)
    start_noise = noise_like(clean[2:], generator=generator)
    if mean_weight:
        xi_BTX, start_noise = xi_BTX * HALF_B11, start_noise.map(lambda tensor: _times(tensor, HALF_B11))
    starts = draw_starts(2, T, generator=generator, device=torch.device("cpu")).tolist()
    context = mix(clean, noise, level)
    known = task.known_conditioning(batch)
    for row, start in zip((2, 3), starts, strict=True):
        one = slice(row, row + 1)
        of_row = replace(known[one], noise_BTX=xi_BTX[row - 2][None])
        cache = ingest(task.net, context[one, :start], level[one, :start], of_row.frames(slice(0, start)))
        for t in range(start, start + passes + 1):
            if t == T:
                break
            at = slice(t, t + 1)
            predict = cached_predictor(task.net, of_row.frames(at), cache)
            z = start_noise[row - 2 : row - 1, at]
            nothing = constant_level(z, 0.0)
            imagined = predict(z, nothing, torch.ones_like(nothing.signal))
            gap = (history.latents_BTVChw[one, at] - imagined.latents_BTVChw).abs().max()
            if t < start + passes:
                assert gap < 1e-5
                torch.testing.assert_close(
                    history.proprio_BTS[one, at], imagined.proprio_BTS, atol=1e-5, rtol=0
                )
            else:
                assert gap > 1e-3, "negative control: that one saw the recording"
            now = mix(imagined, noise[one, at], level[one, at])
            cache = ingest(task.net, now, level[one, at], of_row.frames(at), cache)
        assert torch.equal(history.latents_BTVChw[one, :start], clean.latents_BTVChw[one, :start])
    assert torch.equal(history.latents_BTVChw[:2], clean.latents_BTVChw[:2]), "the last rows only"


def test_the_loss_sees_the_history_as_a_constant() -> None:
    """Gradients are those of a loss whose context was given from outside."""
    task = make_task()
    own = task.history
    kept: list[Frames] = []

    def recorded(*arguments: Any) -> Frames:
        kept.append(own(*arguments))
        return kept[-1]

    def replayed(*arguments: Any) -> Frames:
        own(*arguments)  # the same draws
        return kept[0].map(lambda tensor: tensor.detach().clone())

    gradients = []
    for history in (recorded, replayed):
        task.history = history  # type: ignore[method-assign]
        task.zero_grad()
        losses_of(task, LATE)["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in task.net.parameters()])  # type: ignore[union-attr]
    assert not kept[0].latents_BTVChw.requires_grad
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", ["shortcut", "energy"])
def test_every_weight_learns_under_autocast_too(kind: Any) -> None:
    """Passes without gradient come first: weights that were cast there must not reach the loss."""
    task = make_task(kind=kind, resample_fraction=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(task, LATE)
    losses["loss"].backward()
    missing = [name for name, parameter in task.net.named_parameters() if parameter.grad is None]
    assert not missing


def test_actions_are_known_while_imagining() -> None:
    """As in a rollout, whatever the loss hides."""
    task, batch = make_task(), make_batch()
    task.action_dropout = 1.0
    clean, noise, level = parts(task, batch)
    hidden = task.history(batch, clean, noise, level, torch.Generator().manual_seed(5), LATE)
    other = replace(batch, actions_BTA=batch.actions_BTA + 1)
    moved = task.history(other, clean, noise, level, torch.Generator().manual_seed(5), LATE)
    assert (hidden.latents_BTVChw - moved.latents_BTVChw).abs().max() > 1e-4
