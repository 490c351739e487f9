"""Measure training steps: tokens per second, utilisation, memory, where the time goes; ours against others.

    python tools/bench/train.py --device cuda --minutes 9            # all sizes, as far as the time allows
    python tools/bench/train.py --device cuda --minutes 9 --attention-minutes 0 --sizes 12x768 24x1024
    python tools/bench/train.py --sizes 4x64 --side 8 --frames 8 --rows 2           # a toy on a CPU

Every variant trains the same weights on the same batches of noise, read from disk by the real loader, in one
process. Utilisation counts against the GPU's 989 TFLOP/s (bfloat16, dense): visible query-key pairs only,
modulation once a frame, no recomputation, before the bootstrap begins. Rows are written as soon as a variant
is done; what the time did not allow is named at the end of its size. AdamW everywhere but in `muon`, so that
variants differ in one thing. Kernels that one variant has compiled are found by the next in the compiler's
cache on disk, also those of an earlier call.
"""

import gc
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from table import add_rows, cpu_name
from train_attention import AttentionOptions, measure_attention
from train_data import frame_shape, write_latents
from train_forecast import Forecast
from train_variants import Case, Marks, Stepper, Variant, build, leave_launch, release

from vidworld.config import parse
from vidworld.errors import ConfigError, UserError
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.flops import training_flops
from vidworld.trainer.plan.cluster import Cluster
from vidworld.trainer.plan.estimate import Layout, Subject, estimate
from vidworld.trainer.plan.hardware import GPUS

PEAK_TFLOPS = 989.0
MOST_ROWS = 64
PACKAGES = ("torch", "accelerate", "deepspeed")


@dataclass(frozen=True)
class Size:
    """A model and how large its frames are."""

    num_heads: int
    num_kv_heads: int
    side: int
    """Rows and columns of the latents; patches of 2 x 2 make (side / 2)^2 tokens."""


SIZES = {
    "12x384": Size(6, 2, 16),
    "12x768": Size(12, 4, 32),
    "24x1024": Size(8, 4, 32),
    "28x1536": Size(12, 4, 32),
}


@dataclass(frozen=True)
class Options:
    """Time training steps of several sizes in several ways."""

    sizes: tuple[str, ...] = tuple(SIZES)
    """LAYERSxWIDTH; others than the four get heads of 64 (or one) and `side`."""
    variants: tuple[Variant, ...] = (
        *("ours", "fused", "bare", "zero1", "fsdp2", "zero3", "muon"),
        *("naive_compiled", "naive", "half_residual", "zero2", "naive_full"),
    )
    """In this order, as far as the time allows."""
    minutes: float = 9.0
    """Time for all; every size gets its share of what is left."""
    attention_minutes: float = 1.0
    """Of these, for the attention backends, at the end; 0 leaves them out."""
    steps: int = 20
    """Timed steps; five more are split by part."""
    warmup: int = 3
    frames: int = 16
    side: int = 16
    channels: int = 16
    rows: int | None = None
    """Clips of a step; by default what `vidworld plan` says fits into 85 % of the GPU, at most 64."""
    accumulate: int = 1
    """Micro-batches of a step, each of `rows` clips."""
    compile: bool = True
    device: Literal["cpu", "cuda"] = "cpu"
    out: Path | None = Path("benchmarks/train.json")
    """Rows are added here; `None`: only print."""


