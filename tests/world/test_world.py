"""The simulator's identities, on a world with random weights."""

import dataclasses

import numpy as np
import pytest
import torch

from vidworld.errors import CheckpointError, ConfigError, ContractError, DataError
from vidworld.model.inputs import Conditioning, Streams
from vidworld.model.two_stream import CONTEXT_STEP
from vidworld.types import Frames, SignalLevel
from vidworld.world.finite import RolloutDivergedError
from vidworld.world.noise import CONTEXT, START, NoiseStream
from vidworld.world.state import WorldState

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def same(first: WorldState, second: WorldState) -> bool:
    """Bitwise equality of all that the future depends on."""
    left, right = first._tensors(), second._tensors()
    counters = (first.frame, first.seed, first.world) == (second.frame, second.seed, second.world)
    return counters and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_steps_and_rollout_are_the_same(world, prompt, actions):
    commands = actions(world, 9)
    start = world.reset(prompt(world), num_samples=2, seed=3)
    imagined = world.rollout(start, commands)
    state, frames, proprio = start, [], []
    for action in commands:
        state, seen = world.step(state, action)
        frames.append(seen.video_BVHWC)
        proprio.append(seen.proprio_BS)
    assert torch.equal(torch.stack(frames, 1), imagined.video_BTVHWC)
    assert torch.equal(torch.stack(proprio, 1), imagined.proprio_BTS)
    assert same(state, imagined.state)
    assert imagined.video_BTVHWC.shape == (2, 9, 1, 32, 48, 3)
    assert imagined.video_BTVHWC.dtype == torch.uint8
    assert imagined.proprio_BTS.shape == (2, 9, 4)
    assert start.frame == 3
    assert imagined.state.frame == 12


def test_a_rollout_may_be_cut_anywhere(world, prompt, actions):
    commands = actions(world, 7)
    start = world.reset(prompt(world))
    whole = world.rollout(start, commands)
    first = world.rollout(start, commands[:4])
    second = world.rollout(first.state, commands[4:])
    assert torch.equal(torch.cat([first.latents_BTVChw, second.latents_BTVChw], 1), whole.latents_BTVChw)
    assert world.rollout(start, commands[:0]).video_BTVHWC.shape == (1, 0, 1, 32, 48, 3)


