"""What a task makes of a batch: units, dropout, rows, and gradients that reach every weight."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.diffusion.energy import EnergyConfig
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import ConfigError, DataError
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape
from vidworld.model.normalizer import Normalizer
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.trainer.loop import noise_generator
from vidworld.trainer.tasks import Moment, TokenizerTask, WorldTask
from vidworld.types import Batch, Frames

A, S = 3, 2


def contract(name: str) -> ActionContract:
    rng = np.random.default_rng(len(name))

    def dimensions(count: int) -> tuple[Dimension, ...]:
        return tuple(Dimension(f"d{n}", "rad", "velocity") for n in range(count))

    return ActionContract(
        name,
        10.0,
        dimensions(A),
        dimensions(S),
        Statistics.of(rng.normal(2, 5, (200, A))),
        Statistics.of(rng.normal(-1, 3, (200, S))),
    )


CONTRACTS = (contract("one"), contract("three"))


def make_task(stride: int = 1, noise_dims: int = 0, **settings: Any) -> WorldTask:
    torch.manual_seed(0)
    shape = FrameShape.from_contracts(
        CONTRACTS, views=2, channels=4, height=4, width=4, actions_per_frame=stride
    )
    config = DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2, noise_dims=noise_dims)
    objective = settings.pop("objective", ObjectiveConfig())
    return WorldTask(CausalDiT(config, shape), Normalizer(CONTRACTS), objective, **settings)


def make_batch(stride: int = 1, rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    frames = 1 + 4 * stride
    return Batch(
        ids=tuple(f"e{row}@0" for row in range(rows)),
        actions_BTA=torch.randn(rows, frames, A, generator=generator) * 5,
        proprio_BTS=torch.randn(rows, frames, S, generator=generator) * 3,
        embodiment_B=torch.arange(rows) % 2,
        latents_BTVChw=torch.randn(rows, 5, 2, 4, 4, 4, generator=generator).half(),
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_clean_frames_are_in_contract_units(stride: int) -> None:
    task, batch = make_task(stride), make_batch(stride)
    clean = task.clean(batch)
    assert clean.latents_BTVChw.dtype == torch.float32
    for row in range(4):
        offset, scale = CONTRACTS[row % 2].proprio_scaling
        expected = (batch.proprio_BTS[row, ::stride].numpy() - offset) / scale
        np.testing.assert_allclose(clean.proprio_BTS[row].numpy(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="latents"):
        task.clean(dataclasses.replace(batch, latents_BTVChw=None))


@pytest.mark.parametrize("stride", [1, 2])
def test_actions_lead_into_their_frames(stride: int) -> None:
    task, batch = make_task(stride, action_dropout=0.0, clip_dropout=0.0), make_batch(stride)
    conditioning = task.conditioning(batch, torch.Generator())
    assert conditioning.keep_BT.tolist() == [[False, True, True, True, True]] * 4
    offset, scale = CONTRACTS[1].action_scaling
    expected = (batch.actions_BTA[1, 2 * stride : 3 * stride].numpy() - offset) / scale
    np.testing.assert_allclose(conditioning.actions_BTkA[1, 3].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_actions_are_dropped_at_the_rates_asked_for() -> None:
    batch = make_batch(rows=4)
    big = dataclasses.replace(
        batch,
        ids=batch.ids * 500,
        actions_BTA=batch.actions_BTA.repeat(500, 1, 1),
        embodiment_B=batch.embodiment_B.repeat(500),
    )
    keep_BT = make_task(action_dropout=0.2, clip_dropout=0.1).conditioning(big, torch.Generator()).keep_BT
    whole_B = ~keep_BT[:, 1:].any(1)
    assert whole_B.float().mean() == pytest.approx(0.1, abs=0.03)
    assert keep_BT[~whole_B, 1:].float().mean() == pytest.approx(0.8, abs=0.03)
    assert not make_task(action_dropout=1.0).conditioning(batch, torch.Generator()).keep_BT.any()


@pytest.mark.parametrize("kind", ["shortcut", "energy"])
@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_gradients_reach_every_weight(kind: Any, progress: float) -> None:
    """DDP waits for ever for a weight without a gradient."""
    task = make_task(noise_dims=3, objective=ObjectiveConfig(kind=kind))
    for parameter in task.net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    losses = task(make_batch(), torch.Generator(), Moment(progress))
    losses["loss"].backward()
    assert all(torch.isfinite(value) and value.ndim == 0 for value in losses.values())
    missing = [name for name, parameter in task.net.named_parameters() if parameter.grad is None]
    assert not missing
    assert not any(value.requires_grad for name, value in losses.items() if name != "loss")


class NoSync(TorchDispatchMode):
    """Refuses what makes a host wait for its accelerator."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in self.WAITS), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["shortcut", "energy"])
