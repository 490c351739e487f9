"""The fused kernels are chosen where they may be, and only after they agreed with the plain code.

Triton itself is not needed here: what `fuse` does is stood in for by a change of the blocks, right or wrong.
"""

import contextlib
import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vidworld.trainer.fusing as fusing
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import ConfigError
from vidworld.model.compile import compile_blocks
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape
from vidworld.model.normalizer import Normalizer
from vidworld.trainer.engine import EngineConfig
from vidworld.trainer.fusing import check_fused, choose_fused, disagreement, reason_against
from vidworld.trainer.tasks import WorldTask
from vidworld.trainer.train import train
from vidworld.trainer.warm_up import ClipShape, warm_up

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = FrameShape(views=1, channels=2, height=4, width=4, proprio_dims=3, action_dims=2)
CLIPS = ClipShape(rows=4, frames=4)
CONTRACT = ActionContract(
    "arm",
    10.0,
    (Dimension("x", "m", "position"), Dimension("y", "m", "position")),
    (Dimension("a", "rad", "position"), Dimension("b", "rad", "position"), Dimension("c", "rad", "position")),
    Statistics.of(np.linspace([-1, -1], [1, 1], 9)),
    Statistics.of(np.linspace([-1] * 3, [1] * 3, 9)),
)


def make_task(**settings):
    """As training makes it: every gate is zero."""
    torch.manual_seed(0)
    config = {"width": 32, "depth": 4, "num_heads": 2, "num_kv_heads": 1, "time_every": 2}
    model = CausalDiT(DiTConfig(**(config | settings)), SHAPE)
    return WorldTask(model, Normalizer([CONTRACT]), ObjectiveConfig())


