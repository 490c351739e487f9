"""Damaged and hostile LeRobot folders: an episode, or one line that says what is wrong, and nothing else."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidworld.data.sources.lerobot import LeRobotSource
from vidworld.errors import DataError

TOP = "observation.images.top"
SWAPS: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "x" * 50,
    "",
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    [1.5],
    "../../x",
]


def read_all(root: Path) -> None:
    """Every episode to its numbers, and the first frame of each camera."""
    source = LeRobotSource(root)
    assert source.fingerprint
    for episode_id in source.episode_ids():
        episode = source.read(episode_id)
        widths = [
            len(dimensions) for dimensions in (source.embodiments[0].action, source.embodiments[0].proprio)
        ]
        assert [episode.actions_TA.shape[1], episode.proprio_TS.shape[1]] == widths
        assert len(episode.timestamps_T) == len(episode.actions_TA)
        assert isinstance(episode.text, str)
        for video in episode.views.values():
            assert next(video.frames()).dtype == np.uint8


def outcome(root: Path) -> bool:
    """Whether all could be read; anything but an error of one line fails."""
    try:
        read_all(root)
    except DataError as error:
        said = str(error)
    else:
        return True
    assert "\n" not in said
    return False


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def test_any_value_of_the_metadata_may_be_wrong(lerobot):
    path = lerobot / "meta/info.json"
    whole = json.loads(path.read_text())
    refused = 0
    for number, place in enumerate(places(whole)):
        for swap in SWAPS[number % 4 :: 4]:  # a different quarter of them at each place
            path.write_text(json.dumps(replaced(whole, place, swap)))
            refused += not outcome(lerobot)
    path.write_text(json.dumps(whole))
    assert outcome(lerobot)
    assert refused > 25


@pytest.mark.parametrize("name", ["episodes.jsonl", "tasks.jsonl"])
def test_any_value_of_a_line_may_be_wrong(lerobot_v2, name):
    path = lerobot_v2 / "meta" / name
    first, *others = path.read_text().splitlines()
    for place in places(json.loads(first)):
        for swap in SWAPS:
            changed = json.dumps(replaced(json.loads(first), place, swap))
            path.write_text("\n".join([changed, *others]))
            outcome(lerobot_v2)


def test_any_cell_of_the_episode_table_may_be_wrong(lerobot_v3):
    path = next((lerobot_v3 / "meta/episodes").rglob("*.parquet"))
    rows = pq.read_table(path).to_pylist()
    for column in rows[0]:
        for swap in ("x", -1, 1e308, None, [], ["y"], {"a": 1}, 2**62, b"\xff"):
            table = pa.table(
                {key: [swap] * len(rows) if key == column else [row[key] for row in rows] for key in rows[0]}
            )
            pq.write_table(table, path)
            outcome(lerobot_v3)


@pytest.mark.parametrize(
    "pattern", ["meta/info.json", "meta/*.jsonl", "meta/**/*.parquet", "data/**/*.parquet"]
)
def test_cut_and_flipped_files(lerobot, pattern):
    chance = random.Random(0)
    files = sorted(lerobot.glob(pattern))
    refused = rounds = 0
    for path in files:
        whole = path.read_bytes()
        for number in range(40):
            damaged = bytearray(whole)
            if number % 2:
                del damaged[chance.randrange(len(damaged)) :]
            else:
                for _ in range(3):
                    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            rounds += 1
            refused += not outcome(lerobot)
        path.write_bytes(whole)
    assert not files or refused > rounds / 4


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a width of a gigabyte": (
        lambda info: info.update(data_path="{episode_index:999999999d}.parquet"),
        "data_path",
    ),
    "attributes": (
        lambda info: info.update(data_path="{episode_index.__class__}.parquet"),
        "data_path names",
    ),
    "nested": (lambda info: info.update(data_path="{episode_index:{video_key}}"), "data_path"),
    "unbalanced": (lambda info: info.update(data_path="{episode_index"), "data_path"),
    "absolute": (lambda info: info.update(data_path="/etc/{episode_index}"), "leaves the dataset"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates(lerobot_v2, change_info, case):
    edit, message = HOSTILE[case]
    change_info(lerobot_v2, edit)
    with pytest.raises(DataError, match=message):
        LeRobotSource(lerobot_v2).read("episode_000003")


def test_a_small_file_of_very_many_rows_is_not_read(lerobot_v2):
    """Ten million equal numbers take a few kilobytes on disk."""
    path = next(lerobot_v2.rglob("episode_000003.parquet"))
    rows = pa.array(np.zeros(60_000_000, np.int8))
    pq.write_table(pa.table({"episode_index": rows}), path, compression="zstd")
    assert path.stat().st_size < 1e6
    with pytest.raises(DataError, match="rows of a data file"):
        LeRobotSource(lerobot_v2).read("episode_000003")
