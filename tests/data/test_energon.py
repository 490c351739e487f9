"""Megatron-Energon takes our shards as they are: `energon prepare` counts what the manifest counts."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from vidworld.cli import run
from vidworld.data.manifest import SPLITS, Manifest
from vidworld.data.shards import ShardDataset

ENERGON = shutil.which("energon")
pytestmark = pytest.mark.skipif(ENERGON is None, reason='needs: pip install "vidworld[energon]"')


@pytest.mark.parametrize("kind", ["video", "latents"])
def test_energon_prepares_our_shards(dataset_dir: Path, latents_dir: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "d"
    source = dataset_dir if kind == "video" else latents_dir
    assert run(["edit", "reshard", str(source), "--episodes-per-shard", "1", "--out", str(out)]) == 0
    manifest = Manifest.read(out)
    parts = []
    for split in SPLITS:
        last = sum(shard.split == split for shard in manifest.shards) - 1
        parts += ["--split-parts", f"{split}:shards/{split}-{{000000..{last:06d}}}.tar"]
    assert ENERGON is not None
    command = [ENERGON, "prepare", str(out), "--non-interactive", "--sample-type", "CrudeWebdataset", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((out / ".nv-meta/.info.json").read_text())["shard_counts"]
    assert counts == {shard.file: len(shard.samples) for shard in manifest.shards}
    named = manifest.views[0] + (".mp4" if kind == "video" else ".latents.npy")
    assert named in done.stdout
    ShardDataset.open(out).verify_all()  # what energon adds beside the shards disturbs nothing