def half():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for `fuse`: marks networks, and makes their MLPs wrong by a factor in the backward pass."""
    fused, factor = [], [1.0]

    def scaled(module, grads, _):
        return tuple(None if grad is None else factor[0] * grad for grad in grads)

    def fuse(net):
        fused.append(net)
        for block in net.blocks:
            block.mlp.register_full_backward_hook(scaled)
        return net

    monkeypatch.setattr(fusing, "fuse", fuse)
    monkeypatch.setattr(fusing, "reason_against", lambda device: None)
    return fused, factor


@pytest.mark.parametrize("time_every", [1, 2, 4])
def test_right_kernels_pass_and_wrong_ones_do_not(kernels, time_every):
    fused, factor = kernels
    task = make_task(time_every=time_every)
    assert check_fused(task, CLIPS, CPU, half, compiled=False) is None
    (probe,) = fused
    timed = [block.time is not None for block in probe.blocks]
    assert timed == {1: [True, True], 2: [False, True], 4: [False, False, True]}[time_every]
    factor[0] = 1.2
    fault = check_fused(task, CLIPS, CPU, half, compiled=False)
    assert fault is not None
    assert fault.startswith("the gradient of ")
    assert "is off by" in fault


def test_the_check_leaves_no_trace(kernels):
    task = make_task()
    before, blocks = copy.deepcopy(task.state_dict()), list(task.net.blocks)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert check_fused(task, CLIPS, CPU, half, compiled=False) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert list(task.net.blocks) == blocks
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert task.net not in kernels[0]
    assert not task.net.checkpoint_blocks


def test_the_graphs_of_the_check_are_those_of_training(monkeypatch):
    monkeypatch.setattr(fusing, "fuse", lambda net: net)
    made = {}
    for checked in (False, True):
        torch.compiler.reset()
        graphs = CompileCounter()
        monkeypatch.setattr(fusing, "compile_blocks", partial(compile_blocks, backend=graphs))
        task = make_task()
        compile_blocks(task.net, backend=graphs)
        if checked:
            assert check_fused(task, CLIPS, CPU, contextlib.nullcontext, compiled=True) is None
            assert graphs.frame_count == 4, "with gradient, and without on the rows of half steps"
        warm_up(task, [CLIPS], CPU, contextlib.nullcontext)
        made[checked] = graphs.frame_count
    torch.compiler.reset()
    assert made[True] == made[False] > 2


def test_what_a_compiler_throws_is_a_fault(kernels, monkeypatch):
    def explode(net):
        raise AssertionError("no such instruction\nin line 3")

    monkeypatch.setattr(fusing, "fuse", explode)
    assert check_fused(make_task(), CLIPS, CPU, half, compiled=False) == (
        "AssertionError: no such instruction in line 3"
    )


def test_a_missing_or_infinite_gradient_is_a_fault():
    one = {"a": torch.ones(3), "b": torch.zeros(3)}
    assert disagreement(one, one, one) is None
    assert disagreement({"a": torch.ones(3)}, one, one) == "no gradient of b"
    wrong = one | {"a": torch.full((3,), float("nan"))}
    assert disagreement(wrong, one, one) == "the gradient of a is off by nan, the plain code's by 0"
    rough = one | {"a": torch.full((3,), 1.1)}
    assert disagreement(rough, one | {"a": torch.full((3,), 1.05)}, one) is None, "as rough as the plain code"
    assert disagreement(rough, one, one) is not None


def choose(task, *, device=CUDA, world_size=1, **settings):
    """As on a GPU; the check itself runs where the task is."""
    config = EngineConfig(**({"compile": "on"} | settings))
    return choose_fused(task, config, CLIPS, device, contextlib.nullcontext, world_size=world_size)


def test_auto_takes_what_passed_its_check(kernels, monkeypatch):
    task = make_task()
    monkeypatch.setattr(fusing, "check_fused", lambda *_, **__: None)
    assert choose(task) == "fused kernels: on (gradients of some blocks checked against the plain code)"
    assert kernels[0] == [task.net]
    assert choose(task, world_size=2, fused="on").startswith("fused kernels: on")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"world_size": 2}, "one GPU only so far"),
        ({"strategy": "zero1"}, "strategy ddp"),
        ({"strategy": "fsdp2"}, "strategy ddp"),
        ({"sequence_parallel": 2}, "whole clips"),
        ({"compile": "off"}, "compiled blocks"),
        ({"fused": "off"}, "as configured"),
    ],
)
def test_auto_says_why_not(kernels, settings, says):
    line = choose(make_task(), **settings)
    assert line.startswith("fused kernels: off (")
    assert says in line
    assert not kernels[0]


def test_wrong_kernels_are_loudly_left_out_or_refused(kernels, monkeypatch):
    monkeypatch.setattr(fusing, "check_fused", lambda *_, **__: "the gradient of x is off by 2")
    task = make_task()
    line = choose(task)
    assert line.startswith("WARNING: fused kernels are off")
    assert "the gradient of x is off by 2" in line
    with pytest.raises(ConfigError, match=r"engine\.fused.*the gradient of x is off by 2"):
        choose(task, fused="on")
    assert not kernels[0]


def test_without_a_gpu_nothing_is_said_unless_asked():
    assert reason_against(CPU) == "they are for CUDA, this is cpu"
    task = make_task()
    assert choose(task, device=CPU) is None
    assert choose(task, device=CPU, fused="off") is None
    with pytest.raises(ConfigError, match=r"engine\.fused.*this is cpu"):
        choose(task, device=CPU, fused="on")


def test_without_triton_they_are_off(monkeypatch):
    monkeypatch.setattr(fusing, "find_spec", lambda name: None)
    line = choose(make_task())
    assert line == "WARNING: fused kernels are off, the plain code trains instead, more slowly; " + (
        "they need Triton, which is not installed"
    )


@pytest.mark.parametrize("settings", [{"strategy": "zero2"}, {"sequence_parallel": 2}])
def test_on_is_refused_where_it_is_unproven(settings):
    with pytest.raises(ConfigError, match=r"engine\.fused"):
        EngineConfig(fused="on", **settings)


def test_a_refused_start_leaves_no_run(latents, tokenizer_run, settings, tmp_path):
    training = settings.world(latents, tokenizer_run, engine={"fused": "on"})
    with pytest.raises(ConfigError, match=r"engine\.fused"):
        train(training, tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, to interpret its kernels")
def test_two_ranks_average_the_gradients_of_the_kernels(tmp_path, start_ranks, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = Path(__file__).with_name("fused_ranks.py")
    start_ranks(2, tmp_path, str(tmp_path), script=script).finished()
    first, second = (torch.load(tmp_path / f"fused-{rank}.pt") for rank in range(2))
    assert all(torch.equal(grad, second["fused"][name]) for name, grad in first["fused"].items())
    assert first["fused"].keys() == first["plain"].keys()
    for name, want in first["plain"].items():
        assert want.any()
        assert (first["fused"][name] - want).norm() < 2e-5 * want.norm(), name
    assert any(not torch.equal(grad, first["plain"][name]) for name, grad in first["fused"].items())
