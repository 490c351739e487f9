import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidworld.errors import ConfigError
from vidworld.model import attention, rectangles
from vidworld.model.attention import attend, choose_attention, dense_mask, probe, reference
from vidworld.model.compile import compile_blocks
from vidworld.model.inputs import FrameCausal, Streams
from vidworld.model.rectangles import StreamSizes, cover, fault_of, kernel_for, rectangle_attention
from vidworld.model.two_stream import target_predictor

CPU = torch.device("cpu")
PATTERNS = {
    "causal": Streams(9),
    "two_streams": Streams(5, targets=2),
    "with_past": Streams(3, targets=1, past=4),
    "one_frame": Streams(1, targets=2, past=3),
    "frame_causal": FrameCausal(Streams(5), 3),
    "frame_causal_streams": FrameCausal(Streams(6, targets=1, past=2), 4),
}


def inputs(pattern, dtype=torch.float64, batch=2, heads=4, kv_heads=2, dims=16, device=CPU):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, pattern.num_queries, dims, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, pattern.num_keys, dims, device=device, dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in (q, k, v))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 17), st.integers(0, 3), st.integers(0, 5), st.integers(1, 3))
def test_pieces_cover_what_is_visible_exactly_once(context, targets, past, tokens):
    pattern = FrameCausal(Streams(context, targets, past), tokens)
    counts = torch.zeros(pattern.num_queries, pattern.num_keys, dtype=torch.int64)
    for number, piece in enumerate(cover(pattern.sizes)):
        square = torch.ones(piece.num_queries, piece.num_keys, dtype=torch.int64)
        rows = []
        for query, key in zip(piece.query_starts, piece.key_starts, strict=True):
            part = square.tril() if piece.causal else square
            counts[query : query + piece.num_queries, key : key + piece.num_keys] += part
            rows += range(query, query + piece.num_queries)
        assert len(set(rows)) == len(rows), "a query twice in one piece"
        if number == 0:
            assert rows == list(range(pattern.num_queries))
    assert torch.equal(counts, dense_mask(pattern, CPU).long())


def test_many_frames_cost_few_kernels():
    """All streams share the halvings of the context: log2 of the frames and one."""
    assert len(cover(StreamSizes(16, 1, 0, 256))) == 1 + 4
    assert len(cover(StreamSizes(16, 3, 0, 1))) == 2


def check_parity(pattern, dtype, tolerance, device=CPU):
    q, k, v = inputs(pattern, dtype, device=device)
    expected = reference(q, k, v, dense_mask(pattern, device))
    weight = torch.randn(expected.shape, dtype=torch.float64, device=device)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    got = attend(q, k, v, pattern, "rectangles")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad((got.double() * weight).sum(), (q, k, v))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("kernel", ["cpu", "math"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_parity_with_the_definition(kernel, pattern, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(rectangles, "kernel_for", lambda *_: kernel)
    check_parity(pattern, dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "math"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_parity_on_cuda(kernel, pattern, monkeypatch):
    fault = None if kernel == "math" else fault_of(kernel, "cuda", torch.bfloat16, 16)
    if fault is not None:
        pytest.skip(f"{kernel}: {fault}")
    monkeypatch.setattr(rectangles, "kernel_for", lambda *_: kernel)
    check_parity(pattern, torch.bfloat16, 0.03, torch.device("cuda"))


def test_the_merge_matters():
    """Negative control: the pieces without their log-sum-exps are another answer."""
    pattern = PATTERNS["two_streams"]
    q, k, v = inputs(pattern)
    own = reference(q, k, v, torch.eye(pattern.num_queries, dtype=torch.bool))
    assert (own - attend(q, k, v, pattern, "rectangles").double()).abs().max() > 0.1


@pytest.mark.slow
def test_torch_accepts_the_operator():
    q, k, v = inputs(PATTERNS["frame_causal_streams"], torch.float32)
    sizes = list(PATTERNS["frame_causal_streams"].sizes)
    torch.library.opcheck(torch.ops.vidworld.rectangle_attention, (q, k, v, sizes))


def test_scores_of_any_size_stay_finite():
    pattern = PATTERNS["with_past"]
    q, k, v = inputs(pattern, torch.float32)
    out = rectangle_attention(300 * q, 300 * k, v, pattern.sizes)
    torch.testing.assert_close(
        out.double(), reference(300 * q, 300 * k, v, dense_mask(pattern, CPU)), atol=1e-3, rtol=1e-3
    )
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_model_is_the_same_function(make_model, make_clip, difference):
    """Training streams, eager and compiled whole; a rollout's cache too."""

    def predicted(model):
        context, targets = make_clip(seed=1), make_clip(seed=2)
        predict = target_predictor(model, context.frames, context.level, context.conditioning)
        return predict(targets.frames, targets.level, targets.step_BT)

    expected, model = predicted(make_model(attention="sdpa")), make_model(attention="rectangles")
    assert difference(predicted(model), expected) < 1e-11
    torch.compiler.reset()
    assert difference(predicted(compile_blocks(model, backend="aot_eager")), expected) < 1e-11
    torch.compiler.reset()


def test_what_it_cannot_do_is_refused():
    q, k, v = inputs(PATTERNS["causal"])
    with pytest.raises(ConfigError, match="got a tensor, expected a Pattern"):
        attend(q, k, v, dense_mask(PATTERNS["causal"], CPU), "rectangles")


def test_a_kernel_that_is_wrong_or_missing_is_named(monkeypatch):
    def ignores_causal(q, k, v, causal):
        return rectangles._math_forward(q, k, v, False)

    assert fault_of("cpu", "cpu", torch.bfloat16, 32) is None
    assert kernel_for("cpu", torch.float32, 64) == "cpu"
    monkeypatch.setitem(rectangles.KERNELS, "cpu", (ignores_causal, rectangles._math_backward))
    assert "against the definition" in fault_of("cpu", "cpu", torch.float32, 32)
    assert fault_of("cudnn", "cpu", torch.bfloat16, 32) is not None


def test_the_choice_says_why(monkeypatch):
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    faults = {"flex": None, "rectangles": None}
    monkeypatch.setattr(attention, "probe", lambda name, *_: faults[name])
    assert choose_attention("auto", cuda, bf16, 0).backend == "sdpa"
    assert choose_attention("auto", CPU, bf16, 4096**2) == ("sdpa", "its kernel reads a mask on cpu")
    small = choose_attention("auto", cuda, bf16, 32 * 32)
    assert small == ("sdpa", "a mask of 1,024 entries is small enough to be read")
    assert choose_attention("auto", cuda, bf16, 4096**2).backend == attention.LARGE_MASK_ORDER[0]
    faults["flex"] = "no compiler"
    second = choose_attention("auto", cuda, bf16, 4096**2)
    assert second.backend == "rectangles"
    assert "flex does not run here: no compiler" in second.reason
    assert choose_attention("flex", cuda, bf16, 9) == ("sdpa", "no compiler")
    faults["rectangles"] = "no kernel"
    assert choose_attention("auto", cuda, bf16, 4096**2).backend == "sdpa"


def test_the_probe_runs_it():
    assert probe.__wrapped__("rectangles", "cpu", torch.float32) is None
