"""Make a dataset of every kind of the lab and measure the minutes it takes: 2,000 episodes a kind.

    python tools/bench/lab_generate.py --out data/lab --workers 32

The datasets stay: they are those of `vidworld lab all`. An interrupted run goes on where it was, but its
minutes are then of the rest only, so a row is kept only of kinds that were made in one go.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from table import add_rows, cpu_name

from vidworld import cli
from vidworld.config import parse
from vidworld.lab.effect import EFFECTS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make every kind and add a row each."""

    out: Path
    """Folder of the datasets, one a kind."""
    episodes: int = 2000
    seed: int = 0
    variety: str = "core"
    workers: int = os.cpu_count() or 1
    kinds: tuple[str, ...] = ()
    """Default: all."""
    rows: Path = Path("benchmarks/lab.json")


def main(arguments: Sequence[str], prog: str) -> int:
    """Make the datasets; the exit code is that of the first kind that fails."""
    options = parse(Options, arguments, prog=prog)
    for kind in options.kinds or EFFECTS:
        folder = options.out / kind
        fresh = not folder.exists()
        asked = [
            "--episodes",
            str(options.episodes),
            "--seed",
            str(options.seed),
            "--variety",
            options.variety,
        ]
        start = time.perf_counter()
        code = cli.run(["lab", kind, *asked, "--workers", str(options.workers), "--out", str(folder)])
        if code:
            return code
        minutes = (time.perf_counter() - start) / 60
        print(f"{kind}: {minutes:.1f} minutes", flush=True)
        if fresh:
            add_rows(
                options.rows,
                {
                    f"lab.generate_minutes.{kind}.e{options.episodes}.w{options.workers}": (
                        round(minutes, 2),
                        "min",
                    )
                },
                device=cpu_name(),
                command=f"{prog} {' '.join(asked[:2])} --workers {options.workers}",
                packages=("mujoco", "numpy", "numba"),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python tools/bench/lab_generate.py"))
