"""Do small things that move fade less with `objective.motion_weight`? Measured on a spot on a mottled table.

    python tools/bench/motion.py --seeds 0 1 2

The table is another one in every clip and never moves; a spot of about one latent goes over it by commands
that are known. Tiny networks with other weights of motion train equally long and roll out in one step a
frame. What is told apart is the error where the spot is, as a share of what it would be without any spot, and
the error of the rest. One core takes two minutes for each seed.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from history import CONTEXT, imagined, train
from table import add_rows, cpu_name
from torch import Tensor

from vidworld.config import parse
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import UserError
from vidworld.types import Batch

SIDE, REACH, RADIUS, BRIGHT = 8, 0.12, 0.07, 3.0
"""Latents on a side; longest step and size of the spot, as shares of the torus; its value on a table of
deviation 1."""
HORIZON = 8


@dataclass(frozen=True)
class Options:
    """Measure a small spot and its table with several weights of motion."""

    weights: tuple[float, ...] = (0.0, 1.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    rows: Path | None = Path("benchmarks/motion.json")
    """Rows are added here; `None`: only print."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Train and roll out with every weight; print and write what it comes to."""
    options = parse(Options, arguments, prog=prog)
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for weight in options.weights:
            figures = measure(weight, seed, options.steps)
            said = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"seed {seed} weight {weight:g}: {said}", flush=True)
            for name, value in figures.items():
                found.setdefault(f"motion.w{weight:g}.{name}", []).append(value)
    if options.rows is not None:
        rows = {}
        for name, values in found.items():
            share = ", over that without a spot" if ".spot." in name else ""
            text = f"mean square{share}, mean of {len(values)} seeds"
            if len(values) > 1:
                text += f", standard deviation {statistics.stdev(values):.2g}"
            rows[name] = (float(f"{statistics.fmean(values):.4g}"), text)
        command = " ".join(["python", "tools/bench/motion.py", *arguments])
        add_rows(options.rows, rows, device=cpu_name(), command=command, packages=("torch",))


def measure(weight: float, seed: int, steps: int) -> dict[str, float]:
    """Errors of the spot and of the rest, in the first imagined frame and in the last."""
    objective = ObjectiveConfig(finest_steps=1, motion_weight=weight)
    model = train(objective, seed, steps, make=clips, side=SIDE)
    generator = torch.Generator().manual_seed(99)
    table_BCss, places_BTA, batch = scene(48, CONTEXT + HORIZON, generator)
    spot_BT1ss = spots(places_BTA)[:, CONTEXT:, None]
    assert batch.latents_BTVChw is not None
    truth_BTCss = batch.latents_BTVChw[:, CONTEXT:, 0]
    found_BTCss = torch.cat(list(imagined(model, batch, 0.1)), 1)[:, :, 0]
    without_BTCss = (truth_BTCss - table_BCss[:, None]).square()
    error_BTCss = (found_BTCss - truth_BTCss).square()
    figures = {}
    for name, t in (("f1", 0), (f"f{HORIZON}", HORIZON - 1)):
        on_B1ss, scale = spot_BT1ss[:, t], float((spot_BT1ss[:, t] * without_BTCss[:, t]).mean())
        figures[f"spot.{name}"] = float((on_B1ss * error_BTCss[:, t]).mean()) / scale
        rest = (1 - on_B1ss) * error_BTCss[:, t]
        figures[f"rest.{name}"] = float(rest.mean() / (1 - on_B1ss).mean())
    return figures


def clips(rows: int, frames: int, generator: torch.Generator) -> Batch:
    """Clips to train on."""
    return scene(rows, frames, generator)[2]


def scene(rows: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Batch]:
    """Tables [B, 2, SIDE, SIDE], places of the spot [B, T, 2], and clips of both."""
    actions_BTA = torch.rand(rows, frames, 2, generator=generator) * 2 - 1
    start_B1A = torch.rand(rows, 1, 2, generator=generator)
    places_BTA = torch.cat([start_B1A, start_B1A + REACH * actions_BTA[:, :-1].cumsum(1)], 1)
    table_BCss = torch.randn(rows, 2, SIDE, SIDE, generator=generator)
    spot_BT1ss = spots(places_BTA)[:, :, None]
    latents_BTCss = table_BCss[:, None] * (1 - spot_BT1ss) + BRIGHT * spot_BT1ss
    batch = Batch(
        ids=("",) * rows,
        actions_BTA=actions_BTA,
        proprio_BTS=torch.zeros(rows, frames, 1),
        embodiment_B=torch.zeros(rows, dtype=torch.int64),
        latents_BTVChw=latents_BTCss[:, :, None],
    )
    return table_BCss, places_BTA, batch


def spots(places_XA: Tensor) -> Tensor:
    """How much of each latent [..., SIDE, SIDE] a spot at places [..., 2] covers."""
    grid_s = (torch.arange(SIDE) + 0.5) / SIDE
    x_Xs, y_Xs = ((places_XA[..., axis, None] - grid_s + 0.5) % 1.0 - 0.5 for axis in (0, 1))
    return torch.exp(-(x_Xs[..., :, None].square() + y_Xs[..., None, :].square()) / (2 * RADIUS**2))


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "tools/bench/motion.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
