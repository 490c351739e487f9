"""Which objective, and in how many steps? The decision table: trained alike, sampled, and verified.

    vidworld lab container --episodes 1500 --size 64 --no-masks --out data/container64
    python tools/bench/objectives.py data/container64 --out outputs/objectives --minutes 0.33

Trains, for each seed and for as many minutes each: plain flow matching; shortcuts; one-step regression with
imagined histories; and the latter two for three quarters of the time with an energy-score fine-tune in the
last one. Each is rolled out on held-out episodes
of boxes with hidden contents, whose future is open, in ensembles that are verified against what happened.
Files of finished seeds in --out are kept, so that seeds can be trained on several GPUs (`--seeds 0`,
`--seeds 1`, ..., after `--seeds` alone has made the tokenizer and the latents); each call draws the table of
all that are there.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from objectives_measure import measure
from objectives_table import markdown, paint, rows_of
from table import add_rows, cpu_name
from torch import nn

from vidworld import load, media
from vidworld.config import from_mapping, parse
from vidworld.data.shards import ShardDataset
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import ConfigError, UserError
from vidworld.evaluation.windows import Recorded, Settings, plan_windows, read_window
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import TokenizerTraining, WorldTraining
from vidworld.trainer.encode import encode_dataset
from vidworld.trainer.train import train
from vidworld.world.world import WorldModel

ENERGY_SHARE = 0.25
"""Of the training time of `energy`, in place of the end of what it begins with."""
SIZES: dict[str, dict[str, Any]] = {
    "8x256": {"width": 256, "depth": 8, "num_heads": 4, "num_kv_heads": 2, "time_every": 4},
    "4x64": {"width": 64, "depth": 4, "num_heads": 2, "num_kv_heads": 1, "time_every": 2, "num_registers": 1},
}
TRUNKS = {"energy": "trunk", "regression_energy": "means"}
"""Runs that others begin from, in the folder of a seed."""
FLOW = ObjectiveConfig(bootstrap_fraction=0.0)
MEANS: dict[str, Any] = {
    "kind": "regression",
    "resample_fraction": 0.5,
    "resample_passes": 2,
    "resample_start": 0.2,
}
RECIPES: dict[str, tuple[int, ...]] = {
    "shortcut": (1, 2, 4),
    "energy": (1,),
    "flow": (4, 16, 64),
    "regression": (1,),
    "regression_energy": (1,),
}
"""Objective -> steps a frame that it is sampled in."""


@dataclass(frozen=True)
class Options:
    """Train flow, shortcut and energy alike, and verify them with few and many steps."""

    data: tyro.conf.Positional[Path]
    """Container episodes, as video shards."""
    out: Path = Path("outputs/objectives")
    tokenizer: Path | None = None
    """Default: one is trained in --out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    minutes: float = 0.33
    """Of training, for each objective and seed."""
    steps: int | None = None
    """In place of `minutes`: steps of flow; the others get as many as cost as many operations."""
    tokenizer_minutes: float = 0.5
    size: str = "8x256"
    batch: int = 64
    clip: int = 16
    episodes: int = 32
    """Held-out ones, two windows of each."""
    context: int = 4
    frames: int = 16
    """Imagined."""
    samples: int = 24
    budget_s: float = 540.0
    """No training and no measurement begins after so many seconds."""
    rows: Path | None = Path("benchmarks/objectives.json")
    """Rows are added here; `None`: only print."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError("--size", got=self.size, expected=" or ".join(SIZES))
        if self.samples < 20:
            raise ConfigError("--samples", got=self.samples, expected="20 or more, to tell a 90 % interval")


def main(arguments: Sequence[str], prog: str) -> None:
    """Train and measure what is not there yet, then write rows, table and pictures."""
    options = parse(Options, arguments, prog=prog)
    bench = Bench(options)
    for seed in options.seeds:
        bench.seed(seed)
    found = read_found(options.out)
    if not found:
        print(f"tokenizer and latents are in {options.out}; no seed is measured yet")
        return
    table = markdown(found)
    (options.out / "table.md").write_text(table)
    paint(found, options.out / "table.png")
    print(f"\n{table}\n{options.out / 'table.png'}")
    if options.rows is not None:
        command = " ".join(["python", "tools/bench/objectives.py", *arguments])
        device = found[0]["device"]
        add_rows(options.rows, rows_of(found), device=device, command=command, packages=("torch",))


def read_found(out: Path) -> list[dict[str, Any]]:
    """What is measured of all seeds in a folder."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("seed-*.json"))]
    return [one for one in found if one["measured"]]


