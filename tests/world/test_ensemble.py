"""An ensemble is its members side by side, and refuses those that do not belong together."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vidworld
from vidworld.errors import CheckpointError, ConfigError, ContractError
from vidworld.tokenizers.store import save_tokenizer
from vidworld.world.build import narrow
from vidworld.world.engine import RolloutEngine
from vidworld.world.ensemble import Ensemble
from vidworld.world.noise import MEMBER_STRIDE
from vidworld.world.state import WorldState
from vidworld.world.world import WorldModel

EXACT = 1e-11


def make_members(new_world, count=3, **settings):
    """Worlds with one tokenizer and other weights."""
    members = [new_world(**settings) for _ in range(count)]
    for index, member in enumerate(members):
        generator = torch.Generator().manual_seed(100 + index)
        for parameter in member.model.parameters():
            parameter.add_(
                0.3 * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=generator)
            )
    return members


@pytest.fixture(scope="module")
def members(new_world):
    return make_members(new_world)


@pytest.fixture(scope="module")
def ensemble(members):
    return Ensemble(members)


def test_each_member_imagines_what_it_would_alone(members, ensemble, prompt, actions):
    """Bit for bit, in rollouts of several prompts, after selecting, forking and observing."""
    prompts = [prompt(ensemble, 3, seed=0), prompt(ensemble, 3, seed=1)]
    given = actions(ensemble, 7)
    state = ensemble.reset(prompts, num_samples=2, seed=5)
    assert state.member_B.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert state.scene_B.tolist() == [0] * 6 + [1] * 6
    rolled = ensemble.rollout(state, given)
    frame = prompts[0].frames[0]
    observed = ensemble.rollout(ensemble.observe(rolled.state, frame, action=given[0]), given[:2])
    for index, member in enumerate(members):
        ids = [sample + index * MEMBER_STRIDE for sample in range(4)]
        alone = member.rollout(member.reset(prompts, 2, 5, sample_ids=ids), given)
        rows = state.member_B == index
        assert torch.equal(rolled.latents_BTVChw[rows], alone.latents_BTVChw)
        assert torch.equal(rolled.proprio_BTS[rows], alone.proprio_BTS)
        assert torch.equal(rolled.video_BTVHWC[rows], alone.video_BTVHWC)
        after = member.rollout(member.observe(alone.state, frame, action=given[0]), given[:2])
        assert torch.equal(observed.latents_BTVChw[rows], after.latents_BTVChw)
    # Negative control: members differ, and so do their samples.
    assert not torch.equal(rolled.latents_BTVChw[0], rolled.latents_BTVChw[2])
    assert not torch.equal(rolled.latents_BTVChw[0], rolled.latents_BTVChw[1])


def test_the_first_member_s_futures_are_those_of_its_world(members, ensemble, prompt, actions):
    given = actions(ensemble, 4)
    rolled = ensemble.rollout(ensemble.reset(prompt(ensemble), 2), given)
    alone = members[0].rollout(members[0].reset(prompt(ensemble), 2), given)
    assert torch.equal(rolled.latents_BTVChw[:2], alone.latents_BTVChw)


def test_rows_stay_with_their_members(ensemble, prompt, actions, tmp_path):
    given = actions(ensemble, 3)
    state = ensemble.reset(prompt(ensemble), num_samples=2)
    whole = ensemble.rollout(state, given).latents_BTVChw
    order = [5, 0, 3]
    chosen = state.select(order)
    assert chosen.member_B.tolist() == [2, 0, 1]
    assert torch.allclose(ensemble.rollout(chosen, given).latents_BTVChw, whole[order], atol=1e-5)
    forked = state.fork(2)
    assert forked.member_B.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    chosen.save(tmp_path / "state.safetensors")
    restored = WorldState.load(tmp_path / "state.safetensors")
    assert torch.equal(
        ensemble.rollout(restored, given).latents_BTVChw, ensemble.rollout(chosen, given).latents_BTVChw
    )
    assert restored.scene_B.tolist() == [0, 0, 0]


def test_states_of_one_world_and_of_an_ensemble_are_not_exchanged(members, ensemble, prompt):
    with pytest.raises(CheckpointError, match="another world"):
        members[0].rollout(ensemble.reset(prompt(ensemble)), np.zeros((1, 3)))
    with pytest.raises(CheckpointError, match="another world"):
        ensemble.rollout(members[0].reset(prompt(ensemble)), np.zeros((1, 3)))


@pytest.mark.parametrize("order", [None, [4, 1, 0, 5, 2, 3, 4]], ids=["as begun", "shuffled"])
def test_the_engine_equals_the_plain_ensemble(new_world, prompt, actions, order):
    ensemble = Ensemble(make_members(new_world, noise_dims=3)).double()
    given = actions(ensemble, 9)
    state = ensemble.reset(prompt(ensemble), num_samples=2, seed=3)
    state = state if order is None else state.select(order)
    expected = ensemble.rollout(state, given)
    engine = RolloutEngine(ensemble)
    got = engine.rollout(state, given)
    assert float((got.latents_BTVChw - expected.latents_BTVChw).abs().max()) < EXACT
    assert float((got.proprio_BTS - expected.proprio_BTS).abs().max()) < EXACT
    assert torch.equal(got.state.member_B, expected.state.member_B)
    # Taking the state and stepping on, in the engine and in the plain ensemble.
    on, plain = engine.step(given[0]), ensemble.step(expected.state, given[0])[1]
    assert float((on.latents_BVChw - plain.latents_BVChw).abs().max()) < EXACT
    assert torch.equal(on.rows.member_B, plain.rows.member_B)
    # The same engine takes rows of other members.
    fewer = state.select([0, 3])
    assert (
        float(
            (engine.rollout(fewer, given).latents_BTVChw - ensemble.rollout(fewer, given).latents_BTVChw)
            .abs()
            .max()
        )
        < EXACT
    )


def test_it_says_how_sure_it_is(ensemble, members, prompt, actions):
    prompts = [prompt(ensemble, 3, seed=0), prompt(ensemble, 3, seed=1)]
    state = ensemble.reset(prompts, num_samples=4)
    _, seen = ensemble.step(state, actions(ensemble, 1)[0])
    found = seen.uncertainty.proprio
    values = seen.proprio_BS.view(2, 3, 4, -1)
    assert torch.allclose(found.aleatoric_SX, values.var(2).mean(1))
    assert torch.allclose(found.epistemic_SX, values.mean(2).var(1) - values.var(2).mean(1) / 4)
    assert seen.uncertainty.pixels.aleatoric_SX.shape == (2, 1, 32, 48, 3)
    assert float(seen.uncertainty.pixels.mean_SX.max()) <= 1
    assert (
        seen.uncertainty.latents.epistemic_SX.shape == seen.latents_BVChw.shape[1:]
        or len(seen.uncertainty.latents.epistemic_SX) == 2
    )
    read = seen.uncertainty.of(seen.proprio_BS[:, :1].square())
    assert read.mean_SX.shape == (2, 1)
    rolled = ensemble.rollout(state, actions(ensemble, 5))
    assert rolled.uncertainty.proprio.epistemic_SX.shape == (2, 5, 4)
    # One world alone has an aleatoric part only.
    _, alone = members[0].step(members[0].reset(prompts, 4), actions(ensemble, 1)[0])
    assert alone.uncertainty.proprio.epistemic_SX is None
    with pytest.raises(ConfigError, match="samples of each member"):
        _ = ensemble.step(ensemble.reset(prompts, 1), actions(ensemble, 1)[0])[1].uncertainty.proprio


def test_members_that_are_one_world_know_all(members, prompt, actions):
    """Copies of one world disagree by chance alone: E averages out at zero, unlike among different worlds."""

    def mean_unknown(worlds):
        ensemble = Ensemble(worlds)
        rolled = ensemble.rollout(
            ensemble.reset([prompt(ensemble, 3, seed=s) for s in range(4)], 4), actions(ensemble, 3)
        )
        found = rolled.uncertainty.latents
        return float(found.epistemic_SX.mean() / found.aleatoric_SX.mean())

    assert abs(mean_unknown([members[0]] * 3)) < 0.05
    assert mean_unknown(members) > 0.2


def test_gradients_pass_through_members(ensemble, prompt):
    given = torch.zeros(2, 3, requires_grad=True)
    rolled = ensemble.rollout(ensemble.reset(prompt(ensemble), 2), given, decode=False)
    rolled.uncertainty.proprio.epistemic_SX.sum().backward()
    assert float(given.grad.abs().sum()) > 0


def test_what_does_not_fit_is_refused_by_name(new_world, contract, members):
    def other(**changes):
        spec = dataclasses.replace(members[0].spec, **changes)
        return WorldModel(spec, members[0].model, members[0].normalizer, members[0].tokenizer)

    with pytest.raises(ConfigError, match="got 1, expected 2 to 128"):
        Ensemble(members[:1])
    with pytest.raises(CheckpointError, match=r"`fps` of a member in runs/b: got 5.0, expected 10.0"):
        Ensemble([members[0], other(fps=5.0)], ["runs/a", "runs/b"])
    with pytest.raises(CheckpointError, match=r"`model\.width` of a member in member 1"):
        Ensemble([members[0], new_world(width=64)])
    with pytest.raises(CheckpointError, match="tokenizer of a member in member 1"):
        Ensemble([members[0], new_world(seed=7)])
    with pytest.raises(ContractError, match="action statistics of embodiment 'arm'"):
        Ensemble(
            [members[0], other(contracts=(dataclasses.replace(members[0].spec.contracts[0], action=()),))]
        )
    # Data that were drawn anew, and another sampler, are no hindrance.
    sampler = dataclasses.replace(members[0].spec.sampler, steps=1)
    assert Ensemble([members[0], other(dataset_digest="else", sampler=sampler)]).num_members == 2


def test_narrow_keeps_the_members(new_world, contract, prompt, actions):
    ensemble = Ensemble(make_members(new_world, 2, contracts=(contract("arm", 3, 4), contract("hand", 2, 5))))
    assert narrow(ensemble, ["arm"]).num_members == 2
    assert len(narrow(ensemble, ["arm"]).reset(prompt(ensemble), 3)) == 6


@pytest.fixture
def runs(members, tmp_path):
    for index, member in enumerate(members):
        run = tmp_path / f"run{index}"
        run.mkdir()
        member.spec.write(run)
        save_tokenizer(member.tokenizer, run / "tokenizer")
        save_file(member.model.state_dict(), run / "model.safetensors")
    return [tmp_path / f"run{index}" for index in range(len(members))]


def test_it_is_opened_from_runs_or_from_a_list_of_them(runs, ensemble, prompt, actions, tmp_path):
    state = ensemble.reset(prompt(ensemble), 2)
    expected = ensemble.rollout(state, actions(ensemble, 2)).latents_BTVChw
    opened = vidworld.load(runs, "cpu")
    assert torch.equal(
        opened.rollout(opened.reset(prompt(ensemble), 2), actions(ensemble, 2)).latents_BTVChw, expected
    )
    listing = {"schema_version": 1, "members": [run.name for run in runs]}
    (tmp_path / "ensemble.json").write_text(json.dumps(listing))
    opened = vidworld.load(tmp_path, "cpu")
    assert torch.equal(
        opened.rollout(opened.reset(prompt(ensemble), 2), actions(ensemble, 2)).latents_BTVChw, expected
    )
    assert isinstance(vidworld.load([runs[0]], "cpu"), WorldModel)
    assert not isinstance(vidworld.load([runs[0]], "cpu"), Ensemble)
    with pytest.raises(ConfigError, match="worlds to open: got none"):
        vidworld.load([], "cpu")
    for wrong in ({"schema_version": 2, "members": ["a", "b"]}, {"schema_version": 1, "members": "run0"}, {}):
        (tmp_path / "ensemble.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="list of members"):
            vidworld.load(tmp_path, "cpu")