@dataclass
class Measured:
    """One variant."""

    step_s: float
    parts_s: dict[str, float]
    rows: int
    wait_share: float | None
    memory_gib: float
    extra: dict[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure, print, and write each size as soon as it is done."""
    options = parse(Options, arguments, prog=prog)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", got="cuda", expected="cpu: no GPU is available here")
    command = " ".join(["python", "tools/bench/train.py", *arguments])
    began = time.monotonic()
    ends = began + 60 * (options.minutes - options.attention_minutes)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    matmul = matmul_tflops(device)
    print(f"matrix product in this run: {matmul:.2f} TFLOP/s")
    shown = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()

    def write(rows: dict[str, tuple[float, str]]) -> None:
        for key, (value, unit) in rows.items():
            print(f"    {key:<48} {value:14.4f} {unit}", flush=True)
        if rows and options.out is not None:
            add_rows(options.out, rows, device=shown, command=command, packages=PACKAGES)

    failures = 0
    for number, name in enumerate(options.sizes):
        share = (ends - time.monotonic()) / (len(options.sizes) - number)
        failures += measure_size(name, options, device, matmul, time.monotonic() + share, write)
    if options.attention_minutes:
        left = options.minutes - (time.monotonic() - began) / 60
        toy = device.type == "cpu"
        measure_attention(AttentionOptions(options.device, max(0.0, left), toy=toy, out=options.out), command)
    if failures:
        raise SystemExit(f"{failures} variants failed, see above")


def measure_size(
    name: str,
    options: Options,
    device: torch.device,
    matmul: float,
    ends: float,
    write: Callable[[dict[str, tuple[float, str]]], None],
) -> int:
    """Measure and write as many variants of a size as fit before `ends`; gives how many failed."""
    found: dict[Variant, Measured] = {}
    written: dict[str, tuple[float, str]] = {}
    left_out: list[str] = []
    failures, forecast = 0, Forecast()
    with tempfile.TemporaryDirectory(prefix="vidworld-bench-") as scratch:
        case = make_case(name, options, device, Path(scratch))
        print(
            f"{case.label}: {case.accumulate} x {case.rows} clips of {case.frames} frames, "
            f"{tokens_per_step(case):,} tokens a step, {ends - time.monotonic():.0f} s for all variants",
            flush=True,
        )
        for variant in options.variants:
            began = time.monotonic()
            if began + forecast.seconds(variant) > ends and found:
                left_out.append(
                    f"{variant} (about {forecast.seconds(variant):.0f} s, {ends - began:.0f} left)"
                )
                continue
            try:
                found[variant] = one = measure(case, variant, options)
            except Exception as error:
                failures += 1
                print(
                    f"  {variant}: FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                    flush=True,
                )
                recover()
                continue
            forecast.took_s[variant] = took = time.monotonic() - began
            speed = tokens_per_step(case, one.rows) / one.step_s
            print(
                f"  {variant:<15} {1e3 * one.step_s:9.1f} ms {speed:12,.0f} tokens/s, {one.rows} clips, "
                f"{one.memory_gib:.2f} GiB  ({took:.0f} s to measure)",
                flush=True,
            )
            rows = rows_of(case, found, matmul)
            write({key: row for key, row in rows.items() if key not in written})
            written |= rows
    if left_out:
        print(f"  left out for want of time: {', '.join(left_out)}", flush=True)
    return failures


def make_case(name: str, options: Options, device: torch.device, scratch: Path) -> Case:
    """Model, data and batch of a size. Raises ConfigError for a name that is none."""
    try:
        depth, width = map(int, name.split("x"))
    except ValueError:
        raise ConfigError("--sizes", got=name, expected=f"LAYERSxWIDTH, such as {', '.join(SIZES)}") from None
    heads = max(1, width // 64)
    size = SIZES.get(name) or Size(heads, heads, options.side)
    model = DiTConfig(
        width=width,
        depth=depth,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        time_every=min(4, depth),
    )
    rows = options.rows or 1
    toy = device.type == "cpu"
    data = write_latents(
        scratch / "data", channels=options.channels, side=size.side, episodes=8 if toy else 64, frames=64
    )
    case = Case(
        *(name, model, options.channels, size.side, options.frames, rows, device, data),
        *(options.compile, scratch, options.accumulate),
    )
    return case if options.rows else replace(case, rows=rows_that_fit(case))


def rows_that_fit(case: Case) -> int:
    """As many clips as the plan finds room for in 85 % of the GPU, at most 64; 2 on a CPU."""
    if case.device.type == "cpu":
        return 2
    room = 0.85 * torch.cuda.get_device_properties(case.device).total_memory / 2**30
    plan = planner(case)
    return max(1, bisect_right(range(1, MOST_ROWS + 1), room, key=lambda rows: plan(rows).total_gib))


def planner(case: Case) -> Callable[[int], Any]:
    """What the plan says of our loop on this case with so many clips; the model is traced once."""
    subject = Subject(
        case.model,
        frame_shape(case.channels, case.side),
        case.streams,
        muon=False,
        bf16=case.bf16,
        compiled=case.compiled,
    )
    subject = replace_objective(subject)
    name = torch.cuda.get_device_name().lower() if case.bf16 else "h100"
    gpu = next((gpu for key, gpu in GPUS.items() if key in name.replace(" ", "")), GPUS["h100"])
    return lambda rows: estimate(subject, Cluster(gpu), Layout("ddp", rows, case.accumulate))


def replace_objective(subject: Subject) -> Subject:
    """As measured: before the bootstrap begins."""
    return replace(subject, objective=replace(subject.objective, bootstrap_fraction=0.0))


def measure(case: Case, variant: Variant, options: Options) -> Measured:
    """Median step after warming up, and the parts of five more; halves the batch when memory is short."""
    while True:
        stepper: Stepper | None = None
        try:
            release()
            stepper = build(case, variant)
            return timed_steps(case, stepper, options)
        except torch.OutOfMemoryError:
            if case.rows == 1:
                raise
            print(f"  {variant}: out of memory with {case.rows} clips, half of them now", flush=True)
            leave_launch()
            case = replace(case, rows=case.rows // 2)
        finally:
            if stepper is not None:
                stepper.close()
            del stepper


def timed_steps(case: Case, stepper: Stepper, options: Options) -> Measured:
    def nothing(name: str) -> None:
        pass

    for _ in range(options.warmup):
        stepper.step(nothing)
    synchronize(case.device)
    gc.collect()
    gc.disable()
    wait = getattr(stepper, "wait_s", None)
    ends_of_steps, began = Marks(case.device), time.perf_counter()
    ends_of_steps("start")
    for _ in range(options.steps):
        stepper.step(nothing)
        ends_of_steps("step")
    steps = [seconds for _, seconds in ends_of_steps.seconds()]
    elapsed = time.perf_counter() - began
    waited = None if wait is None else (getattr(stepper, "wait_s") - wait) / elapsed  # noqa: B009
    totals: dict[str, list[float]] = {}
    for _ in range(5):
        marks = Marks(case.device)
        marks("start")
        stepper.step(marks)
        sums: dict[str, float] = {}
        for part, seconds in marks.seconds():
            sums[part] = sums.get(part, 0.0) + seconds
        for part, seconds in sums.items():
            totals.setdefault(part, []).append(seconds)
    gc.enable()
    return Measured(
        median(steps),
        {part: median(values) for part, values in totals.items()},
        case.rows,
        waited,
        memory_gib(case.device),
    )


def rows_of(case: Case, found: Mapping[Any, Measured], matmul: float) -> dict[str, tuple[float, str]]:
    """Everything that is known of a size, by name."""
    kind = "train" if case.device.type == "cuda" else "train.cpu"
    with torch.device("meta"):
        model = CausalDiT(case.model, frame_shape(case.channels, case.side))
    speed = {name: tokens_per_step(case, one.rows) / one.step_s for name, one in found.items()}
    flops = training_flops(model, case.streams) / (case.streams.num_queries * model.tokens_per_frame)
    rows: dict[str, tuple[float, str]] = {}
    per_step = f", {case.accumulate} micro-batches a step" if case.accumulate > 1 else ""
    for name, value in speed.items():
        suffix = case.label if name == "ours" else f"{case.label}.{name}"
        rows[f"{kind}.tok_s.{suffix}"] = (round(value, 1), f"tokens/s{per_step}")
        rows[f"{kind}.memory_gib.{suffix}"] = (round(found[name].memory_gib, 3), "GiB")
        tflops = value * flops / 1e12
        if case.device.type == "cuda" and name != "naive_full":
            rows[f"train.mfu.{suffix}"] = (round(100 * tflops / PEAK_TFLOPS, 2), f"%{per_step}")
        if name != "naive_full":
            rows[f"{kind}.matmul_share.{suffix}"] = (round(100 * tflops / matmul, 2), "%")
        for part, seconds in found[name].parts_s.items():
            rows[f"{kind}.part_ms.{suffix}.{part}"] = (round(1e3 * seconds, 3), "ms")
    if ours := found.get("ours"):
        if ours.wait_share is not None:
            rows[f"{kind}.data_wait.{case.label}"] = (round(100 * ours.wait_share, 3), "%")
        for name in ("naive", "naive_compiled", "naive_full"):
            if name in speed:
                rows[f"{kind}.ratio_{name}.{case.label}"] = (round(speed["ours"] / speed[name], 3), "x")
        if case.device.type == "cuda":
            plan = planner(case)(ours.rows)
            rows[f"plan.memory_error.{case.label}"] = (_error(plan.allocated_gib, ours.memory_gib), "%")
            rows[f"plan.time_error.{case.label}"] = (_error(plan.seconds, ours.step_s), "%")
    if "bare" in speed:
        for name in ("ours", "zero1", "zero2", "zero3", "fsdp2"):
            if name in speed:
                label = f"deepspeed_ratio.{name}" if name.startswith("zero") else f"bare_ratio.{name}"
                rows[f"{kind}.{label}.{case.label}"] = (round(speed[name] / speed["bare"], 3), "x")
    return rows


def _error(predicted: float, measured: float) -> float:
    return round(100 * (predicted / measured - 1), 2)


def tokens_per_step(case: Case, rows: int | None = None) -> int:
    """Tokens that the network reads, of both streams."""
    shape = frame_shape(case.channels, case.side)
    special = 1 + shape.actions_per_frame + case.model.num_registers
    patches = shape.views * (case.side // case.model.patch_size) ** 2
    return case.accumulate * (rows or case.rows) * case.streams.num_queries * (patches + special)


def matmul_tflops(device: torch.device) -> float:
    """The best of a few products of 8192^3 in bfloat16, or of 1024^3 in float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        marks = Marks(device)
        marks("start")
        torch.mm(a, b)
        marks("product")
        best = min(best, *(seconds for _, seconds in marks.seconds()))
    return 2 * size**3 / best / 1e12


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_gib(device: torch.device) -> float:
    """Peak of what was allocated on the GPU since the last `release`, or of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def recover() -> None:
    """After a failure: leave the process group that it may have been in, and drop its memory."""
    leave_launch()
    release()


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/train.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
