"""A small dataset for the data tests: three short synthetic episodes at 32x48, written by ShardWriter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.manifest import Manifest, Sample, Shard
from vidworld.data.shards import (
    ShardDataset,
    ShardWriter,
    json_bytes,
    latents_member,
    npy_bytes,
    video_member,
)
from vidworld.data.video import encode_video

FRAMES = {"ep-000000": 40, "ep-000001": 25, "ep-000002": 31}
SPLIT = {"train": ("ep-000000", "ep-000001"), "val": ("ep-000002",)}
HEIGHT, WIDTH, FPS, CHANNELS, STRIDE = 32, 48, 10.0, 4, 8


def moving_square(seed: int, num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A bright square that wanders over a shaded ground [T, H, W, 3] uint8."""
    generator = np.random.default_rng(seed)
    ground = np.linspace(40, 120, width)[None, :, None] * np.array([1.0, 0.8, 0.6])
    video = np.broadcast_to(ground, (num_frames, height, width, 3)).astype(np.uint8).copy()
    y, x = int(generator.integers(0, height - 8)), int(generator.integers(0, width - 8))
    for frame in video:
        frame[y : y + 8, x : x + 8] = (230, 60, 40)
        y = int(np.clip(y + generator.integers(-2, 3), 0, height - 8))
        x = int(np.clip(x + generator.integers(-2, 3), 0, width - 8))
    return video


def episode(key: str) -> dict[str, np.ndarray]:
    """The true arrays of a fixture episode."""
    seed, count = int(key[-6:]), FRAMES[key]
    generator = np.random.default_rng(100 + seed)
    return {
        "video": moving_square(seed, count),
        "latents": generator.normal(size=(count, CHANNELS, HEIGHT // STRIDE, WIDTH // STRIDE)).astype("f2"),
        "actions": generator.uniform(-1, 1, (count, 2)).astype("f4"),
        "proprio": generator.normal(size=(count, 3)).astype("f4"),
        "timestamps": np.arange(count) / FPS + generator.uniform(0, 0.01, count),
    }


def contract() -> ActionContract:
    """The fixture robot: two velocities in, three positions out."""
    train = [episode(key) for key in SPLIT["train"]]
    return ActionContract(
        embodiment="toy",
        rate_hz=FPS,
        action=(Dimension("vx", "m/s", "velocity"), Dimension("vy", "m/s", "velocity")),
        proprio=tuple(Dimension(name, "m", "position") for name in "xyz"),
        action_statistics=Statistics.of(np.concatenate([arrays["actions"] for arrays in train])),
        proprio_statistics=Statistics.of(np.concatenate([arrays["proprio"] for arrays in train])),
    )


def members(key: str, kind: str = "video") -> dict[str, bytes]:
    """The members of a fixture episode, as they go into a shard."""
    arrays = episode(key)
    picture = (
        {video_member("top"): encode_video(arrays["video"], FPS)}
        if kind == "video"
        else {latents_member("top"): npy_bytes(arrays["latents"])}
    )
    return picture | {
        "actions.npy": npy_bytes(arrays["actions"]),
        "proprio.npy": npy_bytes(arrays["proprio"]),
        "timestamps.npy": npy_bytes(arrays["timestamps"]),
        "meta.json": json_bytes({"embodiment": "toy", "episode_id": key[-1], "fps": FPS, "text": "push"}),
    }


def write_dataset(directory: Path, kind: str = "video") -> Path:
    """Write the fixture dataset: two train episodes in one shard, one val episode in another."""
    (directory / "shards").mkdir(parents=True)
    shards = []
    for split, keys in SPLIT.items():
        file = f"shards/{split}-000000.tar"
        with ShardWriter(directory / file) as writer:
            for key in keys:
                writer.add(key, members(key, kind))
        samples = tuple(Sample(key, FRAMES[key], "toy", key[-1], "push") for key in keys)
        shards.append(Shard(file, writer.sha256, writer.bytes, split, samples))
    Manifest(
        kind="video" if kind == "video" else "latents",
        name="toy",
        fps=FPS,
        height=HEIGHT,
        width=WIDTH,
        views=("top",),
        contracts=(contract(),),
        shards=tuple(shards),
        tokenizer={"digest": "0" * 16, "channels": CHANNELS, "spatial_stride": STRIDE, "time_stride": 1}
        if kind == "latents"
        else None,
    ).write(directory)
    return directory


@pytest.fixture
def dataset_dir(tmp_path: Path) -> Path:
    """A fresh fixture dataset of videos that a test may damage."""
    return write_dataset(tmp_path / "toy")


@pytest.fixture
def latents_dir(tmp_path: Path) -> Path:
    """A fresh fixture dataset of latents."""
    return write_dataset(tmp_path / "toy-latents", "latents")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """The fixture dataset of videos, shared: read only."""
    return ShardDataset.open(write_dataset(tmp_path_factory.mktemp("data") / "toy"))


@pytest.fixture(scope="session")
def true_episode() -> Callable[[str], dict[str, np.ndarray]]:
    """Gives the arrays that a fixture episode was written from."""
    return episode


@pytest.fixture(scope="session")
def sample_members() -> Callable[..., dict[str, bytes]]:
    """Gives the members of a fixture episode as bytes."""
    return members


@pytest.fixture
def contract_file(tmp_path: Path) -> Callable[[str], tuple[Path, ...]]:
    """Writes a contract file; what it gives is what `--contract` takes."""

    def write(text: str) -> tuple[Path, ...]:
        path = tmp_path / "contract.yaml"
        path.write_text(text)
        return (path,)

    return write
