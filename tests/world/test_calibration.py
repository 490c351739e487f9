"""`calibration.json`: what it holds, when it is applied, and that without it nothing changes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vidworld.errors import CheckpointError, ConfigError
from vidworld.files import sha256_of
from vidworld.tokenizers.store import save_tokenizer
from vidworld.world.calibration import FILE_NAME, Calibration, Conformal, Radii, sampling_of
from vidworld.world.engine import RolloutEngine
from vidworld.world.load import load
from vidworld.world.noise_scale import NoiseScale
from vidworld.world.spec import WorldSpec
from vidworld.world.state import WorldState

SCALE = NoiseScale(latents=(1.3, 0.8), proprio=(1.1,), model=(0.5, 2.0))


def rolled(world, scale, state=None, frames=4, engine=False):
    sampler = dataclasses.replace(world.spec.sampler, noise_scale=scale)
    state = state or world.test_state
    actions = world.test_actions[:frames]
    if engine:
        return RolloutEngine(world, sampler=sampler).rollout(state, actions, decode=False)
    return world.rollout(state, actions, sampler=sampler, decode=False)


@pytest.fixture(scope="module")
def noisy_world(new_world, prompt, actions):
    """A world that takes noise as an input."""
    world = new_world(noise_dims=8).double()
    world.test_state = world.reset(prompt(world), 3, seed=5)
    world.test_actions = actions(world, 8)
    return world


def test_a_scale_of_one_changes_no_bit(noisy_world):
    plain, ones = rolled(noisy_world, None), rolled(noisy_world, NoiseScale((1.0,), (1.0, 1.0), (1.0,)))
    assert torch.equal(plain.latents_BTVChw, ones.latents_BTVChw)
    assert torch.equal(plain.proprio_BTS, ones.proprio_BTS)
    scaled = rolled(noisy_world, NoiseScale(latents=(1.001,)))
    assert not torch.equal(plain.latents_BTVChw, scaled.latents_BTVChw), "negative control"


@pytest.mark.parametrize("series", ["latents", "proprio", "model"])
def test_factors_act_at_their_lead_and_the_last_one_goes_on(noisy_world, series):
    plain = rolled(noisy_world, None)
    late = rolled(noisy_world, NoiseScale(**{series: (1.0, 1.0, 2.0)}))
    same = [torch.equal(late.latents_BTVChw[:, t], plain.latents_BTVChw[:, t]) for t in range(4)]
    assert same == [True, True, False, False]
    longer = rolled(noisy_world, NoiseScale(**{series: (1.0, 1.0, 2.0, 2.0, 2.0)}))
    assert torch.equal(longer.latents_BTVChw, late.latents_BTVChw)


def test_leads_count_from_the_last_known_frame(noisy_world, prompt, tmp_path):
    scale = NoiseScale(latents=(1.0, 1.0, 2.0))
    first = rolled(noisy_world, scale, frames=2).state
    assert first.lead == 2
    first.save(tmp_path / "state")
    again = WorldState.load(tmp_path / "state")
    whole = rolled(noisy_world, scale, frames=4)
    sampler = dataclasses.replace(noisy_world.spec.sampler, noise_scale=scale)
    on = noisy_world.rollout(again, noisy_world.test_actions[2:4], sampler=sampler, decode=False)
    torch.testing.assert_close(on.latents_BTVChw, whole.latents_BTVChw[:, 2:], rtol=0, atol=0)
    seen = noisy_world.observe(again, prompt(noisy_world).frames[0])
    assert seen.lead == 0
    assert noisy_world.reset(prompt(noisy_world), 2).lead == 0


def test_the_engine_scales_as_the_world_does(noisy_world):
    whole = rolled(noisy_world, SCALE, frames=8)
    fast = rolled(noisy_world, SCALE, frames=8, engine=True)
    torch.testing.assert_close(fast.latents_BTVChw, whole.latents_BTVChw, rtol=0, atol=1e-9)
    torch.testing.assert_close(fast.proprio_BTS, whole.proprio_BTS, rtol=0, atol=1e-9)
    assert fast.state.lead == 8


def test_wrong_factors_are_refused():
    for wrong in (float("nan"), 0.0, -1.0, 100.0):
        with pytest.raises(ConfigError, match=r"noise_scale\.proprio"):
            NoiseScale(proprio=(1.0, wrong))


def test_other_steps_leave_the_scale_out_loudly(world):
    sampler = dataclasses.replace(world.spec.sampler, noise_scale=SCALE)
    assert sampler.changed(steps=sampler.steps).noise_scale == SCALE
    with pytest.warns(UserWarning, match="not calibrated"):
        assert sampler.changed(steps=1).noise_scale is None


def test_temperature_scales_all_noise_beside_the_calibrated_factors(noisy_world):
    own = dataclasses.replace(noisy_world.spec.sampler, noise_scale=SCALE, temperature=0.5)
    halved = NoiseScale(latents=(0.65, 0.4), proprio=(0.55,), model=(0.25, 1.0))
    assert own.factors(2) == pytest.approx(halved.at(2))
    got = noisy_world.rollout(noisy_world.test_state, noisy_world.test_actions[:4], sampler=own, decode=False)
    torch.testing.assert_close(
        got.latents_BTVChw, rolled(noisy_world, halved).latents_BTVChw, rtol=0, atol=1e-12
    )
    plain = dataclasses.replace(own, noise_scale=None, temperature=1.0)
    assert not plain.scales_noise
    assert plain.factors(7) == (1.0, 1.0, 1.0)


def test_chance_can_be_the_network_s_alone(noisy_world, prompt):
    """With start_noise 0: then samples of one network noise are one future, and factors scale only that."""
    own = dataclasses.replace(
        noisy_world.spec.sampler, start_noise=0.0, context_noise=0.0, noise_scale=SCALE, temperature=0.5
    )
    assert own.scales_noise
    assert own.factors(1) == (0.0, 0.0, 0.25)
    state = noisy_world.reset(prompt(noisy_world), 3, seed=5, sampler=own)
    shared_BTX = torch.randn(1, 3, 8, dtype=torch.float64).expand(3, 3, 8)

    def spread(sampler, noise_BTX):
        rolled = noisy_world.rollout(
            state, noisy_world.test_actions[:3], sampler=sampler, noise_BTX=noise_BTX, decode=False
        )
        return (rolled.latents_BTVChw - rolled.latents_BTVChw[:1]).abs().max().item()

    assert spread(own, shared_BTX) < 1e-12
    assert spread(own, None) > 1e-3, "negative control: each with a noise of its own"
    assert spread(dataclasses.replace(own, start_noise=1.0), shared_BTX) > 1e-3, "negative control"
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"sampler\.start_noise"):
            dataclasses.replace(own, start_noise=wrong)


def test_proprioception_is_read_off_as_it_was_learnt(new_world, prompt):
    """Without noise at the start where training had none; the network has no other here."""
    world = new_world().double()
    blind = dataclasses.replace(prompt(world), proprio=None)
    noisy = dataclasses.replace(world.spec.sampler, context_noise=0.0)

    def read(sampler):
        state = world.reset(blind, 3, seed=5, sampler=sampler)
        return (state.newest.proprio_BTS - state.newest.proprio_BTS[:1]).abs().max().item()

    assert read(noisy) > 1e-3, "negative control"
    assert read(dataclasses.replace(noisy, start_noise=0.0)) < 1e-12


def test_without_noise_there_is_one_future(noisy_world, prompt):
    """Where the context has no noise either; with some, samples differ by that alone."""

    def spread(**changes):
        sampler = dataclasses.replace(noisy_world.spec.sampler, **changes)
        state = noisy_world.reset(prompt(noisy_world), 3, seed=5, sampler=sampler)
        rolled = noisy_world.rollout(state, noisy_world.test_actions[:3], sampler=sampler, decode=False)
        return (rolled.latents_BTVChw - rolled.latents_BTVChw[:1]).abs().max().item()

    assert spread(temperature=0.0, context_noise=0.0) < 1e-12
    assert spread(temperature=0.0) > 1e-9, "negative control: the noise in the context"
    assert spread(context_noise=0.0) > 1e-3, "negative control: the noise of the samples"


def test_another_temperature_is_another_way_of_sampling(world):
    sampler = dataclasses.replace(world.spec.sampler, noise_scale=SCALE)
    assert sampler.changed(temperature=0.0).noise_scale is None
    with pytest.warns(UserWarning, match="temperature 1, and are left out for"):
        assert sampler.changed(temperature=0.7).noise_scale is None
    for wrong in (-0.1, 2.1, float("nan")):
        with pytest.raises(ConfigError, match=r"sampler\.temperature"):
            dataclasses.replace(sampler, temperature=wrong)


def test_radii_follow_the_spread_and_hold_their_last_floor():
    radii = Radii("rad", 2.0, (0.3, 0.4))
    np.testing.assert_allclose(radii([0.4, 0.3, 0.0]), [1.0, 1.0, 0.8])
    np.testing.assert_allclose(radii([0.3], first_lead=2), [1.0])


@pytest.fixture
def run(world, tmp_path):
    """An export of the tiny world."""
    world.spec.write(tmp_path)
    save_tokenizer(world.tokenizer, tmp_path / "tokenizer")
    save_file(world.model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def calibration(run, spec, **changes) -> Calibration:
    found = Calibration(
        weights_sha256=sha256_of(run / "model.safetensors"),
        world=spec.digest,
        sampler=sampling_of(spec.sampler),
        noise_scale=NoiseScale(latents=(1.2, 1.1)),
        conformal={"arm": Conformal(0.9, 20, 8, {"proprio angle_0": Radii("rad", 1.5, (0.1, 0.2))}, 2.0)},
        fit={"context": 3},
    )
    return dataclasses.replace(found, **changes)


def test_it_is_applied_loudly_and_can_be_left_out(run, world, capsys):
    wanted = calibration(run, world.spec)
    wanted.write(run)
    loaded = load(run, "cpu")
    assert "calibrated by" in (said := capsys.readouterr().err)
    assert "x1.10 to x1.20" in said
    assert loaded.calibration == Calibration.read(str(run)) == wanted
    assert loaded.spec.sampler.noise_scale == wanted.noise_scale
    assert loaded.spec.digest == world.spec.digest
    plain = load(run, "cpu", calibrated=False)
    assert plain.calibration is None
    assert plain.spec == world.spec
    # What a world is does not hold what its noise was scaled by.
    loaded.spec.write(run)
    assert WorldSpec.read(run) == world.spec


@pytest.mark.parametrize(
    ("changes", "said"), [({"weights_sha256": "0" * 64}, "it is of weights"), ({"sampler": {}}, "sampler")]
)
def test_one_of_other_weights_is_left_out_loudly(run, world, capsys, changes, said):
    calibration(run, world.spec, **changes).write(run)
    loaded = load(run, "cpu")
    error = capsys.readouterr().err
    assert "NOT calibrated" in error
    assert said in error
    assert loaded.calibration is None
    assert loaded.spec == world.spec


def test_a_damaged_file_is_refused(run, world):
    path = calibration(run, world.spec).write(run)
    assert path.name == FILE_NAME
    content = json.loads(path.read_text())
    content["conformal"]["arm"]["coverage"] = 0.99
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="digest"):
        load(run, "cpu")
    path.write_text("{")
    with pytest.raises(CheckpointError):
        Calibration.read(run)


def test_unknown_quantities_are_named(run, world):
    found = calibration(run, world.spec)
    assert found.radii("arm", "proprio angle_0").multiplier == 1.5
    with pytest.raises(ConfigError, match="embodiment"):
        found.radii("leg", "latents")
    with pytest.raises(ConfigError, match="quantity"):
        found.radii("arm", "latents")
