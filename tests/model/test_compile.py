from dataclasses import replace

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from vidworld.model import attention
from vidworld.model.compile import compile_blocks
from vidworld.model.inputs import FrameShape, Streams
from vidworld.model.two_stream import ingest, target_predictor

SHAPE = FrameShape(
    views=2,
    channels=3,
    height=4,
    width=6,
    proprio_dims=5,
    action_dims=4,
    actions_per_frame=2,
    num_embodiments=2,
    embodiment_action_dims=(4, 2),
    embodiment_proprio_dims=(3, 5),
)
TWO_ROBOTS = replace(SHAPE, embodiment_views=(1, 2), embodiment_heights=(4, 2), embodiment_widths=(4, 6))


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(model, make_clip, time=5, rows=slice(None)):
    context, targets = make_clip(time=time, seed=1), make_clip(time=time, seed=2)[rows]
    predict = target_predictor(model, context.frames, context.level, context.conditioning)
    return predict(targets.frames, targets.level, targets.step_BT, rows=rows)


def test_a_shape_costs_two_graphs_whatever_the_depth(make_model, make_clip, difference):
    """Whole graphs (a break would raise), shared by blocks of a kind, none on repetition, same answers."""
    model, graphs = make_model(depth=6), CompileCounter()
    names, expected = list(model.state_dict()), trained(model, make_clip)
    compile_blocks(model, backend=graphs)
    for _ in range(3):
        assert difference(trained(model, make_clip), expected) == 0
    assert graphs.frame_count == 2
    assert list(model.state_dict()) == names


def test_more_shapes_than_torch_allows_by_default(make_model, make_clip):
    model, graphs = make_model(depth=2), CompileCounter()
    with torch._dynamo.config.patch(recompile_limit=2):
        compile_blocks(model, backend=graphs)
        for time in (2, 3):
            trained(model, make_clip, time)
    assert graphs.frame_count == 4
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(FailOnRecompileLimitHit):
        trained(model, make_clip, 4)


def test_caches_trace_too_and_rollouts_can_stay_eager(make_model, make_clip, difference):
    model, clip, graphs = make_model(), make_clip(time=4), CompileCounter()
    cache = ingest(model, clip.frames, clip.level, clip.conditioning)
    expected, _ = model(*clip.parts(), streams=Streams(4), cache=cache)
    compile_blocks(model, backend=graphs)
    with torch.compiler.set_stance("force_eager"):
        assert difference(model(*clip.parts(), streams=Streams(4), cache=cache)[0], expected) == 0
    assert graphs.frame_count == 0
    got, longer = model(*clip.parts(), streams=Streams(4), cache=cache, commit=True)
    assert difference(got, expected) == 0
    assert longer.num_frames == 8
    assert graphs.frame_count == 2


def test_flex_traces_into_the_blocks(make_model, make_clip, difference, monkeypatch):
    """Its dense form, which needs no compiler; kernels are tested on a GPU."""
    expected = trained(make_model(), make_clip)
    monkeypatch.setattr(attention, "probe", lambda *_: None)
    model = compile_blocks(make_model(attention="flex"), backend="eager")
    with torch.no_grad():
        assert difference(trained(model, make_clip), expected) < 1e-11


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "shape"), [("sdpa", SHAPE), ("flex", SHAPE), ("xformers", SHAPE), ("sdpa", TWO_ROBOTS)]
)
def test_compiled_training_on_cuda(make_model, make_clip, backend, shape):
    """bf16 autocast, forward and backward, close to the same model in float64 on the CPU."""
    reason = attention.probe(backend, "cuda", torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")

    def loss_and_gradient(model, context, targets):
        actions = context.conditioning.actions_BTkA.requires_grad_()
        predict = target_predictor(model, context.frames, context.level, context.conditioning)
        predicted = predict(targets.frames, targets.level, targets.step_BT)
        loss = predicted.latents_BTVChw.square().mean() + predicted.proprio_BTS.square().mean()
        loss.backward()
        return loss.item(), actions.grad.cpu().double()

    context, targets = make_clip(shape=shape, seed=1), make_clip(shape=shape, seed=2)
    on_gpu = [clip.to(torch.float32, "cuda") for clip in (context, targets)]
    model = compile_blocks(make_model(shape, attention=backend).float().cuda().requires_grad_(True))
    with torch.autocast("cuda", torch.bfloat16):
        loss, gradient = loss_and_gradient(model, *on_gpu)
    expected_loss, expected_gradient = loss_and_gradient(make_model(shape), context, targets)
    assert loss == pytest.approx(expected_loss, rel=0.05)
    assert torch.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0) > 0.98
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
