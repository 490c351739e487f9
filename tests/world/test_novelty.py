"""What a world did not expect of known frames is what a rollout without noise would have got wrong."""

import dataclasses

import numpy as np
import pytest
import torch

from vidworld.errors import DataError
from vidworld.world.ensemble import Ensemble
from vidworld.world.novelty import novelty

T = 5


def one_future(world):
    return dataclasses.replace(world.spec.sampler, steps=1, temperature=0.0, context_noise=0.0)


@pytest.fixture(scope="module")
def worlds(new_world):
    """Two with one tokenizer, that take noise as an input and read clean context."""
    made = [new_world(noise_dims=3).double() for _ in range(2)]
    for world in made:
        world.spec = dataclasses.replace(world.spec, sampler=one_future(world))
    generator = torch.Generator().manual_seed(1)
    for parameter in made[1].model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(0.3 * parameter.std(unbiased=False) * noise)
    return made


def test_surprise_is_the_error_of_a_step_without_noise(worlds, prompt):
    world = worlds[0]
    shown = [prompt(world, T, seed=seed) for seed in (0, 1)]
    found = novelty(world, shown)
    assert found.surprise_PT.shape == found.proprio_PT.shape == (2, T - 1)
    assert found.disagreement_PT is None
    for row, one in enumerate(shown):
        latents = world.encode(torch.tensor(one.frames)[None])[0]
        proprio = world.normalizer.proprio(torch.tensor(one.proprio)[None].double(), torch.zeros(1).long())[0]
        for t in range(1, T):
            first = dataclasses.replace(
                one, frames=one.frames[:t], proprio=one.proprio[:t], actions=one.actions[: t - 1]
            )
            state, _ = world.step(world.reset(first, seed=3), one.actions[t - 1])
            error = (state.newest.latents_BTVChw[0, 0] - latents[t]).square().mean()
            torch.testing.assert_close(found.surprise_PT[row, t - 1].double(), error, rtol=1e-4, atol=1e-6)
            error = (state.newest.proprio_BTS[0, 0] - proprio[t]).square().mean()
            torch.testing.assert_close(found.proprio_PT[row, t - 1].double(), error, rtol=1e-4, atol=1e-6)


def test_members_that_differ_disagree_and_copies_do_not(worlds, prompt):
    shown = prompt(worlds[0], T)
    apart = novelty(Ensemble(worlds), shown).disagreement_PT
    assert apart is not None
    assert (apart > 1e-3).all()
    copies = novelty(Ensemble([worlds[0], worlds[0]]), shown).disagreement_PT
    assert copies is not None
    assert not copies.any()
    first = novelty(worlds[0], shown)
    torch.testing.assert_close(novelty(Ensemble(worlds), shown).surprise_PT, first.surprise_PT)


def test_long_prompts_count_their_newest_frames_and_short_ones_are_refused(worlds, prompt):
    world = worlds[0]
    window = world.spec.sampler.window
    long = prompt(world, window + 3)
    assert novelty(world, long).surprise_PT.shape == (1, window - 1)
    with pytest.raises(DataError, match="got 1, expected 2 or more"):
        novelty(world, prompt(world, 1))
    blind = dataclasses.replace(long, proprio=None)
    assert not novelty(world, blind).proprio_PT.any()
    assert np.isfinite(novelty(world, blind).surprise_PT.numpy()).all()
