"""LeRobot folders made on the spot: every frame carries its episode and number as a barcode."""

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HEIGHT, WIDTH, FPS = 48, 64, 10
TOP = "observation.images.top"
LENGTHS = {3: 13, 5: 9, 12: 17}
"""Episode index -> length: with gaps, as in datasets that were cleaned by hand."""


def barcode(episode: int, frame: int) -> np.ndarray:
    """An RGB frame whose 16 tall stripes spell episode and frame number in binary."""
    bits = [(episode * 256 + frame) >> bit & 1 for bit in range(16)]
    row = np.repeat(np.array(bits, np.uint8) * 200 + 25, WIDTH // 16)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def read_barcode(frame: np.ndarray) -> tuple[int, int]:
    """(episode, frame number) of a barcode at any size."""
    stripes = frame.mean(axis=(0, 2)).reshape(16, -1).mean(axis=1) > 125
    number = sum(int(bit) << position for position, bit in enumerate(stripes))
    return number // 256, number % 256


def write_mp4(path: Path, frames: list[np.ndarray], fps: int = FPS, **options: str) -> None:
    """H.264 with B frames and few keyframes, as ffmpeg writes by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as mp4:
        stream = mp4.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"g": "12", "bf": "3", "crf": "20"}
        for frame in frames:
            mp4.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        mp4.mux(stream.encode(None))


def rows_of(index: int, length: int) -> dict[str, Any]:
    """Columns of an episode: actions that count, a jittered clock."""
    generator = np.random.default_rng(index)
    number = np.arange(length)
    return {
        "action": [[index + 0.5, float(frame)] for frame in number],
        "observation.state": [[float(frame), 1.0, -1.0] for frame in number],
        "timestamp": (0.03 + number / FPS + generator.uniform(-0.02, 0.02, length)).astype("f4"),
        "frame_index": number,
        "episode_index": np.full(length, index),
        "index": number,
        "task_index": np.zeros(length, int),
    }


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """A parquet file with float32 vectors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = {"action": pa.list_(pa.float32(), 2), "observation.state": pa.list_(pa.float32(), 3)}
    arrays = {key: pa.array(list(value), vectors.get(key)) for key, value in columns.items()}
    pq.write_table(pa.table(arrays), path)


def info(version: str) -> dict[str, Any]:
    """The contents of meta/info.json."""
    shared = version == "v3.0"
    part = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    return {
        "codebase_version": version,
        "robot_type": "toy_arm",
        "fps": FPS,
        "chunks_size": 10,
        "data_path": f"data/{part}.parquet"
        if shared
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": f"videos/{{video_key}}/{part}.mp4"
        if shared
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "action": {"dtype": "float32", "shape": [2], "names": ["x_vel", "gripper"]},
            "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": ["a", "b", "c"]}},
            TOP: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "info": {"video.fps": FPS}},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        },
    }


def write_info(root: Path, content: Mapping[str, Any]) -> None:
    """Write meta/info.json."""
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps(content))


def write_v2(root: Path) -> Path:
    """A LeRobot v2.1 folder: files by episode."""
    write_info(root, info("v2.1"))
    lines = [{"episode_index": i, "tasks": ["push"], "length": n} for i, n in LENGTHS.items()]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "push it"}))
    for index, length in LENGTHS.items():
        chunk = f"chunk-{index // 10:03d}"
        write_table(root / f"data/{chunk}/episode_{index:06d}.parquet", rows_of(index, length))
        frames = [barcode(index, frame) for frame in range(length)]
        write_mp4(root / f"videos/{chunk}/{TOP}/episode_{index:06d}.mp4", frames)
    return root


def write_v3(root: Path) -> Path:
    """The same as LeRobot v3.0: one parquet and one mp4 for all, spans in the episode table."""
    write_info(root, info("v3.0"))
    spans, start = [], 0
    for index, length in LENGTHS.items():
        spans.append(
            {
                "episode_index": index,
                "data/chunk_index": 0,
                "data/file_index": 0,
                f"videos/{TOP}/chunk_index": 0,
                f"videos/{TOP}/file_index": 0,
                f"videos/{TOP}/from_timestamp": start / FPS,
                f"videos/{TOP}/to_timestamp": (start + length) / FPS,
                "tasks": ["push"],
                "length": length,
                "stats/action/min": [0.0],
            }
        )
        start += length
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(spans), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(
        pa.table({"task_index": [0], "__index_level_0__": ["push it"]}), root / "meta/tasks.parquet"
    )
    parts = [rows_of(index, length) for index, length in LENGTHS.items()]
    joined = {key: [value for part in parts for value in part[key]] for key in parts[0]}
    write_table(root / "data/chunk-000/file-000.parquet", joined)
    frames = [barcode(index, frame) for index, length in LENGTHS.items() for frame in range(length)]
    write_mp4(root / f"videos/{TOP}/chunk-000/file-000.mp4", frames)
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {"v2.1": write_v2, "v3.0": write_v3}


@pytest.fixture
def lerobot_v2(tmp_path: Path) -> Path:
    """A fresh v2.1 folder that a test may damage."""
    return write_v2(tmp_path / "logs")


@pytest.fixture
def lerobot_v3(tmp_path: Path) -> Path:
    """A fresh v3.0 folder that a test may damage."""
    return write_v3(tmp_path / "logs")


@pytest.fixture(params=WRITERS)
def lerobot(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A fresh folder of each version in turn."""
    return WRITERS[request.param](tmp_path / "logs")


@pytest.fixture(scope="session")
def code() -> Callable[[np.ndarray], tuple[int, int]]:
    """Reads (episode, frame number) off a frame."""
    return read_barcode


@pytest.fixture(scope="session")
def lengths() -> dict[int, int]:
    """Episode index -> frames of the folders made here."""
    return LENGTHS


@pytest.fixture(scope="session")
def change_info() -> Callable[..., None]:
    """Edit meta/info.json of a folder with a function of its mapping."""

    def change(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads((root / "meta/info.json").read_text())
        edit(content)
        write_info(root, content)

    return change


@pytest.fixture(scope="session")
def change_rows() -> Callable[..., None]:
    """Edit the columns of a v2.1 episode's parquet."""

    def change(root: Path, index: int, edit: Callable[[dict[str, Any]], Any]) -> None:
        columns = rows_of(index, LENGTHS[index])
        edit(columns)
        write_table(next(root.rglob(f"episode_{index:06d}.parquet")), columns)

    return change


@pytest.fixture(scope="session")
def rewrite_video() -> Callable[..., None]:
    """Write a v2.1 episode's video anew, with other frames, rate or mp4 options."""

    def rewrite(root: Path, index: int, count: int, fps: int = FPS, **options: str) -> Path:
        path = next(root.rglob(f"episode_{index:06d}.mp4"))
        write_mp4(path, [barcode(index, frame) for frame in range(count)], fps, **options)
        return path

    return rewrite


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """Write the first frames of an episode as mp4: (path, episode, count, fps)."""

    def write(path: Path, episode: int, count: int, fps: int = FPS) -> Path:
        write_mp4(path, [barcode(episode, frame) for frame in range(count)], fps)
        return path

    return write


@pytest.fixture
def real() -> Callable[[str], Path]:
    """Path of a real dataset next to the repository, or skip."""

    def find(name: str) -> Path:
        path = Path(__file__).resolve().parents[3].parent / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"real data {name} is not here")
        return path

    return find
