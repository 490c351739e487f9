"""Check and time the fused kernels alone, against the plain code compiled, at the sizes of `train.py`.

    python tools/bench/kernels.py                      # on a GPU
    TRITON_INTERPRET=1 python tools/bench/kernels.py --tokens 8 --frames 2 --widths 128     # a toy on a CPU

Forward and backward of each, called one by one and from a compiled graph, as in training; bytes are what an
ideal kernel reads and writes once.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld.config import parse
from vidworld.errors import UserError
from vidworld.model import fused, fused_residual
from vidworld.model.rope import Rotation, rotate


@dataclass(frozen=True)
class Options:
    """Which sizes."""

    widths: tuple[int, ...] = (384, 1024)
    frames: int = 2048
    tokens: int = 70
    head_dim: int = 64
    half_stream: bool = False
    """Keep the residual stream in bfloat16."""
    compare: bool = True
    """Time the plain code, too."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Print a line for each kernel."""
    options = parse(Options, arguments, prog=prog)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = 0
    for width in options.widths:
        frames = max(2, options.frames * 384 // width)
        for name, make in (("heads", heads), ("mlp", mlp), ("residual", residual)):
            try:
                report(f"{name} {width}", *make(frames, options, width, device), compare=options.compare)
            except Exception as error:
                failed += 1
                print(f"{name} {width}: FAILED {type(error).__name__}: {str(error)[-1500:]}", flush=True)
    if failed:
        raise SystemExit(f"{failed} kernels failed")


Case = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]], list[Tensor], float]


def heads(frames: int, options: Options, width: int, device: str) -> Case:
    """Splitting into heads."""
    dims = options.head_dim
    num_heads, length = width // dims, options.tokens
    kv = max(1, num_heads // 3) if num_heads % 3 == 0 else num_heads // 2
    qkv = normal(frames, length, (num_heads + 2 * kv) * dims, device=device)
    scales = 1 + 0.1 * torch.randn(2, dims, device=device)
    angles = torch.randn(length, dims // 2, device=device)
    rotation = Rotation(angles.cos(), angles.sin())
    tables = torch.cat(rotation, -1).expand(2, -1, -1).contiguous()

    def plain(qkv: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.unflatten(-1, (-1, dims)).transpose(1, 2).split((num_heads, kv, kv), 1)
        q, k = (
            rotate((F.rms_norm(x.float(), (dims,), eps=fused.EPS) * scale).to(x.dtype), rotation)
            for x, scale in zip((q, k), scales, strict=True)
        )
        return q, k, v

    def ours(qkv: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        return fused.split_heads(qkv, scales, tables, num_heads, kv)

    return plain, ours, [qkv, scales], 5 * qkv.nbytes


def mlp(frames: int, options: Options, width: int, device: str) -> Case:
    """SwiGLU."""
    hidden = -(-round(width * 8 / 3) // 64) * 64

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) * up,)

    x = normal(frames, options.tokens, 2 * hidden, device=device)
    return plain, lambda x: (fused.swiglu(x),), [x], 4 * x.nbytes


def residual(frames: int, options: Options, width: int, device: str) -> Case:
    """Adding a gated branch, and norm and modulation."""
    batch = max(1, frames // 32)
    x = normal(batch, frames // batch, options.tokens, width, device=device)
    y = normal(*x.shape, device=device)
    x = x if options.half_stream else x.detach().float()
    parts = [0.5 * normal(*x.shape[:2], 1, width, device=device) for _ in range(3)]

    def plain(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        x = x + gate * y
        h = F.rms_norm(x.float(), x.shape[-1:], eps=fused.EPS) * (1 + scale) + shift
        return x, h.to(y.dtype)

    def ours(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return fused_residual.add_modulate(x, y, gate, shift, scale, False)[:2]

    return plain, ours, [x, y, *parts], 5 * x.nbytes + 5 * y.nbytes


def normal(*size: int, device: str) -> Tensor:
    """Random numbers in bfloat16."""
    return torch.randn(size, device=device, dtype=torch.bfloat16)


def report(
    name: str,
    plain: Callable[..., tuple[Tensor, ...]],
    ours: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    ideal_bytes: float,
    *,
    compare: bool,
) -> None:
    """Deviation from the plain code in float32, and times of one forward and backward."""
    inputs = [x.requires_grad_() for x in inputs]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact = plain(*wide)
    grads = [torch.randn_like(x, dtype=kept.dtype) for x, kept in zip(exact, ours(*inputs), strict=True)]
    want = [*exact, *torch.autograd.grad(exact, wide, [g.float() for g in grads])]
    want = [x.detach() for x in want]
    del exact, wide
    kinds = {"fused": ours}
    if inputs[0].is_cuda:  # the interpreter's kernels cannot be compiled
        kinds["fused compiled"] = torch.compile(ours)
    if compare:
        kinds["plain compiled"] = torch.compile(plain)
    line, wrong = f"{name}:", []
    for kind, run in kinds.items():
        outputs = run(*inputs)
        got = [*outputs, *torch.autograd.grad(outputs, inputs, grads)]
        off = max(float((a.detach().float() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
        del outputs, got
        seconds = timed(run, inputs, grads)
        speed = f"{ideal_bytes / seconds / 1e12:.2f} TB/s of the ideal bytes"
        line += f" {kind} off by {off:.1e}, {1e6 * seconds:.0f} us, {speed};"
        if kind != "plain compiled" and not off < 0.01:
            wrong.append(f"{kind} off by {off:.2g}")
    print(line.rstrip(";"), flush=True)
    if wrong:
        raise ValueError("; ".join(wrong))


def timed(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], grads: list[Tensor]) -> float:
    """Seconds of a forward and backward."""
    count, cuda = (20, True) if inputs[0].is_cuda else (1, False)
    began = time.perf_counter()
    for number in range(3 * cuda + count):
        if number == 3 * cuda:
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
        torch.autograd.grad(run(*inputs), inputs, grads)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/kernels.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
