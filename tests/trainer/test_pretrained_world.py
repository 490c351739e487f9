"""A tiny Wan of the real class from end to end: shards, latents, training, export, rollout, evaluation."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import vidworld
from vidworld.cli import run
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.manifest import Manifest
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.tokenizers.pretrained import PretrainedTokenizer
from vidworld.world.prompt import Prompt

SIZE, K = 32, 4
SETTINGS: dict[str, Any] = {
    "kind": "world",
    "model": {
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "num_registers": 1,
        "time_every": 2,
    },
    "loader": {"clip_frames": 9, "clip_stride": K, "batch_size": 4, "workers": 0},
    "loop": {"steps": 3, "save_every": 3, "log_every": 1},
    "look": {
        "validate_every": 3,
        "sample_every": 3,
        "validate_batches": 1,
        "validate_clips": 2,
        "horizon": 8,
    },
    "engine": {"compile": "off"},
    "wandb": "off",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos` and `vae`: read only."""
    import diffusers

    root = tmp_path_factory.mktemp("pretrained")
    source = PlanarSource(6, config=PlanarConfig(frames=22, size=SIZE))
    convert(source, ConvertOptions(out=root / "videos", size=f"{SIZE}x{SIZE}", workers=1))
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[0.1] * 4,
    )
    vae.save_pretrained(root / "pipeline" / "vae")
    return root


def config(root: Path, out: Path, **changes: Any) -> Path:
    path = out / "world.yaml"
    settings = SETTINGS | {"data": str(root / "videos"), "tokenizer": str(root / "pipeline")} | changes
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, from video and a pipeline's folder."""
    out = tmp_path_factory.mktemp("run")
    assert run(["train", str(config(root, out)), "--out", str(out / "run")]) == 0
    return out / "run"


pytestmark = pytest.mark.filterwarnings("ignore:latent channels have", "ignore:validation reads training")


@torch.no_grad()
def test_the_run_is_a_simulator(root: Path, trained: Path) -> None:
    assert [path.name for path in (trained / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert json.loads((trained / "tokenizer" / "tokenizer.json").read_text())["class"] == "AutoencoderKLWan"
    assert list((trained / "samples").glob("*.mp4"))
    latents = Manifest.read(trained / "latents")
    assert {sample.frames for sample in latents.samples()} == {21}
    world = vidworld.load(trained, "cpu")
    assert isinstance(world.tokenizer, PretrainedTokenizer)
    assert (world.spec.frames_per_step, world.spec.sampler.window) == (K, 3)
    dims = len(world.spec.contracts[0].action)
    frames = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    state = world.reset(Prompt(frames), num_samples=2)
    actions = np.zeros((3 * K, dims), np.float32)
    rollout = world.rollout(state, actions, allow_out_of_range=True)
    assert rollout.video_BTVHWC is not None
    assert rollout.video_BTVHWC.shape == (2, 3 * K, 1, SIZE, SIZE, 3)
    for start in range(0, 3 * K, K):
        state, seen = world.step(state, actions[start : start + K], allow_out_of_range=True)
        assert seen.clip_BkVHWC is not None
        assert torch.equal(seen.clip_BkVHWC, rollout.video_BTVHWC[:, start : start + K])


def test_a_run_goes_on(root: Path, trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    assert run(["train", str(copy), "--resume", "--loop.steps", "5"]) == 0
    assert (copy / "checkpoints" / "latest").read_text().strip().endswith("5")


def test_rollout_and_eval(root: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    videos = str(root / "videos")
    key = Manifest.read(root / "videos").samples("val")[0].key
    arguments = ["rollout", str(trained), "--prompt", key, "--data", videos, "--samples", "2"]
    assert run([*arguments, "--out", str(tmp_path / "rollout"), "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "rollout" / "rollout.json").read_text())
    assert (record["prompt"]["context"], record["frames"]) == (5, 16)  # of 17 that were recorded after it
    saved = np.load(tmp_path / "rollout" / "proprio.npz")
    assert saved["predicted_NTS"].shape[:2] == (2, 4)
    assert saved["recorded_TS"].shape[0] == 4
    assert run([*arguments, "--out", str(tmp_path / "odd"), "--frames", "6"]) == 2
    assert "number of actions: got 6, expected a multiple of 4" in capsys.readouterr().err
    arguments = ["eval", str(trained), videos, "--device", "cpu", "--samples", "2"]
    assert run([*arguments, "--out", str(tmp_path / "odd"), "--windows-per-episode", "1"]) == 2
    assert "pass --context 5 --frames 16" in capsys.readouterr().err
    arguments += ["--context", "5", "--frames", "8", "--windows-per-episode", "1"]
    assert run([*arguments, "--out", str(tmp_path / "eval")]) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["world"]["tokenizer_digest"] == vidworld.load(trained, "cpu").tokenizer.digest


def test_exports_refer_to_the_weights_or_bring_them(root: Path, trained: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(root / "pipeline", tmp_path / "elsewhere"))
    moved = Path(shutil.copytree(trained, tmp_path / "run"))
    description = moved / "tokenizer" / "tokenizer.json"
    content = json.loads(description.read_text()) | {"path": str(elsewhere / "vae")}
    description.write_text(json.dumps(content))
    light, full = tmp_path / "light", tmp_path / "full"
    assert run(["export", str(moved), "--out", str(light)]) == 0
    assert run(["export", str(moved), "--out", str(full), "--with-tokenizer"]) == 0
    shutil.rmtree(elsewhere)
    assert vidworld.load(full, "cpu").spec.digest == vidworld.load(trained, "cpu").spec.digest
    with pytest.raises(vidworld.errors.CheckpointError, match=r"the pretrained autoencoder is gone"):
        vidworld.load(light, "cpu")


def test_clips_that_cut_latents_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    loader = SETTINGS["loader"] | {"clip_frames": 8}
    path = config(root, tmp_path, loader=loader)
    assert run(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert (
        "got 8, expected 1 more than a multiple of the tokenizer's time stride 4" in capsys.readouterr().err
    )


def test_unknown_statistics_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import diffusers

    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16,) * 5,  # type: ignore[arg-type]
        layers_per_block=1,
        scaling_factor=1.0,
    )
    vae.save_pretrained(tmp_path / "vae")
    path = config(root, tmp_path, tokenizer=str(tmp_path / "vae"))
    assert run(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "does not say how its latents are spread" in capsys.readouterr().err
