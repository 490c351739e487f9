"""A run goes on with other ranks and another strategy: the same samples in order, the same state."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vidworld.errors import CheckpointError
from vidworld.trainer.checkpoint import CheckpointStore, Saved, verify
from vidworld.trainer.engine import EngineConfig
from vidworld.trainer.loop import Loop
from vidworld.trainer.optim import OptimConfig

ADAMW = OptimConfig(name="adamw", lr=1e-2, warmup_steps=3)
PARTS = 4


def whole_state(saved: Saved) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from whatever pieces it is in."""
    shapes = {name: tensor.shape for name, tensor in saved.tensors("model").items()}
    found = {f"{kind}/{n}": t for kind in ("model", "ema") for n, t in saved.tensors(kind).items()}
    stored = saved.pieces("optimizer")
    for name in stored.names:
        _, parameter, moment = name.split("/")
        shape = () if moment == "step" else shapes[parameter.removeprefix("net.")]
        found[name] = stored.whole(name, shape)
    return found


def assert_same_checkpoint(one: Saved, other: Saved) -> None:
    a, b = whole_state(one), whole_state(other)
    assert a.keys() == b.keys()
    assert any(name.endswith("exp_avg_sq") for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for key in ("step", "elapsed_s", "ema", "order", "micro_batches"):
        assert one.state[key] == other.state[key], key


def check_run(run: Path, alone: Loop, steps: dict[int, int]) -> None:
    """steps: step at which ranks changed -> number of ranks from there on."""
    lines = [line.split() for path in run.glob("read-*.txt") for line in path.read_text().splitlines()]
    read = sorted((int(step), int(ids[0].removeprefix("clip").split("-")[0])) for step, *ids in lines)
    assert read == [(index // PARTS, index) for index in range(10 * PARTS)], "every clip once, in order"

    store = CheckpointStore(run / "checkpoints")
    for step in steps:
        before, after = (verify(store.directory / f"step-{step:08d}{again}") for again in ("", "-2"))
        assert_same_checkpoint(before, after)
        assert before.state["world_size"] != after.state["world_size"]
        assert after.state["world_size"] == steps[step]
    last = store.newest()
    assert last is not None
    for kind, module in (("model", alone.task.net), ("ema", alone.ema.module.net)):
        for name, tensor in last.tensors(kind).items():
            torch.testing.assert_close(tensor, module.state_dict()[name], atol=2e-5, rtol=1e-4)
    assert last.state["ema"] == alone.ema.state()


@pytest.fixture
def alone(make_loop: Callable[..., Loop], tmp_path: Path) -> Loop:
    loop = make_loop(tmp_path / "alone", optim=ADAMW, engine=EngineConfig(accumulation=PARTS), ema_decay=0.99)
    loop.fit()
    return loop


def test_one_rank_then_two_sharded_then_one(alone: Loop, tmp_path: Path, start_ranks: Any) -> None:
    """DDP's moments cut by FSDP2 and put together again."""
    for ranks, strategy, until in ((1, "ddp", 3), (2, "fsdp2", 6), (1, "ddp", 10)):
        start_ranks(ranks, tmp_path / f"until{until}", strategy, str(tmp_path), f"until{until}").finished()
    check_run(tmp_path / "elastic", alone, steps=cuts(tmp_path / "elastic"))
    pieces = [set(load_file(p)) for p in sorted((tmp_path / "elastic").glob("checkpoints/*-2/optimizer-1*"))]
    assert any("@" in key for keys in pieces for key in keys), "it was sharded in between"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_one_two_four_one(alone: Loop, tmp_path: Path, start_ranks: Any, strategy: str) -> None:
    for ranks, until in ((1, 3), (2, 5), (4, 7), (1, 10)):
        start_ranks(ranks, tmp_path / f"until{until}", strategy, str(tmp_path), f"until{until}").finished()
    changes = cuts(tmp_path / "elastic")
    assert list(changes.values()) == [2, 4, 1]
    check_run(tmp_path / "elastic", alone, changes)


@pytest.mark.slow
def test_every_strategy_goes_on_from_every_other(alone: Loop, tmp_path: Path, start_ranks: Any) -> None:
    for number, strategy in enumerate(("zero3", "ddp", "zero2", "fsdp2", "zero1", "zero3")):
        ranks, until = 1 + number % 2, (2, 4, 5, 6, 8, 10)[number]
        start_ranks(ranks, tmp_path / f"until{until}", strategy, str(tmp_path), f"until{until}").finished()
    check_run(tmp_path / "elastic", alone, cuts(tmp_path / "elastic"))


def cuts(run: Path) -> dict[int, int]:
    """Step -> ranks of what was saved again at once after a change of ranks."""
    states = [json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/*-2/state.json"))]
    return {state["step"]: state["world_size"] for state in states}


def test_other_micro_batches_are_told(
    make_loop: Callable[..., Loop], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = make_loop(optim=ADAMW, engine=EngineConfig(accumulation=2), steps=2)
    loop.fit()
    make_loop(optim=ADAMW, engine=EngineConfig(accumulation=4), steps=4)
    assert "a step was 2 micro-batches over all ranks and is 4 now" in capsys.readouterr().out
    make_loop(optim=ADAMW, engine=EngineConfig(accumulation=2), steps=4)
    assert "micro-batches" not in capsys.readouterr().out


def test_a_missing_shard_is_named(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    """A checkpoint whose manifest is right but which lacks a part of a moment resumes nowhere."""
    from safetensors.torch import save_file

    from vidworld.trainer.pieces import StoredPieces

    save_file({"adamw/net.0.weight/exp_avg@0:50": torch.zeros(50)}, tmp_path / "a.safetensors")
    save_file({"adamw/net.0.weight/exp_avg@60:96": torch.ones(36)}, tmp_path / "b.safetensors")
    stored = StoredPieces([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "here")
    assert stored.read("adamw/net.0.weight/exp_avg", 62, 90).tolist() == [1.0] * 28
    with pytest.raises(CheckpointError, match=r"exp_avg is not all there in here: got elements up to 50"):
        stored.read("adamw/net.0.weight/exp_avg", 40, 70)


def test_any_range_of_a_moment_can_be_read(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(optim=ADAMW, steps=3)
    loop.fit()
    saved = loop.store.newest()
    assert saved is not None
    tensors = saved.tensors("optimizer-0")
    stored = saved.pieces("optimizer")
    for name, tensor in tensors.items():
        assert torch.equal(stored.whole(name, tensor.shape), tensor)
        flat = tensor.reshape(-1)
        if tensor.ndim:
            assert torch.equal(stored.read(name, 1, len(flat) - 1), flat[1:-1])
