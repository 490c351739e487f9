import warnings

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.model import attention
from vidworld.model.attention import attend, available_backends, dense_mask, probe, reference, resolve_backend
from vidworld.model.inputs import Streams

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MASKS = {
    "none": None,
    "causal": Streams(context=9),
    "two_stream": Streams(context=5, targets=2),
    "cache": Streams(context=2, past=7),
    "one_query": Streams(context=1, past=7),
}


def inputs(mask, device=CPU, dtype=torch.float64, batch=3, heads=6, kv_heads=2, dims=16):
    torch.manual_seed(0)
    queries, keys = (mask.num_queries, mask.num_keys) if mask else (7, 11)
    q = torch.randn(batch, heads, queries, dims, device=device, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, keys, dims, device=device, dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in (q, k, v))


def check_parity(backend, mask, device, dtype, tolerance):
    """Output and gradients against the definition in float64."""
    assert resolve_backend(backend, device, dtype, 1) == backend
    q, k, v = inputs(mask, device, dtype)
    dense = None if mask is None else dense_mask(mask, device)
    expected = reference(q, k, v, dense)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for form in (mask, dense):
        got = attend(q, k, v, form, backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
        gradients = torch.autograd.grad(got.double().square().sum(), (q, k, v))
        for gradient, expected_gradient in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_sdpa_on_cpu(mask, dtype, tolerance):
    check_parity("sdpa", mask, CPU, dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "xformers"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.03)])
def test_every_backend_on_cuda(backend, mask, dtype, tolerance):
    reason = probe(backend, "cuda", dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    check_parity(backend, mask, CUDA, dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_thousands_of_environments_on_cuda(masked):
    """Token-wise time attention of 1,024 environments is one batch beyond what a CUDA grid axis holds."""
    mask = torch.ones(1, 8, dtype=torch.bool, device=CUDA) if masked else None
    q, k, v = (torch.randn(70_000, 2, n, 32, device=CUDA, dtype=torch.bfloat16) for n in (1, 8, 8))
    got = attend(q, k, v, mask, "sdpa")
    torch.testing.assert_close(got[-5:].double(), reference(q[-5:], k[-5:], v[-5:]), atol=0.03, rtol=0.03)


def test_xformers_on_cpu():
    reason = probe("xformers", "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"xformers: {reason}")
    check_parity("xformers", MASKS["two_stream"], CPU, torch.float32, 1e-5)


@pytest.mark.slow
def test_flex_on_cpu_without_gradients():
    mask = MASKS["two_stream"]
    with torch.no_grad():
        reason = probe("flex", "cpu", torch.float32, False)
        if reason is not None:
            pytest.skip(f"flex: {reason}")
        q, k, v = (tensor.detach() for tensor in inputs(mask, dtype=torch.float32))
        expected = reference(q, k, v, dense_mask(mask, CPU)).float()
        torch.testing.assert_close(attend(q, k, v, mask, "flex"), expected, atol=1e-5, rtol=1e-5)


def test_reference_is_softmax_by_hand():
    q, k, v = torch.tensor([2.0, 0.0]), torch.tensor([[1.0, 5.0], [0.0, 7.0], [9.0, 9.0]]), torch.eye(3, 2)
    weight = torch.tensor([2 / 2**0.5, 0.0]).exp()
    mask = torch.tensor([[True, True, False]])
    got = reference(q.view(1, 1, 1, 2), k.view(1, 1, 3, 2), v.view(1, 1, 3, 2), mask)
    torch.testing.assert_close(got.flatten().float(), weight / weight.sum())


def test_grouped_queries_equal_repeated_keys():
    q, k, v = inputs(MASKS["two_stream"])
    mask = MASKS["two_stream"]
    wide = attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask, "sdpa")
    torch.testing.assert_close(attend(q, k, v, mask, "sdpa"), wide)


def test_the_mask_is_obeyed():
    """Negative control of the parity tests: without the mask the answer is another one."""
    q, k, v = inputs(MASKS["causal"])
    assert (attend(q, k, v, MASKS["causal"]) - attend(q, k, v)).abs().max() > 0.1


def test_more_rows_than_a_kernel_takes(monkeypatch):
    q, k, v = inputs(MASKS["causal"], batch=7)
    whole = attend(q, k, v, MASKS["causal"], "sdpa")
    monkeypatch.setattr(attention, "MAX_KERNEL_BATCH", 3)
    torch.testing.assert_close(attend(q, k, v, MASKS["causal"], "sdpa"), whole)


def test_a_backend_that_does_not_run_falls_back_loudly(monkeypatch):
    q, k, v = inputs(MASKS["causal"])
    monkeypatch.setattr(attention, "probe", lambda *_: "no such kernel")
    with pytest.warns(UserWarning, match="'flex' does not run here, using sdpa: no such kernel"):
        got = attend(q, k, v, MASKS["causal"], "flex")
    assert torch.equal(got, attend(q, k, v, MASKS["causal"], "sdpa"))


def test_a_probe_reports_refusals_and_wrong_answers(monkeypatch):
    def ignores_mask(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def refuses(*_):
        raise NotImplementedError("wasn't built with\nCUDA support")

    fresh = probe.__wrapped__
    assert fresh("sdpa", "cpu", torch.float32) is None
    monkeypatch.setattr(attention, "_sdpa", ignores_mask)
    assert "against the definition" in fresh("sdpa", "cpu", torch.float32)
    monkeypatch.setattr(attention, "_sdpa", refuses)
    assert fresh("sdpa", "cpu", torch.float32) == "NotImplementedError: wasn't built with CUDA support"


def test_probing_moves_no_random_state_and_runs_in_inference_mode():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert probe.__wrapped__("sdpa", "cpu", torch.float32) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_is_sdpa_on_cpu_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", CPU, torch.float32, 10**9) == "sdpa"
    assert "sdpa" in available_backends("cpu", torch.float32)


def test_auto_prefers_flex_for_large_masks_on_cuda(monkeypatch):
    monkeypatch.setattr(attention, "probe", lambda *_: None)
    assert resolve_backend("auto", CUDA, torch.bfloat16, 4096**2) == "flex"
    assert resolve_backend("auto", CUDA, torch.bfloat16, 96**2) == "sdpa"
    assert resolve_backend("auto", CUDA, torch.bfloat16, 0) == "sdpa"


def test_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match=r"got flash, expected auto \| sdpa"):
        attend(*inputs(None), backend="flash")  # pyright: ignore[reportArgumentType]
