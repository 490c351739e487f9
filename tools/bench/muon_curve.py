"""Muon against AdamW over wall-clock time: who comes to whose validation loss, and when.

    python tools/bench/muon_curve.py --device cuda --minutes 8                  # the planar arm, made here
    python tools/bench/muon_curve.py --device cuda --minutes 8 --config configs/lab.yaml -- --latents LATENTS
    python tools/bench/muon_curve.py --minutes 3 --size 2x32 --episodes 12 --batch 4 --tokenizer-s 3   # a toy

All train the same network from the same weights on the same clips in the same order for the same seconds,
with the real loop, engine, loader and schedule (rates fall to zero over the last part, which follows the
seconds): AdamW at several rates, and Muon on the blocks' matrices. Every few seconds the averaged weights are
judged on held-out clips; that time does not count, nor do compilation and the first batch. With --config the
settings and the data are those of a YAML of a world, with overrides after `--`, and its rate is that of what
Muon leaves to AdamW.

Rows: `muon.val_loss.<case>.<contender>` at the end, `muon.steps...` in that time, and
`muon.time_ratio.<case>`, the time at which Muon first has the best final loss of AdamW over the time that
AdamW had. It is missing when Muon never does.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.ticker import FuncFormatter
from table import add_rows, cpu_name
from torch import nn

from vidworld.config import from_mapping, parse
from vidworld.data.convert import ConvertOptions, convert
from vidworld.errors import ConfigError, UserError
from vidworld.files import write_atomic
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.plots import Line, Panel, draw, to_png
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import TokenizerTraining, WorldTraining, absolute, read_training
from vidworld.trainer.control import frozen_gc
from vidworld.trainer.corpus import encode_corpus, held_out, open_corpus, open_latents, world_spec
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import autocast_of, build_engine, uses_compile
from vidworld.trainer.feed import clip_feed
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Loop, LoopConfig
from vidworld.trainer.optim import OptimConfig
from vidworld.trainer.samples import Validation
from vidworld.trainer.tasks import WorldTask
from vidworld.trainer.train import WorldOptions, train
from vidworld.trainer.warm_up import clip_shapes, prepare_kernels
from vidworld.world.build import build

Curve = list[tuple[float, float]]
"""Seconds of training, and the validation loss then."""


@dataclass(frozen=True)
class Options:
    """Compare Muon with AdamW at equal wall-clock time."""

    config: Path | None = None
    """YAML of a world; by default the planar arm is drawn, tokenized and learnt."""
    size: str = "12x384"
    """LAYERSxWIDTH without --config."""
    episodes: int = 600
    """Of the planar arm, 48 frames each."""
    batch: int = 64
    clip: int = 16
    tokenizer_s: float = 20.0
    """Training of the planar arm's tokenizer."""
    adamw_lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    muon_lr: tuple[float, ...] = (0.02,)
    lr: float = 6e-4
    """AdamW's rate beside Muon, without --config."""
    seconds: float | None = None
    """Of training for each; by default what --minutes allow."""
    minutes: float = 8.0
    """For all of it."""
    validate_s: float = 3.0
    """Seconds of training between two looks at the held-out clips."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    work: Path | None = None
    """Where data, tokenizer and curves.json go and stay; default: a temporary folder."""
    picture: Path | None = Path("docs/images/muon.png")
    out: Path | None = Path("benchmarks/muon.json")
    """Rows are added here; `None`: only print."""

    def __post_init__(self) -> None:
        if not (self.adamw_lr and self.muon_lr):
            raise ConfigError("--adamw-lr and --muon-lr", got="none", expected="at least one of each")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device", got="cuda", expected="cpu: no GPU is available here")


def main(arguments: Sequence[str], prog: str) -> None:
    """Train all, print, draw, and write the rows."""
    began = time.monotonic()
    own, overrides = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, overrides = own[:at], own[at + 1 :]
    options = parse(Options, own, prog=prog)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vidworld-")))
        training = planar_training(options, work) if options.config is None else read_world(options.config)
        path = options.config or Path(options.size)
        default = WorldOptions(config=path, training=training)
        training = parse(WorldOptions, [str(path), *overrides], prog=prog, default=default).training
        case = f"planar_{options.size}" if options.config is None else options.config.stem
        contest = Contest(absolute(training), work, options)  # type: ignore[arg-type]
        everyone = contenders(options, training.optim)
        seconds = options.seconds or contest.share(
            60 * options.minutes - (time.monotonic() - began), len(everyone)
        )
        print(f"{case}: {len(everyone)} contenders, {seconds:.0f} s each", flush=True)
        for name, optim in everyone.items():
            contest.train(name, optim, seconds)
        rows = rows_of(case, contest.curves, contest.steps, seconds)
        for name, (value, unit) in rows.items():
            print(f"{name:<48} {value:12.5g} {unit}")
        (work / "curves.json").write_text(json.dumps(contest.curves))
    if options.picture is not None:
        paint(contest.curves, options.picture, case)
        print(options.picture)
    if options.out is not None:
        shown = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
        command = " ".join(["python", "tools/bench/muon_curve.py", *arguments])
        add_rows(options.out, rows, device=shown, command=command, packages=("torch",))


def contenders(options: Options, base: OptimConfig) -> dict[str, OptimConfig]:
    """AdamW at its rates, and Muon at its own; all else as in the config."""
    adamw = {f"adamw_{rate:g}": dataclasses.replace(base, name="adamw", lr=rate) for rate in options.adamw_lr}
    muon = {
        f"muon_{rate:g}": dataclasses.replace(base, name="muon", muon_lr=rate) for rate in options.muon_lr
    }
    return adamw | muon


def read_world(path: Path) -> WorldTraining:
    """The training of a YAML; raises ConfigError when it is that of a tokenizer."""
    training = read_training(path)
    if not isinstance(training, WorldTraining):
        raise ConfigError("--config", got=path, expected="a YAML of `kind: world`")
    return training


def planar_training(options: Options, work: Path) -> WorldTraining:
    """Draw episodes of the planar arm and train a tokenizer on them, unless they are there; its world."""
    try:
        depth, width = map(int, options.size.split("x"))
    except ValueError:
        raise ConfigError("--size", got=options.size, expected="LAYERSxWIDTH, such as 12x384") from None
    data, tokenizer = work / "data", work / "tokenizer"
    if not (data / "manifest.json").exists():
        source = PlanarSource(options.episodes, 0, PlanarConfig())
        convert(source, ConvertOptions(out=data, size="64x64"))
    common = {"data": str(data), "wandb": "off"}
    if not (tokenizer / "tokenizer" / "tokenizer.json").exists():
        settings = {
            "kind": "tokenizer",
            "tokenizer": {"widths": [32, 64, 96], "encoder_blocks": [1, 1, 1], "decoder_blocks": [1, 1, 1]},
            "loader": {"batch_size": 32},
            "optim": {"lr": 1e-3, "warmup_steps": 20},
            "loop": {"minutes": options.tokenizer_s / 60},
            "engine": {"compile": "off"},
            "look": {"validate_every": 0, "sample_every": 0, "validate_clips": 8},
        }
        training = from_mapping(TokenizerTraining, common | settings)
        train(training, tokenizer, overwrite=True, progress_bar=False)
    heads = max(1, width // 64)
    settings = {
        "kind": "world",
        "tokenizer": str(tokenizer),
        "latents": str(work / "latents"),
        "model": {
            "width": width,
            "depth": depth,
            "num_heads": heads,
            "num_kv_heads": heads // 3 if heads % 3 == 0 else 1,
            "time_every": min(4, depth),
        },
        "loader": {"clip_frames": options.clip, "batch_size": options.batch},
        "optim": {"lr": options.lr, "warmup_steps": 50},
        "look": {"validate_clips": min(64, options.batch), "validate_batches": 2},
    }
    return from_mapping(WorldTraining, common | settings)


@dataclass
class Contest:
    """One network, compiled once, that every contender trains from the same weights."""

    training: WorldTraining
    work: Path
    options: Options
    curves: dict[str, Curve] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        training, began = self.training, time.monotonic()
        self.device = torch.device(self.options.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        corpus = open_corpus(training)
        tokenizer = load_tokenizer(training.tokenizer)
        assert isinstance(tokenizer, nn.Module)
        folder = training.latents or self.work / "latents"
        encode_corpus(corpus, tokenizer.to(self.device), folder)
        self.latents = open_latents(corpus, folder)
        torch.manual_seed(training.seed)
        world = build(world_spec(training, corpus, tokenizer), tokenizer)
        self.task = WorldTask(
            world.model,
            world.normalizer,
            training.objective,
            action_dropout=training.action_dropout,
            clip_dropout=training.clip_dropout,
        ).to(self.device)
        self.ema: EMA[Any] = EMA(self.task, training.loop.ema_decay)
        self.initial = {name: value.clone() for name, value in self.task.state_dict().items()}
        compiled = uses_compile(training.engine)
        if compiled:
            self.task.compile_parts()
        self.autocast = autocast_of(training.engine, self.device)
        self.validation = Validation(held_out(training, self.latents), self.autocast)
        shapes = clip_shapes([training.loader], 1)
        print(prepare_kernels(self.task, shapes, self.device, self.autocast, compiled), flush=True)
        self.validate_took_s = self._timed_validation()
        print(f"network and data ready after {time.monotonic() - began:.0f} s", flush=True)

    def share(self, left_s: float, count: int) -> float:
        """Seconds of training for each of `count`, when so many are left for all with their looks."""
        looks = 1 + self.validate_took_s / self.options.validate_s
        # A loader's workers take some seconds to start.
        return max(2 * self.options.validate_s, (0.95 * left_s / count - 8) / looks)

    def train(self, name: str, optim: OptimConfig, seconds: float) -> None:
        """Train from the initial weights for so many seconds, and keep the curve."""
        self.task.load_state_dict(self.initial)
        self.ema.module.load_state_dict(self.initial)
        self.ema.updates = 0
        matrices = self.task.matrices() if optim.name == "muon" else ()
        engine = build_engine(self.task, self.training.engine, optim, matrices=matrices)
        run = self.work / f"run-{name}"
        run.mkdir(parents=True, exist_ok=True)
        config = LoopConfig(minutes=seconds / 60, ema_decay=self.training.loop.ema_decay)
        feed = clip_feed(self.latents, self.training.loader, seed=self.training.seed)
        log = RunLog(run, active=False, progress_bar=False)
        loop = Loop(
            *(self.task, self.ema, feed, engine, optim, config), run=run, seed=self.training.seed, log=log
        )
        loop._batches = loop._open()
        trained_s, curve = 0.0, [(0.0, self._loss())]
        batches = loop._fetch()
        with frozen_gc():
            while trained_s < seconds:
                due = min(seconds, trained_s + self.options.validate_s)
                began = time.perf_counter()
                while (now := trained_s + time.perf_counter() - began) < due:
                    loop.step(batches)
                    loop.clock.advance(now)
                    batches = loop._fetch()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                trained_s += time.perf_counter() - began
                curve.append((trained_s, self._loss()))
        loop._batches.close()  # type: ignore[attr-defined]
        self.curves[name], self.steps[name] = curve, loop.clock.step
        final = f"validation loss {curve[-1][1]:.5f}"
        print(f"  {name:<14} {loop.clock.step:6d} steps in {trained_s:.1f} s, {final}", flush=True)

    def _loss(self) -> float:
        return float(self.validation(0, self.ema.module)["val_loss"])

    def _timed_validation(self) -> float:
        self._loss()
        began = time.monotonic()
        self._loss()
        return time.monotonic() - began


def reached(curve: Curve, loss: float) -> float | None:
    """When a curve first came down to a loss, between its points on a straight line; None if it never did."""
    before: tuple[float, float] | None = None
    for seconds, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return seconds
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = (seconds, value)
    return None


def best(curves: dict[str, Curve], kind: str) -> str:
    """The contender of a kind with the lowest final loss."""
    return min((name for name in curves if name.startswith(kind)), key=lambda name: curves[name][-1][1])


def rows_of(
    case: str, curves: dict[str, Curve], steps: dict[str, int], seconds: float
) -> dict[str, tuple[float, str]]:
    """Final losses, steps, and when the best Muon had the loss of the best AdamW."""
    rows: dict[str, tuple[float, str]] = {f"muon.seconds.{case}": (round(seconds, 1), "s of training each")}
    for name, curve in curves.items():
        rows[f"muon.val_loss.{case}.{name}"] = (curve[-1][1], "validation loss")
        rows[f"muon.steps.{case}.{name}"] = (steps[name], "steps")
    adamw, muon = curves[best(curves, "adamw")], curves[best(curves, "muon")]
    rows[f"muon.loss_ratio.{case}"] = (muon[-1][1] / adamw[-1][1], "x the best AdamW's")
    if (when := reached(muon, adamw[-1][1])) is not None:
        rows[f"muon.time_ratio.{case}"] = (when / adamw[-1][0], "x AdamW's time to its final loss")
    return rows


def paint(curves: dict[str, Curve], path: Path, case: str) -> None:
    """Validation loss over seconds of training, on a logarithmic scale, as PNG."""
    floor = curves[best(curves, "adamw")][-1][1]
    end = max(curve[-1][0] for curve in curves.values())
    lines = [
        Line(name.replace("_", " "), [seconds for seconds, _ in curve[1:]], [loss for _, loss in curve[1:]])
        for name, curve in curves.items()
    ]
    lines.append(Line("best AdamW at its end", [0, end], [floor, floor], floor=True))
    panel = Panel(tuple(lines), f"{case.replace('_', ' ')}, same seconds", "s of training", "validation loss")
    figure = draw([panel], panel_size=(6.4, 3.6))
    axis = figure.axes[0]
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:.3g}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_png(figure, dots_per_inch=90))


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/muon_curve.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
