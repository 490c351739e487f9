"""The main job end to end, small: logs to shards to tokenizer to world model to rollouts to a report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vidworld
from vidworld import cli, demo, media
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.shards import ShardDataset
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.tokenizers.store import save_tokenizer
from vidworld.trainer.config import WorldTraining, absolute, read_training
from vidworld.world import shipped
from vidworld.world.build import build
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.world import WorldModel

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl


@pytest.fixture
def commands(monkeypatch):
    """The commands that the demo asks for, which are not run."""
    asked: list[list[str]] = []
    monkeypatch.setattr(demo, "run_command", asked.append)
    return asked


def test_the_lab_makes_the_data_where_it_can_draw(tmp_path, monkeypatch, commands):
    monkeypatch.setattr(demo, "_no_lab", lambda: None)
    made = demo._dataset(demo.DemoOptions(out=tmp_path, episodes=7))
    assert made == tmp_path / "data"
    assert [words[0] for words in commands] == ["lab", "inspect"]
    assert {"--episodes", "7", "one"} <= set(commands[0])


def test_without_opengl_the_episodes_that_come_along_serve(tmp_path, monkeypatch, commands, capsys):
    monkeypatch.setattr("vidworld.lab.gl.available", list)
    gl.offscreen.cache_clear()
    assert demo._dataset(demo.DemoOptions(out=tmp_path)) == demo.SAMPLE
    assert [words[0] for words in commands] == ["inspect"]
    printed = capsys.readouterr().out
    assert gl.INSTALL in printed
    assert str(demo.SAMPLE) in printed


def test_your_own_shards_are_taken_as_they_are(commands):
    assert demo._dataset(demo.DemoOptions(data=demo.SAMPLE)) == demo.SAMPLE
    assert commands == []


@pytest.fixture
def shipped_world(tmp_path, monkeypatch):
    """A world of the lab under the name that the demo looks for."""
    manifest = ShardDataset.open(demo.SAMPLE).manifest
    torch.manual_seed(0)
    config = ConvTokenizerConfig(widths=(16, 16, 16), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1))
    tokenizer = ConvTokenizer(config)
    spec = WorldSpec(
        DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2, noise_dims=4),
        FrameShape.from_contracts(manifest.contracts, views=1, channels=16, height=8, width=8),
        manifest.views, 64, 64, manifest.fps, manifest.contracts, SamplerConfig(steps=1, window=8),
        tokenizer.digest,
    )  # fmt: skip
    folder = tmp_path / "weights" / "lab"
    folder.mkdir(parents=True)
    spec.write(folder)
    save_tokenizer(tokenizer, folder / "tokenizer")
    save_file(build(spec, tokenizer).model.state_dict(), folder / "model.safetensors")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    monkeypatch.setattr(demo, "_no_lab", lambda: None)
    return folder


def test_a_world_that_comes_along_is_tuned_and_shown_before_and_after(shipped_world, tmp_path, monkeypatch):
    out, asked = tmp_path / "demo", []

    def run(words):
        """What the commands would leave behind."""
        asked.append(words)
        folder = Path(words[words.index("--out") + 1]) if "--out" in words else out
        if words[0] == "lab":
            shutil.copytree(demo.SAMPLE, folder)
        elif words[0] == "rollout":
            folder.mkdir()
            media.write_mp4(folder / "sample-000.mp4", np.zeros((20, 64, 64, 3), np.uint8), 12.5)
        elif words[0] == "eval":
            folder.mkdir()
            value = 20.0 if "before" in folder.name else 23.0
            summary = {"psnr.f16": value, "psnr_copy.f16": 18.0, "psnr_gain.f8": 1.0, "shuffle_ratio": 2.0}
            (folder / "metrics.json").write_text(json.dumps({"summary": summary}))

    monkeypatch.setattr(demo, "run_command", run)
    demo.main(["--out", str(out), "--tune", "--tune-minutes", "0.5"], "vidworld demo")
    commands = ["rollout", "lab", "train", "rollout", "eval", "rollout", "eval"]
    assert [words[0] for words in asked] == commands
    assert [words[1] for words in asked if words[0] == "eval"] == ["lab", str(out / "world")]
    before, after = (words for words in asked if words[0] == "eval")
    assert before[2:-1] == after[2:-1]  # the same windows
    training = read_training(out / "world.yaml")
    assert isinstance(training, WorldTraining)
    assert training.objective.kind == "regression"
    assert training.sampler.steps == 1
    assert training.model.width == 32
    resolved = absolute(training)
    assert isinstance(resolved, WorldTraining)
    assert resolved.init == shipped_world
    record = json.loads((out / "demo.json").read_text())
    assert (record["before"]["psnr.f16"], record["after"]["psnr.f16"]) == (20.0, 23.0)
    assert media.read_image(out / "before_after.png").shape[2] == 3
    asked.clear()
    demo.main(["--out", str(tmp_path / "other")], "vidworld demo")
    assert [words[0] for words in asked][:3] == ["rollout", "lab", "inspect"]


def test_tuning_is_refused_where_it_cannot_be(shipped_world, tmp_path, capsys, monkeypatch):
    def refused(*words):
        assert cli.run(["demo", "--out", str(tmp_path / "demo"), "--tune", *words, "--overwrite"]) == 2
        return capsys.readouterr().err

    assert "--data too" in refused("--data", str(demo.SAMPLE))
    monkeypatch.setattr(demo, "_no_lab", lambda: "no headless OpenGL")
    assert "no headless OpenGL" in refused()
    (shipped_world / "world.json").unlink()
    assert "no world in this copy" in refused()


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_no_lab", lambda: "no headless OpenGL")
    out = tmp_path / "demo"
    small = ["--tokenizer-minutes", "0.1", "--world-minutes", "0.2", "--frames", "8"]
    assert cli.run(["demo", "--out", str(out), *small]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ vidworld") == 6 + shipped.is_here("lab")
    assert "report.html" in printed
    record = json.loads((out / "demo.json").read_text())
    assert record["state"] == "done"
    assert "psnr_gain.f8" in record["summary"]
    for made in ("rollout/grid.mp4", "rollout/strip.png", "sweep/grid.mp4", "report/report.html"):
        assert (out / made).stat().st_size > 1000
    assert isinstance(vidworld.load(out / "world"), WorldModel)
    assert cli.run(["demo", "--out", str(out), *small]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("frames", "val", "says"),
    [
        (12, 1, "got 1, the longest of 12 frames, expected one of 4 + 24 frames; pass --frames 8"),
        (30, 0, "got 0, the longest of 0 frames, expected one of 4 + 24 frames; give more"),
    ],
)
def test_data_that_cannot_be_shown_are_refused_before_training(tmp_path, capsys, frames, val, says):
    source = PlanarSource(3, config=PlanarConfig(frames=frames, size=32))
    held_out = tuple(source.episode_ids()[:val])
    options = ConvertOptions(
        out=tmp_path / "data", size="32x32", workers=1, val_episodes=held_out, val_fraction=0.0
    )
    convert(source, options)
    assert cli.run(["demo", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "demo")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "demo" / "tokenizer").exists()


def test_demo_never_empties_a_directory_that_it_did_not_make(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.run(["demo", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "which no demo made" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
