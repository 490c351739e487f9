"""Worlds that give a frame the one before it as an input: in rollouts exactly what training showed."""

import copy
import dataclasses

import pytest
import torch

from vidworld.diffusion.path import constant_level, mix
from vidworld.model.dit import CLOSED
from vidworld.model.inputs import Conditioning
from vidworld.model.merge import PREVIOUS_FRAME, with_fresh_parts
from vidworld.model.two_stream import target_predictor
from vidworld.types import Frames
from vidworld.world.build import build
from vidworld.world.engine import RolloutEngine
from vidworld.world.ensemble import Ensemble
from vidworld.world.noise import CONTEXT, START, NoiseStream
from vidworld.world.state import WorldState

EXACT = 1e-11
FRAMES = 3


@pytest.fixture(scope="module", params=[False, True], ids=["reads", "copies"])
def reader(new_world, request):
    return new_world(previous_frame=True, copy_gate=request.param).double()


def apart(got, expected):
    return float((got - expected).abs().max())


def in_world_units(world, state, rollout):
    """What was imagined, as the network says it."""
    proprio = world.normalizer.proprio(rollout.proprio_BTS, state.embodiment_B)
    return Frames(rollout.latents_BTVChw, proprio)


def test_a_target_sees_what_a_rollout_sees(reader, prompt, actions):
    """Every imagined frame is that of `target_predictor` over the finished rollout as its context."""
    one_step = dataclasses.replace(reader.spec.sampler, steps=1, window=12)
    known, commands = prompt(reader, FRAMES), actions(reader, 7)
    state = reader.reset(known, num_samples=2, seed=5, sampler=one_step)
    imagined = in_world_units(reader, state, reader.rollout(state, commands, sampler=one_step))
    latents = reader.encode(torch.tensor(known.frames)[None]).repeat(2, 1, 1, 1, 1, 1)
    proprio = torch.tensor(known.proprio).double()[None].repeat(2, 1, 1)
    past = Frames(latents, reader.normalizer.proprio(proprio, state.embodiment_B))
    frames = Frames.cat([past, imagined], 1)

    led = torch.cat([torch.zeros(1, 3), torch.tensor(known.actions), torch.tensor(commands)]).double()
    actions_BTkA = reader.normalizer.actions(led[None].repeat(2, 1, 1), state.embodiment_B)[:, :, None]
    keep_BT = torch.ones(frames.proprio_BTS.shape[:2], dtype=torch.bool)
    keep_BT[:, 0] = False
    stream = NoiseStream(5, state.sample_ids_B, torch.float64)
    start, context = stream.frames(reader.spec.shape, range(FRAMES + 7), START, CONTEXT)
    level = constant_level(frames, 1 - one_step.context_noise)
    predict = target_predictor(
        reader.model,
        mix(frames, context, level),
        level,
        Conditioning(actions_BTkA, keep_BT, state.embodiment_B),
    )
    pure = constant_level(frames, 0.0)
    trained = predict(start, pure, torch.ones_like(pure.signal))
    future = slice(FRAMES, None)
    assert apart(trained.latents_BTVChw[:, future], imagined.latents_BTVChw) < EXACT
    assert apart(trained.proprio_BTS[:, future], imagined.proprio_BTS) < EXACT
    # Negative control: of the frame before, its context noise is seen too.
    predict = target_predictor(
        reader.model,
        mix(frames, context.map(torch.neg), level),
        level,
        Conditioning(actions_BTkA, keep_BT, state.embodiment_B),
    )
    other = predict(start, pure, torch.ones_like(pure.signal))
    assert apart(other.latents_BTVChw[:, future], imagined.latents_BTVChw) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{"steps": 1}, {"steps": 2, "guidance": 0.7, "sink": 1}, {"steps": 3, "method": "heun"}],
    ids=["one step", "guided with a sink", "heun"],
)
def test_the_engine_equals_the_plain_world(new_world, prompt, actions, changes):
    world = new_world(noise_dims=3, previous_frame=True).double()
    chosen = dataclasses.replace(world.spec.sampler, **changes)
    state = world.reset(prompt(world, FRAMES), num_samples=2, seed=7, sampler=chosen)
    given = actions(world, 14)
    expected = world.rollout(state, given, sampler=chosen)
    engine = RolloutEngine(world, sampler=chosen)
    got = engine.rollout(state, given)
    assert apart(got.latents_BTVChw, expected.latents_BTVChw) < EXACT
    newest, its = got.state.cache.newest, expected.state.cache.newest
    assert apart(newest.latents_BTVChw, its.latents_BTVChw) < EXACT
    assert apart(newest.proprio_BTS, its.proprio_BTS) < EXACT
    # States come out between frames and go in again, with frames committed in passes of their own.
    engine.load(state)
    seen = []
    for index, action in enumerate(given):
        seen.append(engine.step(action, decode=False).latents_BVChw)
        if index % 3 == 0:
            engine.load(engine.state().select([0, 1]))
    assert apart(torch.stack(seen, 1), expected.latents_BTVChw) < EXACT


