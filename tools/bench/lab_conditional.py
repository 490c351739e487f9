"""Measure what draws of `vidworld.lab.conditional` are worth some frames after the first contact.

    python tools/bench/lab_conditional.py --seeds 0 1 2 3 --draws 400

For `container`: effective draws (Kish) of as many simulations, next to those of draws from the prior alone.
"""

import itertools
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Measure effective draws of the container."""

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    draws: int = 400
    after: tuple[int, ...] = (3, 6, 12)
    """Frames that are seen after the first contact."""
    workers: int = 1
    out: Path = Path("benchmarks/lab.json")
    """Rows are added here."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Add the rows."""
    options = parse(Options, arguments, prog=prog)
    if options.draws < 80 or not options.seeds or min(options.after, default=0) < 1:
        raise ConfigError("options", got=options, expected="80 draws or more, a seed, frames after contact")
    from vidworld.lab.conditional import conditional
    from vidworld.lab.episode import LabConfig, generate

    asked = f"--seeds {' '.join(map(str, options.seeds))} --draws {options.draws}"
    warnings.simplefilter("ignore", UserWarning)
    for seed in options.seeds:
        rows: dict[str, tuple[float, str]] = {}
        episode = generate("container", seed, LabConfig(size=64, exploration=0.0), render=False)
        contact = int(np.argmax(episode.outcomes_T["touched"] > 0))
        for after, adapt in itertools.product(options.after, (True, False)):
            k = min(contact + after, episode.config.frames)
            found = conditional(episode, k, options.draws, workers=options.workers, adapt=adapt)
            name = f"lab.effective.{episode.visible['task']}{seed}.a{after}" + ("" if adapt else ".prior")
            rows[name] = (round(found.effective_draws, 1), f"of {options.draws} simulations")
            print(f"{name:<32} {rows[name][0]:8.1f}", flush=True)
        add_rows(
            options.out,
            rows,
            device=cpu_name(),
            command=f"python tools/bench/lab_conditional.py {asked}",
            packages=("mujoco", "numpy"),
        )


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "tools/bench/lab_conditional.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
