"""A run whose members share a network: opened as one world or as all, calibrated, packed, measured."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vidworld
from vidworld import cli
from vidworld.data.convert import ConvertOptions, convert
from vidworld.errors import ConfigError
from vidworld.evaluation.calibrate import Prepared, _by_member
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.world.calibration import Calibration
from vidworld.world.ensemble import Ensemble
from vidworld.world.prompt import Prompt


def imagine(world, samples=2):
    prompt = Prompt(np.full((2, 32, 32, 3), 90, np.uint8))
    with torch.no_grad():
        state = world.reset(prompt, num_samples=samples)
        return world.rollout(state, np.zeros((3, 3), np.float32)).latents_BTVChw


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("planar") / "data"
    convert(
        PlanarSource(16, config=PlanarConfig(frames=12, size=32)),
        ConvertOptions(out=out, size="32x32", workers=1),
    )
    return out


def test_it_opens_as_its_first_member_or_as_an_ensemble(shared_run):
    first, pair, every = (vidworld.load(shared_run, "cpu", members=count) for count in (None, 2, "all"))
    assert not isinstance(first, Ensemble)
    assert first.spec.model.members == 0
    assert (pair.num_members, every.num_members) == (2, 3)
    futures = imagine(every)
    assert torch.equal(imagine(pair), futures[:4])
    assert torch.equal(imagine(first), futures[:2])
    assert not torch.equal(futures[2:4], futures[:2]), "members differ"
    assert torch.equal(imagine(vidworld.load(shared_run, "cpu", members=1)), futures[:2])


def test_more_members_than_there_are_are_refused(shared_run, untrained_run):
    for count in (0, 4):
        with pytest.raises(ConfigError, match=f"members in .*: got {count}, expected 1 to 3"):
            vidworld.load(shared_run, "cpu", members=count)
    with pytest.raises(ConfigError, match="expected 1 to 1"):
        vidworld.load(untrained_run, "cpu", members=2)


def test_the_command_line_takes_a_number_of_members(shared_run, planar_data, tmp_path, capsys):
    words = ["rollout", shared_run, "--data", planar_data, "--samples", 2, "--frames", 3, "--context", 2,
             "--uncertainty", "--device", "cpu"]  # fmt: skip
    for name, asked, found in (
        ("three", ("--members", "all"), 3),
        ("two", ("--members", "2"), 2),
        ("one", (), None),
    ):
        out = tmp_path / name
        assert cli.run([str(word) for word in (*words, "--out", out, *asked)]) == 0, capsys.readouterr().err
        assert json.loads((out / "rollout.json").read_text()).get("members") == found
        with np.load(out / "uncertainty.npz") as kept:
            assert any("unknown" in key for key in kept.files) == (found is not None)
    out = tmp_path / "report"
    words = ["eval", shared_run, planar_data, "--members", "3", "--samples", 8, "--frames", 3, "--context", 2,
             "--windows-per-episode", 1, "--clips", 0, "--calibration",
             "--out", out, "--device", "cpu"]  # fmt: skip
    assert cli.run([str(word) for word in words]) == 0, capsys.readouterr().err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["world"]["members"] == 3
    assert "calibration" in metrics
    words[4] = "4"
    assert cli.run([str(word) for word in words[:-4] + ["--out", tmp_path / "no", "--device", "cpu"]]) == 2
    assert "got 4, expected 1 to 3" in capsys.readouterr().err


def test_members_are_calibrated_together(shared_run, data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(shared_run, run)
    words = ["calibrate", run, data, "--split", "train", "--context", 3, "--frames", 4, "--samples", 8,
             "--rounds", 2, "--coverage", 0.5, "--device", "cpu"]  # fmt: skip
    assert cli.run([str(word) for word in words]) == 0, capsys.readouterr().err
    found = Calibration.read(run)
    assert list(found.conformal) == ["planar_arm"]
    for count in (None, "all"):
        world = vidworld.load(run, "cpu", members=count)
        assert world.calibration == found
        assert world.spec.sampler.noise_scale == found.noise_scale
    assert isinstance(world, Ensemble)
    assert [member.spec.sampler.noise_scale for member in world.members] == [found.noise_scale] * 3
    # It travels with the packed members, and with one of them alone.
    for name, asked in (("all", ()), ("one", ("--member", "1"))):
        out = tmp_path / name
        assert cli.run(["export", str(run), "--out", str(out), "--precision", "int8", *asked]) == 0
        assert vidworld.load(out, "cpu").calibration is not None
    assert "NOT calibrated" not in capsys.readouterr().err


def test_each_member_imagines_a_share_of_the_windows(shared_run):
    ensemble = vidworld.load(shared_run, "cpu", members="all")
    some = [Prepared(ensemble, number, torch.zeros(1), np.zeros(1)) for number in range(7)]  # type: ignore[arg-type]
    found = _by_member(some)
    assert [one.recorded for one in found] == [0, 3, 6, 1, 4, 2, 5]
    assert len({id(one.world) for one in found}) == 3
    assert torch.equal(imagine(found[3].world), imagine(ensemble.members[1]))
    alone = vidworld.load(shared_run, "cpu")
    assert [one.world for one in _by_member([Prepared(alone, 0, torch.zeros(1), np.zeros(1))] * 2)] == [
        alone
    ] * 2  # type: ignore[arg-type]


def test_it_is_packed_whole_or_as_one_member(shared_run, tmp_path, capsys):
    every = vidworld.load(shared_run, "cpu", members="all")

    def pack(name, *asked):
        out = tmp_path / name
        code = cli.run(["export", str(shared_run), "--out", str(out), *asked])
        return code, out

    code, whole = pack("whole")
    assert code == 0, capsys.readouterr().err
    assert torch.equal(imagine(vidworld.load(whole, "cpu", members="all")), imagine(every))
    assert "members=3)" in (whole / "README.md").read_text()
    code, second = pack("second", "--member", "1")
    assert code == 0, capsys.readouterr().err
    alone = vidworld.load(second, "cpu")
    assert alone.spec.model.members == 0
    assert torch.equal(imagine(alone), imagine(every.members[1]))
    assert not any("JrI" in name for name in load_file(second / "model.safetensors"))
    code, small = pack("small", "--precision", "int8")
    assert code == 0
    stored = load_file(small / "model.safetensors")
    changes = {name: stored[name] for name in stored if name.endswith(("in_JrI", "out_JOr"))}
    assert {one.dtype for one in changes.values() if one[0].numel() >= 256} == {torch.int8}
    futures = imagine(every)
    near = (imagine(vidworld.load(small, "cpu", members="all")) - futures).abs().mean()
    assert near < 0.25 * (futures[:2] - futures[2:4]).abs().mean(), "less than what tells members apart"
    for asked in ("3", "-1"):
        assert pack("no", "--member", asked)[0] == 2
        assert "expected 0 to 2" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_world_without_members_has_none_to_pack(untrained_run, tmp_path, capsys):
    assert cli.run(["export", str(untrained_run), "--out", str(tmp_path / "no"), "--member", "0"]) == 2
    assert "an ensemble, to have members" in capsys.readouterr().err
