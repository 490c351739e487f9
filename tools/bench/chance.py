"""What do a world's samples differ by, and do their parts agree?

    python tools/bench/chance.py lab --data data/lab/container data/lab/smoke
    python tools/bench/chance.py runs/before --label before --data data/lab/container

Rows `chance.<label>.<kind>`: `.spread` of latents (root mean square over frames, samples about their mean);
the same with a tenth of the noise that frames are denoised from (`.without_start`) or of the network's own
(`.without_network`); `.coherence`, how much of the spread is in means over 4 x 4 latents: 1 where neighbours
differ independently, 4 where they differ alike; `.coherence.truth` of what came about the same mean, which is
what samples should have. Shapes: M samples, T frames, X latents, C channels, h w pixels of latents.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from table import add_rows, cpu_name
from torch import Tensor
from uncertainty_worlds import Imaginer, Window, encode, read_windows

from vidworld.config import parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, UserError
from vidworld.evaluation.lab_truth import kind_of
from vidworld.world.load import load
from vidworld.world.noise_scale import LEAST, NoiseScale
from vidworld.world.world import WorldModel

COARSE = 4


@dataclass(frozen=True)
class Options:
    """Measure what samples differ by."""

    run: tyro.conf.Positional[Path]
    """Run, export, or the name of one that comes along; its first member."""
    data: tuple[Path, ...] = ()
    """Datasets of the lab, one a kind."""
    label: str = "lab"
    episodes: int = 4
    samples: int = 8
    context: int = 8
    frames: int = 32
    device: str | None = None
    out: Path = Path("benchmarks/chance.json")


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure each dataset and add the rows."""
    options = parse(Options, arguments, prog=prog)
    if not options.data:
        raise ConfigError("--data", got="nothing", expected="datasets of the lab")
    world = load(options.run, options.device, calibrated=False)
    rows: dict[str, tuple[float, str]] = {}
    for location in options.data:
        dataset = ShardDataset.open(location)
        sample = dataset.manifest.samples("val")[0]
        kind = kind_of(dataset.meta(sample.key), where=location)
        windows = read_windows(
            dataset,
            kind,
            split="val",
            half=None,
            context=options.context,
            frames=options.frames,
            count=options.episodes,
        )
        for name, value in measure(world, windows, options.samples).items():
            rows[f"chance.{options.label}.{kind}.{name}"] = (value, f"{len(windows)} episodes")
    command = " ".join(["python", "tools/bench/chance.py", *arguments])
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else cpu_name()
    add_rows(options.out, rows, device=device, command=command, packages=("torch",))


def measure(world: WorldModel, windows: Sequence[Window], samples: int) -> dict[str, float]:
    """Spread and coherence of all windows of a kind."""
    ways: dict[str, NoiseScale | None] = {"spread": None}
    if world.model.config.noise_dims:
        ways["without_start"] = NoiseScale(latents=(LEAST,), proprio=(LEAST,))
        ways["without_network"] = NoiseScale(model=(LEAST,))
    found: dict[str, float] = {}
    for name, scale in ways.items():
        sampler = dataclasses.replace(world.spec.sampler, noise_scale=scale)
        imaginer = Imaginer(world, samples=samples, rows=samples * len(windows), sampler=sampler)
        apart, missed = [], []
        for imagined in imaginer(windows, ()):
            latents_MTX = imagined.latents_MTX
            mean_TX = latents_MTX.mean(0)
            apart.append(latents_MTX - mean_TX)
            if name == "spread":
                window = imagined.window
                missed.append(encode(world, window.frames_THWC[window.context :]) - mean_TX)
        found[name] = float(torch.cat(apart).square().mean().sqrt()) * (samples / (samples - 1)) ** 0.5
        if missed:
            found["coherence"] = coherence(world, torch.cat(apart))
            found["coherence.truth"] = coherence(world, torch.stack(missed))
    return found


def coherence(world: WorldModel, difference_NTX: Tensor) -> float:
    """Root mean square of means over COARSE x COARSE latents, times COARSE, over that of single ones."""
    shape = world.spec.shape
    grid = (shape.views * shape.channels, shape.height, shape.width)
    pictures = difference_NTX.reshape(-1, *grid)
    coarse = COARSE * F.avg_pool2d(pictures, COARSE)
    return float(coarse.square().mean().sqrt() / pictures.square().mean().sqrt())


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/chance.py")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
