"""What `scaling.py` trains, and one run of the real trainer, watched through its metrics.jsonl."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from train import SIZES, Size
from train_data import write_latents

from vidworld.config import from_mapping, parse, read_yaml, to_yaml
from vidworld.errors import ConfigError, UserError
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.tokenizers.store import save_tokenizer
from vidworld.trainer import heartbeat
from vidworld.trainer.config import WorldTraining, absolute, read_training
from vidworld.trainer.train import WorldOptions

REPOSITORY = Path(__file__).resolve().parents[2]
LAB = REPOSITORY / "configs" / "lab.yaml"
ROWS = {"12x384": 64, "12x768": 16, "24x1024": 4, "28x1536": 2}
"""Clips that fit into 85 % of 80 GB, of 16 frames, by `train.py`."""
ENDLESS = 10**9
GRACE_S = 90.0

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A training on one GPU; its batch is what every rank of more GPUs gets."""

    name: str
    training: WorldTraining

    @property
    def rows(self) -> int:
        """Clips of a rank and micro-batch."""
        return self.training.loader.batch_size


def make_case(name: str, scratch: Path, *, rows: int | None, toy: bool, overrides: Sequence[str]) -> Case:
    """A YAML of a world on its own data; `lab`, or LAYERSxWIDTH, on latents of noise.

    Raises ConfigError for a name that is none of them, and what reading the YAML raises.
    """
    if name.endswith((".yaml", ".yml")):
        training, label = read_training(Path(name)), Path(name).stem
    elif name == "lab":
        settings = read_yaml(LAB)
        for key in ("mix", "tokenizer"):
            del settings[key]
        training, label = _on_noise(scratch / name, settings, 16, toy=toy), name
    else:
        training, label = _of_size(name, scratch / name, toy=toy), name
    if not isinstance(training, WorldTraining):
        raise ConfigError("--cases", got=name, expected="a YAML of `kind: world`")
    default = WorldOptions(config=Path(name), training=training)
    training = parse(WorldOptions, [name, *overrides], prog="scaling.py", default=default).training
    if rows is not None:
        training = _with(training, {"loader.batch_size": rows})
    if training.engine.fused == "auto":  # on for one GPU alone: more would be compared with something else
        training = _with(training, {"engine.fused": "off"})
    return Case(label, absolute(training))  # type: ignore[arg-type]


