"""`vidworld inspect`: counts, contracts and quarantine, as text and as JSON; damage is the user's error."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vidworld.cli import run
from vidworld.contract import ActionContract
from vidworld.data.inspect import describe
from vidworld.data.manifest import Manifest, Quarantined


@pytest.fixture
def rich_dir(dataset_dir: Path) -> Path:
    """The fixture dataset with a quarantined episode, a note and dimensions that never change."""
    manifest = Manifest.read(dataset_dir)
    contract = manifest.contracts[0]

    def constant(statistics, index):
        def fixed(row):
            return (*row[:index], 0.5, *row[index + 1 :])

        names = ("minimum", "maximum", "mean", "std", "q01", "q99")
        return dataclasses.replace(statistics, **{name: fixed(getattr(statistics, name)) for name in names})

    contract = dataclasses.replace(
        contract,
        note="measured velocities",
        action_statistics=constant(contract.action_statistics, 1),
        proprio_statistics=constant(contract.proprio_statistics, 2),
    )
    dataclasses.replace(
        manifest,
        contracts=(contract,),
        quarantined=(Quarantined("9", "NaN in action 'vx' at step 3"),),
        created_by="vidworld test",
    ).write(dataset_dir)
    return dataset_dir


def test_json_says_everything(rich_dir, capsys):
    assert run(["inspect", str(rich_dir), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["episodes"], said["frames"], said["duration_s"]) == (3, 96, 9.6)
    assert (said["views"], said["fps"], said["width"], said["height"]) == (["top"], 10.0, 48, 32)
    assert said["splits"] == {
        "train": {"episodes": 2, "frames": 65},
        "val": {"episodes": 1, "frames": 31},
    }
    assert said["quarantined"] == [{"episode_id": "9", "reason": "NaN in action 'vx' at step 3"}]
    assert [shard["file"] for shard in said["shards"]] == ["shards/train-000000.tar", "shards/val-000000.tar"]
    for shard in said["shards"]:
        assert shard["bytes"] == (rich_dir / shard["file"]).stat().st_size
    assert said["bytes"] == sum(shard["bytes"] for shard in said["shards"])
    manifest = Manifest.read(rich_dir)
    assert (said["kind"], said["digest"], said["verified"]) == ("video", manifest.digest, False)
    (embodiment,) = said["embodiments"]
    assert (embodiment["embodiment"], embodiment["episodes"], embodiment["frames"]) == ("toy", 3, 96)
    assert ActionContract.from_mapping(embodiment["contract"]) == manifest.contracts[0]
    assert embodiment["constant_actions"] == ["vy"]
    assert embodiment["constant_proprio"] == ["z"]


def test_text_says_what_matters(rich_dir, capsys):
    assert run(["inspect", str(rich_dir), "--verify"]) == 0
    said = capsys.readouterr().out
    for fact in (
        "toy: video, 48x32 at 10 fps, views top",
        "3 episodes, 96 frames (0 min 10 s)",
        "in 2 shards, checksums hold",
        "embodiment toy: 3 episodes, 10 Hz",
        "note: measured velocities",
        "quarantined 1:",
        "9: NaN in action 'vx' at step 3",
    ):
        assert fact in said
    assert "action dimensions that never change in embodiment 'toy': got 'vy' = 0.5" in said
    assert "suspicious: 3 (only the manifest was read)" in said
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert lines["vy"].endswith("constant")
    assert "m/s" in lines["vx"]
    assert not lines["vx"].endswith("constant")


def test_latents(latents_dir, capsys):
    assert run(["inspect", str(latents_dir)]) == 0
    assert "tokenizer: digest 0000000000000000, channels 4, spatial_stride 8" in capsys.readouterr().out
    assert describe(Manifest.read(latents_dir))["tokenizer"]["channels"] == 4


def test_verify_names_every_damaged_shard(dataset_dir, capsys):
    for path in (dataset_dir / "shards").iterdir():
        content = bytearray(path.read_bytes())
        content[3000] ^= 1
        path.write_bytes(content)
    assert run(["inspect", str(dataset_dir)]) == 0  # sizes still hold
    capsys.readouterr()
    assert run(["inspect", str(dataset_dir), "--verify"]) == 2
    said = capsys.readouterr().err
    assert "2 of 2 shards" in said
    assert "shards/train-000000.tar is damaged" in said
    assert "shards/val-000000.tar is damaged" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("missing", ["manifest.json", "shards/val-000000.tar"])
def test_missing_files(dataset_dir, capsys, missing):
    (dataset_dir / missing).unlink()
    assert run(["inspect", str(dataset_dir), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert missing in captured.err
    assert captured.err.count("\n") == 1


def test_needs_neither_torch_nor_webdataset(dataset_dir):
    """Inspecting is instant, and works where only the core is installed."""
    script = (
        "import sys; from vidworld.cli import run; code = run(['inspect', sys.argv[1]]);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'webdataset')))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(dataset_dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