class Bench:
    """What all seeds share: the data, the tokenizer, the windows, and the time that is left."""

    def __init__(self, options: Options) -> None:
        self.options, self.began = options, time.monotonic()
        self.dataset = ShardDataset.open(options.data)
        options.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = options.tokenizer or options.out / "tokenizer"
        if options.tokenizer is None and not (self.tokenizer / "done").exists():
            train(self._tokenizer_training(), self.tokenizer, overwrite=True, progress_bar=False)
            (self.tokenizer / "done").touch()
        self.latents = options.out / "latents"
        if not (self.latents / "manifest.json").exists():
            tokenizer = load_tokenizer(self.tokenizer)
            assert isinstance(tokenizer, nn.Module)
            tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
            encode_dataset(options.data, tokenizer, self.latents, progress=False)
        self._windows: list[Recorded] = []
        self._timed = {
            key
            for one in read_found(options.out)
            for key, figures in one["measured"].items()
            if "fps" in figures
        }
        """What some seed has told the speed of."""

    def seed(self, seed: int) -> None:
        """Train and measure every objective with one seed; what is there already is kept."""
        record = self.options.out / f"seed-{seed}.json"
        found: dict[str, Any] = {"seed": seed, "device": device_name(), "steps": {}, "measured": {}}
        if record.exists():
            found |= json.loads(record.read_text())
        for name, counts in RECIPES.items():
            todo = [steps for steps in counts if f"{name}.k{steps}" not in found["measured"]]
            if not todo or not self.has_time(f"{name} of seed {seed}"):
                continue
            run = self.train(name, seed)
            found["steps"][name] = steps_of(run)
            world = load(run)
            for steps in todo:
                if not self.has_time(f"{name} in {steps} steps, seed {seed}"):
                    break
                key = f"{name}.k{steps}"
                speed = key not in self._timed
                measured, videos = measure(world, self.windows(world), self.options, steps, speed=speed)
                self._timed.add(key)
                found["measured"][key] = measured
                record.write_text(json.dumps(found, indent=1) + "\n")
                figures = "  ".join(f"{name} {value:.4g}" for name, value in measured.items())
                print(f"[{self.elapsed_s:4.0f} s] seed {seed} {key:<12} {figures}", flush=True)
                draw_strip(videos, self.options, self.options.out / f"strip-{seed}-{key}.png")

    def train(self, name: str, seed: int) -> Path:
        """The run of an objective; those with `energy` begin where a shorter run of another ends."""
        folder = self.options.out / f"seed-{seed}"
        if name == "energy":
            trunk = self._run(folder / "trunk", seed, 1 - ENERGY_SHARE, {})
            return self._run(folder / name, seed, ENERGY_SHARE, {"kind": "energy"}, init=trunk)
        if name == "regression_energy":
            trunk = self._run(folder / "means", seed, 1 - ENERGY_SHARE, MEANS)
            histories = MEANS | {"kind": "energy", "resample_start": 0.0, "energy": {"mean_weight": 2.0}}
            return self._run(folder / name, seed, ENERGY_SHARE, histories, init=trunk)
        if name == "regression":
            return self._run(folder / name, seed, 1.0, MEANS)
        return self._run(folder / name, seed, 1.0, {"bootstrap_fraction": 0.0} if name == "flow" else {})

    def windows(self, world: WorldModel) -> list[Recorded]:
        """The same stretches of held-out episodes for every world."""
        if not self._windows:
            options = self.options
            settings = Settings(
                episodes=options.episodes,
                windows_per_episode=2,
                context=options.context,
                frames=options.frames,
            )
            plan = plan_windows(self.dataset, world.spec, settings)
            self._windows = [read_window(self.dataset, world.spec, settings, one) for one in plan.windows]
        return self._windows

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    def has_time(self, what: str) -> bool:
        """Whether something new may begin; says so if not."""
        if self.elapsed_s < self.options.budget_s:
            return True
        print(f"left out for want of time: {what}", flush=True)
        return False

    def _run(
        self,
        run: Path,
        seed: int,
        share: float,
        objective: Mapping[str, Any],
        init: Path | None = None,
    ) -> Path:
        """Train for a share of the time, or of the operations, that each objective has."""
        if (run / "done").exists():
            return run
        print(f"[{self.elapsed_s:4.0f} s] trains {run}", flush=True)
        options, scale = self.options, 1.0 if init is None else 0.3
        settings: dict[str, Any] = {
            "kind": "world",
            "data": str(self.latents),
            "tokenizer": str(self.tokenizer),
            "seed": seed,
            "init": None if init is None else str(init),
            "model": SIZES[options.size] | {"noise_dims": 32},
            "objective": dict(objective),
            "sampler": {} if objective.get("kind", "shortcut") == "shortcut" else {"steps": 1},
            "loader": {"clip_frames": options.clip, "batch_size": options.batch, "workers": 0, "cache_gb": 8},
            "optim": {
                "lr": 6e-4 * scale,
                "muon_lr": 0.02 * scale,
                "warmup_steps": 100 if init is None else 20,
            },
            "loop": self._length(share, objective)
            | {"ema_decay": 0.998 if init is None else 0.99, "log_every": 100},
            "look": {"validate_every": 0, "sample_every": 0, "sample_episodes": 1, "horizon": 2},
            "wandb": "off",
        }
        train(from_mapping(WorldTraining, settings), run, overwrite=True, progress_bar=False)
        (run / "done").touch()
        return run

    def _length(self, share: float, objective: Mapping[str, Any]) -> dict[str, Any]:
        if self.options.steps is None:
            return {"minutes": share * self.options.minutes}
        config = from_mapping(ObjectiveConfig, dict(objective))
        return {"steps": max(1, round(share * self.options.steps * forwards(FLOW) / forwards(config)))}

    def _tokenizer_training(self) -> TokenizerTraining:
        wide = self.options.size == "8x256"
        settings: dict[str, Any] = {
            "kind": "tokenizer",
            "data": str(self.options.data),
            "tokenizer": {} if wide else {"widths": [32, 48, 64]},
            "loader": {
                "clip_frames": 2 if wide else 1,
                "batch_size": 64 if wide else 8,
                "workers": 8 if torch.cuda.is_available() else 0,
                "cache_gb": 8,
            },
            "optim": {"lr": 1e-3, "warmup_steps": 100},
            "loop": {"minutes": self.options.tokenizer_minutes, "ema_decay": 0.99, "log_every": 100},
            "engine": {"compile": "off"},
            "look": {"validate_every": 0, "sample_every": 0},
            "wandb": "off",
        }
        return from_mapping(TokenizerTraining, settings)


def forwards(config: ObjectiveConfig) -> float:
    """Operations of a step, mean over training, in forward passes over a context and one target stream."""
    imagined = config.resample_fraction * config.resample_passes * (1 - config.resample_start)
    if config.kind == "energy":
        return 3 * (1 + config.energy.streams) / 2 + imagined
    if config.kind == "regression":
        return 3 + imagined
    return 3 + imagined + 2 * config.bootstrap_fraction * (1 - config.bootstrap_start)


def draw_strip(videos: Mapping[str, np.ndarray], options: Options, path: Path) -> None:
    """Truth and samples of one window, a column every few frames."""
    times = sorted({round(value) for value in np.linspace(0, options.frames - 1, 6)})
    media.write_png(path, media.strip(videos, times, labels=[f"frame {time + 1}" for time in times]))


def steps_of(run: Path) -> int:
    """Optimizer steps that a run had time for, those of the run that it began from included."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = max(row.get("step", 0) for row in rows)
    trunk = TRUNKS.get(run.name)
    return own + (steps_of(run.parent / trunk) if trunk else 0)


def device_name() -> str:
    """The GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "tools/bench/objectives.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
