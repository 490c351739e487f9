"""Compiled kernels of the effects: made once an installation, then read from Numba's cache on disk."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vidworld.errors import require

if TYPE_CHECKING:
    from vidworld.lab.episode import LabConfig

WARM_UP = {
    # Seeds whose first frames use every kernel of a kind: drawn paint; pot and wand; mug, clear cup and tray.
    "paint": ((8, 0.0, 14),),
    "smoke": ((2, 0.0, 9), (1, 0.0, 9)),
    "liquid": ((0, 0.0, 16), (1, 0.0, 3), (2, 0.0, 3)),
}
"""Kind -> (seed, exploration, frames) of episodes."""


def warm_up(kind: str, config: "LabConfig", announce: Callable[[], None]) -> bool:
    """Have all kernels of a kind compiled and cached; says so first if that is not the case yet.

    Done before worker processes start, or each of them would compile for itself. Returns whether anything was
    compiled.
    """
    from vidworld.lab.episode import generate

    if kind not in WARM_UP:
        return False
    with compiling(announce) as compiled:
        for seed, exploration, frames in WARM_UP[kind]:
            small = dataclasses.replace(config, size=64, frames=frames, exploration=exploration, robot=None)
            generate(kind, seed, small)
    return bool(compiled)


@contextlib.contextmanager
def compiling(announce: Callable[[], None]) -> Iterator[list[str]]:
    """Call `announce` before the first compilation within; yields the names of what is compiled."""
    require("numba", "lab")
    from numba.core import event

    names: list[str] = []

    class Listener(event.Listener):
        def on_start(self, event: event.Event) -> None:
            if not names:
                announce()
            names.append(event.data["dispatcher"].py_func.__name__ if event.data else "")

        def on_end(self, event: event.Event) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield names
