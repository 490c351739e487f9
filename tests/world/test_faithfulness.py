"""The alarm for models that ignore their actions: silent on those that listen, loud on those that do not."""

import copy

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.world.faithfulness import WRONG, action_faithfulness


def test_a_model_that_listens_and_one_that_cannot(learnt_world, clips):
    world = copy.deepcopy(learnt_world)
    settings = {"levels": [0.0], "finest_steps": 1}
    data = clips(world, 8, 4, seed=0)
    measured = action_faithfulness(world.model, world.normalizer, *data, **settings)
    assert measured["ratio_shuffled"] > 2
    assert measured["ratio_shifted"] > 2
    assert measured["ratio_zero"] > 1.5
    assert measured["proprio_ratio_shuffled"] > 2
    # Deaf: with the action's ways into the network cut, every ratio is one.
    with torch.no_grad():
        world.model.action_embedding.linear.weight_EIO.zero_()
    deaf = action_faithfulness(world.model, world.normalizer, *data, **settings)
    for wrong in ("shuffled", "zero", "shifted"):
        assert deaf[f"ratio_{wrong}"] == pytest.approx(1, abs=1e-5)


def test_it_is_deterministic_and_matched(world, clips):
    first, again = (
        action_faithfulness(world.model, world.normalizer, *clips(world, 4, 5, seed=0)) for _ in range(2)
    )
    assert first == again
    names = {"true", *WRONG, *(f"ratio_{wrong}" for wrong in WRONG)}
    assert set(first) == names | {f"proprio_{name}" for name in names}
    other = action_faithfulness(world.model, world.normalizer, *clips(world, 4, 5, seed=0), seed=1)
    assert other["true"] != first["true"]
    # With equal actions everywhere, another clip's are one's own: noise and levels are matched.
    clean, actions_BTA, embodiment_B = clips(world, 4, 5, seed=0)
    actions_BTA[:] = actions_BTA[:1, :1]
    equal = action_faithfulness(world.model, world.normalizer, clean, actions_BTA, embodiment_B)
    assert equal["ratio_shuffled"] == equal["ratio_shifted"] == 1


def test_actions_are_swapped_within_an_embodiment(new_world, contract, clips):
    world = new_world(contracts=(contract("arm", 3, 4), contract("hand", 3, 4)))
    clean, actions_BTA, _ = clips(world, 5, 4, seed=0)
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
