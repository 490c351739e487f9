"""What lets stay what was painted: the frame before as an input, the objective, imagined histories? On paint.

    vidworld lab paint --episodes 200 --size 64 --variety one --out data/paint64
    python tools/bench/previous_frame.py data/paint64 --out outputs/previous_frame

For each seed worlds are trained alike for as many steps, by the objective of shortcuts with and without
`model.previous_frame`, by that with imagined histories, and by one-step regression, there with
`model.copy_gate` too, on latents of the tokenizer that comes with vidworld. Measured on held-out episodes, in
one step a frame: the error on pixels of strokes by how many frames ago they were painted, a frame ahead of
true history; and rollouts of 24 frames. `copy` is the true frame before (or, of rollouts, the last known
one), and `tokenizer` what no world can beat; `latent` errors are those to what the tokenizer makes of the
truth. Runs in --out are kept, so that arms can be trained side by side
(`--seeds 0 --arms previous --rows None`), and all be read at the end.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from table import add_rows, cpu_name
from torch import nn

from vidworld import load
from vidworld.config import from_mapping, parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import UserError
from vidworld.evaluation.lab_frames import scene
from vidworld.evaluation.lab_truth import read_truth
from vidworld.evaluation.windows import Recorded, Settings, plan_windows, read_window
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import WorldTraining
from vidworld.trainer.encode import encode_dataset
from vidworld.trainer.train import train
from vidworld.world.load import find
from vidworld.world.prompt import Prompt
from vidworld.world.world import WorldModel

CONTEXT, HORIZON = 7, 24
AGES = (0, 1, 2, 4, 8)
HORIZONS = (8, 16, 24)
HISTORY = {"resample_fraction": 0.5, "resample_passes": 3, "resample_start": 0.3}
PREVIOUS = {"previous_frame": True}
ARMS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "attention": ({}, {}),
    "previous": (PREVIOUS, {}),
    "history": ({}, HISTORY),
    "regression": ({}, {"kind": "regression"}),
    "regression_history": ({}, {"kind": "regression", **HISTORY}),
    "regression_history_previous": (PREVIOUS, {"kind": "regression", **HISTORY}),
    "regression_history_copy": (
        {**PREVIOUS, "copy_gate": True},
        {"kind": "regression", "context_noise": 0.0, **HISTORY},
    ),
}
"""What differs of the model and of the objective."""
WORLD: dict[str, Any] = {
    "width": 128,
    "depth": 3,
    "num_heads": 4,
    "num_kv_heads": 1,
    "time_every": 3,
    "num_registers": 1,
}
"""As wide as two patches of latents: a network has to carry both the noisy one and the one before."""
OBJECTIVE: dict[str, Any] = {
    "finest_steps": 8,
    "pure_noise_fraction": 0.5,
    "bootstrap_start": 0.6,
    "context_noise": 0.15,
}
"""Half of the levels are pure noise, and larger steps are copied late: all that one-step samples need."""


@dataclass(frozen=True)
class Options:
    """Train worlds in several ways, and see what stays."""

    data: tyro.conf.Positional[Path]
    """Paint episodes with masks, as video shards."""
    out: Path = Path("outputs/previous_frame")
    seeds: tuple[int, ...] = (0, 1)
    arms: tuple[str, ...] = tuple(ARMS)
    steps: int = 800
    episodes: int = 10
    """Held-out ones, two windows of each."""
    rows: Path | None = Path("benchmarks/previous_frame.json")
    """Rows are added here; `None`: only print."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Train what is not there yet, measure all, print and write."""
    options = parse(Options, arguments, prog=prog)
    tokenizer, latents = prepare(options)
    windows: list[Window] = []
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for arm in options.arms:
            run = options.out / f"{arm}-{seed}"
            figures = run / "figures.json"
            if not (run / "done").exists():
                train_world(options, arm, seed, tokenizer, latents)
            if not figures.exists():
                world = load(run)
                windows = windows or list(read(options, world))
                figures.write_text(json.dumps(measure(world, windows), indent=1) + "\n")
            for name, value in json.loads(figures.read_text()).items():
                of = name if name.startswith(("copy.", "tokenizer.")) else f"{arm}.{name}"
                found.setdefault(of, []).append(value)
                print(f"seed {seed} {of:<36} {value:.4f}", flush=True)
    rows = {}
    for name, values in sorted(found.items()):
        text = unit(name)
        if len(values) > 1 and not name.startswith(("copy.", "tokenizer.")):
            text += f", mean of {len(values)} seeds, from {min(values):.4g} to {max(values):.4g}"
        rows[f"previous_frame.{name}"] = (float(f"{statistics.fmean(values):.4g}"), text)
        print(f"{name:<40} {statistics.fmean(values):.4f}  {text}")
    if options.rows is not None:
        command = " ".join(["python", "tools/bench/previous_frame.py", *arguments])
        add_rows(options.rows, rows, device=cpu_name(), command=command, packages=("torch",))


