"""An encoder of tf.train.Example and TFRecord of its own, and small RLDS datasets made with it."""

import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

POLYNOMIAL = 0x82F63B78
LENGTHS = (6, 9, 4, 7, 5)


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, as its definition says."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ POLYNOMIAL * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        out.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(out)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: Any, packed: bool = True) -> bytes:
    """A Feature: list of bytes, or an array of floats or of integers."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    values = np.asarray(values)
    if values.dtype.kind == "f":
        pieces = [struct.pack("<f", value) for value in values.ravel()]
        body = field(1, b"".join(pieces)) if packed else b"".join(varint(1 << 3 | 5) + p for p in pieces)
        return field(2, body)
    pieces = [varint(int(value)) for value in values.ravel()]
    body = field(1, b"".join(pieces)) if packed else b"".join(varint(1 << 3) + p for p in pieces)
    return field(3, body)


def example(values: Mapping[str, Any], packed: bool = True) -> bytes:
    entries = [
        field(1, field(1, name.encode()) + field(2, feature(value, packed))) for name, value in values.items()
    ]
    return field(1, b"".join(entries))


def record(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def picture(frame: np.ndarray, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind)
    return buffer.getvalue()


def tensor(*shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"tensor": {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype, "encoding": "none"}}


def image(channels: int = 3, dtype: str = "uint8") -> dict[str, Any]:
    sizes = {"shape": {"dimensions": ["24", "32", str(channels)]}, "dtype": dtype, "encodingFormat": "jpeg"}
    return {"image": sizes}


def group(**features: Any) -> dict[str, Any]:
    return {"featuresDict": {"features": features}}


STEPS = {
    "action": tensor(3),
    "reward": tensor(),
    "is_last": tensor(dtype="bool"),
    "language_instruction": {"text": {}},
    "observation": group(
        front=image(), wrist=image(), depth=image(1, "uint16"), state=tensor(2), embedding=tensor(512)
    ),
}


def frame_of(episode: int, step: int, camera: int = 0) -> np.ndarray:
    """A frame [24, 32, 3] whose left half spells the episode and whose right half the step."""
    frame = np.full((24, 32, 3), 40 + 60 * camera, np.uint8)
    frame[:, :16] += np.uint8(20 * episode)
    frame[:, 16:] += np.uint8(15 * step)
    return frame


def episode_of(index: int, length: int, black: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of a record that fits STEPS."""
    frames = {
        name: [picture(frame_of(index, step, camera) * (name not in black)) for step in range(length)]
        for camera, name in enumerate(("front", "wrist"))
    }
    steps = np.arange(length, dtype=np.float32)
    return {
        "steps/action": np.stack([np.full(length, index), steps, -steps], 1).astype(np.float32),
        "steps/reward": (steps == length - 1).astype(np.float32),
        "steps/is_last": (steps == length - 1).astype(np.int64),
        "steps/language_instruction": [b"push the block"] * length,
        "steps/observation/front": frames["front"],
        "steps/observation/wrist": frames["wrist"],
        "steps/observation/state": np.stack([steps, steps + 0.5], 1).astype(np.float32),
        "steps/observation/embedding": np.zeros(0, np.float32),
        "episode_metadata/file_path": [b"/lab/%d.npy" % index],
    }


def write(
    root: Path,
    shards: Sequence[Sequence[Mapping[str, Any]]],
    *,
    name: str = "toy_set",
    steps: Mapping[str, Any] = STEPS,
) -> Path:
    """A dataset of one split, each item of `shards` a file."""
    root.mkdir(parents=True)
    for index, episodes in enumerate(shards):
        path = root / f"{name}-train.tfrecord-{index:05d}-of-{len(shards):05d}"
        path.write_bytes(b"".join(record(example(values)) for values in episodes))
    (root / "dataset_info.json").write_text(
        json.dumps(
            {
                "name": name,
                "splits": [
                    {
                        "name": "train",
                        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                        "shardLengths": [str(len(episodes)) for episodes in shards],
                    }
                ],
            }
        )
    )
    features = group(steps={"sequence": {"feature": group(**steps), "length": "-1"}})
    (root / "features.json").write_text(json.dumps(features))
    return root


@pytest.fixture(scope="session")
def encode() -> SimpleNamespace:
    """The encoder: example, record, crc32c, picture, and pieces of features.json."""
    return SimpleNamespace(
        example=example, record=record, crc32c=crc32c, varint=varint, field=field, picture=picture,
        tensor=tensor, image=image, group=group, steps=STEPS, write=write, episode=episode_of,
        frame=frame_of, lengths=LENGTHS,
    )  # fmt: skip


@pytest.fixture
def rlds(tmp_path: Path) -> Path:
    """A fresh dataset of five episodes in two files that a test may damage."""
    episodes = [episode_of(index, length) for index, length in enumerate(LENGTHS)]
    return write(tmp_path / "toy_set" / "1.0.0", [episodes[:3], episodes[3:]])


@pytest.fixture
def change_json() -> Callable[..., None]:
    """Edit a JSON file of a dataset with a function of its content."""

    def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change
