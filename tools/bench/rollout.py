"""Measure imagined camera frames per second: the plain world and the engine, side by side in one run.

    python tools/bench/rollout.py --device cuda --budget-s 540      # what GPUs are steered by
    python tools/bench/rollout.py --cases lab.b1.k1         # the world that comes along, on one core

Weights are random but for `lab`: speed does not depend on them. Every row is written as soon as it is
measured, first what counts most: the fastest variant of every case, then pixels and latency, then the other
variants. A frame is denoised and committed; rows ending in `.decoded` also make its pixels, nothing is
encoded. The window is full from the first measured frame on, and the first rollout of each (compilation,
capture) is not measured.
"""

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rollout_cases import SHIPPED, SIZES, Case, full_prompt, make_world
from rollout_variants import Plain, Variant, runner
from roofline import Machine, frames_per_s_bound, machine
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import UserError
from vidworld.world.engine import RolloutEngine
from vidworld.world.load import load
from vidworld.world.noise_ahead import NoiseAhead
from vidworld.world.spec import SamplerConfig
from vidworld.world.state import WorldState
from vidworld.world.world import WorldModel

GPU_CASES = ("24x1024.b1.k4", "16x512.b128.k4", "16x512.b256.k1", "12x384.b1.k1")
CPU_CASES = ("12x384.b1.k1", "8x256.b1.k1")
GPU_VARIANTS: tuple[Variant, ...] = ("compiled", "lean", "engine", "plain")
CPU_VARIANTS: tuple[Variant, ...] = ("engine", "plain", "half", "compiled")
"""In the order of what counts: the first is measured for all cases before anything else is."""
PROFILED_FRAMES, LONGEST = 8, 12
PARTS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "triton_mm", "triton_tem"),
    "copy": ("memcpy", "memset", "index_copy", "copy_kernel", "catarray"),
    "elementwise": ("triton_", "elementwise", "reduce", "softmax", "norm"),
}
"""Part -> what is in the names of its kernels; the first that fits."""


@dataclass(frozen=True)
class Options:
    """Time rollouts of worlds with random weights."""

    cases: tuple[str, ...] = ()
    """SIZE.bBATCH.kSTEPS each, of the sizes above; default: those of the device."""
    variants: tuple[Variant, ...] = ()
    """Default: compiled, lean, engine and plain; on a CPU engine, plain, half and compiled."""
    window: int = 16
    frames: int = 32
    """Frames of each measured rollout."""
    repeats: int = 5
    latency_steps: int = 100
    """Steps whose time from action to pixels is taken, at batch 1."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    pixels: bool = True
    """Also measure with pixels: speed, latency, and how far they are from the plain world's."""
    profile: bool = False
    """Also tell on a GPU what the time of a frame goes to: rows `rollout.part_ms.<case>.<variant>.<part>`."""
    budget_s: float = 540.0
    """Nothing new begins after so many seconds."""
    out: Path | None = Path("benchmarks/rollout.json")
    """Rows are added here; `None`: only print."""