def test_no_step_waits_for_the_device(kind: Any) -> None:
    objective = ObjectiveConfig(kind=kind, motion_weight=1.0, resample_fraction=0.5)
    task, batch = make_task(noise_dims=3, objective=objective), make_batch()
    with NoSync():
        task(batch, torch.Generator(), Moment(0.9))["loss"].backward()
    with NoSync(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        batch.proprio_BTS.sum().item()


def test_losses_depend_on_generator_and_progress_only() -> None:
    task, batch = make_task(), make_batch()
    torch.nn.init.normal_(task.net.patch_head.weight, std=0.1)

    def loss(seed: int, progress: float = 0.0) -> float:
        torch.manual_seed(seed + int(100 * progress))
        return task(batch, noise_generator(0, seed, 0, "cpu"), Moment(progress))["loss"].item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    assert loss(1) != loss(1, 0.9), "bootstrap rows"
    assert loss(1, 0.5) == loss(1, 0.9)


def test_small_micro_batches_take_turns_at_the_bootstrap() -> None:
    task = make_task()
    counts = []
    for number in range(8):
        losses = task(make_batch(rows=2), torch.Generator(), Moment(0.5, number))
        counts.append(int(losses["bootstrap"] != 0))
    torch.nn.init.normal_(task.net.patch_head.weight, std=0.5)
    seen = [
        task(make_batch(rows=2), torch.Generator(), Moment(0.5, number))["bootstrap"].item() != 0
        for number in range(8)
    ]
    assert sum(seen) == 4, "a quarter of two rows is one row in every second micro-batch"


def test_the_mean_is_predicted_without_noise() -> None:
    """Its stream is the last; of the loss it is the squared error, beside the very same energy score."""
    energy = EnergyConfig(mean_weight=2.0)
    task = make_task(noise_dims=3, objective=ObjectiveConfig(kind="energy", energy=energy))
    for parameter in task.net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    seen: list[tuple[Frames, torch.Tensor | None]] = []

    def watch(module: Any, given: Any) -> None:
        seen.append((given[0], given[3].noise_BTX))

    handle = task.net.register_forward_pre_hook(watch)
    both = task(make_batch(), torch.Generator().manual_seed(1), Moment())
    handle.remove()
    [(frames, noise_BTX)] = seen
    num_frames = frames.num_frames // 4  # the context, two samples, the mean
    assert noise_BTX is not None
    for part_BTX in (frames.latents_BTVChw, frames.proprio_BTS, noise_BTX):
        streams = part_BTX.unflatten(1, (4, num_frames))
        assert not streams[:, 3].any()
        assert streams[:, 1].any()
        assert streams[:, 2].any(), "negative control"
    torch.testing.assert_close(
        both["loss"], both["latents"] + 0.2 * both["proprio"] + 2.0 * both["mean"].to(both["loss"])
    )
    assert "mean" not in make_task(noise_dims=3, objective=ObjectiveConfig(kind="energy"))(
        make_batch(), torch.Generator().manual_seed(1), Moment()
    )


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_regression_predicts_from_as_much_noise_as_its_rollouts(temperature: float) -> None:
    """All of it scales, the network's own too; energy and shortcuts are trained on whole noise."""

    def noises(heat: float, kind: Any) -> list[torch.Tensor]:
        plain = make_task(noise_dims=3, objective=ObjectiveConfig(kind=kind, bootstrap_fraction=0.0))
        task = WorldTask(plain.net, plain.normalizer, plain.objective, temperature=heat)
        seen: list[torch.Tensor] = []

        def watch(module: Any, given: Any) -> None:
            frames, noise_BTX = given[0], given[3].noise_BTX
            half = frames.num_frames // 2
            seen.extend([frames.latents_BTVChw[:, half:], frames.proprio_BTS[:, half:], noise_BTX])

        handle = task.net.register_forward_pre_hook(watch)
        task(make_batch(), torch.Generator().manual_seed(1), Moment())
        handle.remove()
        return seen[:2] + [part[:, part.shape[1] // 2 :] for part in seen[2:]]

    for scaled, whole in zip(noises(temperature, "regression"), noises(1.0, "regression"), strict=True):
        assert whole.any()
        torch.testing.assert_close(scaled, whole * temperature)
    shortcut = zip(noises(temperature, "shortcut"), noises(1.0, "shortcut"), strict=True)
    assert all(torch.equal(one, other) for one, other in shortcut), "negative control"


@pytest.mark.parametrize("start_noise", [0.0, 0.5])
def test_energy_scores_are_of_samples_that_start_as_those_of_a_rollout(start_noise: float) -> None:
    """Frames from a share of the noise, histories too; the network's own noise stays whole."""
    config = ObjectiveConfig(kind="energy", resample_fraction=0.5, resample_start=0.0)

    def noises(share: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        plain = make_task(noise_dims=3, objective=config)
        task = WorldTask(plain.net, plain.normalizer, config, start_noise=share)
        of_frames: list[torch.Tensor] = []
        of_network: list[torch.Tensor] = []

        def watch(module: Any, given: Any) -> None:
            frames, noise_BTX = given[0], given[3].noise_BTX
            known = num_frames if frames.num_frames % num_frames == 0 else 0
            of_frames.extend([frames.latents_BTVChw[:, known:], frames.proprio_BTS[:, known:]])
            of_network.append(noise_BTX[:, known:])

        batch = make_batch()
        num_frames = task.clean(batch).num_frames
        handle = task.net.register_forward_pre_hook(watch)
        task(batch, torch.Generator().manual_seed(1), Moment())
        handle.remove()
        return of_frames, of_network

    (scaled, own), (whole, same) = noises(start_noise), noises(1.0)
    assert len(scaled) == 4, "the history's pass and the loss's"
    for one, other in zip(scaled, whole, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other * start_noise)
    for one, other in zip(own, same, strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_an_energy_score_needs_noise() -> None:
    with pytest.raises(ConfigError, match="noise_dims"):
        make_task(objective=ObjectiveConfig(kind="energy"))


def test_muon_gets_matrices_of_blocks_only() -> None:
    task = make_task()
    chosen = {id(parameter) for parameter in task.matrices()}
    names = [name for name, parameter in task.net.named_parameters() if id(parameter) in chosen]
    assert names
    assert all(name.startswith("blocks.") and "modulation" not in name for name in names)


def test_the_tokenizer_sees_every_view() -> None:
    torch.manual_seed(0)
    config = ConvTokenizerConfig(
        widths=(16, 16, 16), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0), decoder_noise=0.0
    )
    task = TokenizerTask(ConvTokenizer(config))
    video = torch.randint(0, 256, (2, 3, 2, 3, 16, 16), dtype=torch.uint8)
    base = make_batch(rows=2)
    batch = dataclasses.replace(base, latents_BTVChw=None, video_BTVCHW=video)
    pictures = video.movedim(2, 1).reshape(4, 3, 3, 16, 16).float() / 127.5 - 1
    expected = task.net.training_loss(pictures, torch.Generator())["loss"]
    torch.testing.assert_close(task(batch, torch.Generator(), Moment())["loss"], expected)
    with pytest.raises(DataError, match="video"):
        task(base, torch.Generator(), Moment())
