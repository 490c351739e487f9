"""Draw the figures of uncertainty.py again, of what one or several processes kept: one process a GPU.

    python tools/bench/uncertainty_redraw.py --figures outputs/uncertainty --out benchmarks/uncertainty.json

Reliability and fan charts show the kinds of all processes; rows of events are of all of them too. What is
kept is in Python's own format: open only what you measured yourself.
"""

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uncertainty_figures as figures
from table import add_rows, cpu_name
from uncertainty_calibration import Kind, event_rows

from vidworld.config import parse
from vidworld.errors import DataError
from vidworld.files import write_atomic
from vidworld.lab.effect import EFFECTS

FOLDER = "kept"
EVENT_LEADS = (8, 16, 24, 32)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put together what was kept."""

    figures: Path = Path("outputs/uncertainty")
    """Folder that uncertainty.py was given, with `kept` in it; pictures are written beside."""
    out: Path | None = None
    """Rows of events over all kinds are added here."""
    device: str | None = None
    """That these rows name: what it was measured on."""


def keep(folder: Path, name: str, found: object) -> None:
    """Write what figures are drawn from, in place of what was there."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FOLDER / f"{name}.pickle", pickle.dumps(found))


def main(arguments: Sequence[str], prog: str) -> None:
    """Draw every figure that something was kept of."""
    options = parse(Options, arguments, prog=prog)
    kept = {path.stem: _read(path) for path in sorted((options.figures / FOLDER).glob("*.pickle"))}
    if not kept:
        raise DataError("nothing is kept", where=options.figures / FOLDER, fix="run uncertainty.py first")
    command = " ".join(["python", "tools/bench/uncertainty_redraw.py", *arguments])
    for way in ("", ".uncalibrated"):
        found = together([one for name, one in kept.items() if name.startswith(f"calibration{way}-")])
        if not found:
            continue
        longest = max(len(one.verified[0].floor_T) for one in found)
        leads = [lead for lead in EVENT_LEADS if lead <= longest] or [longest]
        rows, told = event_rows(found, leads, way)
        if options.out is not None and rows:
            rounded = {name: (float(f"{value:.4g}"), unit) for name, (value, unit) in rows.items()}
            device = options.device or cpu_name()
            add_rows(options.out, rounded, device=device, command=command, packages=("torch",))
        name = f"uncertainty-reliability{way.replace('.', '-')}.png"
        figures.reliability(found, told, options.figures / name)
        if not way:
            figures.fans(found, options.figures / "uncertainty-fans.png")
    parts = [one for name, one in kept.items() if name.startswith("mass-")]
    if parts:
        futures, narrowing, mass = (
            next((part[place] for part in parts if part[place] is not None), None) for place in range(3)
        )
        figures.hidden_mass(futures, narrowing, mass, parts[0][3], options.figures / "uncertainty-mass.png")
    for told, rows in (one for name, one in kept.items() if name.startswith("ood-")):
        figures.shifted(told, rows, options.figures / "uncertainty-ood.png")
    print("\n".join(str(path) for path in sorted(options.figures.glob("*.png"))))


def together(parts: Sequence[Sequence[Kind]]) -> list[Kind]:
    """The kinds of several processes, in the lab's order; of one that is there twice the longer."""
    best: dict[str, Kind] = {}
    for one in (one for part in parts for one in part):
        if one.kind not in best or len(one.verified) > len(best[one.kind].verified):
            best[one.kind] = one
    return [best[kind] for kind in EFFECTS if kind in best]


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/uncertainty_redraw.py")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
