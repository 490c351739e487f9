"""Measure the convolutional tokenizer: training rate, quality after a budget, robustness, encode and decode.

    python tools/bench/tokenizer.py [--seconds 40] [--dataset DIR] [--config.widths 96 160 256 ...]

It trains on the planar world, or on a video dataset that `vidworld shard` made, and measures on episodes held
out. The budget is in CPU seconds on a CPU, so that other work disturbs little, and in seconds on a GPU.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from table import add_rows, cpu_name
from torch import Tensor

from vidworld.config import parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import UserError
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.tokenizers.base import to_unit_range
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig

NARROW = ConvTokenizerConfig(widths=(32, 48, 64), encoder_blocks=(0, 1, 1), decoder_blocks=(1, 1, 1))
NOISES = (0.02, 0.1, 0.3)


@dataclass(frozen=True)
class Options:
    """Train a tokenizer for a budget and measure it."""

    seconds: float = 40.0
    """Training time: CPU seconds on a CPU, seconds on a GPU."""
    dataset: Path | None = None
    """A video dataset; default: the planar world at 64x64."""
    batch_frames: int = 4
    learning_rate: float = 2e-3
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    config: ConvTokenizerConfig = field(default_factory=lambda: NARROW)
    name: str = "tokenizer.planar64"
    """First part of the figures' names."""
    out: Path | None = Path("benchmarks/tokenizer.json")
    """Rows are added here; `None`: only print."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Train, measure, print and write the rows."""
    options = parse(Options, arguments, prog=prog)
    torch.set_num_threads(options.threads)
    train_NHWC, held_NHWC = frames_of(options.dataset)
    tokenizer, iterations = train(options, train_NHWC)
    rows = {
        "it_per_s": (iterations / options.seconds, "it/s"),
        "train_images_per_s": (iterations * options.batch_frames / options.seconds, "images/s"),
        **measure(options, tokenizer, train_NHWC, held_NHWC),
    }
    for name, (value, unit) in rows.items():
        print(f"{options.name}.{name:<24} {value:10.2f} {unit}")
    if options.out is not None:
        device = torch.cuda.get_device_name() if options.device == "cuda" else f"{cpu_name()}, CPU seconds"
        add_rows(
            options.out,
            {f"{options.name}.{name}": (round(value, 3), unit) for name, (value, unit) in rows.items()},
            device=device,
            command=" ".join(["python", "tools/bench/tokenizer.py", *arguments]),
            packages=("torch",),
        )


def frames_of(dataset_dir: Path | None) -> tuple[Tensor, Tensor]:
    """Training and held-out frames [N, H, W, 3] uint8."""
    if dataset_dir is None:
        source = PlanarSource(83, config=PlanarConfig(frames=48, size=64))
        videos = [
            np.stack(list(source.read(episode).views["top"].frames())) for episode in source.episode_ids()
        ]
        return torch.from_numpy(np.concatenate(videos[:80])), torch.from_numpy(np.concatenate(videos[80:]))
    dataset = ShardDataset.open(dataset_dir)
    found: list[Tensor] = []
    for split in ("train", "val"):
        episodes = (dataset.read(sample.key).video or {} for sample in dataset.manifest.samples(split))
        found.append(
            torch.from_numpy(np.concatenate([video for views in episodes for video in views.values()]))
        )
    return found[0], found[1]


def batch(frames_NHWC: Tensor, rows: Tensor | slice, device: str) -> Tensor:
    """Frames as videos of one frame [N, 1, 3, H, W] in [-1, 1]."""
    return to_unit_range(frames_NHWC[rows].to(device)).movedim(-1, -3)[:, None]


def train(options: Options, frames_NHWC: Tensor) -> tuple[ConvTokenizer, int]:
    """AdamW, short warm-up, linear decay over the last 30 % of the budget."""
    torch.manual_seed(0)
    device = options.device
    clock = time.perf_counter if device == "cuda" else time.process_time
    tokenizer = ConvTokenizer(options.config).to(device)
    optimizer = torch.optim.AdamW(
        tokenizer.parameters(), lr=0.0, weight_decay=1e-4, betas=(0.9, 0.95), fused=True
    )
    generator = torch.Generator(device).manual_seed(0)
    frames_NHWC = frames_NHWC.to(device)

    def step() -> None:
        rows = torch.randint(len(frames_NHWC), (options.batch_frames,), generator=generator, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = tokenizer.training_loss(batch(frames_NHWC, rows, device), generator)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()

    if device == "cuda":
        tokenizer.encoder.compile(dynamic=False)
        tokenizer.decoder.compile(dynamic=False)
    for _ in range(3):
        step()
    iterations, started = 0, clock()
    while (progress := (clock() - started) / options.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, progress / 0.05 + 0.01, (1 - progress) / 0.3)
        step()
        iterations += 1
        if device == "cuda" and iterations % 20 == 0:
            torch.cuda.synchronize()
    return tokenizer.eval().requires_grad_(False), iterations


def measure(
    options: Options, tokenizer: ConvTokenizer, train_NHWC: Tensor, held_NHWC: Tensor
) -> dict[str, tuple[float, str]]:
    """PSNR of held-out frames through the tokenizer, with noise on the latents, and of the mean picture."""
    device = options.device
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train_NHWC), generator=generator)
    tokenizer.measure_statistics(batch(train_NHWC, order[:512], device).split(64))
    truth = batch(held_NHWC, slice(None, 512), device)
    latents, encoding = timed(lambda: tokenizer.encode(truth), device)
    decoded, decoding = timed(lambda: tokenizer.decode(latents), device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    mean = batch(train_NHWC, order[:1024], device).mean(0, keepdim=True)
    return {
        "psnr": (psnr(decoded, truth), "dB"),
        **{
            f"psnr_noise_{scale:g}": (psnr(tokenizer.decode(latents + scale * noise), truth), "dB")
            for scale in NOISES
        },
        "psnr_mean_picture": (psnr(mean.expand_as(truth), truth), "dB"),
        "encode_images_per_s": (len(truth) / encoding, "images/s"),
        "decode_images_per_s": (len(truth) / decoding, "images/s"),
    }


def timed(function: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    """The result, and the seconds of a second run: CPU seconds on a CPU."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    started = clock()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, clock() - started


def psnr(video: Tensor, truth: Tensor) -> float:
    """Mean PSNR in dB over frames in [-1, 1]."""
    squared = (video.clamp(-1, 1) - truth).square().flatten(-3).mean(-1)
    return float((10 * torch.log10(4 / squared.clamp(min=1e-10))).mean())


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/tokenizer.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
