"""Ranks that share clips compute what one process computes, gradients included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.model.sequence import sequence_groups, token_counts

WORKER = Path(__file__).with_name("sequence_worker.py")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_clips_are_one_process(ranks, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(ranks):
        results = torch.load(tmp_path / f"rank-{rank}.pt")
        assert "multiple of engine.sequence_parallel" in results.pop("refused")
        assert results.pop("negative_control") > 1e-3, "one rank's gradient is not the whole"
        assert max(results.values()) < 1e-11, results


def test_tokens_that_do_not_divide():
    assert token_counts(17, 4) == [5, 4, 4, 4]


def test_one_process_cannot_be_cut():
    with pytest.raises(ConfigError, match="got 2, expected a divisor of the number of ranks = 1"):
        sequence_groups(2)
