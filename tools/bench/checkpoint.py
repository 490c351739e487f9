"""Measure what a checkpoint costs a training: written in the background, and at once.

    python tools/bench/checkpoint.py [--width 1024] [--tokens 2048] [--throttle-s 0.3]

A stack of matrices learns on rows of tokens; every few steps a checkpoint is written to a disk that is made
slow by a pause at each of its nine points. The figure is the time that a save holds up the training, as a
share of a step: the largest of all saves.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table import add_rows, cpu_name
from torch import nn

from vidworld.config import parse
from vidworld.errors import UserError
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Feed, Loop
from vidworld.trainer.loop_config import LoopConfig
from vidworld.trainer.optim import OptimConfig
from vidworld.trainer.tasks import Moment, Task
from vidworld.types import Batch


@dataclass(frozen=True)
class Options:
    """Measure what a checkpoint costs a training."""

    width: int = 1024
    depth: int = 12
    tokens: int = 2048
    """Rows of a step."""
    steps: int = 12
    save_every: int = 3
    throttle_s: float = 0.3
    """Pause of the writer at each of its points."""
    device: str = "cpu"
    name: str = "reliability.save"
    out: Path | None = Path("benchmarks/reliability.json")
    """Rows are added here; `None`: only print."""


class Stack(Task[nn.Sequential]):
    """Matrices of one width, one after the other."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.GELU())]
        self.net = nn.Sequential(*layers)

    def forward(self, batch: Batch, generator: torch.Generator, moment: Moment) -> dict[str, torch.Tensor]:
        """Mean square of what comes out."""
        return {"loss": self.net(batch.actions_BTA).square().mean()}


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure both ways, print and write the rows."""
    options = parse(Options, arguments, prog=prog)
    torch.set_num_threads(1)
    rows: dict[str, tuple[float, str]] = {}
    for way, in_background in (("background", True), ("at_once", False)):
        step_s, held_up_s = measure(options, in_background=in_background)
        rows[f"{options.name}.{way}.stall"] = (round(100 * held_up_s / step_s, 2), "% of a step")
        rows[f"{options.name}.{way}.held_up_s"] = (round(held_up_s, 3), "s")
    rows[f"{options.name}.step_s"] = (round(step_s, 3), "s")
    for name, (value, unit) in rows.items():
        print(f"{name:<40} {value:10.3f} {unit}")
    if options.out is not None:
        device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
        command = " ".join(["python", "tools/bench/checkpoint.py", *arguments])
        add_rows(options.out, rows, device=device, command=command, packages=("torch",))


def measure(options: Options, *, in_background: bool) -> tuple[float, float]:
    """Median seconds of a step, and the longest that a save held up the training."""
    torch.manual_seed(0)
    task = Stack(options.width, options.depth)
    optim = OptimConfig(warmup_steps=0)
    ema = EMA[Task[Any]](task, 0.999)
    engine = build_engine(task, EngineConfig(), optim)
    rows = torch.randn(1, options.tokens, options.width)
    batch = Batch(
        ids=("rows",),
        actions_BTA=rows,
        proprio_BTS=torch.zeros(1, options.tokens, 1),
        embodiment_B=torch.zeros(1, dtype=torch.int64),
    )

    def batches(step: int) -> Iterator[Batch]:
        while True:
            yield batch

    step_s: list[float] = []
    held_up_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder), progress_bar=False) as log:
        loop = Loop(
            task,
            ema,
            Feed(batches, lambda step: {}, lambda stored, where: None),
            engine,
            optim,
            LoopConfig(steps=options.steps, save_every=options.save_every, save_in_background=in_background),
            run=Path(folder),
            seed=0,
            log=log,
        )
        loop.saving.writer.reached = lambda point: time.sleep(options.throttle_s)
        plain_step, plain_save = loop.step, loop.saving.save

        def step(micro_batches: Any) -> None:
            begin = time.perf_counter()
            plain_step(micro_batches)
            if options.device == "cuda":
                torch.cuda.synchronize()
            step_s.append(time.perf_counter() - begin)

        def save(number: int, facts: Any) -> None:
            begin = time.perf_counter()
            plain_save(number, facts)
            if number < options.steps:  # the last one is waited for by right
                held_up_s.append(time.perf_counter() - begin)

        loop.step, loop.saving.save = step, save  # type: ignore[method-assign]
        loop.fit()
    # The first step makes the optimizer's state, and the first save the buffers on the host.
    return statistics.median(step_s[1:]), max(held_up_s[1:] or held_up_s)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "checkpoint.py")
    except UserError as error:
        print(f"checkpoint.py: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
