"""Products in 8-bit floats: what they round, that rollouts stay near, and the kernels that feed them.

The kernels run on CUDA, or anywhere with TRITON_INTERPRET=1.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.fp8 import E4M3, Fp8Linear, Scaled, quantise, use_fp8, why_not
from vidworld.model.inputs import FrameShape
from vidworld.model.ring import Clock
from vidworld.model.streaming import StreamedDiT, StreamKernels
from vidworld.types import Frames

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPE = FrameShape(views=1, channels=4, height=2, width=2, proprio_dims=3, action_dims=2)
needs_kernels = pytest.mark.skipif(
    find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs CUDA, or TRITON_INTERPRET=1",
)
if DEVICE == "cuda" and why_not(torch.device("cuda")) is not None:
    pytest.skip(f"no fp8 here: {why_not(torch.device('cuda'))}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _interpreter_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter halves what rounds up to a power of two; let torch round in its place."""
    if not INTERPRETED or find_spec("triton") is None:
        return
    from triton.runtime import interpreter  # type: ignore[import-not-found]

    convert = interpreter._convert_float

    def rounded(value, source, target, mode):
        if str(target) != "fp8e4nv" or str(source) != "fp32":
            return convert(value, source, target, mode)
        return torch.from_numpy(value.copy()).to(E4M3).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size).to(DEVICE)


def test_rows_are_rounded_each_on_its_own_scale() -> None:
    torch.manual_seed(0)
    x = normal(5, 64) * torch.tensor([1e-6, 1.0, 1e6, 0.0, 1.0], device=DEVICE)[:, None]
    wide = quantise(x).wide()
    largest = x.abs().amax(1, keepdim=True)
    assert ((wide - x).abs() <= x.abs() / 16 + largest / 2**17).all()
    assert off(wide[1], x[1]) > 0.01, "it does round"
    torch.testing.assert_close(wide.abs().amax(1, keepdim=True), largest)


def test_a_product_is_that_of_the_rounded_factors() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 48, bias=False).to(DEVICE), normal(2, 7, 128)
    got = Fp8Linear(linear)(x)
    assert got.dtype == torch.bfloat16
    assert off(got, quantise(x).wide() @ quantise(linear.weight.detach()).wide().t()) < 0.01
    assert 0.01 < off(got, linear(x).detach()) < 0.05
    torch.testing.assert_close(Fp8Linear(linear)(quantise(x)), got, rtol=0, atol=0)


def make_model() -> CausalDiT:
    torch.manual_seed(0)
    config = DiTConfig(width=128, depth=2, num_heads=4, num_kv_heads=2, time_every=2, num_registers=0)
    model = CausalDiT(config, SHAPE)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not parameter.any() or "scale" in name:
            nn.init.normal_(parameter, mean=1.0 * name.endswith("scale_d"), std=0.2)
    return model.to(DEVICE).requires_grad_(False)


def roll(model: CausalDiT, kernels: tuple[str, ...] = (), *, half: bool = True) -> torch.Tensor:
    """Predictions of five frames of two samples, each committed in the pass of the next."""
    torch.manual_seed(2)
    net = StreamedDiT(model, Clock(3), 2, dtype=torch.bfloat16 if half else None, kernels=kernels)
    assert len([on for on in net.kernels if on]) == len(kernels)
    embodiment_B = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    found = []
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        for frame in range(5):
            commits = frame > 0
            net.begin()
            out = net(
                Frames(normal(2, 1 + commits, 1, 4, 2, 2), normal(2, 1 + commits, 3)),
                normal(2, 1 + commits, 1, 128),
                embodiment_B,
                net.modulation(normal(2, 2, 128)),
                slice(1 - commits, 2),
                commits=commits,
                first=True,
                full=net.clock.is_full(net.num_frames - 1 - commits),
            )
            found.append(out.latents_BTVChw.flatten())
    return torch.cat(found)


def test_a_rollout_stays_near_that_in_bfloat16() -> None:
    exact = roll(make_model(), half=False)
    bfloat16, fp8 = off(roll(make_model()), exact), off(roll(use_fp8(make_model())), exact)
    assert 0 < bfloat16 < 0.03
    assert 2 * bfloat16 < fp8 < 0.15, (bfloat16, fp8)


def test_matrices_of_odd_sizes_stay_as_they_are() -> None:
    model = CausalDiT(DiTConfig(width=24, depth=2, num_heads=2, num_kv_heads=1, time_every=2), SHAPE)
    assert isinstance(use_fp8(model).blocks[0].mlp.gate_up, nn.Linear)  # type: ignore[union-attr]
    block = use_fp8(make_model()).blocks[1]
    assert isinstance(block.time.qkv, Fp8Linear)  # type: ignore[union-attr]
    assert isinstance(block.space.out, nn.Linear), "what attention puts out is not rounded"  # type: ignore[union-attr]


@needs_kernels
@pytest.mark.parametrize("half", [False, True])
def test_the_kernels_round_as_the_plain_code(half: bool) -> None:
    import vidworld.model.fp8_kernels  # noqa: F401

    torch.manual_seed(0)
    ops, dtype = torch.ops.vidworld, torch.bfloat16 if half else torch.float32
    x, y = normal(2, 3, 7, 96).to(dtype), normal(2, 3, 7, 96).to(dtype)
    gate, shift, scale = normal(2, 5, 1, 288)[:, 1:4].chunk(3, -1)
    stream, h, _ = ops.add_modulate(x, y, gate, shift, scale, False)
    got, *rounded = ops.add_modulate_fp8(x, y, gate, shift, scale)
    assert torch.equal(got, stream)
    # Division in a kernel may turn a few roundings; in bfloat16, what is compared with was rounded once more.
    tolerance = 0.02 if half else 0.003
    assert off(Scaled(*rounded).wide(), quantise(h).wide()) < tolerance
    gate_up = normal(5, 176).to(dtype)
    rounded = ops.swiglu_fp8(gate_up)
    assert off(Scaled(*rounded).wide(), quantise(ops.swiglu(gate_up)).wide()) < tolerance


@needs_kernels
def test_a_rollout_with_kernels_is_as_near() -> None:
    exact = roll(make_model(), half=False)
    plain = off(roll(use_fp8(make_model())), exact)
    assert 0 < off(roll(use_fp8(make_model()), StreamKernels._fields), exact) < 1.25 * plain
