"""`vidworld demo --tune`: roll out the world that comes with the package, fine-tune it, roll it out again.

The lab makes episodes under a camera and a light that the world has not seen (`--variety one`). The same
held-out windows are measured before and after, with the same noise.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vidworld import media
from vidworld.config import to_mapping
from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset
from vidworld.evaluation.lab_frames import scene
from vidworld.world.load import find
from vidworld.world.spec import WorldSpec

NAME = "lab"
KIND = "rigid"
EPISODES, EPISODE_FRAMES = 32, 32
CONTEXT, FRAMES = 4, 16
BATCH, CLIP_FRAMES = 2, 12
COLUMNS = 6


def tune(out: Path, minutes: float, do: Callable[..., None]) -> dict[str, Any]:
    """Run all steps in `out`, print what came of them, and return the figures.

    `do` prints and runs a command of vidworld, given as its words.
    """
    spec = WorldSpec.read(find(NAME).directory)
    mean = ("--temperature", 0, "--samples", 1)
    do("rollout", NAME, *mean, "--frames", 24, "--out", out / "rollout")
    data = out / "data"
    look = ("--size", spec.width, "--variety", "one", "--exploration", 1, "--no-masks")
    do("lab", KIND, "--episodes", EPISODES, "--frames", EPISODE_FRAMES, *look, "--out", data)
    held_out = next(sample.key for sample in Manifest.read(data).samples("val"))
    write_config(out / "world.yaml", data, minutes, spec)
    do("train", out / "world.yaml", "--out", out / "world")
    known = ("--context", CONTEXT, "--frames", FRAMES)
    asked = ("--data", data, "--prompt", held_out, *known, *mean, "--allow-out-of-range")
    windows = (*mean, "--episodes", 4, "--windows-per-episode", 1, "--overwrite")
    summaries = {}
    for when, world in (("before", NAME), ("after", out / "world")):
        do("rollout", world, *asked, "--out", out / when)
        do("eval", world, data, *known, *windows, "--out", out / f"report-{when}")
        metrics = json.loads((out / f"report-{when}" / "metrics.json").read_text())
        summaries[when] = {name: value for name, value in metrics["summary"].items() if value is not None}
    write_strip(out, data, held_out)
    report(out, summaries)
    return {"before": summaries["before"], "after": summaries["after"]}


def write_config(path: Path, data: Path, minutes: float, spec: WorldSpec) -> None:
    """A YAML that trains on from the world that comes along; a mean learns the new look fastest."""
    own = to_mapping(spec.sampler)
    settings = {
        "kind": "world",
        "data": str(data),
        "tokenizer": NAME,
        "init": NAME,
        "wandb": "off",
        "model": to_mapping(dataclasses.replace(spec.model, members=0)),  # the first one alone
        "objective": {
            "kind": "regression", "context_noise": 0.0 if spec.model.copy_gate else 0.3,
            "resample_fraction": 0.5, "resample_passes": 2, "resample_start": 0.0,
        },
        "sampler": {"steps": 1} | {
            name: own[name] for name in ("method", "context_noise", "sink", "guidance")
        } | {"temperature": 0.0},
        "loader": {
            "clip_frames": min(CLIP_FRAMES, spec.sampler.window), "batch_size": BATCH, "workers": 0,
        },
        "optim": {"lr": 2e-4, "muon_lr": 0.006, "warmup_steps": 5, "weight_decay": 0.02},
        "loop": {"minutes": minutes, "ema_decay": 0.9, "log_every": 10},
        "look": {"validate_every": 0, "sample_every": 0, "validate_batches": 1},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def write_strip(out: Path, data: Path, key: str) -> None:
    """before_after.png: what happened, and what was imagined before and after."""
    rows = {"recorded": scene(ShardDataset.open(data).read(key))}
    rows |= {when: media.read_video(out / when / "sample-000.mp4")[0] for when in ("before", "after")}
    times = np.linspace(CONTEXT - 1, CONTEXT + FRAMES - 1, COLUMNS).round().astype(int).tolist()
    labels = ["known", *(f"+{time - CONTEXT + 1} frames" for time in times[1:])]
    media.write_png(out / "before_after.png", media.strip(rows, times, labels=labels))


def report(out: Path, summaries: dict[str, dict[str, float]]) -> None:
    """Say what changed, and where to look."""
    before, after = (summaries[when][f"psnr.f{FRAMES}"] for when in ("before", "after"))
    copy = summaries["after"][f"psnr_copy.f{FRAMES}"]
    print(
        f"\nA camera that the world had not seen, {FRAMES} frames ahead, held out:\n"
        f"  last frame held  {copy:.1f} dB\n"
        f"  before           {before:.1f} dB\n"
        f"  after            {after:.1f} dB\n"
        f"  clips    {out / 'rollout' / 'grid.mp4'} (as it comes), {out / 'before_after.png'}\n"
        f"  reports  {out / 'report-before' / 'report.html'}, {out / 'report-after' / 'report.html'}\n"
        "Next:\n"
        "  make demo DATA=<your logs>          a world of your robot, from scratch\n"
        f"  vidworld train {out / 'world.yaml'} --out runs/longer --loop.minutes 60\n"
        "  vidworld rollout lab --help         smoke, paint, liquids: vidworld/weights/lab/prompts"
    )