class Rows:
    """Prints and saves each figure at once, and knows when time is up."""

    def __init__(self, options: Options, arguments: Sequence[str]) -> None:
        self.options, self.began = options, time.monotonic()
        self.device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
        self.command = " ".join(["python", "tools/bench/rollout.py", *arguments])

    def add(self, name: str, value: float, unit: str) -> None:
        """One figure."""
        print(f"{name:<46} {value:14,.3f} {unit}", flush=True)
        if self.options.out is not None:
            row = {name: (round(value, 4), unit)}
            add_rows(self.options.out, row, device=self.device, command=self.command, packages=("torch",))

    def has_time(self, what: str) -> bool:
        """Whether there is time for something new; says so if not."""
        left = self.options.budget_s - (time.monotonic() - self.began)
        if left <= 0:
            print(f"left out for want of time: {what}", flush=True)
        return left > 0


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure, print and write the rows."""
    options = parse(Options, arguments, prog=prog)
    gpu = options.device == "cuda"
    cases = [Case.parse(text) for text in options.cases or (GPU_CASES if gpu else CPU_CASES)]
    # On a GPU the processor only makes the weights.
    torch.set_num_threads(min(16, os.cpu_count() or 1) if gpu else options.threads)
    rows = Rows(options, arguments)
    limits = machine(torch.device(options.device))
    rates = f"matmul {limits.flops / 1e12:.3g} TFLOP/s, copy {limits.bytes_per_s / 1e9:.4g} GB/s"
    print(f"{rows.device}: {rates}", flush=True)
    bench = Bench(options, rows, limits)
    variants = options.variants or (GPU_VARIANTS if gpu else CPU_VARIANTS)
    for variant in variants:
        measured = []
        if gpu:
            # Which kernel computes attention is decided when a graph is compiled.
            torch.backends.cuda.enable_cudnn_sdp(variant != "flash")
            torch.compiler.reset()
        for case in cases:
            if rows.has_time(f"{case.name}.{variant}"):
                bench.measure(case, variant, decoded=options.pixels and variant != variants[0])
                measured.append(case)
        if variant == variants[0] and options.pixels:
            for case in measured:
                if rows.has_time(f"{case.name}.{variant} with its pixels"):
                    bench.look(case, variant)
    for case in cases if options.pixels else ():
        if rows.has_time(f"noise of {case.name}"):
            bench.noise(case, compiled=bool(set(variants) - {"plain", "engine", "half"}))


class Bench:
    """Worlds, states and engines of the cases, made when they are asked for."""

    def __init__(self, options: Options, rows: Rows, limits: Machine) -> None:
        self.options, self.rows, self.limits = options, rows, limits
        self.gpu = options.device == "cuda"
        self.kind = "fps" if self.gpu else "cpu_fps"
        self._worlds: dict[str, WorldModel] = {}
        self._states: dict[Case, WorldState] = {}
        self._engines: dict[Case, RolloutEngine | Plain] = {}
        self._best: dict[Case, float] = {}

    def world(self, case: Case) -> WorldModel:
        """Of the case's size."""
        if case.size not in self._worlds:
            began = time.monotonic()
            shipped, device = case.size == SHIPPED, self.options.device
            self._worlds[case.size] = (
                load(SHIPPED, device)
                if shipped
                else make_world(*SIZES[case.size], self.options.window, device)
            )
            print(f"{case.size}: made in {time.monotonic() - began:.0f} s", flush=True)
        return self._worlds[case.size]

    def sampler(self, case: Case) -> SamplerConfig:
        """The world's own in as many steps as asked."""
        return replace(self.world(case).spec.sampler, steps=case.steps)

    def state(self, case: Case) -> WorldState:
        """With a full window; the limit of the machine is said with it."""
        if case not in self._states:
            world, sampler = self.world(case), self.sampler(case)
            self._states[case] = world.reset(
                full_prompt(world.spec, sampler), num_samples=case.batch, sampler=sampler
            )
            bound = frames_per_s_bound(
                world.model, case.batch, case.steps, sampler.window, self.limits, half=self.gpu
            )
            unit = "frames/s that this run's matmul and copy allow"
            self.rows.add(f"rollout.{self.kind}.{case.name}.roofline", bound, unit)
        return self._states[case]

    def actions(self, case: Case, frames: int) -> np.ndarray:
        """The middle of what was recorded, frame after frame."""
        contract = self.world(case).spec.contracts[0]
        return np.tile(np.array(contract.action_statistics.mean, np.float32), (frames, 1))

    def unit(self, case: Case, decoded: bool) -> str:
        """What a frame is here."""
        unit = "frames/s; commit in, " + ("decode in, encode out" if decoded else "decode and encode out")
        tokens = self.world(case).model.tokens_per_frame
        unit += f", window {self.sampler(case).window} full, {tokens} tokens a frame"
        return unit + ("" if self.gpu else f", CPU seconds, {self.options.threads} thread(s)")

    @torch.no_grad()
    def measure(self, case: Case, variant: Variant, *, decoded: bool) -> None:
        """Frames a second of a variant, without pixels and with `decoded` also with them."""
        began, state = time.monotonic(), self.state(case)
        run = runner(variant, self.world(case), self.sampler(case))
        # The plain world only says where one began: a few frames of it do.
        short = self.gpu and variant == "plain"
        options = replace(self.options, repeats=2) if short else self.options
        actions = self.actions(case, 8 if short else self.options.frames)
        name = f"rollout.{self.kind}.{case.name}"
        for pixels in (False, True)[: 1 + decoded]:
            per_s = frames_per_s(run, state, actions, pixels, options)
            what = self.unit(case, pixels)
            self.rows.add(f"{name}.{variant}" + ".decoded" * pixels, per_s, what)
            exact = variant not in ("plain", "fp8", "fp8-kernels")  # fp8 rounds more: it is told apart
            if exact and not pixels and per_s > self._best.get(case, 0.0):
                self._best[case] = per_s
                self.rows.add(name, per_s, what)
            if case.size == SHIPPED and variant == "engine" and pixels:
                self.rows.add(f"rollout.{self.kind}.flagship", per_s, what)
        print(f"{case.name} {variant}: {time.monotonic() - began:.0f} s with warming up", flush=True)
        if decoded:
            self._check(case, variant, run)
        elif self.options.pixels:
            self._engines[case] = run
        else:
            self._rough_check(case, variant, run)

    def _rough_check(self, case: Case, variant: Variant, run: "RolloutEngine | Plain") -> None:
        """How far latents are from the plain world's, which costs less than pixels."""
        state, actions = self.state(case), self.actions(case, 2)
        got, want = (
            one.rollout(state, actions, decode=False, check=False).latents_BTVChw.double()
            for one in (run, Plain(self.world(case), self.sampler(case)))
        )
        off = float((got - want).norm() / want.norm())
        name = f"rollout.{self.kind}.{case.name}.{variant}.latents_off"
        self.rows.add(name, off, "of the latents' norm over 2 frames, to plain")
        if self.options.profile and self.gpu:
            self._profile(case, variant, run)

    @torch.no_grad()
    def look(self, case: Case, variant: Variant) -> None:
        """What a variant that was measured without pixels takes with them, and whether they are right."""
        run = self._engines.pop(case)
        per_s = frames_per_s(
            run, self.state(case), self.actions(case, self.options.frames), True, self.options
        )
        name = f"rollout.{self.kind}.{case.name}.{variant}.decoded"
        self.rows.add(name, per_s, self.unit(case, decoded=True))
        self._check(case, variant, run)
        if self.options.profile and self.gpu and self.rows.has_time(f"profile of {case.name}"):
            self._profile(case, variant, run)

    def _profile(self, case: Case, variant: Variant, run: "RolloutEngine | Plain") -> None:
        """Milliseconds a frame of the kernels of each part, and the longest kernels."""
        state, actions = self.state(case), self.actions(case, PROFILED_FRAMES)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            run.rollout(state, actions, decode=False, check=False)
            torch.cuda.synchronize()
        taken = {
            event.key: event.self_device_time_total / 1e3 / len(actions) for event in found.key_averages()
        }
        parts: dict[str, float] = {}
        for kernel, ms in taken.items():
            parts[part_of(kernel)] = parts.get(part_of(kernel), 0.0) + ms
        for part, ms in parts.items():
            self.rows.add(f"rollout.part_ms.{case.name}.{variant}.{part}", ms, "ms a frame, sum of kernels")
        for kernel, ms in sorted(taken.items(), key=lambda one: -one[1])[:LONGEST]:
            print(f"    {ms:8.4f} ms  {kernel[:110]}", flush=True)

    def _check(self, case: Case, variant: Variant, run: "RolloutEngine | Plain") -> None:
        """How far from the plain world, and at batch 1 the time from an action to its pixels."""
        world, state, actions = self.world(case), self.state(case), self.actions(case, 8)
        if isinstance(run, RolloutEngine):
            unit = "of 255: mean difference of pixels over 8 frames, to plain"
            name = f"rollout.{self.kind}.{case.name}.{variant}.difference"
            self.rows.add(name, difference(world, run, state, actions), unit)
        if case.batch == 1 and self.rows.has_time(f"latency of {case.name}.{variant}"):
            options = replace(self.options, latency_steps=20) if variant == "plain" else self.options
            for quantile, value in latency_ms(run, state, actions[0], options).items():
                latency = f"rollout.latency_ms.{case.name}.{variant}.{quantile}"
                self.rows.add(latency, value, "ms from an action to its pixels, both on the host")

    @torch.no_grad()
    def noise(self, case: Case, *, compiled: bool) -> None:
        """What drawing the noise of a frame takes."""
        world, state = self.world(case), self.state(case)
        shape, options = world.spec.shape, self.options
        noise = NoiseAhead(shape, 0, case.batch, dtype=world.dtype, device=world.device, compile=compiled)

        def draw() -> None:
            noise.load(0, state.sample_ids_B)
            noise.go_to(0)

        per_frame = statistics.median(timed(draw, options, options.repeats)) / noise.ahead
        name = f"rollout.{self.kind}.noise_ms.{case.name}"
        self.rows.add(name, 1e3 * per_frame, f"ms a frame, {noise.ahead} at once")


