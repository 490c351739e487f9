"""Parity of the Triton kernels with the plain code, on CUDA, or with TRITON_INTERPRET=1 on any machine."""

import copy
import os
from collections.abc import Callable

import pytest
import torch

from vidworld.model.attention import reference
from vidworld.model.compile import KERNELS, compile_blocks, fuse
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.model.rope import Rotation, rotate
from vidworld.types import Frames, SignalLevel

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)

import vidworld.model.layers as layers  # noqa: E402
from vidworld.model.fused_attention import short_attention  # noqa: E402
from vidworld.model.fused_attention_long import long_attention  # noqa: E402

SHAPE = FrameShape(views=1, channels=4, height=8, width=8, proprio_dims=3, action_dims=2)
BATCH, FRAMES = 2, 2


def make_model(**settings: object) -> CausalDiT:
    torch.manual_seed(0)
    config = {"width": 96, "depth": 2, "num_heads": 6, "num_kv_heads": 2, "time_every": 2}
    model = CausalDiT(DiTConfig(**(config | settings)), SHAPE)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():  # nothing may be zero, or gradients are, too
        if parameter.ndim < 2 or not parameter.any() or "modulation" in name or "scale" in name:
            torch.nn.init.normal_(parameter, mean=1.0 * name.endswith("scale_d"), std=0.2)
    return model.to(DEVICE)


