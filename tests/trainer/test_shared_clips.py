"""Two ranks that share every clip train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vidworld.cli import run as run_command
from vidworld.config import to_yaml
from vidworld.trainer.train import train

TRAIN = Path(__file__).parents[2] / "training" / "train.py"


def weights(run: Path) -> dict[str, torch.Tensor]:
    latest = (run / "checkpoints" / "latest").read_text().strip()
    return load_file(run / "checkpoints" / latest / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_that_share_clips_train_what_one_trains(
    latents: Path, tokenizer_run: Path, settings: SimpleNamespace, tmp_path: Path
) -> None:
    objective = {"bootstrap_start": 0.3, "resample_fraction": 0.5, "resample_start": 0.5}
    alone = settings.world(latents, tokenizer_run, objective=objective)
    train(alone, tmp_path / "alone", progress_bar=False)
    config = tmp_path / "shared.yaml"
    engine = {"sequence_parallel": 2, "checkpoint_activations": True}
    config.write_text(to_yaml(settings.world(latents, tokenizer_run, objective=objective, engine=engine)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(TRAIN), str(config), "--out", str(tmp_path / "shared")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, got = weights(tmp_path / "alone"), weights(tmp_path / "shared")
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, atol=2e-5, rtol=1e-4)


def test_a_tokenizer_has_no_frames_to_share(tmp_path: Path, planar: Path, settings, capsys) -> None:
    config = tmp_path / "tokenizer.yaml"
    config.write_text(to_yaml(settings.tokenizer(planar, engine={"checkpoint_activations": True})))
    assert run_command(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "engine.checkpoint_activations: got True, expected false" in capsys.readouterr().err
