"""Draw the galleries of docs/lab.md and docs/lab-liquid.md: a row an episode of the lab, over its time.

    python tools/lab_gallery.py --out docs/images/lab-gallery.webp
    python tools/lab_gallery.py --of liquid --columns 9 --out docs/images/lab-liquid.webp

Takes half a minute. Every row is `vidworld lab show KIND --seed S --variety V` with scripts only.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from vidworld import media
from vidworld.config import parse
from vidworld.lab.episode import LabConfig, generate

Row = tuple[str, int, Literal["core", "full"]]
"""Kind, seed and variety."""
LIQUID: tuple[Row, ...] = (
    ("liquid", 0, "core"),
    ("liquid", 2, "core"),
    ("liquid", 3, "core"),
    ("liquid", 7, "core"),
)
ALL: tuple[Row, ...] = (
    ("rigid", 5, "core"),
    ("container", 8, "core"),
    ("container", 2, "core"),
    ("paint", 4, "full"),
    ("smoke", 3, "full"),
    ("smoke", 1, "core"),
    ("liquid", 0, "core"),
    ("liquid", 2, "full"),
    ("liquid", 1, "core"),
)


@dataclass(frozen=True)
class Options:
    """Draw the gallery."""

    of: Literal["all", "liquid"] = "all"
    out: Path = Path("docs/images/lab-gallery.webp")
    columns: int = 7


def main(arguments: list[str], prog: str) -> None:
    """Write the picture."""
    options = parse(Options, arguments, prog=prog)
    rows: dict[str, np.ndarray] = {}
    for kind, seed, variety in LIQUID if options.of == "liquid" else ALL:
        config = LabConfig(variety=variety, exploration=0.0, masks=False)
        episode = generate(kind, seed, config)
        assert episode.frames_THWC is not None
        rows[f"{kind} {seed} {variety}"] = episode.frames_THWC
        print(f"{kind} {seed} {variety}: {episode.plan.text}")
    times = np.linspace(4, LabConfig.frames - 1, options.columns).round().astype(int).tolist()
    buffer = io.BytesIO()
    Image.fromarray(media.strip(rows, times)).save(buffer, "WEBP", quality=60, method=6)
    media.write_bytes(options.out, buffer.getvalue())


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "tools/lab_gallery.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