def gradients(model: CausalDiT, *, half: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    size = (BATCH, 2 * FRAMES)
    conditioning = Conditioning(
        normal(*size, 1, 2),
        normal(*size) > -1,
        torch.zeros(BATCH, dtype=torch.int64, device=DEVICE),
        member_B=torch.arange(BATCH, device=DEVICE) if model.config.members else None,
    )
    frames = Frames(normal(*size, 1, 4, 8, 8), normal(*size, 3))
    level = SignalLevel(torch.rand(size, generator=generator).to(DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        out, _ = model(frames, level, normal(*size).abs(), conditioning, streams=Streams(FRAMES, targets=1))
    loss = (out.latents_BTVChw * normal(*size, 1, 4, 8, 8)).mean() + out.proprio_BTS.square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return found | {"latents": out.latents_BTVChw.detach()}


def deviation(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-12)) for n in want)


def agrees(fused: CausalDiT, plain: CausalDiT) -> bool:
    """In float32, or on CUDA in bfloat16: attention there has kernels of ours for nothing else."""
    exact = gradients(plain)
    if DEVICE == "cpu":
        return deviation(gradients(fused), exact) < 2e-5
    allowed = 1.25 * deviation(gradients(plain, half=True), exact)
    return deviation(gradients(fused, half=True), exact) < allowed


@pytest.mark.parametrize("kernels", [(name,) for name in KERNELS] + [KERNELS])
def test_kernels_agree_with_the_plain_code(kernels: tuple[str, ...]) -> None:
    plain = make_model()
    fused = fuse(copy.deepcopy(plain), kernels)
    want = gradients(plain)
    assert all(value.any() for value in want.values()), "what is zero everywhere proves nothing"
    assert deviation(gradients(fused), want) < 2e-5
    fused.blocks[0].mlp.gate_up.weight.data.mul_(1.01)  # type: ignore[union-attr]
    assert deviation(gradients(fused), want) > 1e-4


ANY = [(16, 2, 2, 32), (17, 4, 2, 64), (70, 6, 2, 64), (70, 3, 1, 16), (100, 2, 1, 128), (127, 3, 3, 32)]
LONG = [(128, 2, 2, 64), (150, 6, 2, 32), (262, 2, 1, 128)]


@pytest.mark.parametrize(
    ("kernel", "length", "heads", "kv_heads", "dims"),
    [(short_attention, *size) for size in ANY] + [(long_attention, *size) for size in ANY[1:4] + LONG],
)
def test_attention_agrees_with_its_definition(
    kernel: Callable[..., tuple[torch.Tensor, ...]], length: int, heads: int, kv_heads: int, dims: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    qkv = normal(2, length, (heads + 2 * kv_heads) * dims).requires_grad_()
    scales = (1 + 0.3 * normal(2, dims)).requires_grad_()
    angles, grad = normal(2, length, dims // 2), normal(2, length, heads * dims)

    def plain(angles: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unflatten(-1, (-1, dims)).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        q, k = (
            rotate(torch.rms_norm(x, (dims,)) * scale, Rotation(angle.cos(), angle.sin()))
            for x, scale, angle in zip((q, k), scales, angles, strict=True)
        )
        return reference(q, k, v).transpose(1, 2).flatten(2).float()

    def found(mixed: torch.Tensor) -> dict[str, torch.Tensor]:
        of_qkv, of_scales = torch.autograd.grad(mixed, [qkv, scales], grad)
        of_q, of_k, of_v = of_qkv.split([count * dims for count in (heads, kv_heads, kv_heads)], -1)
        return {"mixed": mixed.detach(), "q": of_q, "k": of_k, "v": of_v, "of scales": of_scales}

    want = found(plain(angles))
    tables = torch.cat([angles.cos(), angles.sin()], -1)
    mixed = kernel(qkv, scales, tables, heads, kv_heads)[0]
    assert deviation(found(mixed), want) < 2e-6
    wrong = found(plain(1.01 * angles))
    assert min(deviation({name: wrong[name]}, {name: want[name]}) for name in ("mixed", "q", "k")) > 1e-4


def test_blocks_run_the_kernels_of_long_sequences_beyond_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_model()
    monkeypatch.setattr(layers, "SHORT_TOKENS", 0)
    called = []
    kernel = torch.ops.vidworld.long_attention

    def counted(*inputs: object) -> tuple[torch.Tensor, ...]:
        called.append(1)
        return kernel(*inputs)

    monkeypatch.setattr(torch.ops.vidworld, "long_attention", counted)
    assert agrees(fuse(copy.deepcopy(plain), ("attention",)), plain)
    assert len(called) == 2, "space attention of two blocks"


def test_members_that_share_a_network_agree_too() -> None:
    plain = make_model(members=2, member_rank=4)
    want = gradients(plain)
    assert deviation(gradients(fuse(plain)), want) < 2e-5


@pytest.mark.parametrize("residual", ["float32", "autocast"])
def test_bfloat16_is_as_near_to_float32_as_in_the_plain_code(residual: str) -> None:
    exact = gradients(make_model())
    plain = make_model(residual=residual)
    fused = fuse(copy.deepcopy(plain))
    allowed = 1.25 * deviation(gradients(plain, half=True), exact)
    assert deviation(gradients(fused, half=True), exact) < allowed


@pytest.mark.skipif(DEVICE == "cpu", reason="a compiler traces into the kernels, which cannot be interpreted")
def test_compiled_blocks_run_the_kernels_in_one_graph() -> None:
    plain = make_model()
    fused = compile_blocks(fuse(copy.deepcopy(plain)))
    assert deviation(gradients(fused), gradients(plain)) < 2e-5
    assert agrees(fused, plain)


def test_checkpointed_blocks_give_the_same() -> None:
    plain = make_model()
    want = gradients(plain)
    fuse(plain).checkpoint_blocks = True
    assert deviation(gradients(plain), want) < 2e-5


def test_what_is_committed_is_what_the_plain_code_commits() -> None:
    plain = make_model()
    fused = fuse(copy.deepcopy(plain))
    size = (BATCH, FRAMES)
    inputs = (
        Frames(torch.randn(*size, 1, 4, 8, 8, device=DEVICE), torch.randn(*size, 3, device=DEVICE)),
        SignalLevel(torch.rand(size, device=DEVICE)),
        torch.zeros(size, device=DEVICE),
        Conditioning(
            torch.randn(*size, 1, 2, device=DEVICE),
            torch.ones(size, dtype=torch.bool, device=DEVICE),
            torch.zeros(BATCH, dtype=torch.int64, device=DEVICE),
        ),
    )
    with torch.no_grad():
        (_, want), (_, got) = (
            model(*inputs, streams=Streams(FRAMES), commit=True) for model in (plain, fused)
        )
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        torch.testing.assert_close(mine.key, theirs.key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.value, theirs.value, rtol=1e-4, atol=1e-5)
