"""HDF5 files in each layout, written from frames of a real robot where those are at hand."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from vidworld.data.sources.lerobot import LeRobotSource

FRAMES, HEIGHT, WIDTH = 12, 48, 64


@pytest.fixture(scope="session")
def footage() -> np.ndarray:
    """Frames [12, 48, 64, 3] uint8 of the CR5 arm, or of a moving square where that set is not here."""
    root = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "cr5_banana_lerobot_v21"
    if root.is_dir():
        video = LeRobotSource(root).read("episode_000028").views["top"].frames()
        pictures = [next(video) for _ in range(FRAMES)]
        return np.stack([np.asarray(Image.fromarray(p).resize((WIDTH, HEIGHT))) for p in pictures])
    frames = np.full((FRAMES, HEIGHT, WIDTH, 3), (90, 60, 140), np.uint8)
    for index, frame in enumerate(frames):
        frame[10:24, 3 * index : 3 * index + 12] = (220, 180, 40)
    return frames


def encoded(frames: np.ndarray, kind: str = "PNG", **options: Any) -> list[bytes]:
    """Each frame as a PNG (exact) or a JPEG."""
    result = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, kind, **options)
        result.append(buffer.getvalue())
    return result


def padded(contents: list[bytes]) -> np.ndarray:
    """Rows of equal length, filled with zeros: ACT's compressed pictures."""
    rows = np.zeros((len(contents), max(map(len, contents)) + 7), np.uint8)
    for row, content in zip(rows, contents, strict=True):
        row[: len(content)] = np.frombuffer(content, np.uint8)
    return rows


def vlen(group: Any, name: str, contents: list[bytes]) -> None:
    """Rows of any length: RoboMIND's pictures."""
    dataset = group.create_dataset(name, (len(contents),), h5py.vlen_dtype(np.uint8))
    for index, content in enumerate(contents):
        dataset[index] = np.frombuffer(content, np.uint8)


ENVIRONMENT = {
    "env_name": "Lift",
    "env_kwargs": {
        "control_freq": 20,
        "robots": ["Panda"],
        "controller_configs": {"type": "OSC_POSE", "control_delta": True, "output_max": [0.05, 0.5]},
    },
}


def write_robomimic(path: Path, frames: np.ndarray, lengths: tuple[int, ...] = (8, 12, 6)) -> Path:
    """robomimic's image files; demo i shows `frames` from its first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(ENVIRONMENT)
        for index, length in enumerate(lengths):
            demo = data.create_group(f"demo_{index * 5}")
            steps = np.arange(length, dtype=np.float64)[:, None]
            demo["actions"] = np.concatenate([np.full((length, 1), index), steps, *[-steps] * 5], 1)
            demo["rewards"] = (steps[:, 0] == length - 1) * float(index != 2)
            obs = demo.create_group("obs")
            obs.create_dataset(
                "agentview_image", data=frames[:length], chunks=(1, *frames.shape[1:]), compression="gzip"
            )
            obs["robot0_eye_in_hand_image"] = frames[:length, :, ::-1]
            obs["robot0_eef_pos"] = np.repeat(steps, 3, 1)
            obs["robot0_eef_quat"] = np.tile([0, 0, 0, 1.0], (length, 1))
            obs["robot0_gripper_qpos"] = np.repeat(steps, 2, 1) / 100
            obs["object"] = np.zeros((length, 14))
    return path


def write_libero(path: Path, frames: np.ndarray, text: str = "open the drawer") -> Path:
    """LIBERO's files: pictures upside down, the instruction in `problem_info`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(ENVIRONMENT)
        data.attrs["problem_info"] = json.dumps({"language_instruction": [text]})
        for index in range(2):
            demo = data.create_group(f"demo_{index}")
            length = 6 + index
            steps = np.arange(length, dtype=np.float64)[:, None]
            demo["actions"] = np.repeat(steps, 7, 1)
            demo["rewards"] = demo["dones"] = (steps[:, 0] == length - 1).astype(np.uint8)
            obs = demo.create_group("obs")
            obs["agentview_rgb"] = frames[:length, ::-1]
            obs["eye_in_hand_rgb"] = frames[:length, ::-1]
            for name, width in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2), ("joint_states", 7)):
                obs[name] = np.repeat(steps, width, 1)
            obs["ee_states"] = np.repeat(steps, 6, 1)
    return path


def write_act(path: Path, frames: np.ndarray, *, sim: bool = False, compress: bool = False) -> Path:
    """One episode as ACT and ALOHA record it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["sim"], file.attrs["compress"] = sim, compress
        steps = np.arange(len(frames), dtype=np.float64)[:, None]
        file["action"] = np.repeat(steps + 1, 14, 1)
        observations = file.create_group("observations")
        observations["qpos"] = np.repeat(steps, 14, 1)
        observations["qvel"] = np.ones((len(frames), 14))
        images = observations.create_group("images")
        for name in ("cam_high", "cam_left_wrist"):
            images[name] = padded(encoded(frames)) if compress else frames
        if compress:
            file["compress_len"] = np.full((2, len(frames)), 9)
    return path


def write_robomind(path: Path, frames: np.ndarray) -> Path:
    """One episode as RoboMIND has it, for two arms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        steps = np.arange(len(frames), dtype=np.float64)[:, None]
        for role, offset in (("master", 1), ("puppet", 0)):
            for side in ("left", "right"):
                file[f"{role}/joint_position_{side}"] = np.repeat(steps + offset, 7, 1)
            file[f"{role}/end_effector_left"] = np.zeros((len(frames), 7))
        images = file.create_group("observations/rgb_images")
        vlen(images, "camera_front", encoded(frames))
        vlen(file.create_group("observations/depth_images"), "camera_front", [b"depth"] * len(frames))
        file["language_raw"] = np.array([b"steam the egg"], h5py.string_dtype())
    return path


@pytest.fixture(scope="session")
def write() -> SimpleNamespace:
    """Writers of each layout, and of compressed pictures."""
    return SimpleNamespace(
        robomimic=write_robomimic, libero=write_libero, act=write_act, robomind=write_robomind,
        encoded=encoded, padded=padded, vlen=vlen,
    )  # fmt: skip


@pytest.fixture
def robomimic(tmp_path: Path, footage: np.ndarray) -> Path:
    """A fresh robomimic file that a test may damage."""
    return write_robomimic(tmp_path / "lift" / "image.hdf5", footage)


@pytest.fixture
def change() -> Callable[..., None]:
    """Edit an HDF5 file with a function of the open file."""

    def edit(path: Path, function: Callable[[h5py.File], Any]) -> None:
        with h5py.File(path, "r+") as file:
            function(file)

    return edit