def unit(name: str) -> str:
    """What a figure is in."""
    if ".psnr" in name:
        return "dB"
    return "ratio of squared errors" if name.endswith("shuffle_ratio") else "mean square, pixels 0 to 1"


def prepare(options: Options) -> tuple[Path, Path]:
    """The tokenizer and the latents that all worlds share."""
    tokenizer, latents = find("lab").tokenizer, options.out / "latents"
    if not (latents / "manifest.json").exists():
        network = load_tokenizer(tokenizer)
        assert isinstance(network, nn.Module)
        encode_dataset(options.data, network, latents, progress=False)
    return tokenizer, latents


def train_world(options: Options, arm: str, seed: int, tokenizer: Path, latents: Path) -> None:
    """Train one world into the folder of its arm and seed."""
    objective = {**OBJECTIVE, **ARMS[arm][1]}
    settings = {
        "kind": "world",
        "data": str(latents),
        "tokenizer": str(tokenizer),
        "seed": seed,
        "model": {**WORLD, **ARMS[arm][0]},
        "objective": objective,
        "sampler": {"steps": 1, "context_noise": min(objective["context_noise"], 0.1)},
        "loader": {"clip_frames": 8, "batch_size": 8, "workers": 0},
        "optim": {"lr": 1.5e-3, "muon_lr": 0.02, "warmup_steps": 50, "decay_fraction": 0.5},
        "loop": {"steps": options.steps, "ema_decay": 0.99, "log_every": 50},
        "look": {"validate_every": 0, "sample_every": 0, "sample_episodes": 1, "horizon": 2},
        "wandb": "off",
    }
    run = options.out / f"{arm}-{seed}"
    train(from_mapping(WorldTraining, settings), run, overwrite=True, progress_bar=False)
    (run / "done").touch()


@dataclass(frozen=True)
class Window:
    """A stretch of a held-out episode, and where strokes are in it."""

    recorded: Recorded
    age_THW: np.ndarray
    """Frames since a pixel of a stroke was first one; -1 where there is none."""

    def prompt(self, end: int) -> Prompt:
        """The CONTEXT frames before `end`."""
        one, begin = self.recorded, end - CONTEXT
        return Prompt(
            one.frames_TVHWC[begin:end],
            one.proprio_TS[begin:end],
            one.actions_TA[begin : end - 1],
            one.grounding.contract.embodiment,
        )


def read(options: Options, world: WorldModel) -> Iterator[Window]:
    """The same stretches of held-out episodes for every world."""
    dataset = ShardDataset.open(options.data)
    settings = Settings(
        episodes=options.episodes, windows_per_episode=2, context=CONTEXT, frames=HORIZON, calibration=False
    )
    for one in plan_windows(dataset, world.spec, settings).windows:
        episode = dataset.read(one.sample.key)
        truth = read_truth(episode.meta, scene(episode), where=one.sample.key)
        mask_THW = truth.masks_THW["streak"]
        times_T11 = np.arange(len(mask_THW))[:, None, None]
        first_HW = np.where(mask_THW.any(0), mask_THW.argmax(0), len(mask_THW))
        age_THW = np.where(mask_THW, times_T11 - first_HW, -1)
        kept = slice(one.start, one.start + CONTEXT + HORIZON)
        yield Window(read_window(dataset, world.spec, settings, one), age_THW[kept])


