"""`vidworld export`: opens again with the same numbers, and refuses what is damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vidworld
from vidworld import cli
from vidworld.data.shards import ShardDataset
from vidworld.errors import CheckpointError
from vidworld.files import sha256_of
from vidworld.world.calibration import Calibration, sampling_of
from vidworld.world.load import find
from vidworld.world.noise_scale import NoiseScale
from vidworld.world.prompt import Prompt


def imagine(path):
    world = vidworld.load(path, "cpu")
    prompt = Prompt(np.full((2, 32, 32, 3), 90, np.uint8))
    with torch.no_grad():
        return world.rollout(world.reset(prompt), np.zeros((4, 3), np.float32)).latents_BTVChw


@pytest.fixture
def export(untrained_run, tmp_path):
    def run(*arguments):
        return cli.run(["export", str(untrained_run), "--out", str(tmp_path / "out"), *arguments])

    return run


def test_a_calibration_goes_along_and_holds_for_the_packed_weights(untrained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(untrained_run, run)
    world = vidworld.load(run, "cpu")
    plain = imagine(run)
    Calibration(
        weights_sha256=sha256_of(find(run).weights),
        world=world.spec.digest,
        sampler=sampling_of(world.spec.sampler),
        noise_scale=NoiseScale(latents=(1.5, 0.7)),
    ).write(run)
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert cli.run(["export", str(run), "--out", str(out), "--precision", precision]) == 0
        opened = vidworld.load(out, "cpu")
        assert opened.calibration is not None
        assert opened.calibration.world == opened.spec.digest
        assert opened.spec.sampler.noise_scale == NoiseScale(latents=(1.5, 0.7))
    assert torch.equal(imagine(tmp_path / "fp32"), imagine(run))
    assert not torch.equal(imagine(run), plain), "it does something"
    assert "NOT calibrated" not in capsys.readouterr().err


def test_fp32_repeats_the_run_exactly(export, untrained_run, tmp_path, capsys):
    assert export() == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "manifest.json", "model.safetensors", "tokenizer", "world.json",
    ]  # fmt: skip
    assert torch.equal(imagine(out), imagine(untrained_run))
    assert "vidworld.load" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "planar_arm" in card
    assert "| action | shoulder_velocity | rad/s | velocity |" in card


def test_bf16_is_half_the_size_and_close(export, untrained_run, tmp_path):
    assert export() == 0
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    exact = imagine(tmp_path / "out")
    assert export("--precision", "bf16", "--overwrite") == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.6 * size
    rounded = imagine(tmp_path / "out")
    relative = float((rounded - exact).norm() / exact.norm())
    assert 0 < relative < 0.05


def test_an_export_of_an_export_is_the_same(export, tmp_path):
    assert export() == 0
    assert cli.run(["export", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]


def test_the_card_s_example_runs(export, tmp_path, capsys):
    assert export() == 0
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("path/to/this/folder", str(tmp_path / "out")), {})
    assert "torch.Size([4, 1, 32, 32, 3])" in capsys.readouterr().out


def test_damage_is_found(export, tmp_path):
    assert export() == 0
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="weights are damaged"):
        vidworld.load(tmp_path / "out", "cpu")


def test_a_run_is_never_overwritten(untrained_run, tmp_path, capsys):
    before = json.loads((untrained_run / "world.json").read_text())
    assert cli.run(["export", str(untrained_run), "--out", str(untrained_run), "--overwrite"]) == 2
    assert json.loads((untrained_run / "world.json").read_text()) == before
    assert cli.run(["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_int8_is_a_quarter_of_the_size_and_close(export, untrained_run, tmp_path):
    assert export() == 0
    exact, whole = imagine(tmp_path / "out"), vidworld.load(tmp_path / "out", "cpu")
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert export("--precision", "int8", "--overwrite") == 0
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors")) < 0.45 * size
    shipped = vidworld.load(tmp_path / "out", "cpu")
    assert shipped.tokenizer.digest != whole.tokenizer.digest
    assert shipped.spec.tokenizer_digest == shipped.tokenizer.digest
    relative = float((imagine(tmp_path / "out") - exact).norm() / exact.norm())
    assert 0 < relative < 0.1
    picture = torch.randint(0, 256, (1, 1, 1, 32, 32, 3), dtype=torch.uint8)
    apart = shipped.encode(picture) - whole.encode(picture)
    assert 0 < float(apart.norm() / whole.encode(picture).norm()) < 0.05


def test_prompts_go_along_and_begin_a_rollout(export, planar_data, tmp_path, capsys):
    assert export("--prompts", str(planar_data)) == 0
    asked = ["--frames", "2", "--samples", "1"]
    assert cli.run(["rollout", str(tmp_path / "out"), *asked, "--out", str(tmp_path / "rolled")]) == 0
    first = ShardDataset.open(planar_data).manifest.samples("val")[0].key
    assert json.loads((tmp_path / "rolled" / "rollout.json").read_text())["prompt"]["key"] == first
    other = ShardDataset.open(planar_data).manifest.samples("train")[0].key
    named = ["--prompt", other, "--out", str(tmp_path / "named")]
    assert cli.run(["rollout", str(tmp_path / "out"), *asked, *named]) == 0
    assert cli.run(["export", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "prompts" / "manifest.json").is_file()
    assert "prompts/" in (tmp_path / "again" / "README.md").read_text()
    capsys.readouterr()
    assert export("--prompts", str(tmp_path / "none"), "--overwrite") == 2
    assert "none" in capsys.readouterr().err


def test_without_prompts_a_rollout_asks_for_one(export, tmp_path, capsys):
    assert export() == 0
    assert cli.run(["rollout", str(tmp_path / "out"), "--out", str(tmp_path / "rolled")]) == 2
    assert "--prompt" in capsys.readouterr().err


@pytest.fixture
def second_run(untrained_run, tmp_path):
    """The same world as if it had been trained with another seed."""
    run = tmp_path / "second"
    shutil.copytree(untrained_run, run)
    (weights,) = run.glob("checkpoints/*/ema.safetensors")
    moved = {name: tensor + 0.1 * tensor.roll(1) for name, tensor in load_file(weights).items()}
    save_file(moved, weights)
    return run


def test_an_ensemble_goes_into_one_folder_with_one_tokenizer(untrained_run, second_run, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(untrained_run), str(second_run), "--out", str(out)]
    assert cli.run(arguments) == 0, capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "ensemble.json", "manifest.json", "member-0", "member-1", "tokenizer",
    ]  # fmt: skip
    assert not (out / "member-0" / "tokenizer").exists()
    assert torch.equal(imagine(out), imagine([untrained_run, second_run]))
    assert torch.equal(imagine(out)[:1], imagine(untrained_run))
    assert torch.equal(imagine(out / "member-1"), imagine(second_run))
    assert "2 members of" in (out / "README.md").read_text()
    # Again, from the packed one; and only an ensemble may be written over.
    assert cli.run(["export", str(out), "--out", str(tmp_path / "again")]) == 0
    assert torch.equal(imagine(tmp_path / "again"), imagine(out))
    assert cli.run([*arguments, "--overwrite"]) == 0
    assert cli.run(["export", str(untrained_run), "--out", str(out), "--overwrite"]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err
    damaged = out / "member-1" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    with pytest.raises(CheckpointError, match=r"weights are damaged in .*member-1"):
        vidworld.load(out, "cpu")


def test_strangers_are_not_packed_together(untrained_run, second_run, tmp_path, capsys):
    spec = json.loads((second_run / "world.json").read_text())
    spec["spec"]["fps"] = 20.0
    (second_run / "world.json").write_text(json.dumps(spec))
    assert cli.run(["export", str(untrained_run), str(second_run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "`fps` of a member in" in error
    assert str(second_run) in error
    assert not (tmp_path / "out").exists()