def _of_size(name: str, folder: Path, *, toy: bool) -> WorldTraining:
    try:
        depth, width = map(int, name.split("x"))
    except ValueError:
        expected = f"lab, LAYERSxWIDTH such as {', '.join(SIZES)}, or a YAML"
        raise ConfigError("--cases", got=name, expected=expected) from None
    heads = max(1, width // 64)
    size = SIZES.get(name) or Size(heads, heads, 8)
    settings = {
        "kind": "world",
        "model": {
            "width": width,
            "depth": depth,
            "num_heads": size.num_heads,
            "num_kv_heads": size.num_kv_heads,
            "time_every": min(4, depth),
        },
        "loader": {"clip_frames": 4 if toy else 16, "batch_size": ROWS.get(name, 2), "workers": 2},
        "optim": {"name": "adamw"},
    }
    return _on_noise(folder, settings, size.side, toy=toy)


def _on_noise(folder: Path, settings: dict[str, Any], side: int, *, toy: bool) -> WorldTraining:
    """A training on latents of noise, with a tokenizer of the right form that has learnt nothing."""
    channels = 16
    config = ConvTokenizerConfig(channels, (16, 16, 16), (0, 0, 0), (0, 0, 0))
    digest = save_tokenizer(ConvTokenizer(config), folder / "tokenizer")
    episodes, frames = (8, 32) if toy else (64, 64)
    write_latents(
        folder / "data", channels=channels, side=side, episodes=episodes, frames=frames, tokenizer=digest
    )
    data = {"data": str(folder / "data"), "tokenizer": str(folder / "tokenizer")}
    return from_mapping(WorldTraining, settings | data)


def _with(training: WorldTraining, changes: Mapping[str, Any]) -> WorldTraining:
    """The same with some dotted settings changed."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = dataclasses.replace(getattr(training, section), **{name: value})
        training = dataclasses.replace(training, **{section: part})
    return training


class RunError(UserError):
    """A training that did not come as far as its measurement."""


@dataclass
class Trainer:
    """Starts trainings one after the other; they share the compiler's cache."""

    scratch: Path
    device: str
    start_s: float
    """Longest wait for the first line of the log: imports, ranks that meet, and compilation."""

    def run(
        self,
        case: Case,
        name: str,
        ranks: int,
        changes: Mapping[str, Any],
        *,
        log_every: int,
        enough: Callable[[Rows, float], bool],
    ) -> Rows:
        """Train until `enough` (log lines, seconds since the first one); gives the lines.

        Every rank has the case's batch, cut into `engine.accumulation` micro-batches of its rows if that is
        among the changes. Raises RunError when the training ends before, or does not begin.
        """
        accumulation = changes.get("engine.accumulation", 1)
        training = _with(
            case.training,
            {
                **changes,
                "loader.batch_size": case.rows * ranks * accumulation,
                # Far from the end: the rate on its plateau, no looks, no checkpoints. What comes later in a
                # training is not compiled either.
                "objective.bootstrap_fraction": 0.0,
                "objective.resample_fraction": 0.0,
                "loop.steps": ENDLESS,
                "loop.minutes": None,
                "loop.save_every": ENDLESS,
                "loop.log_every": log_every,
                "look.validate_every": 0,
                "look.sample_every": 0,
                "look.validate_batches": 1,
                "look.validate_clips": 2,
            },
        )
        training = dataclasses.replace(training, wandb="off")
        run, config = self.scratch / name, self.scratch / f"{name}.yaml"
        config.write_text(to_yaml(training))
        script = [str(REPOSITORY / "training" / "train.py"), str(config), "--out", str(run)]
        command = [sys.executable, *script]
        if ranks > 1 or training.engine.strategy != "ddp":
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
            command = [sys.executable, *torchrun, f"--nproc-per-node={ranks}", "--max-restarts=0", *script]
        log = self.scratch / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=self._environment(), stdout=output, stderr=subprocess.STDOUT
            )
            try:
                lines = self._watch(process, run, log, enough)
            finally:
                _stop(process, run)
        codes = [beat.exit_code for beat in heartbeat.read_all(run)]
        if codes != [3] * ranks:  # as after any signal: saved, and left
            print(f"  {name}: ranks left with exit codes {codes}, see {log}", flush=True)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        return lines

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        found = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        if self.device == "cpu":
            found["CUDA_VISIBLE_DEVICES"] = ""
        return found

    def _watch(
        self, process: subprocess.Popen[bytes], run: Path, log: Path, enough: Callable[[Rows, float], bool]
    ) -> Rows:
        began, first = time.monotonic(), None
        while True:
            ended = process.poll()
            lines = read_lines(run / "metrics.jsonl")
            now = time.monotonic()
            if lines and first is None:
                first = now
            if lines and first is not None and enough(lines, now - first):
                return lines
            if ended is not None:
                raise RunError(f"ended with exit code {ended} after {len(lines)} log lines; {_last(log)}")
            if first is None and now - began > self.start_s:
                raise RunError(f"no log line within {self.start_s:.0f} s; {_last(log)}")
            time.sleep(0.1)


def read_lines(path: Path) -> Rows:
    """The log lines of steps so far; a line that is half written is left for later."""
    lines: Rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if "step_s" in (row := json.loads(line)):
                    lines.append(row)
    return lines


def _stop(process: subprocess.Popen[bytes], run: Path) -> None:
    """Ask one rank to leave, as a scheduler would: all of them do. Kill what has not in good time."""
    beats = heartbeat.read_all(run)
    if process.poll() is None and beats:
        with contextlib.suppress(ProcessLookupError):
            os.kill(beats[0].pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    if process.poll() is None:
        for beat in beats:
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)
        process.kill()
    process.wait()


def _last(log: Path) -> str:
    """What a failed training said last, as far as it says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line and "ChildFailed" not in line]
    return f"it said: {(told or lines or ['nothing'])[-1][:300]} (all of it: {log})"


@dataclass(frozen=True)
class Speed:
    """A training in its steady state."""

    step_ms: float
    tok_s: float
    wait_share: float
    memory_gib: float
    spread: float
    """Difference of the upper and lower quartile of the steps' times, over their median."""

    @classmethod
    def of(cls, lines: Rows, *, skip: int) -> "Speed":
        """Medians of the log lines after the first `skip`."""
        kept = lines[skip:] or lines[-1:]
        steps = torch.tensor([line["step_s"] for line in kept], dtype=torch.float64)
        low, middle, high = steps.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return cls(
            1e3 * middle,
            median(line["tokens_per_s"] for line in kept),
            median(line["wait_share"] for line in kept),
            max(line["memory_gb"] for line in kept),
            (high - low) / middle,
        )


def differences(one: Rows, many: Rows) -> list[float]:
    """Step by step the largest relative difference of loss and gradient norm between two trainings."""
    pairs = list(zip(one, many, strict=False))
    assert pairs, "both have log lines"
    assert all(a["step"] == b["step"] for a, b in pairs), "log lines of the same steps"
    return [max(abs(b[key] / a[key] - 1) for key in ("loss", "grad_norm")) for a, b in pairs]