def part_of(kernel: str) -> str:
    """What a CUDA kernel is for, by its name."""
    name = kernel.lower()
    for part, words in PARTS.items():
        if any(word in name for word in words):
            return part
    return "other"


def frames_per_s(
    run: "RolloutEngine | Plain", state: WorldState, actions: np.ndarray, decode: bool, options: Options
) -> float:
    """Frames of all samples together: median of the repeats."""
    seconds = timed(lambda: run.rollout(state, actions, decode=decode, check=False), options, options.repeats)
    middle = statistics.median(seconds) if options.device == "cuda" else min(seconds)
    return len(state) * len(actions) / middle


def latency_ms(
    run: "RolloutEngine | Plain", state: WorldState, action: np.ndarray, options: Options
) -> dict[str, float]:
    """Time from an action on the host to its picture on the host."""
    run.load(state)
    taken = []
    for _ in range(options.latency_steps + 5):
        began = clock(options)
        seen = run.step(action)
        assert seen.video_BVHWC is not None
        seen.video_BVHWC.cpu()
        taken.append(1e3 * (clock(options) - began))
    taken = sorted(taken[5:])
    return {"p50": taken[len(taken) // 2], "p99": taken[min(len(taken) - 1, round(0.99 * len(taken)))]}


def difference(world: WorldModel, engine: RolloutEngine, state: WorldState, actions: np.ndarray) -> float:
    """Mean difference of pixels between the engine and the plain world."""
    videos = [
        run.rollout(state, actions, decode=True, check=False).video_BTVHWC
        for run in (engine, Plain(world, engine.sampler))
    ]
    first, second = (video for video in videos if video is not None)
    return float((first.float() - second.float()).abs().mean())


def timed(function: Callable[[], object], options: Options, repeats: int) -> list[float]:
    """Seconds of each call, after one to warm up; on a CPU, which others use too, CPU seconds a thread."""

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    function()
    wait()
    seconds = []
    for _ in range(repeats):
        started = clock(options)
        function()
        wait()
        seconds.append(clock(options) - started)
    return seconds


def clock(options: Options) -> float:
    """Seconds: of the wall on a GPU, of the processor on a CPU, which others use too."""
    return time.perf_counter() if options.device == "cuda" else time.process_time() / options.threads


if __name__ == "__main__":
    warnings.simplefilter("always")
    try:
        main(sys.argv[1:], "python tools/bench/rollout.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
