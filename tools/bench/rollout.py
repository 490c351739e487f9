"""Measure imagined camera frames per second, denoised, committed and decoded, and the cost of the noise.

    python tools/bench/rollout.py [--batches 1 64] [--steps 1 4] [--frames 24] [--device cuda]

Weights are random: speed does not depend on them. The window is full from the first measured frame on.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.contract import ActionContract, Statistics
from vidworld.errors import UserError
from vidworld.lab.planar import EMBODIMENT
from vidworld.model.dit import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.world.build import build
from vidworld.world.noise import CONTEXT, START, NoiseStream
from vidworld.world.prompt import Prompt
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.world import WorldModel


@dataclass(frozen=True)
class Options:
    """Time rollouts of a world with random weights."""

    model: DiTConfig = field(default_factory=DiTConfig)
    tokenizer: ConvTokenizerConfig = field(default_factory=ConvTokenizerConfig)
    height: int = 96
    width: int = 128
    batches: tuple[int, ...] = (1, 64)
    """Samples stepped together."""
    steps: tuple[int, ...] = (1, 4)
    """Denoising steps a frame, K."""
    frames: int = 24
    """Frames of each measured rollout."""
    decode: bool = True
    device: Literal["cpu", "cuda"] = "cpu"
    autocast: bool = True
    threads: int = 1
    out: Path | None = Path("benchmarks/rollout.json")
    """Rows are added here; `None`: only print."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure, print and write the rows."""
    options = parse(Options, arguments, prog=prog)
    torch.set_num_threads(options.threads)
    world = make_world(options)
    kind = "fps" if options.device == "cuda" else "cpu_fps"
    name = f"rollout.{kind}.{options.model.depth}x{options.model.width}"
    rows: dict[str, tuple[float, str]] = {}
    for batch in options.batches:
        for steps in options.steps:
            per_s = frames_per_s(world, batch, replace(world.spec.sampler, steps=steps), options)
            rows[f"{name}.b{batch}.k{steps}"] = (round(per_s, 2), "frames/s")
        stream = NoiseStream(0, torch.arange(batch, device=options.device))
        draw = partial(stream.frames, world.spec.shape, [0], START, CONTEXT)
        seconds = timed(draw, options.device, 10)
        rows[f"rollout.{kind}.noise_ms.b{batch}"] = (round(1e3 * seconds, 3), "ms a frame")
    for key, (value, unit) in rows.items():
        print(f"{key:<40} {value:12.2f} {unit}")
    if options.out is not None:
        device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
        command = " ".join(["python", "tools/bench/rollout.py", *arguments])
        add_rows(options.out, rows, device=device, command=command, packages=("torch",))


def make_world(options: Options) -> WorldModel:
    """A world of the planar arm's embodiment with fresh weights."""
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(options.tokenizer)
    generator = np.random.default_rng(0)
    contract = ActionContract(
        EMBODIMENT.embodiment,
        EMBODIMENT.rate_hz,
        EMBODIMENT.action,
        EMBODIMENT.proprio,
        Statistics.of(generator.uniform(-1, 1, (100, len(EMBODIMENT.action)))),
        Statistics.of(generator.uniform(-1, 1, (100, len(EMBODIMENT.proprio)))),
    )
    stride = tokenizer.spatial_stride
    shape = FrameShape.from_contracts(
        [contract],
        views=1,
        channels=tokenizer.latent_channels,
        height=options.height // stride,
        width=options.width // stride,
    )
    spec = WorldSpec(
        options.model, shape, ("top",), options.height, options.width, 10.0, (contract,), SamplerConfig()
    )
    world = build(spec, tokenizer, autocast=options.autocast)
    return world.requires_grad_(False).eval().to(options.device)


@torch.no_grad()
def frames_per_s(world: WorldModel, batch: int, sampler: SamplerConfig, options: Options) -> float:
    """Frames of all samples together, from a prompt that fills the window."""
    spec = world.spec
    frames = np.zeros((sampler.window, spec.height, spec.width, 3), np.uint8)
    proprio = np.zeros((sampler.window, len(spec.contracts[0].proprio)))
    state = world.reset(Prompt(frames, proprio), num_samples=batch, sampler=sampler)
    actions = np.zeros((options.frames, len(spec.contracts[0].action)))
    seconds = timed(
        lambda: world.rollout(state, actions, sampler=sampler, decode=options.decode), options.device, 1
    )
    return batch * options.frames / seconds


def timed(function: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds a call, after one to warm up."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    function()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/rollout.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
