"""Runs and exports open; what is missing, damaged or of another architecture is refused."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import vidworld
from vidworld.errors import CheckpointError, ConfigError
from vidworld.tokenizers.store import save_tokenizer
from vidworld.world.build import build


def write(world, directory, weights):
    world.spec.write(directory)
    save_tokenizer(world.tokenizer, directory / "tokenizer")
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(world.model.state_dict(), weights)
    return directory


@pytest.fixture
def exported(world, tmp_path):
    return write(world, tmp_path, tmp_path / "model.safetensors")


@pytest.fixture
def run(world, tmp_path):
    write(world, tmp_path, tmp_path / "checkpoints" / "step-00000007" / "ema.safetensors")
    (tmp_path / "checkpoints" / "latest").write_text("step-00000007\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["exported", "run"])
def test_a_loaded_world_is_the_same_world(world, prompt, actions, kind, request):
    loaded = vidworld.load(request.getfixturevalue(kind), device="cpu")
    assert loaded.spec == world.spec
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    results = [
        one.rollout(one.reset(prompt(world)), actions(world, 3)).video_BTVHWC for one in (world, loaded)
    ]
    assert torch.equal(*results)


def test_averaged_weights_are_preferred(run):
    ema = run / "checkpoints" / "step-00000007" / "ema.safetensors"
    weights = load_file(ema)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, ema.with_name("model.safetensors"))
    name = "blocks.0.mlp.down.weight"
    assert torch.equal(vidworld.load(run, "cpu").model.state_dict()[name], weights[name])
    ema.unlink()
    assert torch.equal(vidworld.load(run, "cpu").model.state_dict()[name], weights[name] + 1)


def test_low_precision_weights_are_held_in_float32(exported):
    path = exported / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    world = vidworld.load(exported, "cpu")
    assert world.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in world.model.parameters())


def no_latest(run):
    (run / "checkpoints" / "latest").unlink()


def dangling(run):
    (run / "checkpoints" / "latest").write_text("step-00000009\n")


def outside(run):
    (run / "checkpoints" / "latest").write_text("../..\n")


def no_world(run):
    (run / "world.json").unlink()


def no_tokenizer(run):
    (run / "tokenizer" / "tokenizer.json").unlink()


def weights_of(run):
    return run / "checkpoints" / "step-00000007" / "ema.safetensors"


def truncated(run):
    weights_of(run).write_bytes(weights_of(run).read_bytes()[:1000])


def renamed_and_reshaped(run):
    weights = load_file(weights_of(run))
    weights["extra"] = torch.zeros(1)
    weights["blocks.0.mlp.down.weight"] = torch.zeros(3)
    del weights["blocks.1.mlp.down.weight"]
    save_file(weights, weights_of(run))


def not_finite(run):
    weights = load_file(weights_of(run))
    weights["blocks.0.mlp.down.weight"][0, 0] = torch.nan
    save_file(weights, weights_of(run))


def flipped_bit(run):
    path = weights_of(run)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": "0" * 64}}
    (path.parent / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


FAULTS = {
    no_latest: "no finished checkpoint.*train on",
    dangling: "'step-00000009' has no weights",
    outside: "name of the latest checkpoint",
    no_world: "no world.json",
    no_tokenizer: "no tokenizer.json",
    truncated: "cannot read the weights",
    renamed_and_reshaped: r"1 missing \(blocks.1.mlp.down.weight\); 1 unknown \(extra\); 1 of another shape",
    not_finite: "not finite.*blocks.0.mlp.down.weight",
    flipped_bit: "weights are damaged",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=[fault.__name__ for fault in FAULTS])
def test_faults_are_refused(run, fault, message):
    fault(run)
    with pytest.raises(CheckpointError, match=message):
        vidworld.load(run, device="cpu")


def test_no_folder_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="got no such folder"):
        vidworld.load(tmp_path / "none")


def test_devices_that_are_not_here(tmp_path):
    for device, says in (("gpu0", "got gpu0, expected cpu, cuda or cuda:N"), ("cuda:99", "got cuda:99")):
        with pytest.raises(ConfigError, match=says):
            vidworld.load(tmp_path / "none", device)


def test_another_tokenizer_is_refused(world):
    wrong = {
        "digest": dataclasses.replace(world.spec, tokenizer_digest="0123"),
        "latent height": dataclasses.replace(world.spec, height=64),
        "latent channels": dataclasses.replace(
            world.spec, shape=dataclasses.replace(world.spec.shape, channels=8)
        ),
    }
    for name, spec in wrong.items():
        with pytest.raises(CheckpointError, match=f"{name} of the tokenizer"):
            build(spec, world.tokenizer)
