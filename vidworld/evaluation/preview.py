"""A rollout in the terminal while it is imagined: two pixels a character, in 24-bit colour."""

import shutil
import sys
from typing import TextIO

import numpy as np

from vidworld import media

UPPER_HALF = "▀"
MOST_COLUMNS = 96


class Preview:
    """Draws one picture over the one before; `stream` must understand ANSI escapes.

    columns: width in characters; default: the terminal's, at most 96.
    """

    def __init__(self, stream: TextIO | None = None, columns: int | None = None) -> None:
        self.stream = stream or sys.stderr
        self.columns = columns or min(MOST_COLUMNS, shutil.get_terminal_size().columns)
        self._lines = 0

    def show(self, picture_HWC: np.ndarray, caption: str) -> None:
        """Draw a picture [H, W, 3] uint8 with a line of text under it."""
        lines = [*block_art(picture_HWC, self.columns), caption[: self.columns]]
        back = f"\x1b[{self._lines}F" if self._lines else ""
        self.stream.write(back + "".join(f"{line}\x1b[0m\x1b[K\n" for line in lines))
        self.stream.flush()
        self._lines = len(lines)


def block_art(picture_HWC: np.ndarray, columns: int) -> list[str]:
    """Lines of half blocks: the upper pixel is the colour of the character, the lower one its background."""
    height, width = picture_HWC.shape[:2]
    columns = min(columns, width)
    rows = max(1, round(height * columns / width / 2))
    small = media.fit(picture_HWC, width=columns, height=2 * rows, mode="stretch")
    lines = []
    for upper, lower in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m{UPPER_HALF}"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells))
    return lines
