"""Several ranks: DDP and DeepSpeed ZeRO do what one process does, and resume."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vidworld.errors import ConfigError
from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.loop import Loop
from vidworld.trainer.optim import OptimConfig
from vidworld.trainer.zero import deepspeed_config

pytestmark = pytest.mark.timeout(1200)  # several processes import torch, on cores that may be busy

WORKER = Path(__file__).with_name("worker.py")
TRAINING = Path(__file__).parents[2] / "training"


def torchrun(strategy: str, out: Path, *scenarios: str, ranks: int = 2) -> str:
    """Run the worker on gloo ranks; what it said on standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(WORKER), strategy, str(out), *scenarios],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def final(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """Weights of the checkpoint at the end of a run."""
    latest = (run / "checkpoints" / "latest").read_text().strip()
    assert latest == "step-00000010"
    return load_file(run / "checkpoints" / latest / f"{name}.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4)


@pytest.fixture
def alone(make_loop: Callable[..., Loop], tmp_path: Path) -> Path:
    """The run of one process that those of two must equal: twice the micro-batches, same order and noise."""
    loop = make_loop(
        tmp_path / "alone",
        optim=OptimConfig(name="adamw", lr=1e-2, warmup_steps=3),
        engine=EngineConfig(accumulation=4),
        ema_decay=0.99,
    )
    loop.fit()
    return tmp_path / "alone"


def check_runs(alone: Path, out: Path, said: str) -> None:
    """Ten steps, five and five, and a step that one rank alone would spoil."""
    assert "SIGTERM at step" in said or "another rank at step" in said
    whole, parts = out / "whole", out / "parts"
    for name in ("model", "ema"):
        assert_close(final(alone, name), final(whole, name))
        first, second = final(whole, name), final(parts, name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    # One rank got the signal in the fourth step (number 3); the ranks agree one step later.
    assert {"step-00000005", "step-00000010"} <= {
        path.name for path in (parts / "checkpoints").glob("step-*")
    }

    lines = (out / "poison" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert all(torch.isfinite(tensor).all() for tensor in final(out / "poison").values())
    for rank in range(2):
        digests = [line.split() for line in (out / "poison" / f"digests-{rank}.txt").read_text().splitlines()]
        untouched = [int(step) for step, before, after in digests if before == after]
        assert untouched == [4], "weights and moments of every rank, at the step of the bad gradient alone"


def test_ddp_on_two_ranks(alone: Path, tmp_path: Path) -> None:
    said = torchrun("ddp", tmp_path, "whole", "stop", "resume", "poison")
    check_runs(alone, tmp_path, said)


def test_gradients_in_bf16_are_close_and_equal_on_all_ranks(tmp_path: Path, start_ranks: Any) -> None:
    script = Path(__file__).with_name("reduce_ranks.py")
    start_ranks(2, tmp_path, str(tmp_path), script=script).finished()
    first, second = (torch.load(tmp_path / f"reduce-{rank}.pt") for rank in range(2))
    for reduce in ("fp32", "bf16"):
        assert all(map(torch.equal, first[reduce], second[reduce]))
    exact, rounded = (torch.cat([grad.flatten() for grad in first[reduce]]) for reduce in ("fp32", "bf16"))
    # Half a unit in the last of 8 bits a rounding: each rank's gradient, their sum, and its mean.
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 3 * 2**-9
    assert torch.equal(rounded, rounded.bfloat16().float()), "it did travel in bfloat16"
    assert not torch.equal(exact, exact.bfloat16().float())


def test_bf16_gradients_are_for_ddp() -> None:
    with pytest.raises(ConfigError, match="reduce"):
        EngineConfig(strategy="zero1", reduce="bf16")


def test_fsdp2_on_two_ranks(alone: Path, tmp_path: Path) -> None:
    said = torchrun("fsdp2", tmp_path, "whole", "stop", "resume", "poison")
    check_runs(alone, tmp_path, said)
    check_shards(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_on_two_ranks(alone: Path, tmp_path: Path, strategy: str) -> None:
    said = "".join(torchrun(strategy, tmp_path, name) for name in ("whole", "stop", "resume", "poison"))
    check_runs(alone, tmp_path, said)
    check_shards(tmp_path / "whole")


def check_shards(run: Path) -> None:
    """Every element of every moment is in one file, and each rank wrote some."""
    files = [load_file(path) for path in sorted(run.glob("checkpoints/*10/optimizer-*"))]
    assert len(files) == 2
    names = [set(file) for file in files]
    assert all(names)
    assert not names[0] & names[1], "nothing is stored twice"
    sizes: dict[str, int] = {}
    for key, tensor in itertools.chain.from_iterable(file.items() for file in files):
        name = key.partition("@")[0]
        sizes[name] = sizes.get(name, 0) + tensor.numel()
    weights = final(run)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {n: sizes[f"adamw/net.{n}/{moment}"] for n in weights} == {
            n: tensor.numel() for n, tensor in weights.items()
        }


def test_zero_refuses_muon(toy: Any) -> None:
    with pytest.raises(ConfigError, match=r"set optim\.name to adamw"):
        build_engine(toy.Task(), EngineConfig(strategy="zero1"), OptimConfig(name="muon"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_bf16_on_a_cpu_is_for_one_strategy(toy: Any, make_loop: Callable[..., Loop]) -> None:
    bf16 = EngineConfig(strategy="zero1", precision="bf16")
    with pytest.raises(ConfigError, match=r"engine\.precision"):
        build_engine(toy.Task(), bf16, OptimConfig())
    loop = make_loop(engine=EngineConfig(precision="bf16"), steps=2)
    loop.fit()
    assert all(tensor.dtype == torch.float32 for tensor in loop.task.net.state_dict().values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_launch_file_is_what_the_trainer_says(stage: int) -> None:
    shown = json.loads((TRAINING / f"deepspeed_zero{stage}.json").read_text())
    config = EngineConfig(strategy=f"zero{stage}")  # type: ignore[arg-type]
    assert shown == deepspeed_config(config, micro_batch_size=1, bf16=True) | {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
