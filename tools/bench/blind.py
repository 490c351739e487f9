"""Score a blind look: which clips of the sheet somebody took for imagined.

    python tools/bench/blind.py docs/flagship-blind-key.json --imagined 2 3 7 11

Adds `flagship.blind.correct`, the share of clips told right (0.5 is guessing), and that of each kind.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from table import add_rows

from vidworld.config import parse
from vidworld.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Compare answers with the key."""

    key: tyro.conf.Positional[Path]
    """flagship-blind-key.json."""
    imagined: tuple[int, ...] = ()
    """Numbers of the clips that were taken for imagined; all others were taken for true."""
    looked: str = "one viewer"
    """Who looked."""
    out: Path = Path("benchmarks/flagship.json")


def main(arguments: Sequence[str], prog: str) -> None:
    """Print and add the rows."""
    options = parse(Options, arguments, prog=prog)
    clips = json.loads(options.key.read_text())["clips"]
    numbers = {clip["number"] for clip in clips}
    if not set(options.imagined) <= numbers:
        raise ConfigError(
            "--imagined", got=sorted(set(options.imagined) - numbers), expected=f"1 to {len(clips)}"
        )
    right = [(clip["kind"], (clip["number"] in options.imagined) == clip["imagined"]) for clip in clips]
    correct = sum(told for _, told in right)
    chance = at_least(correct, len(right))
    rows = {
        "flagship.blind.correct": (
            round(correct / len(right), 3),
            f"of {len(right)} clips told right by {options.looked}; as many by guessing: p {chance:.2g}",
        )
    }
    for kind in dict.fromkeys(kind for kind, _ in right):
        told = [one for name, one in right if name == kind]
        rows[f"flagship.blind.{kind}.correct"] = (round(sum(told) / len(told), 3), f"of {len(told)} clips")
    command = " ".join(["python", "tools/bench/blind.py", *arguments])
    add_rows(options.out, rows, device=options.looked, command=command)
    for name, (value, unit) in rows.items():
        print(f"{name:<36} {value:6.3f} {unit}")


def at_least(correct: int, count: int) -> float:
    """Chance of telling so many right or more by guessing."""
    return sum(math.comb(count, right) for right in range(correct, count + 1)) / 2**count


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "python tools/bench/blind.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
