"""The Triton kernels of rollouts against the plain code; on CUDA, or anywhere with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from vidworld.model.attention import reference
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape
from vidworld.model.ring import Clock
from vidworld.model.rope import rotate
from vidworld.model.streaming import StreamedDiT, StreamKernels
from vidworld.types import Frames

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)

from vidworld.model import stream_kernels  # noqa: E402
from vidworld.model.stream_kernels import FrameTiles, RingTiles, frame_attention  # noqa: E402

SHAPE = FrameShape(views=1, channels=4, height=2, width=2, proprio_dims=3, action_dims=2)
WINDOW = 3


def make_model(**settings: object) -> CausalDiT:
    torch.manual_seed(0)
    config = {"width": 128, "depth": 2, "num_heads": 4, "num_kv_heads": 2}
    config |= {"time_every": 2, "num_registers": 0}
    model = CausalDiT(DiTConfig(**(config | settings)), SHAPE)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not parameter.any() or "scale" in name:
            torch.nn.init.normal_(parameter, mean=1.0 * name.endswith("scale_d"), std=0.2)
    return model.to(DEVICE).requires_grad_(False)


@pytest.mark.parametrize("length", [7, 70, 150])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_a_frame(length: int, groups: int, dtype: torch.dtype) -> None:
    """Few keys and many; queries that do and do not fill their tiles."""
    attend_in_a_frame(length, groups, dtype)


@pytest.mark.parametrize("tiles", [(64, 1, 64, 4), (16, 2, 32, 4), (32, 3, 128, 8), (32, 1, 16, 4)])
def test_attention_in_a_frame_however_it_is_cut(
    tiles: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tile of queries a program or several; one block of keys or several, with a smaller one or not."""
    monkeypatch.setattr(stream_kernels, "frame_tiles", lambda *_: FrameTiles(*tiles))
    attend_in_a_frame(70, 2, torch.float32)


def attend_in_a_frame(length: int, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    heads, kv_heads, dims = 2 * groups, 2, 32
    qkv = torch.randn(2, length, (heads + 2 * kv_heads) * dims, device=DEVICE).to(dtype)
    scales = 1 + 0.3 * torch.randn(2, dims, device=DEVICE)
    angles = torch.randn(length, dims // 2, device=DEVICE)
    got = frame_attention(qkv, *scales, angles.cos(), angles.sin(), heads, kv_heads)

    def expected(angles: torch.Tensor) -> torch.Tensor:
        split = qkv.double().unflatten(-1, (-1, dims)).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
        q, k = (
            rotate(torch.nn.functional.rms_norm(x, x.shape[-1:], eps=2.0**-23) * scale.double(),
                   (angles.double().cos(), angles.double().sin()))  # type: ignore[arg-type]
            for x, scale in zip(split, scales, strict=False)
        )  # fmt: skip
        return reference(q, k, split[2]).transpose(1, 2).flatten(2)

    tolerance = 3e-6 if dtype == torch.float32 else 0.02
    assert float((got.double() - expected(angles)).abs().max()) < tolerance
    assert float((got.double() - expected(-2 * angles)).abs().max()) > 5 * tolerance, "angles count"


def roll(net: StreamedDiT, versions: int, *, half: bool) -> list[torch.Tensor]:
    """What three frames of two passes each give, from an empty ring until it has turned; and the slots."""
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    batch, width = net.batch, net.model.config.width
    embodiment_B = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    found: list[torch.Tensor] = []

    def run(count: int, modulation: list[torch.Tensor], rows: slice, commits: bool, first: bool) -> None:
        frames = Frames(normal(batch, count, 1, 4, 2, 2), normal(batch, count, 3))
        tokens = normal(batch, count, 1, width)
        full = net.clock.is_full(net.num_frames - 1 - int(commits))
        out = net(frames, tokens, embodiment_B, modulation, rows, commits=commits, first=first, full=full)
        assert out.num_frames == count - commits
        if out.num_frames:
            found.extend([out.latents_BTVChw, out.proprio_BTS])

    with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
        for frame in range(WINDOW + 2):
            modulation = net.modulation(normal(batch, 1 + 2 * versions, width))
            net.begin()
            for index in range(2):
                commits = index == 0 and frame > 0
                row, count = 1 + index * versions, versions + commits
                run(count, modulation, slice(row - commits, row + versions), commits, index == 0)
        # The newest frame in a pass of its own, as for a state.
        net.before.copy_(net.now)
        run(1, modulation, slice(0, 1), True, True)
    return [*found, *(part for layer in net.cache().layers for part in layer)]


def streamed(model: CausalDiT, kernels: tuple[str, ...], sink: int, dtype: torch.dtype) -> StreamedDiT:
    return StreamedDiT(model, Clock(WINDOW, sink), 2, dtype=dtype, kernels=kernels)


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "kernels", [*((name,) for name in StreamKernels._fields), ("time", "residual"), StreamKernels._fields]
)
@pytest.mark.parametrize(("sink", "versions"), [(0, 1), (1, 2)])
def test_a_rollout_is_that_of_the_plain_code(kernels: tuple[str, ...], sink: int, versions: int) -> None:
    """While the window fills and after, with and without versions that do not see each other."""
    model = make_model()
    fast = streamed(model, kernels, sink, torch.float32)
    assert {name for name, on in fast.kernels._asdict().items() if on} == set(kernels)
    want = roll(streamed(model, (), sink, torch.float32), versions, half=False)
    assert worst(roll(fast, versions, half=False), want) < 1e-5
    other = roll(streamed(model, (), 1 - sink, torch.float32), versions, half=False)
    assert worst(other[:-2], want[:-2]) > 1e-3, "the sink counts"


@pytest.mark.parametrize("sequences", [1, 2, 16])
def test_a_rollout_however_many_tokens_look_at_once(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are, too."""
    want = roll(streamed(make_model(), (), 0, torch.float32), 1, half=False)
    monkeypatch.setattr(stream_kernels, "ring_tiles", lambda *_: RingTiles(sequences, 4))
    assert worst(roll(streamed(make_model(), ("time",), 0, torch.float32), 1, half=False), want) < 1e-5


@pytest.mark.parametrize("residual", ["float32", "autocast"])
def test_bfloat16_is_as_near_to_float32_as_in_the_plain_code(residual: str) -> None:
    exact = roll(streamed(make_model(), (), 0, torch.float32), 1, half=False)
    model = make_model(residual=residual)
    plain = worst(roll(streamed(model, (), 0, torch.bfloat16), 1, half=True), exact)
    fused = worst(roll(streamed(model, StreamKernels._fields, 0, torch.bfloat16), 1, half=True), exact)
    assert 0 < fused < 1.25 * plain < 0.2, (fused, plain)


def test_what_the_kernels_cannot_do_is_left_to_the_plain_code() -> None:
    names = StreamKernels._fields
    model = make_model()
    assert all(StreamKernels.here(names, model, 64, torch.float32))
    assert not StreamKernels.here(names, model, 65, torch.float32).time
    assert not any(StreamKernels.here(names, model, 16, torch.float64))
    assert StreamKernels.here(names, make_model(width=96), 16, torch.float32) == (False, False, True, True)
    model.used_tokens_EN = torch.ones(1, model.tokens_per_frame, dtype=torch.bool, device=DEVICE)
    assert StreamKernels.here(names, model, 16, torch.float32) == (False, True, True, True)