def test_the_frame_before_is_read_in_both(reader, prompt, actions):
    """Negative control: another one makes another frame, and without it there is none."""
    state, action = reader.reset(prompt(reader)), actions(reader, 1)
    expected = reader.rollout(state, action).latents_BTVChw
    newest = state.cache.newest.map(lambda tensor: tensor + 1)
    moved = dataclasses.replace(state, cache=dataclasses.replace(state.cache, newest=newest))
    for roll in (reader.rollout, RolloutEngine(reader).rollout):
        assert apart(roll(moved, action).latents_BTVChw, expected) > 1e-3
    assert torch.equal(reader.rollout(state.detach(), action).latents_BTVChw, expected)


def test_states_keep_it(reader, prompt, actions, tmp_path):
    """Saved, selected, forked and moved, they go on as they would have."""
    given, after = actions(reader, 4), actions(reader, 3, seed=1)
    state = reader.rollout(reader.reset(prompt(reader), num_samples=3), given).state
    expected = reader.rollout(state, after).latents_BTVChw
    state.save(tmp_path / "state.safetensors")
    restored = WorldState.load(tmp_path / "state.safetensors")
    assert torch.equal(restored.cache.newest.latents_BTVChw, state.cache.newest.latents_BTVChw)
    assert torch.equal(reader.rollout(restored, after).latents_BTVChw, expected)
    swapped = reader.rollout(state.select([2, 0]), after).latents_BTVChw
    assert apart(swapped, expected[[2, 0]]) < EXACT
    forked = reader.rollout(state.fork(2), after).latents_BTVChw
    assert apart(forked[::2], expected) < EXACT
    assert apart(forked[1::2], expected) > 1e-3


def test_observing_is_prompting(reader, prompt, actions):
    known = prompt(reader, 4)
    begun = dataclasses.replace(
        known, frames=known.frames[:3], proprio=known.proprio[:3], actions=known.actions[:2]
    )
    state = reader.observe(
        reader.reset(begun), known.frames[3], proprio=known.proprio[3], action=known.actions[2]
    )
    given = actions(reader, 3)
    expected = reader.rollout(reader.reset(known), given).latents_BTVChw
    assert apart(reader.rollout(state, given).latents_BTVChw, expected) < EXACT


def test_ensembles_keep_rows_with_their_frames(new_world, prompt, actions):
    members = [new_world(previous_frame=True).double() for _ in range(2)]
    for parameter in members[1].model.parameters():
        parameter.mul_(0.8)
    ensemble = Ensemble(members)
    state = ensemble.reset(prompt(ensemble), num_samples=2, seed=3).select([3, 0, 2, 1])
    given = actions(ensemble, 8)
    expected = ensemble.rollout(state, given)
    got = RolloutEngine(ensemble).rollout(state, given)
    assert apart(got.latents_BTVChw, expected.latents_BTVChw) < EXACT
    newest, its = got.state.cache.newest, expected.state.cache.newest
    assert apart(newest.latents_BTVChw, its.latents_BTVChw) < EXACT
    first = members[0].rollout(members[0].reset(prompt(ensemble), num_samples=2, seed=3), given)
    assert apart(expected.latents_BTVChw[[1, 3]], first.latents_BTVChw) < EXACT


