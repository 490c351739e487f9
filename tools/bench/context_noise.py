"""How much noise should a run's context have when it is served? Chosen by the CRPS of held-out rollouts.

    python tools/bench/context_noise.py runs/lab data/lab/rigid --frames 48 --write

Rolls the same ensembles out with every `sampler.context_noise` and scores them against what happened. The
run's own noise stays unless another one is better by more than a standard error over windows. With --write
the best goes into the run: world.json, which rollouts and evaluations read, and config.yaml, which a resumed
training reads.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from objectives_measure import fair_crps
from table import add_rows, cpu_name

from vidworld import load
from vidworld.config import parse, to_yaml
from vidworld.data.shards import ShardDataset
from vidworld.errors import CheckpointError, ConfigError, UserError
from vidworld.evaluation.windows import Recorded, Settings, plan_windows, read_window
from vidworld.trainer.config import WorldTraining, read_training
from vidworld.trainer.run import CONFIG
from vidworld.world.engine import RolloutEngine
from vidworld.world.load import find
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.world import WorldModel


@dataclass(frozen=True)
class Options:
    """Scan the noise of served context on held-out episodes, and keep the best."""

    run: tyro.conf.Positional[Path]
    """Directory of a trained world."""
    data: tyro.conf.Positional[Path]
    """Video shards of one of its robots."""
    noises: tuple[float, ...] = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
    """Training covers up to `objective.context_noise`."""
    steps: int | None = None
    """Denoising steps a frame, in place of the run's own."""
    context: int = 4
    frames: int = 48
    """Imagined: several windows long, since noise is there for long rollouts."""
    episodes: int = 16
    samples: int = 8
    seed: int = 0
    device: str | None = None
    write: bool = False
    """Write the best into the run."""
    name: str | None = None
    """Rows are `context_noise.NAME.<noise>.<metric>`; default: the run's folder."""
    rows: Path | None = Path("benchmarks/context_noise.json")
    """Rows are added here; `None`: only print."""

    def __post_init__(self) -> None:
        if not self.noises or not all(0 <= noise < 1 for noise in self.noises):
            raise ConfigError("--noises", got=self.noises, expected="shares from 0 to below 1")
        if self.samples < 2:
            raise ConfigError("--samples", got=self.samples, expected="2 or more")


def main(arguments: Sequence[str], prog: str) -> None:
    """Print a line for each noise, and what is best."""
    options = parse(Options, arguments, prog=prog)
    files = find(options.run)
    if options.write and files.checkpoint == "export":
        raise ConfigError("--write", got=f"{options.run}, an export", expected="a run", fix="export it anew")
    world = load(options.run, options.device)
    sampler = world.spec.sampler
    if options.steps is not None:
        sampler = replace(sampler, steps=options.steps)
    windows = read_windows(world, options)
    noises = sorted({*options.noises, sampler.context_noise})
    scores = {
        noise: score(world, windows, replace(sampler, context_noise=noise), options) for noise in noises
    }
    best = choose({noise: one["crps_W"] for noise, one in scores.items()}, sampler.context_noise)
    name = options.name or options.run.resolve().name
    rows: dict[str, tuple[float, str]] = {f"context_noise.{name}.best": (best, "share of noise")}
    for noise, one in scores.items():
        values = {key: float(one[f"{key}_W"].mean()) for key in ("crps", "crps_end", "crps_proprio")}
        mark = "  <- best" if noise == best else ""
        print(f"{noise:5.3f}  " + "  ".join(f"{key} {value:.5f}" for key, value in values.items()) + mark)
        for key, value in values.items():
            unit = "normalised units" if key == "crps_proprio" else "latent standard deviations"
            rows[f"context_noise.{name}.{noise:g}.{key}"] = (float(f"{value:.6g}"), unit)
    if options.rows is not None:
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else cpu_name()
        command = " ".join(["python", "tools/bench/context_noise.py", *arguments])
        add_rows(options.rows, rows, device=device, command=command, packages=("torch",))
    if options.write:
        write(files.directory, best)
        print(f"{options.run}: sampler.context_noise {sampler.context_noise:g} -> {best:g}")


def read_windows(world: WorldModel, options: Options) -> list[Recorded]:
    """One stretch of each held-out episode."""
    dataset = ShardDataset.open(options.data)
    settings = Settings(
        episodes=options.episodes, windows_per_episode=1, context=options.context, frames=options.frames
    )
    plan = plan_windows(dataset, world.spec, settings)
    return [read_window(dataset, world.spec, settings, one) for one in plan.windows]


@torch.no_grad()
def score(
    world: WorldModel, windows: Sequence[Recorded], sampler: SamplerConfig, options: Options
) -> dict[str, np.ndarray]:
    """Fair CRPS of each window [W]: latents over all leads and over the last quarter, proprioception."""
    samples, k = options.samples, world.spec.frames_per_step
    state = world.reset(
        [one.grounding.prompt for one in windows],
        samples,
        options.seed,
        sampler=sampler,
        allow_out_of_range=True,
    )
    actions_BTA = np.repeat(np.stack([one.future_TA for one in windows]), samples, 0)
    engine = RolloutEngine(world, sampler=sampler)
    rolled = engine.rollout(state, actions_BTA, decode=False, allow_out_of_range=True)
    known = state.frame
    found: dict[str, list[float]] = {"crps_W": [], "crps_end_W": [], "crps_proprio_W": []}
    embodiment_B = rolled.state.embodiment_B
    proprio_BTS = world.normalizer.proprio(rolled.proprio_BTS, embodiment_B)
    for number, one in enumerate(windows):
        rows = slice(number * samples, (number + 1) * samples)
        frames_1TVHWC = torch.from_numpy(one.frames_TVHWC[None]).to(world.device)
        truth_TVChw = world.encode(frames_1TVHWC)[0, known:]
        crps_TVChw = fair_crps(rolled.latents_BTVChw[rows], truth_TVChw)
        found["crps_W"].append(float(crps_TVChw.mean()))
        found["crps_end_W"].append(float(crps_TVChw[-max(1, len(crps_TVChw) // 4) :].mean()))
        seen_1TS = torch.from_numpy(one.proprio_TS[None, options.context - 1 + k :: k]).to(proprio_BTS)
        seen_1TS = world.normalizer.proprio(seen_1TS, embodiment_B[rows][:1])
        found["crps_proprio_W"].append(float(fair_crps(proprio_BTS[rows], seen_1TS[0]).mean()))
    return {name: np.array(values) for name, values in found.items()}


def choose(scores: dict[float, np.ndarray], own: float) -> float:
    """The noise of least mean score, if it beats the run's own by more than a standard error over windows."""
    best = min(scores, key=lambda noise: float(scores[noise].mean()))
    better_W = scores[own] - scores[best]
    error = statistics.stdev(better_W) / math.sqrt(len(better_W)) if len(better_W) > 1 else 0.0
    return best if float(better_W.mean()) > error else own


def write(run: Path, noise: float) -> None:
    """Put the noise into world.json and config.yaml of a run."""
    spec = WorldSpec.read(run)
    config = run / CONFIG
    training = read_training(config) if config.is_file() else None
    if training is not None and not isinstance(training, WorldTraining):
        raise CheckpointError("kind of the run", where=config, got=training.kind, expected="world")
    replace(spec, sampler=replace(spec.sampler, context_noise=noise)).write(run)
    if training is not None:
        sampler = replace(training.sampler, context_noise=noise)
        temporary = config.with_name(f".{CONFIG}.tmp")
        temporary.write_text(to_yaml(replace(training, sampler=sampler)))
        temporary.replace(config)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "tools/bench/context_noise.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