def test_the_seed_repeats_and_another_does_not(world, prompt, actions):
    commands = actions(world, 3)
    first, again, other = (
        world.rollout(world.reset(prompt(world), seed=seed), commands).latents_BTVChw for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 1e-2


def test_samples_do_not_depend_on_the_batch_around_them(world, prompt, actions):
    commands = actions(world, 3)
    many = world.rollout(world.reset(prompt(world), num_samples=5, seed=1), commands)
    for sample in range(5):
        alone = world.rollout(world.reset(prompt(world), seed=1, sample_ids=[sample]), commands)
        torch.testing.assert_close(alone.latents_BTVChw[0], many.latents_BTVChw[sample], **CLOSE)
    order = [3, 0, 4]
    some = world.rollout(world.reset(prompt(world), num_samples=3, seed=1, sample_ids=order), commands)
    torch.testing.assert_close(some.latents_BTVChw, many.latents_BTVChw[order], **CLOSE)
    # Negative control: samples differ from each other by far more than the tolerance.
    assert (many.latents_BTVChw[0] - many.latents_BTVChw[1]).abs().mean() > 1e-2


def test_worlds_side_by_side_are_worlds_alone(world, prompt, actions):
    prompts = [prompt(world, seed=seed) for seed in range(3)]
    commands = np.stack([actions(world, 4, seed) for seed in range(3)])
    together = world.rollout(world.reset(prompts, seed=5), commands)
    for index, one in enumerate(prompts):
        alone = world.rollout(world.reset(one, seed=5, sample_ids=[index]), commands[index])
        torch.testing.assert_close(alone.latents_BTVChw[0], together.latents_BTVChw[index], **CLOSE)


def test_select_repeats_and_fork_branches(world, prompt, actions):
    commands = actions(world, 3)
    start = world.rollout(world.reset(prompt(world), num_samples=2), actions(world, 2)).state
    plain = world.rollout(start, commands).latents_BTVChw
    selected = world.rollout(start.select([1, 0, 1]), commands).latents_BTVChw
    torch.testing.assert_close(selected, plain[[1, 0, 1]], **CLOSE)
    assert torch.equal(world.rollout(world.fork(start, [0, 1]), commands).latents_BTVChw, plain)
    branched = world.rollout(start.fork(2), commands).latents_BTVChw
    torch.testing.assert_close(branched[[0, 2]], plain, **CLOSE)
    assert (branched[1] - branched[0]).abs().mean() > 1e-2
    # A branch is named by its parent and number alone, not by its place.
    torch.testing.assert_close(
        world.rollout(world.fork(start, [1, 1]), commands).latents_BTVChw, branched[2:], **CLOSE
    )


def test_an_old_state_stays_valid(world, prompt, actions):
    start = world.reset(prompt(world))
    before = {name: tensor.clone() for name, tensor in start._tensors().items()}
    first = world.rollout(start, actions(world, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in start._tensors().items())
    assert torch.equal(world.rollout(start, actions(world, 8)).latents_BTVChw, first.latents_BTVChw)


def test_a_saved_state_continues_exactly(world, prompt, actions, tmp_path):
    state = world.rollout(world.reset(prompt(world), num_samples=2, seed=2**63 + 1), actions(world, 4)).state
    state.save(tmp_path / "state.safetensors")
    restored = WorldState.load(tmp_path / "state.safetensors")
    assert same(restored, state)
    commands = actions(world, 3, seed=1)
    assert torch.equal(
        world.rollout(restored, commands).latents_BTVChw, world.rollout(state, commands).latents_BTVChw
    )
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def window_of(world, frames: Frames, numbers: range, actions_BTkA, state: WorldState) -> Frames:
    """Predict the last of `frames` from pure noise in one step, from a window without a cache."""
    stream = NoiseStream(state.seed, state.sample_ids_B)
    sampler, shape = world.spec.sampler, world.spec.shape
    level_BT = torch.full(frames.proprio_BTS.shape[:2], 1 - sampler.context_noise)
    level_BT[:, -1] = 0
    (noise,) = stream.frames(shape, numbers, CONTEXT)
    (last,) = stream.frames(shape, numbers[-1:], START)
    z = frames.map(
        lambda x, eps, own: torch.cat(
            [(1 - sampler.context_noise) * x[:, :-1] + sampler.context_noise * eps[:, :-1], own], 1
        ),
        noise,
        last,
    )
    step_BT = torch.full_like(level_BT, CONTEXT_STEP)
    step_BT[:, -1] = 1
    keep_BT = torch.ones_like(level_BT, dtype=torch.bool)
    keep_BT[:, 0] = numbers[0] > 0
    conditioning = Conditioning(actions_BTkA, keep_BT, state.embodiment_B)
    predicted, _ = world.model(
        z, SignalLevel.from_signal(level_BT), step_BT, conditioning, streams=Streams(context=len(numbers))
    )
    return predicted[:, -1:]


@pytest.mark.parametrize("frame", [4, 5, 9, 12])
def test_cached_rollout_equals_a_window_computed_afresh(new_world, prompt, actions, frame):
    # With one time attention a cached key holds its own frame only, so that a window says it all.
    world = new_world(depth=2, time_every=2)
    one_step = dataclasses.replace(world.spec.sampler, steps=1)
    known, commands = prompt(world), actions(world, 12)
    state = world.reset(known, num_samples=2)
    latents = world.encode(torch.tensor(known.frames)[None]).repeat(2, 1, 1, 1, 1, 1)
    proprio = world.normalizer.proprio(torch.tensor(known.proprio)[None].repeat(2, 1, 1), state.embodiment_B)
    imagined = world.rollout(state, commands, sampler=one_step)
    later = world.normalizer.proprio(imagined.proprio_BTS, state.embodiment_B)
    history = Frames(torch.cat([latents, imagined.latents_BTVChw], 1), torch.cat([proprio, later], 1))
    first = max(0, frame + 1 - world.spec.sampler.window)
    numbers = range(first, frame + 1)
    led = np.concatenate([np.zeros((1, 3), np.float32), known.actions, commands])
    actions_BTA = world.normalizer.actions(torch.tensor(led)[None].repeat(2, 1, 1), state.embodiment_B)
    window = slice(first, frame + 1)
    afresh = window_of(world, history[:, window], numbers, actions_BTA[:, window, None], state)
    torch.testing.assert_close(afresh.latents_BTVChw, history.latents_BTVChw[:, frame : frame + 1], **CLOSE)
    torch.testing.assert_close(afresh.proprio_BTS, history.proprio_BTS[:, frame : frame + 1], **CLOSE)
    # Negative control: a window one frame short gives something else.
    short = slice(first + 1, frame + 1)
    other = window_of(world, history[:, short], numbers[1:], actions_BTA[:, short, None], state)
    assert (other.latents_BTVChw - afresh.latents_BTVChw).abs().max() > 1e-3


def test_a_learnt_world_shows_what_was_commanded(learnt_world, prompt):
    """Each action reaches the frame that it leads to, and what only the prompt shows stays."""
    world = learnt_world
    sampler = dataclasses.replace(world.spec.sampler, steps=1)
    start = world.reset(prompt(world), num_samples=2, sampler=sampler)
    commands = np.random.default_rng(3).uniform(-2, 2, (8, 3)).astype(np.float32)
    imagined = world.rollout(start, commands, sampler=sampler)
    wanted_T3 = world.normalizer.actions(torch.tensor(commands)[None], torch.tensor([0]))[0]
    shown_BT3 = imagined.latents_BTVChw[:, :, 0, :3].mean((-2, -1))
    read_BT3 = world.normalizer.proprio(imagined.proprio_BTS, start.embodiment_B)[..., :3]
    for found_BT3 in (shown_BT3, read_BT3):
        error = (found_BT3 - wanted_T3).square().mean().sqrt()
        late = (found_BT3[:, 1:] - wanted_T3[:-1]).square().mean().sqrt()
        assert error < 0.25
        assert late > 2 * error
    shades = []
    for shade in (0, 255):
        known = dataclasses.replace(prompt(world), frames=np.full((3, 1, 32, 48, 3), shade, np.uint8))
        last = world.rollout(world.reset(known, sampler=sampler), commands, sampler=sampler)
        shown = last.latents_BTVChw[0, -1, 0, 3].mean()
        shades.append(
            (float(shown), float(world.encode(torch.tensor(known.frames)[None])[..., 3, :, :].mean()))
        )
    (dark, dark_before), (bright, bright_before) = shades
    # Eight frames on, when none of the prompt is in sight any more.
    assert (dark - bright) / (dark_before - bright_before) > 0.5


def test_gradients_of_pixels_reach_the_actions(new_world, prompt, actions):
    world = new_world().double()
    commands = torch.tensor(actions(world, 3), dtype=torch.float64)
    probe = torch.randn(3, 1, 3, 32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = world.reset(prompt(world), seed=4)

    def score(commands_TA):
        pixels_BTVCHW = world.decode(world.rollout(start, commands_TA, decode=False).latents_BTVChw)
        return (pixels_BTVCHW[0] * probe).sum()

    commands.requires_grad_()
    (gradient_TA,) = torch.autograd.grad(score(commands), commands)
    # The first action moves all three frames, the last one only its own; none is without effect.
    assert (gradient_TA.abs() > 1e-6).all()
    step = 1e-5
    with torch.no_grad():
        for index in [(0, 0), (0, 2), (1, 1), (2, 0)]:
            bump = torch.zeros_like(commands)
            bump[index] = step
            slope = (score(commands + bump) - score(commands - bump)) / (2 * step)
            torch.testing.assert_close(slope, gradient_TA[index], rtol=1e-5, atol=1e-6)


def test_no_gradient_is_kept_unless_asked_for(world, prompt, actions):
    imagined = world.rollout(world.reset(prompt(world)), actions(world, 2))
    assert not imagined.latents_BTVChw.requires_grad
    commands = torch.tensor(actions(world, 2), requires_grad=True)
    first = world.rollout(world.reset(prompt(world)), commands)
    assert first.latents_BTVChw.requires_grad
    assert first.proprio_BTS.requires_grad
    assert not world.rollout(first.state.detach(), actions(world, 1)).latents_BTVChw.requires_grad


def test_guidance_is_off_at_zero_and_moves_towards_the_actions(world, prompt, actions):
    start, commands = world.reset(prompt(world)), actions(world, 1)
    sampler = dataclasses.replace(world.spec.sampler, steps=1)
    calls = []
    handle = world.model.register_forward_hook(lambda *_: calls.append(1))
    plain = world.rollout(start, commands, sampler=sampler).latents_BTVChw
    assert len(calls) == 2  # one denoising pass, one commit
    calls.clear()
    scales = {
        scale: world.rollout(
            start, commands, sampler=dataclasses.replace(sampler, guidance=scale)
        ).latents_BTVChw
        for scale in (1.0, 2.0)
    }
    handle.remove()
    assert len(calls) == 6
    # (1 + l) f_c - l f_u is linear in l after one step.
    torch.testing.assert_close(scales[2.0] - plain, 2 * (scales[1.0] - plain), **CLOSE)
    assert (scales[1.0] - plain).abs().mean() > 1e-3


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_both_samplers_run_with_any_number_of_steps(world, prompt, actions, method):
    start, commands = world.reset(prompt(world)), actions(world, 1)
    results = [
        world.rollout(
            start, commands, sampler=dataclasses.replace(world.spec.sampler, method=method, steps=steps)
        ).latents_BTVChw
        for steps in (1, 3)
    ]
    assert all(result.isfinite().all() for result in results)
    assert not torch.equal(*results)


def test_the_model_is_told_the_context_level_honestly(world, prompt):
    seen = []
    handle = world.model.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[:3]), with_kwargs=False
    )
    sampler = dataclasses.replace(world.spec.sampler, context_noise=0.25)
    known = prompt(world)
    world.reset(known, sampler=sampler)
    handle.remove()
    [(frames, level, step_BT)] = seen
    assert torch.all(level.noise == 0.25)
    assert torch.all(step_BT == CONTEXT_STEP)
    clean = world.encode(torch.tensor(known.frames)[None])
    noise = (frames.latents_BTVChw - 0.75 * clean) / 0.25
    stream = NoiseStream(0, torch.arange(1))
    (expected,) = stream.frames(world.spec.shape, range(3), CONTEXT)
    torch.testing.assert_close(noise, expected.latents_BTVChw, **CLOSE)


def test_observing_frames_is_prompting_with_them(world, prompt, actions):
    known = prompt(world, frames=4)
    at_once = world.reset(known, num_samples=2)
    begun = world.reset(
        dataclasses.replace(
            known, frames=known.frames[:3], proprio=known.proprio[:3], actions=known.actions[:2]
        ),
        num_samples=2,
    )
    grounded = world.observe(begun, known.frames[3], proprio=known.proprio[3], action=known.actions[2])
    assert grounded.frame == at_once.frame == 4
    commands = actions(world, 2)
    torch.testing.assert_close(
        world.rollout(grounded, commands).latents_BTVChw,
        world.rollout(at_once, commands).latents_BTVChw,
        **CLOSE,
    )
    imagined, _ = world.step(begun, known.actions[2])
    assert (imagined.newest.latents_BTVChw - grounded.newest.latents_BTVChw).abs().mean() > 1e-2


def test_unknown_proprioception_is_read_off_the_pictures(world, prompt):
    known = prompt(world)
    blind = world.reset(dataclasses.replace(known, proprio=None), num_samples=2)
    told = world.reset(known, num_samples=2)
    assert torch.equal(blind.newest.latents_BTVChw, told.newest.latents_BTVChw)
    assert not torch.isclose(blind.newest.proprio_BTS, told.newest.proprio_BTS).any()
    # Another picture, another reading; another sample, another draw.
    other = prompt(world, seed=1).frames
    elsewhere = world.reset(dataclasses.replace(known, frames=other, proprio=None), num_samples=2)
    assert not torch.isclose(blind.newest.proprio_BTS, elsewhere.newest.proprio_BTS).all()
    assert not torch.isclose(blind.newest.proprio_BTS[0], blind.newest.proprio_BTS[1]).all()
    # Beside a prompt that knows its own, which stays as it was told.
    both = world.reset([known, dataclasses.replace(known, proprio=None)])
    torch.testing.assert_close(both.newest.proprio_BTS[0], told.newest.proprio_BTS[0], **CLOSE)
    torch.testing.assert_close(both.newest.proprio_BTS[1], blind.newest.proprio_BTS[1], **CLOSE)


def test_unknown_actions_are_not_zero_actions(world, prompt):
    known = prompt(world)
    states = [
        world.reset(dataclasses.replace(known, actions=actions)).cache.layers[-1].key
        for actions in (None, np.zeros_like(known.actions), known.actions)
    ]
    assert not torch.allclose(states[0], states[1])
    assert not torch.allclose(states[1], states[2])


def test_a_long_prompt_keeps_its_newest_frames_and_the_sink(world, prompt):
    known = prompt(world, frames=9)
    state = world.reset(known)
    assert state.cache.num_frames == world.spec.sampler.window - 1
    assert state.frame == 9
    sampler = dataclasses.replace(world.spec.sampler, sink=1)
    pinned = world.reset(known, sampler=sampler)
    alone = world.reset(prompt(world, frames=9), sampler=dataclasses.replace(sampler, window=9, sink=0))
    assert pinned.cache.num_frames == world.spec.sampler.window - 1
    assert alone.cache.num_frames == 8


def test_several_views_and_robots_share_a_world(new_world, prompt, contract):
    arm, hand = contract("arm", 3, 4), contract("hand", 2, 1)
    world = new_world(contracts=(arm, hand), views=("top", "wrist"))
    first = prompt(world)
    second = dataclasses.replace(
        first, proprio=first.proprio[:, :1], actions=first.actions[:, :2], embodiment="hand"
    )
    state = world.reset([first, second])
    assert state.embodiment_B.tolist() == [0, 1]
    commands = np.zeros((2, 3, 3), np.float32)
    commands[0] = 1.0
    imagined = world.rollout(state, commands)
    assert imagined.video_BTVHWC.shape == (2, 3, 2, 32, 48, 3)
    assert torch.all(imagined.proprio_BTS[1, :, 1:] == 0)
    # A robot's padding is never read.
    commands[1, :, 2] = 1.5
    assert torch.equal(world.rollout(state, commands).latents_BTVChw, imagined.latents_BTVChw)
    alone = world.rollout(state.select([1]), commands[1, :, :2])
    torch.testing.assert_close(alone.latents_BTVChw[0], imagined.latents_BTVChw[1], **CLOSE)
    with pytest.raises(ContractError, match=r"embodiment.*got none, expected one of 'arm', 'hand'"):
        world.reset(dataclasses.replace(first, embodiment=None))


def test_low_dimensional_noise_chooses_the_future(new_world, prompt, actions):
    world = new_world(noise_dims=4)
    with torch.no_grad():
        torch.nn.init.normal_(world.model.condition_embedding.noise.weight)
    seen = []
    handle = world.model.register_forward_pre_hook(lambda module, given: seen.append(given[3].noise_BTX))
    state = world.reset(prompt(world), num_samples=2)
    world.rollout(state, actions(world, 1), sampler=dataclasses.replace(world.spec.sampler, steps=1))
    handle.remove()
    assert [noise is None for noise in seen] == [True, False, True]  # context, denoising, commit
    assert seen[1].shape == (2, 1, 4)
    assert not torch.isclose(seen[1][0], seen[1][1]).any()


BAD_ACTIONS = {
    "dimensions": (np.zeros((4, 2)), ContractError, "3 in the last axis for embodiment 'arm'"),
    "one row only": (np.zeros(3), ContractError, "3 in the last axis"),
    "dtype": (np.zeros((4, 3), dtype=object), ContractError, "dtype"),
    "not finite": (np.full((4, 3), np.nan), ContractError, "'joint_0' not finite at step 0"),
    "range": (np.eye(4, 3, k=-1) * 40, ContractError, "'joint_0' out of range at step 1.*got 40 rad"),
    "samples": (np.zeros((3, 4, 3)), ContractError, "3 samples, expected 2"),
}


@pytest.mark.parametrize(("actions", "error", "message"), BAD_ACTIONS.values(), ids=BAD_ACTIONS.keys())
def test_actions_outside_the_contract_are_refused_by_name(world, prompt, actions, error, message):
    state = world.reset(prompt(world), num_samples=2)
    with pytest.raises(error, match=message):
        world.rollout(state, actions)


def test_range_may_be_waived_and_is_not_asked_of_gradients(world, prompt):
    state = world.reset(prompt(world))
    bold = np.full((1, 3), 30.0)
    world.rollout(state, bold, allow_out_of_range=True)
    world.rollout(state, bold, check=False)
    world.rollout(state, torch.tensor(bold, requires_grad=True))


def test_a_rollout_stops_at_the_first_frame_that_is_not_finite(world, prompt, actions):
    state = world.reset(prompt(world))
    commands = actions(world, 5)
    commands[3] = 1e38
    with pytest.raises(RolloutDivergedError, match="from frame 6 on"):
        world.rollout(state, commands, allow_out_of_range=True)
    for action in commands[:3]:
        state, _ = world.step(state, action)
    with pytest.raises(RolloutDivergedError, match="from frame 6 on") as raised:
        world.step(state, commands[3], allow_out_of_range=True)
    assert raised.value.exit_code != 0


def test_bad_calls_are_refused(world, new_world, prompt, actions):
    known = prompt(world)
    with pytest.raises(ConfigError, match="samples"):
        world.reset(known, num_samples=0)
    with pytest.raises(ConfigError, match="seed"):
        world.reset(known, seed=-1)
    with pytest.raises(ConfigError, match="sample_ids"):
        world.reset(known, num_samples=2, sample_ids=[1])
    with pytest.raises(ConfigError, match="prompts"):
        world.reset([])
    with pytest.raises(DataError, match=r"frames of the prompts: got \[3, 4\]"):
        world.reset([known, prompt(world, frames=4)])
    state = world.reset(known)
    with pytest.raises(CheckpointError, match="another world"):
        new_world(num_registers=2).step(state, actions(world, 1)[0])
    with pytest.raises(DataError, match="observed frames"):
        world.observe(state, np.zeros((3, 1, 32, 48, 3), np.uint8))
    with pytest.raises(DataError, match="row of the state"):
        state.select([1])
