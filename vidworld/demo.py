"""`vidworld demo`: logs to shards to tokenizer to world model to rollouts to a report, on a laptop's CPU.

Where a trained world comes with the package it is rolled out first; `--tune` fine-tunes that one in place of
training anew (`vidworld.demo_tune`).
The robot logs are made by the lab where it can draw, and are a small set that comes with vidworld where it
cannot. This only calls what the other commands call, with settings that fit two cores and a few minutes.
"""

import json
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vidworld.cli import run_command
from vidworld.config import parse
from vidworld.data.manifest import Manifest
from vidworld.errors import ConfigError, DataError, UserError
from vidworld.world.shipped import is_here

CONTEXT = 4
SIZE = 64
LAB = ("--size", SIZE, "--variety", "one", "--exploration", 1, "--no-masks")
"""One camera and light, and an arm that never rests: what minutes on a CPU suffice for."""
SAMPLE = Path(__file__).parent / "lab" / "sample"
"""Episodes of the lab that come with vidworld; see datasets/lab_sample.md."""
MARK = "demo.json"
"""Written first, so that `--overwrite` only ever empties a directory that a demo made."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Robot logs in, simulator out, with one command and no GPU."""

    out: Path = Path("outputs/demo")
    """Directory of everything that is made."""
    data: Path | None = None
    """Your own logs, of any format that `vidworld shard` reads, or shards; default: the lab's robot."""
    size: str = f"{SIZE}x{SIZE}"
    """WIDTHxHEIGHT that your logs are converted to."""
    episodes: int = 240
    """Simulated episodes, or the most that are taken from your logs."""
    tune: bool = False
    """Fine-tune the world that comes along, under a camera that is new to it, in place of training anew."""
    tune_minutes: float = 4.0
    """Of that."""
    tokenizer_minutes: float = 1.6
    world_minutes: float = 5.7
    frames: int = 24
    """Frames that are imagined after a context of 4."""
    seed: int = 0
    overwrite: bool = False
    """Replace what an earlier demo left in `out`."""


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld demo`: prints each step as the command that does it, and does it."""
    options = parse(DemoOptions, arguments, prog=prog)
    began = time.monotonic()
    if options.tune:
        _require_tunable(options)
    _claim(options)
    if options.tune:
        from vidworld.demo_tune import tune

        record = tune(options.out, options.tune_minutes, do)
        finished = {"state": "done", "minutes": round((time.monotonic() - began) / 60, 2), **record}
        (options.out / MARK).write_text(json.dumps(finished, indent=1) + "\n")
        return
    if options.data is None and is_here("lab"):
        mean = ("--temperature", 0, "--samples", 1)
        do("rollout", "lab", "--context", 16, "--frames", 40, *mean, "--out", options.out / "lab")
    data = _dataset(options)
    episode = _held_out(Manifest.read(data), options)
    _write_configs(options, data)
    tokenizer, world = options.out / "tokenizer", options.out / "world"
    do("train", options.out / "tokenizer.yaml", "--out", tokenizer)
    do("train", options.out / "world.yaml", "--out", world)
    known = ("--context", CONTEXT, "--frames", options.frames, "--samples", 1)  # a mean has one future
    asked = ["--data", data, "--prompt", episode, *known]
    if options.data is not None:
        # Of a few episodes, the held-out one may go where no other went; the contract is still its own.
        asked.append("--allow-out-of-range")
    do("rollout", world, *asked, "--out", options.out / "rollout")
    do("rollout", world, *asked, "--actions", "sweep", "--out", options.out / "sweep")
    report = options.out / "report"
    do("eval", world, data, *known, "--episodes", 16, "--out", report)
    _finish(options, json.loads((report / "metrics.json").read_text()), (time.monotonic() - began) / 60)


def _require_tunable(options: DemoOptions) -> None:
    """Refuse `--tune` where there is nothing to tune, or nothing to tune it on."""
    if options.data is not None:
        raise ConfigError(
            "--tune", got="--data too", expected="one of them", fix="train on your logs without it"
        )
    if not is_here("lab"):
        raise ConfigError("--tune", got="no world in this copy of vidworld", expected="one that comes along")
    if reason := _no_lab():
        raise ConfigError("--tune", got=reason, expected="a lab that can draw")


def _held_out(manifest: Manifest, options: DemoOptions) -> str:
    """The episode to imagine; what could not be shown in the end is refused before minutes of training."""
    if manifest.kind != "video":
        raise DataError("--data", where=options.data, got=manifest.kind, expected="video")
    needed, held_out = CONTEXT + options.frames, manifest.samples("val")
    longest = max((sample.frames for sample in held_out), default=0)
    if longest < needed:
        raise DataError(
            "held-out episodes of the demo",
            got=f"{len(held_out)}, the longest of {longest} frames",
            expected=f"one of {CONTEXT} + {options.frames} frames",
            fix=f"pass --frames {longest - CONTEXT}"
            if longest > CONTEXT + 1
            else "give more or longer episodes",
        )
    return next(sample.episode_id for sample in held_out if sample.frames >= needed)


def _claim(options: DemoOptions) -> None:
    """Make the output directory, emptied if an earlier demo made it and that is asked for."""
    out = options.out
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise ConfigError("--out", got=f"{out}, which no demo made", expected="a new or empty directory")
        if not options.overwrite:
            raise ConfigError("--out", got=f"{out}, an earlier demo", fix="pass --overwrite to replace it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(json.dumps({"state": "running"}) + "\n")


def _dataset(options: DemoOptions) -> Path:
    """Shards of the lab's robot, or of the user's logs."""
    if options.data is None:
        reason = _no_lab()
        if reason:
            print(f"{reason}\nUntil then, the episodes that come with vidworld serve: {SAMPLE}", flush=True)
            made = SAMPLE
        else:
            made = options.out / "data"
            asked = ("--episodes", options.episodes, *LAB, "--seed", options.seed)
            do("lab", "rigid", *asked, "--out", made)
    elif (options.data / "manifest.json").exists():
        return options.data
    else:
        made = options.out / "data"
        limit = ("--max-episodes", options.episodes)
        do("shard", options.data, "--size", options.size, *limit, "--out", made)
    do("inspect", made)
    return made


def _no_lab() -> str | None:
    """Why the lab cannot make episodes here, and what would help; None where it can."""
    try:
        from vidworld.lab.gl import offscreen

        offscreen(2 * SIZE)
    except UserError as error:
        return str(error)
    return None


def _write_configs(options: DemoOptions, data: Path) -> None:
    """Two YAMLs of differences that fit two CPU cores; copy and edit them for more."""
    common = {"data": str(data), "seed": options.seed, "wandb": "off"}
    tokenizer = common | {
        "kind": "tokenizer",
        "tokenizer": {"widths": [32, 48, 64], "encoder_blocks": [0, 1, 1], "decoder_blocks": [1, 1, 1]},
        "loader": {"clip_frames": 1, "batch_size": 8, "workers": 0},
        "optim": {"lr": 2e-3, "warmup_steps": 50},
        "loop": {"minutes": options.tokenizer_minutes, "ema_decay": 0.99},
        "look": {"validate_every": 0, "sample_every": 0},
    }
    world = common | {
        "kind": "world",
        "tokenizer": str(options.out / "tokenizer"),
        "model": {
            "width": 96,
            "depth": 6,
            "num_heads": 3,
            "num_kv_heads": 1,
            "time_every": 3,
            "num_registers": 1,
        },
        # An arm goes where it is told: learn the mean, and histories that the model imagined itself.
        "objective": {
            "kind": "regression",
            "context_noise": 0.15,
            "resample_fraction": 0.5,
            "resample_passes": 2,
            "resample_start": 0.2,
        },
        "sampler": {"steps": 1},
        "loader": {"clip_frames": 8, "batch_size": 8, "workers": 0},
        "optim": {"lr": 1.5e-3, "muon_lr": 0.02, "warmup_steps": 50, "decay_fraction": 0.5},
        "loop": {"minutes": options.world_minutes, "ema_decay": 0.99, "log_every": 50},
        "look": {"validate_every": 0, "sample_every": 0, "validate_batches": 1},
    }
    for name, settings in (("tokenizer", tokenizer), ("world", world)):
        (options.out / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def do(command: str, *arguments: object) -> None:
    """Print a command as a user would type it, and run it in this process."""
    words = [command, *map(str, arguments)]
    print(f"\n$ vidworld {shlex.join(words)}", flush=True)
    run_command(words)


def _finish(options: DemoOptions, metrics: Mapping[str, Any], minutes: float) -> None:
    """Keep the figures, and say where the report is and what to do next."""
    summary = {k: v for k, v in metrics["summary"].items() if v is not None}
    record = {"state": "done", "minutes": round(minutes, 2), "summary": summary}
    (options.out / MARK).write_text(json.dumps(record, indent=1) + "\n")
    gain = summary.get("psnr_gain.f8", summary.get(f"psnr_gain.f{options.frames}"))
    print(
        f"\nDone in {minutes:.1f} minutes: logs in, simulator out.\n"
        f"  held-out gain over holding the last frame, at frame 8: {gain:+.1f} dB\n"
        f"  error with wrong actions over error with true ones:    {summary['shuffle_ratio']:.2f}x\n"
        f"  report   {options.out / 'report' / 'report.html'}\n"
        f"  clips    {options.out / 'rollout' / 'grid.mp4'}, {options.out / 'sweep' / 'grid.mp4'}\n"
        f"{_shipped(options)}"
        "Next:\n"
        "  make demo DATA=<your logs>                    the same on your robot\n"
        "  vidworld demo --tune --out outputs/tuned      fine-tune the world that comes along\n"
        "  vidworld lab smoke --out data/smoke           more to learn: smoke, paint, liquids; docs/lab.md\n"
        f"  vidworld train {options.out / 'world.yaml'} --out runs/longer --loop.minutes 60\n"
        f"  vidworld.load('{options.out / 'world'}') in Python: see docs/simulator.md"
    )


def _shipped(options: DemoOptions) -> str:
    """Where the rollout of the world that comes along is, if there is one."""
    clip = options.out / "lab" / "grid.mp4"
    return f"  and of the world that comes along: {clip}\n" if clip.exists() else ""
