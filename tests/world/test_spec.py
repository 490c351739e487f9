"""world.json comes back as it was, and a damaged or altered one is refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from vidworld.config import to_mapping
from vidworld.errors import CheckpointError, ConfigError, ContractError
from vidworld.world.build import narrow
from vidworld.world.spec import SamplerConfig, WorldSpec


def test_a_spec_survives_its_file(world, tmp_path):
    path = world.spec.write(tmp_path)
    assert path.name == "world.json"
    again = WorldSpec.read(tmp_path)
    assert again == world.spec
    assert again.digest == world.spec.digest
    assert [found.name for found in tmp_path.iterdir()] == ["world.json"]


def test_the_digest_tells_worlds_apart_and_ignores_the_sampler(world):
    spec = world.spec
    assert dataclasses.replace(spec, sampler=SamplerConfig(steps=1)).digest == spec.digest
    assert dataclasses.replace(spec, fps=20.0).digest != spec.digest


def edited(change):
    def apply(content):
        change(content)
        return json.dumps(content)

    return apply


def rename(content):
    content["spec"]["contracts"][0]["action"][0]["name"] = "other"


def rescale(content):
    content["spec"]["contracts"][0]["action_statistics"]["q99"][0] = 99.0


DAMAGE = {
    "cut short": (lambda content: json.dumps(content)[:100], "damaged JSON"),
    "not an object": (lambda content: "[]", "damaged JSON"),
    "other version": (edited(lambda c: c.update(schema_version=9)), "schema version.*got 9"),
    "unknown setting": (edited(lambda c: c["spec"]["model"].update(widht=3)), "did you mean 'model.width'"),
    "wrong type": (edited(lambda c: c["spec"].update(fps="ten")), "'fps'"),
    "lost part": (edited(lambda c: c["spec"].pop("shape")), "'shape'"),
    "renamed dimension": (edited(rename), "'arm' was altered"),
    "rescaled dimension": (edited(rescale), "'arm' was altered"),
    "no hashes": (edited(lambda c: c.update(contract_digests={})), "hashes of the action contracts"),
    "views": (edited(lambda c: c["spec"].update(views=["a", "b"])), "views of the world"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused(world, tmp_path, damage, message):
    path = world.spec.write(tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match=message):
        WorldSpec.read(tmp_path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced in a JSON value; two entries of every list."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def test_any_value_may_be_wrong(world, tmp_path):
    """A world or CheckpointError, never anything else."""
    path = world.spec.write(tmp_path)
    whole = path.read_text()
    refused = 0
    swaps = (None, -1, 1e308, "x", [[]], {"a": {}})
    for number, place in enumerate(places(json.loads(whole))[1:]):
        for swap in swaps[number % 3 :: 3]:
            content = inner = json.loads(whole)
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = swap
            path.write_text(json.dumps(content))
            try:
                WorldSpec.read(tmp_path)
            except CheckpointError:
                refused += 1
    assert refused > 50


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"world\.json"):
        WorldSpec.read(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"context_noise": 1.0}, {"window": 1}, {"window": 4, "sink": 3}, {"guidance": -1.0}],
)
def test_samplers_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"sampler\."):
        SamplerConfig(**wrong)


def test_a_world_trained_for_one_step_refuses_more():
    own = SamplerConfig(steps=1, one_step=True)
    assert own.changed(steps=1, temperature=0.0).temperature == 0
    for wrong in ({"steps": 4}, {"method": "heun"}):
        with pytest.raises(ConfigError, match=r"trained for one: got steps \d, method \w+, expected steps 1"):
            dataclasses.replace(own, **wrong)
    with pytest.raises(ConfigError, match="leave --steps"):
        own.changed(steps=2)
    assert SamplerConfig(steps=1).changed(steps=4).steps == 4


def test_embodiments_are_found_by_name(world):
    assert world.spec.embodiment_index(None) == world.spec.embodiment_index("arm") == 0
    with pytest.raises(ContractError, match="got 'leg', expected one of 'arm'"):
        world.spec.embodiment_index("leg")


def test_worlds_of_robots_that_see_alike_are_hashed_as_before(world) -> None:
    """States and resumed runs know a world by its hash: new fields at their defaults are not in it."""
    written = to_mapping(world.spec)
    assert "layouts" not in written
    assert not {"embodiment_views", "embodiment_heights", "embodiment_widths"} & written["shape"].keys()


def test_one_robots_world_imagines_what_the_whole_one_does(new_world, contract, prompt) -> None:
    whole = new_world(contracts=(contract("arm", 3, 4), contract("gripper", 2, 5))).double()
    own = narrow(whole, ["gripper"])
    assert own.spec.contracts == whole.spec.contracts[1:]
    assert (own.spec.shape.action_dims, own.spec.shape.proprio_dims) == (2, 5)
    given = prompt(whole, proprio=np.zeros((3, 5)), actions=np.zeros((2, 2)), embodiment="gripper")
    with torch.no_grad():
        a, b = (one.rollout(one.reset(given, 2), np.full((3, 2), 0.3)) for one in (whole, own))
    torch.testing.assert_close(a.latents_BTVChw, b.latents_BTVChw, rtol=0, atol=1e-10)
    torch.testing.assert_close(a.proprio_BTS[..., :5], b.proprio_BTS, rtol=0, atol=1e-10)
    with pytest.raises(ContractError, match="embodiment"):
        narrow(whole, ["hand"])
