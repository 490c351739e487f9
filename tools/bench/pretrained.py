"""Measure what pretrained autoencoders weigh and what their streams remember, by diffusers' default configs.

    python tools/bench/pretrained.py [--seconds]

Weights are random: sizes do not depend on them. Stream memory is that of one video in float32, a pixel of a
frame; `--seconds` also times encoding and decoding of 9 frames there, on this device.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import require
from vidworld.tokenizers.pretrained import wrap
from vidworld.tokenizers.streaming import StreamingTokenizer, StreamState, streaming

WAN22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1": ("AutoencoderKLWan", {}),
    "wan2.2": ("AutoencoderKLWan", WAN22),
    "qwen": ("AutoencoderKLQwenImage", {}),
    "cosmos": ("AutoencoderKLCosmos", {}),
    "ltx": ("AutoencoderKLLTXVideo", {"decoder_causal": True}),
    "hunyuan15": ("AutoencoderKLHunyuanVideo15", {}),
    "dc": ("AutoencoderDC", {"encoder_block_types": STAGES, "decoder_block_types": STAGES}),
}
LATENT_FRAMES, LATENT_SIZE = 3, 4


@dataclass(frozen=True)
class Options:
    """Measure the autoencoders in the table of docs/tokenizers.md."""

    seconds: bool = False
    """Time encoding and decoding too; Wan 2.2 takes a minute on a CPU core."""
    threads: int = 1
    out: Path | None = Path("benchmarks/pretrained.json")
    """Rows are added here; `None`: only print."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure, print and write the rows."""
    options = parse(Options, arguments, prog=prog)
    torch.set_num_threads(options.threads)
    diffusers = require("diffusers", "train")
    rows: dict[str, tuple[float, str]] = {}
    for name, (cls, config) in MODELS.items():
        with torch.device("meta"):
            model = getattr(diffusers, cls)(**config)
        count = sum(parameter.numel() for parameter in model.parameters())
        rows[f"{name}.parameters"] = (count / 1e6, "M")
        if cls == "AutoencoderKLWan":
            model = getattr(diffusers, cls)(**config)
            tokenizer = streaming(wrap(model, cls, model.config))
            assert tokenizer is not None
            rows |= {f"{name}.{row}": value for row, value in measure(tokenizer, options.seconds).items()}
    for name, (value, unit) in rows.items():
        print(f"pretrained.{name}: {value:.4g} {unit}")
    if options.out is not None:
        add_rows(
            options.out,
            {f"pretrained.{name}": (round(value, 3), unit) for name, (value, unit) in rows.items()},
            device=cpu_name(),
            command=" ".join([prog, *arguments]),
            packages=("torch", "diffusers"),
        )


@torch.no_grad()
def measure(tokenizer: StreamingTokenizer, seconds: bool) -> dict[str, tuple[float, str]]:
    """Memory of a stream after some frames."""
    size = LATENT_SIZE * tokenizer.spatial_stride
    video_BTCHW = torch.rand(1, 1 + (LATENT_FRAMES - 1) * tokenizer.time_stride, 3, size, size) * 2 - 1
    began = time.perf_counter()
    encoder, latents = tokenizer.encode_next(tokenizer.start(1), video_BTCHW)
    between = time.perf_counter()
    decoder, _ = tokenizer.decode_next(tokenizer.start(1), latents)
    rows = {
        "encoder_bytes_pixel": (_bytes(encoder) / size**2, "B"),
        "decoder_bytes_pixel": (_bytes(decoder) / size**2, "B"),
    }
    if seconds:
        rows[f"encode_s.{size}px"] = (between - began, "s")
        rows[f"decode_s.{size}px"] = (time.perf_counter() - between, "s")
    return rows


def _bytes(state: StreamState) -> int:
    return sum(feature.numel() * feature.element_size() for feature in state.features.values())


if __name__ == "__main__":
    main(sys.argv[1:], "python tools/bench/pretrained.py")
