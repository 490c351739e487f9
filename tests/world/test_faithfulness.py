"""The alarm for models that ignore their actions: silent on those that listen, loud on those that do not."""

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.model.inputs import Conditioning
from vidworld.model.two_stream import target_predictor
from vidworld.types import Frames, SignalLevel
from vidworld.world.faithfulness import WRONG, action_faithfulness


def clips(world, batch: int, frames: int, seed: int = 0) -> tuple[Frames, torch.Tensor, torch.Tensor]:
    """Frames that show the last action and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    actions_BTA = torch.empty(batch, frames, 3).uniform_(-2, 2, generator=generator)
    embodiment_B = torch.zeros(batch, dtype=torch.int64)
    shown_BTA = world.normalizer.actions(actions_BTA, embodiment_B).roll(1, 1)
    latents = torch.randn(batch, frames, 1, 4, 4, 6, generator=generator) * 0.1
    latents[:, :, 0, :3] += shown_BTA[..., None, None]
    return Frames(latents, torch.randn(batch, frames, 4, generator=generator)), actions_BTA, embodiment_B


def test_a_model_that_listens_and_one_that_cannot(new_world):
    world = new_world(depth=2).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(world.model.parameters(), 3e-3)
    for step in range(100):
        clean, actions_BTA, embodiment_B = clips(world, 8, 3, seed=step + 1)
        into_BTkA = world.normalizer.actions(actions_BTA, embodiment_B).roll(1, 1)[:, :, None]
        conditioning = Conditioning(into_BTkA, torch.ones(8, 3, dtype=torch.bool), embodiment_B)
        noise = clean.map(lambda x: torch.randn(x.shape, generator=generator))
        zero = SignalLevel.from_signal(torch.zeros(8, 3))
        predict = target_predictor(
            world.model, clean, SignalLevel.from_noise(torch.zeros(8, 3)), conditioning
        )
        predicted = predict(noise, zero, torch.full((8, 3), 1 / 16))
        loss = (predicted.latents_BTVChw - clean.latents_BTVChw).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measured = action_faithfulness(world.model, world.normalizer, *clips(world, 8, 4), levels=[0.0])
    assert measured["ratio_shuffled"] > 2
    assert measured["ratio_shifted"] > 2
    assert measured["ratio_zero"] > 1.5
    assert measured["ratio_dropped"] > 1.1
    # Deaf: with the action's ways into the network cut, every ratio is one.
    with torch.no_grad():
        world.model.action_embedding.linear.weight_EIO.zero_()
    deaf = action_faithfulness(world.model, world.normalizer, *clips(world, 8, 4), levels=[0.0])
    for wrong in ("shuffled", "zero", "shifted"):
        assert deaf[f"ratio_{wrong}"] == pytest.approx(1, abs=1e-5)


def test_it_is_deterministic_and_matched(world):
    first, again = (action_faithfulness(world.model, world.normalizer, *clips(world, 4, 5)) for _ in range(2))
    assert first == again
    names = {"true", *WRONG, *(f"ratio_{wrong}" for wrong in WRONG)}
    assert set(first) == names | {f"proprio_{name}" for name in names}
    other = action_faithfulness(world.model, world.normalizer, *clips(world, 4, 5), seed=1)
    assert other["true"] != first["true"]
    # With equal actions everywhere, another clip's are one's own: noise and levels are matched.
    clean, actions_BTA, embodiment_B = clips(world, 4, 5)
    actions_BTA[:] = actions_BTA[:1, :1]
    equal = action_faithfulness(world.model, world.normalizer, clean, actions_BTA, embodiment_B)
    assert equal["ratio_shuffled"] == equal["ratio_shifted"] == 1


def test_actions_are_swapped_within_an_embodiment(new_world, contract):
    world = new_world(contracts=(contract("arm", 3, 4), contract("hand", 3, 4)))
    clean, actions_BTA, _ = clips(world, 5, 4)
    lonely = torch.tensor([0, 1, 0, 0, 0])
    measured = action_faithfulness(world.model, world.normalizer, clean, actions_BTA, lonely)
    keep = [0, 2, 3, 4]
    same = action_faithfulness(
        world.model, world.normalizer, clean[keep], actions_BTA[keep], lonely[keep], levels=[0.5]
    )
    assert measured["ratio_shuffled"] > 0
    assert same["ratio_shuffled"] > 0
    with pytest.raises(ConfigError, match="got 2, expected two of one embodiment"):
        action_faithfulness(world.model, world.normalizer, clean[:2], actions_BTA[:2], torch.tensor([0, 1]))
