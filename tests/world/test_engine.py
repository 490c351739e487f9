"""The engine against the plain world: the same frames, proprioception, pictures and states."""

import dataclasses

import numpy as np
import pytest
import torch

from vidworld.errors import CheckpointError, ConfigError, ContractError
from vidworld.world.dynamics import imagine
from vidworld.world.engine import RolloutEngine
from vidworld.world.finite import RolloutDivergedError
from vidworld.world.noise import CONTEXT, START, NoiseStream, Purpose
from vidworld.world.noise_ahead import NoiseAhead

EXACT = 1e-11
"""In float64 nothing but the order of sums differs."""
CLOSE = 2e-5
"""In float32."""


def sampler(world, **changes):
    return dataclasses.replace(world.spec.sampler, **changes)


def worst(got, expected):
    """Largest difference of two rollouts, and of the states after them."""
    cached = [
        (a - b).abs().max()
        for one, other in zip(got.state.cache.layers, expected.state.cache.layers, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    frames = [got.latents_BTVChw - expected.latents_BTVChw, got.proprio_BTS - expected.proprio_BTS]
    return max(float(one.abs().max()) for one in [*cached, *frames])


CASES = {
    "one step": {"steps": 1},
    "four steps": {"steps": 4},
    "heun": {"steps": 3, "method": "heun"},
    "guided": {"steps": 2, "guidance": 0.7},
    "sink": {"steps": 2, "sink": 2},
    "guided with a sink, one step": {"steps": 1, "guidance": 1.5, "sink": 1},
    "quiet context": {"steps": 1, "context_noise": 0.0},
    "half the noise": {"steps": 1, "temperature": 0.5},
    "no noise": {"steps": 1, "temperature": 0.0},
    "noise of the network alone": {"steps": 1, "start_noise": 0.0},
    "least window": {"steps": 2, "window": 2},
    "wide window": {"steps": 1, "window": 40},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_it_equals_the_plain_world(new_world, prompt, actions, changes):
    """From a short prompt over the filling of the window and several turns of the ring."""
    world = new_world(noise_dims=3).double()
    chosen = sampler(world, **changes)
    state = world.reset(prompt(world, 3), num_samples=2, seed=7, sampler=chosen)
    given = actions(world, 17)
    expected = world.rollout(state, given, sampler=chosen)
    got = RolloutEngine(world, sampler=chosen).rollout(state, given)
    assert worst(got, expected) < EXACT
    assert (got.video_BTVHWC.int() - expected.video_BTVHWC.int()).abs().max() <= 1
    assert dataclasses.astuple(got.state)[2:4] == dataclasses.astuple(expected.state)[2:4]
    # Negative control: the check sees a change of the sampler.
    other = world.rollout(state, given, sampler=dataclasses.replace(chosen, context_noise=0.3))
    assert worst(got, other) > 1e-4


def test_float32_is_close(world, prompt, actions):
    state = world.reset(prompt(world, 8), num_samples=3)
    given = actions(world, 24)
    assert worst(RolloutEngine(world).rollout(state, given), world.rollout(state, given)) < CLOSE


def test_the_stream_between_blocks_in_half_precision(new_world, prompt, actions):
    """By the engine's choice or the network's, which give the same numbers; not those of a wide stream."""
    world = new_world(noise_dims=3)
    state, given = world.reset(prompt(world, 8), num_samples=2), actions(world, 6)
    wide = RolloutEngine(world, half=True).rollout(state, given)
    narrow = RolloutEngine(world, half=True, residual="autocast").rollout(state, given)
    assert world.model.config.residual == "float32", "the world keeps its own"
    world.model.config = dataclasses.replace(world.model.config, residual="autocast")
    trained = RolloutEngine(world, half=True).rollout(state, given)
    assert worst(narrow, trained) == 0
    exact = world.rollout(state, given).latents_BTVChw
    assert worst(narrow, wide) > 0
    rounded = [float((one.latents_BTVChw - exact).abs().mean()) for one in (narrow, wide)]
    assert rounded[0] < 3 * rounded[1] < 0.05, rounded


def test_kernels_that_cannot_run_here_change_nothing(world, prompt, actions, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    state, given = world.reset(prompt(world, 3)), actions(world, 2)
    got = RolloutEngine(world, kernels=("space", "time", "mlp", "residual")).rollout(state, given)
    assert worst(got, RolloutEngine(world).rollout(state, given)) == 0
    with pytest.raises(ConfigError, match=r"kernels of the engine.*'speed'.*space \| time"):
        RolloutEngine(world, kernels=("speed",))


def test_fp8_products_that_cannot_run_here_change_nothing_and_say_so(world, prompt, actions):
    state, given = world.reset(prompt(world, 3)), actions(world, 2)
    with pytest.warns(UserWarning, match="not in fp8: bfloat16 autocast is off"):
        engine = RolloutEngine(world, products="fp8")
    assert worst(engine.rollout(state, given), RolloutEngine(world).rollout(state, given)) == 0
    with pytest.warns(UserWarning, match="not in fp8: the device is cpu"):
        engine = RolloutEngine(world, products="fp8", half=True)
    assert worst(engine.rollout(state, given), RolloutEngine(world, half=True).rollout(state, given)) == 0
    with pytest.raises(ConfigError, match=r"products of the engine.*int4.*autocast \| fp8"):
        RolloutEngine(world, products="int4")


def test_several_robots_views_and_padding(new_world, contract, prompt):
    """Two embodiments of other widths side by side, two views."""
    robots = (contract("arm", 3, 4), contract("hand", 2, 5))
    world = new_world(contracts=robots, views=("top", "wrist")).double()
    first = prompt(world, 3)
    second = dataclasses.replace(
        first, proprio=np.zeros((3, 5), np.float32), actions=np.zeros((2, 2), np.float32), embodiment="hand"
    )
    state = world.reset([first, second], num_samples=2)
    given = np.zeros((4, 9, 3), np.float32)
    assert worst(RolloutEngine(world).rollout(state, given), world.rollout(state, given)) < EXACT


def test_steps_equal_one_rollout_and_states_come_out_anywhere(world, prompt, actions):
    """Taking a state commits the frame early, which must change nothing."""
    state, given = world.reset(prompt(world, 4), num_samples=2), actions(world, 9)
    engine = RolloutEngine(world)
    expected = engine.rollout(state, given)
    engine.load(state)
    seen = []
    for index, action in enumerate(given):
        seen.append(engine.step(action))
        if index in (2, 3, 7):
            plain = world.rollout(engine.state(), given[index + 1 :], decode=False)
            rest = expected.latents_BTVChw[:, index + 1 :]
            assert float((plain.latents_BTVChw - rest).abs().amax()) < CLOSE if rest.numel() else True
    latents = torch.stack([one.latents_BVChw for one in seen], 1)
    assert float((latents - expected.latents_BTVChw).abs().max()) < CLOSE
    pictures = torch.stack([one.video_BVHWC for one in seen], 1)
    assert (pictures.int() - expected.video_BTVHWC.int()).abs().max() <= 1
    assert engine.frame == state.frame + 9


def test_it_goes_on_from_its_own_states_forked_and_saved(world, prompt, actions, tmp_path):
    engine, given = RolloutEngine(world), actions(world, 5)
    state = engine.rollout(world.reset(prompt(world, 4)), given).state
    forked = world.fork(state, [0, 0, 0])
    got, expected = engine.rollout(forked, given), world.rollout(forked, given)
    assert worst(got, expected) < CLOSE
    state.save(tmp_path / "state.safetensors")
    restored = type(state).load(tmp_path / "state.safetensors")
    again = engine.rollout(restored, given)
    first = engine.rollout(state, given)
    assert torch.equal(again.latents_BTVChw, first.latents_BTVChw)
    # A state is a value: the engine that went on did not change it.
    assert torch.equal(engine.rollout(state, given).latents_BTVChw, first.latents_BTVChw)


def test_batched_equals_single(world, prompt, actions):
    state, given = world.reset(prompt(world, 4), num_samples=5, seed=3), actions(world, 8)
    together = RolloutEngine(world).rollout(state, given)
    for row in range(5):
        alone = RolloutEngine(world).rollout(state.select([row]), given)
        assert float((alone.latents_BTVChw - together.latents_BTVChw[[row]]).abs().max()) < CLOSE


def test_k_steps_take_k_passes(new_world, prompt, actions, monkeypatch):
    """The point of committing on the way; the plain world takes K + 1."""
    world = new_world()
    passes = []
    embed = type(world.model).embed
    monkeypatch.setattr(
        type(world.model), "embed", lambda self, *given: passes.append(0) or embed(self, *given)
    )
    state, given = world.reset(prompt(world, 6)), actions(world, 10)
    chosen = sampler(world, steps=2)
    passes.clear()
    world.rollout(state, given, sampler=chosen, decode=False)
    assert len(passes) == 10 * (2 + 1)
    passes.clear()
    RolloutEngine(world, sampler=chosen).rollout(state, given, decode=False)
    assert len(passes) == 10 * 2 + 1, "one more for the state at the end"


def test_cached_keys_are_turned_once_a_frame(world, prompt, actions, monkeypatch):
    turned = []
    monkeypatch.setattr("vidworld.model.streaming._turn", lambda *given: turned.append(0))
    engine = RolloutEngine(world, sampler=sampler(world, steps=4))
    engine.rollout(world.reset(prompt(world, 6)), actions(world, 3), decode=False)
    assert len(turned) == 3 * len(world.reset(prompt(world, 6)).cache.layers)


def test_the_merged_commit_is_the_commit(new_world, prompt):
    """One frame after another through `imagine`, which commits in a pass of its own, layer by layer."""
    world = new_world(depth=4, time_every=1).double()
    state = world.reset(prompt(world, 6), num_samples=2)
    cache, given = state.cache, torch.zeros(1, 3)
    engine = RolloutEngine(world)
    engine.load(state)
    for frame in range(6, 16):
        actions_B1kA = world.normalized_actions(state, given, True, False)
        from vidworld.model.inputs import Conditioning

        conditioning = Conditioning(actions_B1kA, torch.ones(2, 1, dtype=torch.bool), state.embodiment_B)
        stream = NoiseStream(0, state.sample_ids_B, torch.float64)
        clean, cache = imagine(world.model, cache, conditioning, frame, stream, world.spec.sampler)
        seen = engine.step(given[0], decode=False)
        assert float((seen.latents_BVChw - clean.latents_BTVChw[:, 0]).abs().max()) < EXACT
    for got, expected in zip(engine.state().cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(got, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    ("noise_dims", "starts", "contexts"),
    [(0, True, True), (3, True, True), (3, False, True), (3, True, False), (3, False, False)],
)
def test_noise_ahead_has_the_bits_of_the_stream(world, noise_dims, starts, contexts):
    shape, ids = world.spec.shape, torch.tensor([4, 2**40 + 1])
    ahead = NoiseAhead(
        shape,
        noise_dims,
        2,
        dtype=torch.float32,
        device=torch.device("cpu"),
        starts=starts,
        contexts=contexts,
    )
    assert ahead.ahead > 1
    ahead.load(2**63 + 5, ids)
    stream = NoiseStream(2**63 + 5, ids)
    for frame in [*range(5, 5 + 2 * ahead.ahead), 3]:
        ahead.go_to(frame)
        start, context, of_model = ahead.parts
        for got, kind, drawn in ((start, START, starts), (context, CONTEXT, contexts)):
            if not drawn:
                assert not got.latents_BTVChw.any()
                assert not got.proprio_BTS.any()
                continue
            (expected,) = stream.frames(shape, [frame], kind)
            assert torch.equal(got.latents_BTVChw, expected.latents_BTVChw)
            assert torch.equal(got.proprio_BTS, expected.proprio_BTS)
        if noise_dims:
            assert torch.equal(of_model, stream.draw(frame, Purpose.MODEL, (noise_dims,)))
        else:
            assert of_model is None


def test_wrong_use_is_refused(world, new_world, prompt, actions):
    engine = RolloutEngine(world)
    with pytest.raises(ConfigError, match="engine without a state"):
        engine.step(actions(world, 1)[0])
    other = new_world(depth=6)
    with pytest.raises(CheckpointError, match="state of another world"):
        engine.rollout(other.reset(prompt(other, 3)), actions(other, 1))
    state = world.reset(prompt(world, 3))
    with pytest.raises(ContractError, match="joint_1"):
        engine.rollout(state, np.full((3, 3), [0, 99, 0]))


def test_divergence_names_the_frame(world, prompt, actions):
    state, given = world.reset(prompt(world, 3)), actions(world, 20)
    given[17] = 3e38
    with pytest.raises(RolloutDivergedError, match=f"from frame {3 + 17} on"):
        RolloutEngine(world).rollout(state, given, allow_out_of_range=True)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "model"), [(1, {}), (2, {}), (2, {"previous_frame": True})])
def test_compiled_equals_plain_and_nothing_compiles_again(new_world, prompt, actions, steps, model):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    world = new_world(depth=6, time_every=3, **model)
    chosen = sampler(world, steps=steps)
    state, given = world.reset(prompt(world, 3), num_samples=2, sampler=chosen), actions(world, 14)
    expected = world.rollout(state, given, sampler=chosen)
    engine = RolloutEngine(world, sampler=chosen, compile=True)
    assert worst(engine.rollout(state, given), expected) < CLOSE
    counters.clear()
    with torch.compiler.set_stance("fail_on_recompile"):
        again = engine.rollout(state, given)
        engine.load(again.state)
        for action in given:
            engine.step(action)
    assert not counters["stats"].get("unique_graphs")
    assert not counters["graph_break"]
    assert worst(again, expected) < CLOSE
