"""Keeping only a block's inputs changes nothing but memory."""

import pytest
import torch

from vidworld.model.compile import compile_blocks
from vidworld.model.inputs import Streams
from vidworld.model.two_stream import target_predictor


def gradients(model, make_clip, dtype=torch.float64, autocast=False):
    """Gradients of all parameters, and bytes kept for the backward pass, each storage counted once."""
    context, targets = (make_clip(seed=seed).to(dtype) for seed in (1, 2))
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    predict = target_predictor(model, context.frames, context.level, context.conditioning)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            predicted = predict(targets.frames, targets.level, targets.step_BT)
        loss = predicted.latents_BTVChw.square().mean() + predicted.proprio_BTS.square().mean()
        forward = sum(size for size, _ in kept.values())
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], forward


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.float32, True)])
def test_gradients_are_equal_bit_by_bit(make_model, make_clip, dtype, autocast, compiled):
    def run(checkpointed):
        torch.compiler.reset()
        model = make_model(depth=6).to(dtype).requires_grad_(True)
        model.checkpoint_blocks = checkpointed
        if compiled:
            compile_blocks(model, backend="aot_eager")
        return gradients(model, make_clip, dtype, autocast)

    (expected, whole), (got, small) = run(False), run(True)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    if not compiled:  # a compiled block's own tensors pass these hooks too, but counted differently
        assert small < 0.5 * whole
    torch.compiler.reset()


def test_nothing_is_kept_without_gradient(make_model, make_clip, difference):
    model, clip = make_model(), make_clip(time=1)
    expected, _ = model(*clip.parts(), streams=Streams(1))
    model.checkpoint_blocks = True
    got, cache = model(*clip.parts(), streams=Streams(1), commit=True)
    assert difference(got, expected) == 0
    assert cache.num_frames == 1


def test_a_half_precision_residual_stream_is_close_and_smaller(make_model, make_clip):
    def run(residual):
        model = make_model(depth=6, residual=residual).float().requires_grad_(True)
        return gradients(model, make_clip, torch.float32, autocast=True)

    (expected, whole), (got, small) = run("float32"), run("autocast")
    flat = [torch.cat([grad.flatten() for grad in grads]) for grads in (got, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99
    assert not torch.equal(*flat)
    assert small < whole
    model = make_model(residual="autocast")
    same = gradients(model.requires_grad_(True), make_clip)[0]
    reference = gradients(make_model().requires_grad_(True), make_clip)[0]
    assert all(torch.equal(a, b) for a, b in zip(same, reference, strict=True)), "without autocast: the same"
