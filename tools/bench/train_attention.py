"""Time attention, forward and backward: every backend on long frame-causal sequences and on the time axis.

    python tools/bench/train_attention.py [--device cuda] [--minutes 2]

TFLOP/s are per visible query-key pair, forward and backward together counted as 3.5 forward passes.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import UserError
from vidworld.model import rectangles
from vidworld.model.attention import attend, choose_attention, prepare_mask, probe
from vidworld.model.inputs import FrameCausal, Streams

PASSES = 3.5


@dataclass(frozen=True)
class AttentionOptions:
    """Time attention backends against each other."""

    device: Literal["cpu", "cuda"] = "cpu"
    minutes: float = 2.0
    """Stop after so long; what is measured by then is kept."""
    repeats: int = 10
    toy: bool = False
    """Tiny sizes, to see that everything runs."""
    out: Path | None = Path("benchmarks/train.json")
    """Rows are added here; `None`: only print."""


@dataclass(frozen=True)
class AttentionCase:
    """One shape."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    pattern: FrameCausal

    @property
    def visible_flops(self) -> float:
        """Operations of one forward pass over what is visible."""
        streams, tokens = self.pattern.streams, self.pattern.tokens
        frames = streams.context * (streams.context + 1) // 2 * (1 + streams.targets)
        return 4.0 * self.batch * self.heads * self.head_dim * frames * tokens**2


def cases(toy: bool) -> list[AttentionCase]:
    """Long sequences, where the mask matters, and the short ones of a factorised model's time axis."""
    if toy:
        return [
            AttentionCase("4x8", 2, 4, 2, 16, FrameCausal(Streams(4), 8)),
            AttentionCase("time8", 16, 4, 2, 16, FrameCausal(Streams(4, targets=1), 1)),
        ]
    return [
        AttentionCase("16x256.d64", 8, 16, 16, 64, FrameCausal(Streams(16), 256)),
        AttentionCase("32x256.d128", 4, 8, 8, 128, FrameCausal(Streams(32), 256)),
        AttentionCase("16x256.streams2.d128", 4, 8, 8, 128, FrameCausal(Streams(16, targets=1), 256)),
        AttentionCase("time32.d64", 4192, 12, 4, 64, FrameCausal(Streams(16, targets=1), 1)),
        AttentionCase("time32.d128", 2096, 8, 4, 128, FrameCausal(Streams(16, targets=1), 1)),
        AttentionCase("time96.d64", 1048, 12, 4, 64, FrameCausal(Streams(48, targets=1), 1)),
    ]


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure, print, and write each case as soon as it is done."""
    options = parse(AttentionOptions, arguments, prog=prog)
    command = " ".join(["python", "tools/bench/train_attention.py", *arguments])
    measure_attention(options, command)


def measure_attention(options: AttentionOptions, command: str) -> None:
    """All cases in the time that there is."""
    device, ends = torch.device(options.device), time.monotonic() + 60 * options.minutes
    name = "train.attention" if options.device == "cuda" else "train.cpu.attention"
    for case in cases(options.toy):
        rows: dict[str, tuple[float, str]] = {}
        for label, run in runs(case, device).items():
            if time.monotonic() > ends:
                print(f"{case.name} {label}: left out, the time is over")
                continue
            try:
                seconds = timed(run, device, options.repeats)
            except Exception as error:  # a backend that refuses is a result
                print(f"{case.name} {label}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
                continue
            tflops = PASSES * case.visible_flops / seconds / 1e12
            print(f"{case.name:<22} {label:<20} {1e3 * seconds:9.3f} ms {tflops:8.1f} TFLOP/s")
            rows[f"{name}.{case.name}.{label}"] = (round(tflops, 4), "TFLOP/s visible")
        size = case.pattern.num_queries * case.pattern.num_keys
        print(f"{case.name:<22} auto is", *choose_attention("auto", device, dtype_of(device), size))
        if rows and options.out is not None:
            shown = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
            add_rows(options.out, rows, device=shown, command=command, packages=("torch",))


def runs(case: AttentionCase, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Forward and backward of each backend that runs here, on the same tensors."""
    dtype = dtype_of(device)
    shape = (case.batch, case.heads, case.pattern.num_queries, case.head_dim)
    q = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(case.batch, case.kv_heads, *shape[2:], device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    grad = torch.randn(shape, device=device, dtype=dtype)

    def both(backend: Any, mask: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(q, k, v, mask, backend), (q, k, v), grad)

    def with_kernel(kernel: rectangles.Kernel) -> Callable[[], Any]:
        run = both("rectangles", case.pattern.sizes)

        def call() -> Any:
            chosen = rectangles.kernel_for
            rectangles.kernel_for = lambda *_: kernel  # type: ignore[assignment]
            try:
                return run()
            finally:
                rectangles.kernel_for = chosen

        return call

    found: dict[str, Callable[[], Any]] = {"full": both("sdpa", None)}
    backends: tuple[Any, ...] = ("sdpa", "flex", "xformers")
    for backend in backends:
        fault = probe(backend, device.type, dtype)
        if fault is None:
            found[backend] = both(backend, prepare_mask(case.pattern, backend, device))
        else:
            print(f"{case.name:<22} {backend}: {fault[:150]}")
    kernels: tuple[rectangles.Kernel, ...] = ("cudnn", "flash") if device.type == "cuda" else ("cpu",)
    for kernel in kernels:
        fault = rectangles.fault_of(kernel, device.type, dtype, case.head_dim)
        if fault is None:
            found[f"rectangles_{kernel}"] = with_kernel(kernel)
        else:
            print(f"{case.name:<22} rectangles by {kernel}: {fault[:150]}")
    return found


def dtype_of(device: torch.device) -> torch.dtype:
    """What training computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after three to warm up."""
    for _ in range(3):
        run()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2]


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/train_attention.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
