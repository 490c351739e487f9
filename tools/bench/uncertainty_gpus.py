"""Calibrate a run and measure all of uncertainty.py on the GPUs of one host, within minutes.

    python tools/bench/uncertainty_truth.py --data data/lab/container --episodes 48    # before; all cores
    python tools/bench/uncertainty_gpus.py --run runs/lab --data data/lab --readout runs/readout

Each process has a GPU of its own: `vidworld calibrate` first, and beside it what needs no calibration
(shifted episodes, the cost of the ensemble); then the calibration of some kinds each, and the container.
What a process says is in --figures/NAME.log. Rows of all are added to --out, pictures are drawn of what all
kept.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from table import read_rows

from vidworld.config import parse
from vidworld.errors import ConfigError
from vidworld.files import write_atomic

BENCH = Path(__file__).parent
KINDS = (("rigid", "container"), ("paint", "smoke", "liquid"))
"""Of the two processes that measure calibration."""
LEAST_S = 20.0
CALIBRATE_SHARE = 0.5
"""Of the budget, after which the other parts are measured uncalibrated."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure everything, a GPU a process."""

    run: Path
    """Run or export; its members are the ensemble."""
    data: Path
    """Folder with a dataset a kind."""
    readout: Path
    cache: Path = Path("outputs/truth")
    """Of true ensembles."""
    gpus: int = 4
    """0: all processes on the CPU."""
    budget_s: float = 230.0
    calibrate: str = "--episodes 24 --rounds 4"
    """Further words for `vidworld calibrate`, as --calibrate='--episodes 12'; it replaces an earlier one."""
    measure: str = "--rows 512"
    """Further words for uncertainty.py."""
    cost: str = "--ways engine alone --budget-s 60"
    """Further words for ensemble.py."""
    figures: Path = Path("outputs/uncertainty")
    out: Path = Path("benchmarks/uncertainty.json")


@dataclass
class Job:
    """A process on a GPU."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: IO[bytes]
    began: float = field(default_factory=time.monotonic)


class Host:
    """Starts processes on GPUs, and collects what they found."""

    def __init__(self, options: Options) -> None:
        self.options, self.began = options, time.monotonic()
        self.cores = max(1, (os.cpu_count() or 1) // max(1, options.gpus))

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self.options.budget_s - (time.monotonic() - self.began)

    def start(self, name: str, gpu: int, words: Sequence[object]) -> Job:
        """Start a process that sees one GPU."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.cores)}
        if self.options.gpus:
            shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            names = shown or [str(number) for number in range(self.options.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = names[gpu % min(self.options.gpus, len(names))]
        log = (self.options.figures / f"{name}.log").open("wb")
        command = [sys.executable, *map(str, words)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        return Job(name, process, log)

    def measure(self, name: str, gpu: int, *words: str) -> Job:
        """Start uncertainty.py with what is left of the budget."""
        options = self.options
        device = "cuda" if options.gpus else "cpu"
        given = {
            "--run": options.run, "--data": options.data, "--readout": options.readout,
            "--cache": options.cache, "--device": device, "--workers": self.cores,
            "--figures": options.figures, "--out": self.rows_of(name),
            "--budget-s": max(self.left_s, LEAST_S),
        }  # fmt: skip
        flat = [word for pair in given.items() for word in pair]
        return self.start(name, gpu, [BENCH / "uncertainty.py", *flat, *words, *shlex.split(options.measure)])

    def rows_of(self, name: str) -> Path:
        """File of one process's rows."""
        return self.options.figures / "rows" / f"{name}.json"

    def wait(self, *jobs: Job, share: float = 1.0) -> list[str]:
        """Wait for processes, a while beyond their share of the budget; names of those that failed."""
        failed = []
        for job in jobs:
            try:
                left_s = self.left_s - (1 - share) * self.options.budget_s
                code = job.process.wait(timeout=max(left_s, 0) + 2 * LEAST_S * share)
            except subprocess.TimeoutExpired:
                job.process.kill()
                code = job.process.wait()
            job.log.close()
            print(f"{job.name}: exit {code} after {time.monotonic() - job.began:.0f} s", flush=True)
            if code:
                failed.append(job.name)
        return failed


def main(arguments: Sequence[str], prog: str) -> int:
    """Run everything; the number of processes that failed."""
    options = parse(Options, arguments, prog=prog)
    if options.gpus < 0:
        raise ConfigError("--gpus", got=options.gpus, expected="0 or more")
    (options.figures / "rows").mkdir(parents=True, exist_ok=True)
    host = Host(options)
    device = "cuda" if options.gpus else "cpu"
    datasets = sorted(path.parent for path in options.data.glob("*/manifest.json"))
    kinds = {path.name for path in datasets}
    calibrate = host.start(
        "calibrate",
        0,
        ["-m", "vidworld", "calibrate", options.run, *datasets, "--overwrite", "--device", device]
        + shlex.split(options.calibrate),
    )
    cost = host.start(
        "cost",
        2,
        [BENCH / "ensemble.py", "--run", options.run, "--device", device, "--out", host.rows_of("cost")]
        + shlex.split(options.cost),
    )
    ood = host.measure("ood", 1, "--parts", "ood", "--kinds", "container")
    # Better all parts of a world as it was trained than none.
    failed = host.wait(calibrate, share=CALIBRATE_SHARE)
    running = [cost, ood]
    for place, some in enumerate(KINDS):
        here = [kind for kind in some if kind in kinds]
        if here:
            gpu = (0, 2)[place]
            running.append(
                host.measure(f"calibration-{place}", gpu, "--parts", "calibration", "--kinds", *here)
            )
    parts = ("futures", "narrowing", "mass")
    running.append(host.measure("container", 3, "--parts", *parts, "--kinds", "container"))
    failed += host.wait(*running)
    redraw = [BENCH / "uncertainty_redraw.py", "--figures", options.figures, "--out", host.rows_of("events")]
    if names := {row["device"] for row in read_rows(options.figures / "rows")}:
        redraw += ["--device", sorted(names)[0]]
    failed += host.wait(host.start("redraw", 0, redraw))
    collect(options)
    print(f"{host.options.budget_s - host.left_s:.0f} s; failed: {', '.join(failed) or 'none'}", flush=True)
    return len(failed)


def collect(options: Options) -> None:
    """Add the rows of all processes to --out, in one go."""
    found = read_rows(options.figures / "rows")
    before = json.loads(options.out.read_text()) if options.out.is_file() else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(row) for row in before + found) + "\n]\n"
    write_atomic(options.out, text.encode())


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:], "python tools/bench/uncertainty_gpus.py"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
