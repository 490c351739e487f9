"""The door for robot logs: what a format must offer so that `vidworld shard` can convert it.

A new source is a class with four attributes and two methods; nothing needs to be registered or inherited:

    class MyLogs:
        def __init__(self, root: Path) -> None:
            self.name = root.name
            self.embodiments = (EmbodimentSpec("my_arm", rate_hz=10, action=(...), proprio=(...)),)
            self.views = ("front", "wrist")
            self.fps = 10.0
            ...

        def episode_ids(self) -> list[str]: ...       # cheap: reads an index, decodes nothing
        def read(self, episode_id: str) -> Episode: ...  # opens one episode; frames stay undecoded

Report what was recorded and repair nothing. The converter checks every episode of every source (lengths
that disagree, values that are not finite, timestamps that go back, zero frames), trims, resamples, resizes,
quarantines and measures statistics. A source only raises `DataError` for what it cannot read, and
`sources/video_file.py` already does so for video files. To make `open_source` find the format, add one line
to the table in `sources/detect.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vidworld.config import digest
from vidworld.types import EmbodimentSpec, Episode, Video


class Source(Protocol):
    """Robot logs of one dataset, read episode by episode.

    Instances travel to worker processes, so they must pickle and be small: keep a path and read lazily.
    """

    @property
    def name(self) -> str:
        """Name of the dataset; the converted one inherits it."""
        ...

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        """Every robot and control mode in it. Say `unknown` for a unit or kind that the logs do not state."""
        ...

    @property
    def views(self) -> tuple[str, ...]:
        """Short names of the cameras (`top`, not `observation.images.top`), in a fixed order."""
        ...

    @property
    def fps(self) -> float:
        """Declared frames per second, and the rate of the converted dataset unless another is asked for.

        Episodes may have their own `Episode.fps`: it must be this or an integer multiple of the target rate.
        0 when the logs do not say: the user must, and an `Episode.fps` of 0 has row numbers for timestamps.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Short digest that changes when the logs change (names and sizes of files are enough).

        It tells a finished or interrupted conversion that its source is no longer the same.
        """
        ...

    def episode_ids(self) -> list[str]:
        """Stable ids, unique in this source, in natural order. No position: a gap is nothing special."""
        ...

    def read(self, episode_id: str) -> Episode:
        """One episode in raw units, row t of each array paired with frame t, videos undecoded.

        Lengths are reported as found; `Video.frames` may raise while decoding.
        Raises DataError with the reason when this episode is damaged; it is then quarantined by name.
        """
        ...


@dataclass(frozen=True)
class SimulatedSource:
    """A source whose episodes are made by a function, for simulators, tests and arrays in memory.

    `make` gets one of `ids`. To convert with several worker processes it must be picklable: a function of a
    module, or a `functools.partial` of one, not a lambda.
    """

    name: str
    embodiments: tuple[EmbodimentSpec, ...]
    views: tuple[str, ...]
    fps: float
    ids: tuple[str, ...]
    make: Callable[[str], Episode]
    version: str = ""
    """Change it when `make` starts to produce other episodes for the same ids."""

    @property
    def fingerprint(self) -> str:
        """Digest of the name, the ids and `version`."""
        return digest([self.name, list(self.ids), self.version])

    def episode_ids(self) -> list[str]:
        """The ids given."""
        return list(self.ids)

    def read(self, episode_id: str) -> Episode:
        """Make one episode."""
        return self.make(episode_id)


def video_of(frames: Sequence[np.ndarray] | np.ndarray) -> Video:
    """A view of frames that are in memory already: uint8 RGB, [T, H, W, 3] or a sequence of [H, W, 3]."""

    def iterate() -> Iterator[np.ndarray]:
        yield from frames

    return Video(num_frames=len(frames), frames=iterate)
