"""A small clean dataset of the planar arm, and the same with one fault planted in it."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from vidworld.contract import Dimension
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.inspection.detectors import suspicious
from vidworld.data.inspection.finding import Finding
from vidworld.data.inspection.survey import Survey, choose, read
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.base import SimulatedSource, video_of
from vidworld.lab.planar import EMBODIMENT, PlanarConfig, PlanarSource
from vidworld.types import EmbodimentSpec, Episode

EPISODES, FRAMES, SIZE = 10, 40, 32


@cache
def clean_episodes() -> tuple[Episode, ...]:
    """Simulated episodes with their frames in memory, and sensor noise as a camera has."""
    source = PlanarSource(EPISODES, 0, PlanarConfig(FRAMES, SIZE))
    episodes = []
    for index, name in enumerate(source.episode_ids()):
        episode = source.read(name)
        frames = np.stack(list(episode.views["top"].frames())).astype(np.float32)
        noise = np.random.default_rng(index).normal(0, 2, frames.shape)
        noisy = np.clip(frames + noise, 0, 255).astype(np.uint8)
        episodes.append(dataclasses.replace(episode, views={"top": video_of(noisy)}))
    return tuple(episodes)


def frames_of(episode: Episode, view: str = "top") -> np.ndarray:
    """The frames of a view [T, H, W, 3]."""
    return np.stack(list(episode.views[view].frames()))


def make(
    directory: Path,
    plant: Callable[[Episode, int], Episode] = lambda episode, index: episode,
    *,
    spec: EmbodimentSpec | None = None,
    views: Sequence[str] = ("top",),
    fps: float = 10.0,
    **options,
) -> Path:
    """Convert the clean episodes, each changed by `plant(episode, index)`."""
    episodes = {episode.episode_id: plant(episode, index) for index, episode in enumerate(clean_episodes())}
    source = SimulatedSource(
        "planted", (spec or EMBODIMENT,), tuple(views), fps, tuple(episodes), episodes.__getitem__
    )
    settings = {"val_episodes": (next(reversed(episodes)),), "min_frames": 2} | options
    convert(source, ConvertOptions(out=directory, size=f"{SIZE}x{SIZE}", workers=1, **settings))
    return directory


def survey_of(directory: Path, count: int = 1000) -> Survey:
    """Read a dataset whole."""
    dataset = ShardDataset.open(directory)
    return read(dataset, choose(dataset.manifest, count), workers=1)


@pytest.fixture(scope="session")
def clean_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset without a fault: read only."""
    return make(tmp_path_factory.mktemp("inspection") / "clean")


@pytest.fixture(scope="session")
def clean(clean_dir: Path) -> Survey:
    """All episodes of the dataset without a fault."""
    return survey_of(clean_dir)


@pytest.fixture
def planted(tmp_path: Path) -> Callable[..., list[Finding]]:
    """Gives what is suspicious in a dataset with a fault; takes what `make` takes."""

    def inspect(plant=lambda episode, index: episode, **options) -> list[Finding]:
        return suspicious(survey_of(make(tmp_path / "planted", plant, **options)))

    return inspect


@pytest.fixture
def plant_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes a dataset with a fault and gives its directory; takes what `make` takes."""
    return lambda *arguments, **options: make(tmp_path / "planted", *arguments, **options)


@pytest.fixture(scope="session")
def pictures() -> Callable[..., np.ndarray]:
    """Gives the frames of an episode's view."""
    return frames_of


@pytest.fixture(scope="session")
def robot() -> Callable[..., EmbodimentSpec]:
    """Gives the planar arm's specification with some dimensions replaced: `robot(action={0: {...}})`."""

    def changed(dimensions: tuple[Dimension, ...], changes: dict[int, dict]) -> tuple[Dimension, ...]:
        return tuple(dataclasses.replace(d, **changes.get(i, {})) for i, d in enumerate(dimensions))

    def build(action: dict | None = None, proprio: dict | None = None) -> EmbodimentSpec:
        return dataclasses.replace(
            EMBODIMENT,
            action=changed(EMBODIMENT.action, action or {}),
            proprio=changed(EMBODIMENT.proprio, proprio or {}),
        )

    return build
