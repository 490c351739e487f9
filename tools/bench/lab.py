"""Measure the lab: frames a second and core of each kind, and how that holds when every core works.

    python tools/bench/lab.py --processes 16

64 frames at 128 px, everything included (planning, physics, effect, pictures, masks). CPU seconds count, so
other work on the machine disturbs little: `lab.fps.<kind>` is of one process, `lab.scaling.<kind>.p<n>` what
is left of it a process when n work at once. The first episode of a process compiles kernels and is left out.
"""

import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import ConfigError
from vidworld.lab.effect import EFFECTS

WARM_UP_SEED = 10_000


@dataclass(frozen=True)
class Options:
    """Measure the lab's speed."""

    kinds: tuple[str, ...] = tuple(EFFECTS)
    episodes: int = 8
    """Of each kind and process."""
    processes: int = 1
    """More than one: also measure this many at once."""
    out: Path = Path("benchmarks/lab.json")
    """Rows are added here."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Add one or two rows a kind."""
    options = parse(Options, arguments, prog=prog)
    for name in ("episodes", "processes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}", got=getattr(options, name), expected="at least 1")
    rows: dict[str, tuple[float, str]] = {}
    for kind in options.kinds:
        alone = run(kind, options.episodes)
        rows[f"lab.fps.{kind}"] = (round(alone, 1), "frames/s/core")
        if options.processes > 1:
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=context) as pool:
                jobs = [pool.submit(run, kind, options.episodes) for _ in range(options.processes)]
                rates = [job.result() for job in jobs]
            share = sum(rates) / len(rates) / alone
            rows[f"lab.scaling.{kind}.p{options.processes}"] = (round(share, 3), "of one process alone")
    asked = f"--kinds {' '.join(options.kinds)} --episodes {options.episodes} --processes {options.processes}"
    add_rows(
        options.out,
        rows,
        device=f"{cpu_name()}, CPU seconds",
        command=f"python tools/bench/lab.py {asked}",
        packages=("mujoco", "numpy", "numba"),
    )
    for name, (value, unit) in rows.items():
        print(f"{name:<36} {value:8.1f} {unit}")


def run(kind: str, episodes: int) -> float:
    """Frames a CPU second over some episodes of a kind."""
    from vidworld.lab.episode import LabConfig, generate

    config = LabConfig()
    generate(kind, WARM_UP_SEED, config)
    start = time.process_time()
    for seed in range(episodes):
        generate(kind, seed, config)
    return episodes * config.frames / (time.process_time() - start)


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "tools/bench/lab.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