@torch.no_grad()
def measure(world: WorldModel, windows: Sequence[Window]) -> dict[str, float]:
    """All figures of a world, and those that it is compared with."""
    future = slice(CONTEXT, CONTEXT + HORIZON)
    true = np.stack([window.recorded.frames_TVHWC[:, 0] for window in windows])
    age_BTHW = np.stack([window.age_THW for window in windows])[:, future]
    truth = true[:, future]
    drawn = forced(world, windows)
    rolled, astray = (free(world, windows, shuffled=shuffled) for shuffled in (False, True))
    latents = world.encode(torch.tensor(true)[:, :, None])
    seen = world.codec.pictures(latents).numpy()[:, :, 0]
    rebuilt, before = seen[:, future], seen[:, CONTEXT - 1 : -1]
    held = np.broadcast_to(true[:, CONTEXT - 1 : CONTEXT], truth.shape)
    found = {
        **one_ahead("", drawn, truth, age_BTHW),
        **one_ahead("latent.", drawn, rebuilt, age_BTHW),
        **one_ahead("copy.latent.", before, rebuilt, age_BTHW),
        **one_ahead("copy.", true[:, CONTEXT - 1 : -1], truth, age_BTHW),
        **one_ahead("tokenizer.", rebuilt, truth, age_BTHW),
        **ahead("", rolled, truth, age_BTHW),
        **ahead("latent.", rolled, rebuilt, age_BTHW),
        **ahead("copy.", held, truth, age_BTHW),
    }
    found["free.shuffle_ratio"] = float(squared(astray, truth).mean() / squared(rolled, truth).mean())
    return found


def one_ahead(name: str, frames: np.ndarray, truth: np.ndarray, age_BTHW: np.ndarray) -> Mapping[str, float]:
    """Errors of frames that are each given true history."""
    error_BTHW = squared(frames, truth)
    by_age = {f"{name}forced.stroke.age{age}": float(error_BTHW[age_BTHW == age].mean()) for age in AGES}
    return by_age | {f"{name}forced.psnr": psnr(error_BTHW)}


def ahead(name: str, frames: np.ndarray, truth: np.ndarray, age_BTHW: np.ndarray) -> Mapping[str, float]:
    """Errors of rollouts: over frames up to each horizon, and on strokes that were painted on the way."""
    error_BTHW = squared(frames, truth)
    new_BTHW = (age_BTHW >= 0) & (age_BTHW <= np.arange(HORIZON)[:, None, None])
    found = {f"{name}free.psnr.f{end}": psnr(error_BTHW[:, end - 8 : end]) for end in HORIZONS}
    return found | {f"{name}free.stroke": float(error_BTHW[new_BTHW].mean())}


def squared(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Squared errors [B, T, H, W], mean over colours, of pixels from 0 to 1."""
    return np.square((frames.astype(np.float32) - truth.astype(np.float32)) / 255).mean(-1)


def psnr(error: np.ndarray) -> float:
    """Decibels of a mean over windows, frames and pixels."""
    return float(-10 * np.log10(error.mean()))


def forced(world: WorldModel, windows: Sequence[Window]) -> np.ndarray:
    """Each frame of the horizon in one step from the CONTEXT true frames before it: [B, T, H, W, 3]."""
    drawn = []
    for window in windows:
        ends = range(CONTEXT, CONTEXT + HORIZON)
        state = world.reset([window.prompt(end) for end in ends], num_samples=1)
        _, seen = world.step(state, window.recorded.actions_TA[CONTEXT - 1 :])
        assert seen.video_BVHWC is not None
        drawn.append(seen.video_BVHWC[:, 0].numpy())
    return np.stack(drawn)


def free(world: WorldModel, windows: Sequence[Window], *, shuffled: bool) -> np.ndarray:
    """Rollouts from the first CONTEXT frames, under the recorded actions or those of the next window."""
    state = world.reset([window.prompt(CONTEXT) for window in windows], num_samples=1)
    actions_BTA = np.stack([window.recorded.future_TA for window in windows])
    if shuffled:
        actions_BTA = np.roll(actions_BTA, 1, 0)
    video_BTVHWC = world.rollout(state, actions_BTA).video_BTVHWC
    assert video_BTVHWC is not None
    return video_BTVHWC[:, :, 0].numpy()


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "tools/bench/previous_frame.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
