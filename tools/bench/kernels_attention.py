"""Check and time attention inside frames, the fused kernels against `split_heads` and sdpa, as in training.

    python tools/bench/kernels_attention.py                        # on a GPU: all sizes, several launches
    python tools/bench/kernels_attention.py --sizes 12x384 --no-sweep
    TRITON_INTERPRET=1 python tools/bench/kernels_attention.py --sequences 2 --sizes 12x384   # a toy on a CPU

Both run from compiled graphs, from the projection to the mixed heads that the next one reads, and back. The
sweep times every launch of the kernels that is said to be sensible, each way alone, and names the best.
"""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernels import normal, timed
from torch import Tensor

from vidworld.config import parse
from vidworld.errors import UserError
from vidworld.model import fused, fused_attention, fused_attention_long
from vidworld.model.attention import attend

ops: Any = torch.ops.vidworld
SIZES = {
    "12x384": (2048, 70, 6, 2, 64),
    "12x768": (640, 262, 12, 4, 64),
    "24x1024": (160, 262, 8, 4, 128),
    "28x1536": (64, 262, 12, 4, 128),
    "24x1024.short": (640, 70, 8, 4, 128),
}
"""Sequences, their tokens, query heads, key-value heads and head dims, as `train.py` has them on one H100."""


@dataclass(frozen=True)
class Options:
    """Which sizes."""

    sizes: tuple[str, ...] = tuple(SIZES)
    sequences: int | None = None
    """Instead of each size's own number."""
    sweep: bool = True
    """Try other launches, too."""
    seconds: float = 55.0
    """What is left of the sweep then is left out."""


@dataclass(frozen=True)
class Kernels:
    """An operator, and how its kernels are launched; each is timed as a part of the operator of its way."""

    name: str
    launch: dict[str, dict[str, int]]
    parameters: Sequence[str]
    launches: Sequence[Sequence[int]]
    fit: Callable[[int, int], bool]
    """Whether they are for so many tokens and head dims."""


KERNELS = (
    Kernels(
        "short_attention",
        fused_attention.LAUNCH,
        ("ROWS", "num_warps", "num_stages"),
        ((64, 4, 1), (64, 4, 2), (128, 8, 1), (128, 8, 2), (64, 4, 3), (128, 4, 1)),
        lambda length, dims: length < 128,
    ),
    Kernels(
        "long_attention",
        fused_attention_long.LAUNCH,
        ("ROWS", "KEYS", "num_warps", "num_stages"),
        (
            *((64, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 1)),
            *((64, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3)),
        ),
        lambda length, dims: True,
    ),
)


def main(arguments: Sequence[str], prog: str) -> None:
    """Print a line for each size, and one for each launch."""
    options = parse(Options, arguments, prog=prog)
    ends = time.monotonic() + options.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = [name for name in options.sizes if not measure(name, options, device, ends)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measure(name: str, options: Options, device: str, ends: float) -> bool:
    """Compare both at one size, then sweep; gives whether the fused kernels were right."""
    sequences, length, heads, kv_heads, dims = SIZES[name]
    sequences = options.sequences or sequences
    qkv = normal(sequences, length, (heads + 2 * kv_heads) * dims, device=device).requires_grad_()
    scales = (1 + 0.1 * torch.randn(2, dims, device=device)).requires_grad_()
    angles = torch.randn(length, dims // 2, device=device)
    tables = torch.cat([angles.cos(), angles.sin()], -1).expand(2, -1, -1).contiguous()
    grad = normal(sequences, length, heads * dims, device=device)

    def present(qkv: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        q, k, v = fused.split_heads(qkv, scales, tables, heads, kv_heads)
        return (attend(q, k, v, None, "sdpa").transpose(1, 2).flatten(2),)

    def ours(operator: str) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        kernel = getattr(ops, operator)
        return lambda qkv, scales: (kernel(qkv, scales, tables, heads, kv_heads)[0],)

    fitting = [kernels for kernels in KERNELS if kernels.fit(length, dims)]
    inputs = [qkv, scales]
    few = [qkv[:64].detach().float().requires_grad_(), scales.detach().clone().requires_grad_()]
    exact = present(*few)
    want = [*exact, *torch.autograd.grad(exact, few, [grad[:64].float()])]
    good = True
    for kind, run in {"present": present, **{one.name: ours(one.name) for one in fitting}}.items():
        try:
            mine = [qkv[:64].detach().requires_grad_(), scales]
            out = run(*mine)
            got = [*out, *torch.autograd.grad(out, mine, [grad[:64]])]
            off = [float((a.float() - b).detach().norm() / b.norm()) for a, b in zip(got, want, strict=True)]
            compiled = torch.compile(run, dynamic=False) if device == "cuda" else run
            forward = 1e6 * forward_s(compiled, inputs)
            both = 1e6 * timed(compiled, inputs, [grad])
        except Exception as error:
            print(f"{name} {kind}: FAILED {type(error).__name__}: {str(error)[-600:]}", flush=True)
            good = False
            continue
        print(
            f"{name} {kind}: forward {forward:.0f} us, backward {both - forward:.0f} us; "
            f"off by {off[0]:.1e}, gradients by {max(off[1:]):.1e}",
            flush=True,
        )
        good = good and max(off) < 0.02
    for kernels in fitting if options.sweep and device == "cuda" else ():
        sweep(name, kernels, inputs, (tables, heads, kv_heads), grad, ends)
    return good


def sweep(
    name: str, kernels: Kernels, inputs: list[Tensor], others: tuple[Any, ...], grad: Tensor, ends: float
) -> None:
    """Time every launch, each way alone, until the time is up."""
    qkv, scales = (x.detach() for x in inputs)
    tables, _, kv_heads = others
    forward = getattr(ops, kernels.name)
    backward = getattr(ops, f"{kernels.name}_backward")
    kept = forward(qkv, scales, *others)
    saved = kept if len(kept) > 2 else (kept[1], kv_heads)

    def call(way: str) -> None:
        if way == "forward":
            forward(qkv, scales, *others)
        else:
            backward(grad, qkv, scales, tables, *saved)

    for way, launch in kernels.launch.items():
        default, found = dict(launch), {}
        for tried in kernels.launches:
            if time.monotonic() > ends:
                print(f"{name} {kernels.name} {way}: the rest left out for want of time", flush=True)
                break
            launch.update(zip(kernels.parameters, tried, strict=True))
            try:
                found[tuple(tried)] = 1e6 * call_s(partial(call, way))
            except Exception as error:
                print(
                    f"{name} {kernels.name} {way} {tried}: {type(error).__name__}: {str(error)[-120:]}",
                    flush=True,
                )
        launch.update(default)
        line = ", ".join(
            f"{'/'.join(map(str, key))} {us:.0f} us" for key, us in sorted(found.items(), key=lambda x: x[1])
        )
        print(f"{name} {kernels.name} {way} by {'/'.join(kernels.parameters)}: {line}", flush=True)


def forward_s(run: Callable[..., Any], inputs: list[Tensor]) -> float:
    """Seconds of a forward pass that is differentiated later."""
    return call_s(lambda: run(*inputs))


def call_s(call: Callable[[], Any]) -> float:
    """Median seconds of calls."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return spans[len(spans) // 2] / 1e3


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/kernels_attention.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
