"""Every graph of a run is made before its first step, and nothing breaks them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import vidworld.model.compile as compile_module
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.loader import LoaderConfig
from vidworld.diffusion.objective import EnergyConfig, ObjectiveConfig
from vidworld.model.compile import compile_blocks
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape
from vidworld.model.normalizer import Normalizer
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.trainer.feed import clip_kinds
from vidworld.trainer.loop import Loop
from vidworld.trainer.optim import OptimConfig, build_optimizers
from vidworld.trainer.tasks import Moment, TokenizerTask, WorldTask
from vidworld.trainer.train import train
from vidworld.trainer.warm_up import (
    ClipShape,
    clip_shapes,
    prepare_kernels,
    synthetic_batch,
    warm_up,
    warm_up_tokenizer,
)
from vidworld.types import Layout

CONTRACT = ActionContract(
    "arm",
    10.0,
    (Dimension("x", "m", "position"), Dimension("y", "m", "position")),
    (Dimension("a", "rad", "position"), Dimension("b", "rad", "position"), Dimension("c", "rad", "position")),
    Statistics.of(np.linspace([-1, -1], [1, 1], 9)),
    Statistics.of(np.linspace([-1] * 3, [1] * 3, 9)),
)
CPU = torch.device("cpu")
SHAPE = FrameShape(views=1, channels=2, height=4, width=4, proprio_dims=3, action_dims=2)
SMALL = DiTConfig(width=16, depth=4, num_heads=2, num_kv_heads=1, time_every=2, num_registers=1)


def make_task(compiled=True, **objective):
    torch.manual_seed(0)
    config = ObjectiveConfig(**objective)
    model = CausalDiT(DiTConfig(**{**vars(SMALL), "noise_dims": 3}), SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    task = WorldTask(model, Normalizer([CONTRACT]), config)
    graphs = CompileCounter()
    if compiled:
        compile_blocks(model, backend=graphs)
    return task, graphs


def no_autocast():
    return torch.autocast("cpu", enabled=False)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def steps(task, shapes, count, first=0):
    """Optimizer steps on alternating clip lengths, with a bootstrap in the later ones."""
    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    optimizers = build_optimizers(named, OptimConfig(name="muon"), task.matrices())
    generator = torch.Generator().manual_seed(1)
    for step in range(first, first + count):
        batch = synthetic_batch(task, shapes[step % len(shapes)], CPU)
        task(batch, generator, Moment(step / 20, step))["loss"].backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("imagined", "expected"), [(0.25, 2 + 2 + 1), pytest.param(0.5, 2 + 3 + 2, marks=pytest.mark.slow)]
)
def test_no_graph_is_made_after_the_warm_up_and_none_breaks(imagined, expected):
    task, graphs = make_task(motion_weight=1.0, resample_fraction=imagined, resample_start=0.7)
    shapes = clip_shapes(
        [LoaderConfig(clip_frames=4, batch_size=6), LoaderConfig(clip_frames=8, batch_size=3)], 1
    )
    assert shapes == [ClipShape(6, 4), ClipShape(3, 8)]
    warm_up(task, shapes, CPU, no_autocast)
    made = graphs.frame_count
    # Two kinds of block; with gradient on both lengths. Without, half steps on 1 or 2 rows of 6, on 1 of 3;
    # as many rows imagine a history in the same graphs, and half of the rows are 3 of 6 and 1 or 2 of 3.
    assert made == 2 * expected
    steps(task, shapes, 20)
    assert graphs.frame_count == made
    assert not counters["graph_break"]
    steps(task, [ClipShape(6, 5)], 1, first=19)
    assert graphs.frame_count > made, "negative control: another length is another graph"


@pytest.mark.slow
def test_without_a_warm_up_the_bootstrap_compiles_in_the_middle_of_a_run():
    task, graphs = make_task()
    shapes = [ClipShape(6, 4)]
    steps(task, shapes, 4)
    made = graphs.frame_count
    steps(task, shapes, 2, first=4)
    assert graphs.frame_count > made


def test_it_leaves_no_trace():
    task, _ = make_task(compiled=False)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fired = []
    for parameter in task.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    warm_up(task, [ClipShape(4, 4)], CPU, no_autocast)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert not fired, "hooks of DDP and DeepSpeed hang there"


def test_energy_scores_have_one_shape():
    task, graphs = make_task(kind="energy", energy=EnergyConfig(samples=2))
    warm_up(task, [ClipShape(3, 4)], CPU, no_autocast)
    assert graphs.frame_count == 2


@pytest.mark.slow
def test_energy_scores_imagine_with_one_stream_of_targets():
    task, graphs = make_task(kind="energy", resample_fraction=1.0)
    warm_up(task, [ClipShape(3, 4)], CPU, no_autocast)
    made = graphs.frame_count
    assert made == 2 * 2, "two streams of targets in the loss, one to imagine with"
    steps(task, [ClipShape(3, 4)], 20)
    assert graphs.frame_count == made


def test_the_line_says_what_was_chosen():
    task, _ = make_task(compiled=False)
    kinds = clip_kinds(LoaderConfig(clip_frames=4, batch_size=6), 12, 0.5, 1)
    line = prepare_kernels(task, clip_shapes(list(kinds.values()), 1), CPU, no_autocast, False)
    assert line == (
        "attention along 8 frames: sdpa (its kernel reads a mask on cpu); "
        "attention along 24 frames: sdpa (its kernel reads a mask on cpu)"
    )


def test_a_tokenizer_is_compiled_before_its_first_step():
    layout = Layout(("scene",), 16, 16, 10.0)
    config = ConvTokenizerConfig(
        widths=(16, 16, 16), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0), norm_groups=16
    )
    task = TokenizerTask(ConvTokenizer(config), (layout,))
    graphs = CompileCounter()
    task.net.encoder.compile(backend=graphs)
    task.net.decoder.compile(backend=graphs)
    before = [parameter.clone() for parameter in task.parameters()]
    warm_up_tokenizer(task, ClipShape(rows=2, frames=3), layout, CPU, no_autocast)
    made = graphs.frame_count
    assert made == 2
    assert all(map(torch.equal, before, task.parameters()))
    assert all(parameter.grad is None for parameter in task.parameters())
    rng = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 3, 1, 3, 16, 16), dtype=torch.uint8, generator=rng)
    batch = synthetic_batch(make_task(compiled=False)[0], ClipShape(2, 3), CPU)
    batch = replace(batch, latents_BTVChw=None, video_BTVCHW=video)
    task(batch, rng, Moment())["loss"].backward()
    assert graphs.frame_count == made, "a real batch needs no other graph"


@pytest.mark.parametrize("warmed", [True, False])
def test_a_real_run_makes_its_graphs_before_its_first_step(
    warmed, latents, tokenizer_run, settings, tmp_path, monkeypatch
):
    """Through loader, engine, Muon, averages, looks and checkpoints, from the first step past the bootstrap.

    Without the warm-up, the negative control, the bootstrap and the imagined histories compile on their way.
    """
    graphs, made, breaks = CompileCounter(), [], []
    plain = compile_module.compile_blocks
    monkeypatch.setattr(compile_module, "compile_blocks", lambda model: plain(model, backend=graphs))
    if not warmed:
        monkeypatch.setattr("vidworld.trainer.warm_up.warm_up", lambda *_: 0.0)
    step = Loop.step

    def counted(self, micro_batches):
        made.append(graphs.frame_count)
        breaks.append(sum(counters["graph_break"].values()))
        step(self, micro_batches)

    monkeypatch.setattr(Loop, "step", counted)
    training = settings.world(
        latents,
        tokenizer_run,
        engine={"compile": "on"},
        objective={"resample_fraction": 0.3, "resample_start": 0.3, "bootstrap_start": 0.2},
        optim={"name": "muon"},
        loop={"steps": 12, "log_every": 4, "save_every": 6},
        look={"validate_every": 5, "sample_every": 0, "validate_batches": 1, "horizon": 2},
    )
    train(training, tmp_path / "run", progress_bar=False)
    assert len(made) == 12
    if warmed:
        assert made[0] > 0
        assert graphs.frame_count == made[0], "not one after the warm-up, at the end neither"
        assert breaks == breaks[:1] * 12
    else:
        assert graphs.frame_count > made[4] > made[0] == 0