def test_gradients_pass_through_it(reader, prompt, actions):
    """Against finite differences, from the last frame to the first action."""
    commands = torch.tensor(actions(reader, 3), dtype=torch.float64)
    start = reader.reset(prompt(reader), seed=4)

    def score(commands_TA):
        return reader.rollout(start, commands_TA, decode=False).latents_BTVChw[:, -1].square().sum()

    (gradient_TA,) = torch.autograd.grad(score(commands.requires_grad_()), commands)
    step = 1e-5
    with torch.no_grad():
        for index in [(0, 0), (1, 1), (2, 2)]:
            bump = torch.zeros_like(commands)
            bump[index] = step
            slope = (score(commands + bump) - score(commands - bump)) / (2 * step)
            torch.testing.assert_close(slope, gradient_TA[index], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", ["world", "engine"])
def test_an_open_gate_holds_the_last_frame(new_world, prompt, actions, way):
    """But for rounding, for as long as it is open; half open it does not."""
    world = new_world(previous_frame=True, copy_gate=True)
    sampler = dataclasses.replace(world.spec.sampler, steps=1, context_noise=0.0)
    state = world.reset(prompt(world), sampler=sampler)
    held = []
    for bias in (1e4, 0.0):
        torch.nn.init.constant_(world.model.copy_head.bias, bias)
        torch.nn.init.zeros_(world.model.copy_head.weight)
        made = RolloutEngine(world, sampler=sampler) if way == "engine" else world
        given = {} if way == "engine" else {"sampler": sampler}
        rollout = made.rollout(state, actions(world, 7), **given)
        held.append(apart(rollout.latents_BTVChw, state.newest.latents_BTVChw) < 1e-5)
    assert held == [True, False]


def test_weights_without_it_mean_what_they_meant(world, prompt, actions):
    """Bit for bit, in a world that has the input: its weights start at zero."""
    spec = dataclasses.replace(world.spec, model=dataclasses.replace(world.spec.model, previous_frame=True))
    grown = build(spec, world.tokenizer).requires_grad_(False).eval()
    weights = with_fresh_parts(world.model.state_dict(), grown.model)
    fresh = weights.keys() - world.model.state_dict().keys()
    assert len(fresh) == 3
    assert all(name.startswith(PREVIOUS_FRAME) for name in fresh)
    grown.model.load_state_dict(weights)
    given = actions(world, 9)
    expected = world.rollout(world.reset(prompt(world), num_samples=2), given)
    got = grown.rollout(grown.reset(prompt(world), num_samples=2), given)
    assert torch.equal(got.latents_BTVChw, expected.latents_BTVChw)
    assert torch.equal(got.proprio_BTS, expected.proprio_BTS)


def test_weights_without_the_gate_mean_nearly_what_they_meant(new_world, prompt, actions):
    """It starts nearly closed: in one step a latent moves by 2 % of the way to the one before."""
    world = new_world(previous_frame=True)
    spec = dataclasses.replace(world.spec, model=dataclasses.replace(world.spec.model, copy_gate=True))
    grown = build(spec, copy.deepcopy(world.tokenizer)).requires_grad_(False).eval().double()
    world = world.double()
    weights = with_fresh_parts(world.model.state_dict(), grown.model)
    assert weights.keys() - world.model.state_dict().keys() == {"copy_head.weight", "copy_head.bias"}
    grown.model.load_state_dict(weights)
    quiet = dataclasses.replace(world.spec.sampler, steps=1, context_noise=0.0)
    given = actions(world, 1)
    state = world.reset(prompt(world), sampler=quiet)
    painted = world.rollout(state, given, sampler=quiet).latents_BTVChw
    mixed = grown.rollout(grown.reset(prompt(world), sampler=quiet), given, sampler=quiet).latents_BTVChw
    share = torch.tensor(CLOSED, dtype=torch.float64).sigmoid()
    assert 0.01 < share < 0.02
    torch.testing.assert_close(mixed, torch.lerp(painted, state.newest.latents_BTVChw, share))
