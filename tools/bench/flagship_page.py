"""Write docs/flagship.md: tables and pictures of what flagship, drift, blind, ship and peers.py measured.

    python tools/bench/flagship_page.py

Every figure is the newest row of its name in benchmarks/*.json; what was not measured is left out, and so is
skill from before the last measurement of a kind, which may have found nothing to foresee.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import newest, read_rows

from vidworld.config import parse
from vidworld.errors import DataError
from vidworld.evaluation.skill import HEADLINE

Row = dict[str, Any]
PICTURES = (
    ("psnr", "PSNR [dB]"),
    ("psnr_moving", "PSNR of moving pixels [dB]"),
    ("ssim", "SSIM"),
    ("lpips", "LPIPS"),
)
RATIO = "flagship.shuffle_ratio."
WHO = (("", "imagined"), (".held", "last frame held"), (".bound", "tokenizer"), (".oracle", "oracle"))
DRIFT = {
    "gain_while_recorded": "over the last frame held, while recorded",
    "background.begin": "what never moves, first 16",
    "background.end": "at the end",
    "contrast.end": "contrast",
    "sharpness.end": "sharpness",
    "motion.end": "motion",
    "jump_ratio": "jumps with the window",
    "returned.turn": "turn",
    "returned.return": "return",
    "returned.bound": "tokenizer",
}
PEERS = {
    "ours": "ours",
    "plain": "diffusion-forcing transformer, 10 steps",
    "edm": "pixel-space U-Net, 3 steps",
}


@dataclass(frozen=True)
class Options:
    """Write the page."""

    directory: Path = Path("benchmarks")
    out: Path = Path("docs/flagship.md")


def main(arguments: Sequence[str], prog: str) -> None:
    """Write the page from the rows that are there."""
    options = parse(Options, arguments, prog=prog)
    rows = {row["name"]: row for row in newest(current(read_rows(options.directory)))}
    if not any(name.startswith("flagship.skill.") for name in rows):
        raise DataError(
            "rows of skill", where=options.directory, got="none", fix="run tools/bench/flagship.py"
        )
    options.out.write_text(page(rows, options.out.parent))
    print(options.out)


def current(rows: Sequence[Row]) -> list[Row]:
    """Rows without the skill of a kind from before its pictures were measured last."""
    last = {row["name"].rpartition(".")[2]: place for place, row in enumerate(rows) if RATIO in row["name"]}

    def holds(place: int, row: Row) -> bool:
        match = re.search(r"^flagship\.(?:skill|error)\.(\w+)\.", row["name"])
        return match is None or place > last.get(match[1], -1)

    return [row for place, row in enumerate(rows) if holds(place, row)]


def page(rows: dict[str, Row], docs: Path) -> str:
    """The page as markdown; pictures are shown if they lie in `docs`."""
    kinds = [kind for kind in HEADLINE if any(name.startswith(f"flagship.skill.{kind}.") for name in rows)]
    found = [re.search(r"^flagship\.skill\..*\.h(\d+)$", name) for name in rows]
    horizons = sorted({int(match[1]) for match in found if match})
    first = next(row for name, row in rows.items() if name.startswith("flagship.skill."))
    parts = [
        "# The world of the lab, measured\n",
        f"Held-out seeds, 8 known frames, on {first['device']}, {first['date']}. What the words mean:\n"
        "[evaluation](evaluation.md#how-much-of-what-can-be-foreseen-is-foreseen). Written by\n"
        "`tools/bench/flagship_page.py` from the rows of `benchmarks/`.\n",
        f"```sh\n{first['command']}\n```\n",
        "## Skill\n",
        "1 is as good as the true simulator that does not know what is hidden, 0 as good as holding the\n"
        "last frame; with the central 95 % over resampled episodes.\n",
        table(
            ["", *(f"frame {horizon}" for horizon in horizons)],
            [
                [kind, *(skill(rows.get(f"flagship.skill.{kind}.h{horizon}")) for horizon in horizons)]
                for kind in kinds
            ],
        ),
    ]
    for kind in kinds:
        parts += [f"### {kind}\n", quantities(rows, kind, horizons)]
        picture = docs / "images" / f"flagship-{kind}.jpg"
        if picture.is_file():
            parts.append(f"![{kind}: what happened above what was imagined](images/{picture.name})\n")
    parts += ["## Pictures\n", *pictures(rows, kinds, horizons)]
    ratios = [[kind, number(rows.get(f"flagship.shuffle_ratio.{kind}"))] for kind in kinds]
    parts += [
        "Error under another episode's commands, over that under the true ones:\n",
        table(["", "ratio"], ratios),
    ]
    parts += drift(rows, kinds, docs)
    parts += blind(rows, docs)
    parts += shipped(rows)
    parts += peers(rows)
    return "\n".join(parts)


def quantities(rows: dict[str, Row], kind: str, horizons: Sequence[int]) -> str:
    """Errors and skill of each headline quantity."""
    lines = []
    for name in (*HEADLINE[kind], "moving_pixels"):
        for horizon in horizons:
            row = rows.get(f"flagship.skill.{kind}.{name}.h{horizon}")
            errors = [
                number(rows.get(f"flagship.error.{kind}.{name}.{who}.h{horizon}"))
                for who in ("imagined", "held", "oracle", "ruler")
            ]
            if row is not None or any(error != "-" for error in errors):
                note = "ruler too blunt" if row is not None and "too blunt" in row["unit"] else ""
                lines.append([name, str(horizon), *errors, skill(row), note])
    return table(["error of", "frame", "imagined", "held", "oracle", "ruler on truth", "skill", ""], lines)


def pictures(rows: dict[str, Row], kinds: Sequence[str], horizons: Sequence[int]) -> list[str]:
    """A table a metric."""
    parts = []
    for metric, title in PICTURES:
        lines = []
        for kind in kinds:
            for suffix, who in WHO:
                cells = [number(rows.get(f"flagship.{metric}{suffix}.{kind}.h{h}")) for h in horizons]
                if any(cell != "-" for cell in cells):
                    lines.append([kind, who, *cells])
        if lines:
            parts.append(table([title, "", *(f"frame {horizon}" for horizon in horizons)], lines))
    return parts


def drift(rows: dict[str, Row], kinds: Sequence[str], docs: Path) -> list[str]:
    """Whether rollouts many times longer than the clips of training hold: samples, and means."""
    parts: list[str] = []
    for mark, what in (("drift", "Sampled"), ("drift.t0", "The mean of the future (`temperature 0`)")):
        measured = [kind for kind in kinds if f"{mark}.{kind}.contrast.end" in rows]
        if not measured:
            continue
        lines = [[kind, *(number(rows.get(f"{mark}.{kind}.{name}")) for name in DRIFT)] for kind in measured]
        count = rows[f"{mark}.{measured[0]}.contrast.end"]["unit"].rpartition(", ")[2]
        parts += [f"{what}, {count} a kind:\n", table(["", *DRIFT.values()], lines)]
        for suffix, shown in (("jpg", "A rollout of each kind"), ("png", "Looks, frame by frame")):
            picture = docs / "images" / f"{mark.replace('.', '-')}.{suffix}"
            if picture.is_file():
                parts.append(f"![{shown}](images/{picture.name})\n")
    head = [
        "## Hundreds of frames\n",
        "Under recorded commands. The end is the last quarter; contrast, sharpness and motion are shares of\n"
        "the recording's; the rest but jumps is PSNR in dB. Turn and return: there and back within the\n"
        "window, against the last known view.\n",
    ]
    return head + parts if parts else []


def blind(rows: dict[str, Row], docs: Path) -> list[str]:
    """The sheet, and how well somebody told the clips."""
    sheet = docs / "images" / "flagship-blind.jpg"
    if not sheet.is_file():
        return []
    parts = ["## A blind look\n", f"![Numbered clips, half of them true](images/{sheet.name})\n"]
    parts.append("Half of the clips are true. The key is `docs/flagship-blind-key.json`.\n")
    if row := rows.get("flagship.blind.correct"):
        parts.append(f"{row['value']:.0%} {row['unit']}.\n")
    return parts


def shipped(rows: dict[str, Row]) -> list[str]:
    """What rounding costs."""
    lines = [
        [name.removeprefix("flagship.shipped."), number(row), row["unit"]]
        for name, row in rows.items()
        if name.startswith("flagship.shipped.")
    ]
    return ["## What comes with the package\n", table(["", "", ""], lines)] if lines else []


def peers(rows: dict[str, Row]) -> list[str]:
    """All contenders side by side."""
    names = sorted(
        {match[1] for name in rows if (match := re.search(r"^peers\.(ours\.k\d+|plain|edm)\.", name))}
    )
    if not names:
        return []
    columns = sorted(
        {name.partition(f"peers.{who}.")[2] for who in names for name in rows if f"peers.{who}." in name}
    )
    lines = [
        [who.replace("ours.k", "ours, steps ") if who.startswith("ours") else PEERS[who]]
        + [number(rows.get(f"peers.{who}.{column}")) for column in columns]
        for who in names
    ]
    ahead = [
        [name.removeprefix("peers."), number(row), row["unit"]]
        for name, row in rows.items()
        if name.startswith(("peers.ahead.", "peers.speed_at"))
    ]
    return ["## Against others\n", table(["", *columns], lines), table(["", "", ""], ahead)]


def skill(row: Row | None) -> str:
    """A value with its interval."""
    if row is None:
        return "-"
    spread = re.search(r"95 % (-?[\d.]+) to (-?[\d.]+)", row["unit"])
    return f"{row['value']:.2f}" + (f" ({spread[1]} to {spread[2]})" if spread else "")


def number(row: Row | None) -> str:
    """Three digits."""
    return "-" if row is None else f"{row['value']:.3g}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    rule = "|".join("---" for _ in head)
    rows = [f"| {' | '.join(line)} |\n" for line in (head, *lines)]
    return f"{rows[0]}|{rule}|\n{''.join(rows[1:])}"


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "python tools/bench/flagship_page.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
