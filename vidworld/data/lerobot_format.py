"""Names of the LeRobot layout and of what we add to it, known once to its reader and its writer.

Source: `lerobot.datasets.utils` and `lerobot.utils.constants` of lerobot 0.4 to 0.6.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidworld.contract import ActionContract
from vidworld.errors import DataError, UserError

VERSION = "v3.0"

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EPISODE_TABLES = "meta/episodes"
PART = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES = f"{EPISODE_TABLES}/{PART}.parquet"
DATA = f"data/{PART}.parquet"
VIDEO = f"videos/{{video_key}}/{PART}.mp4"
CONTRACT = "meta/vidworld.json"
"""Ours: the action contract and where the data came from. Other readers pass over it."""

LINES_OF_TASKS = "meta/tasks.jsonl"
LINES_OF_EPISODES = "meta/episodes.jsonl"
"""Of v2.0 and v2.1."""

FILES_PER_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200

ACTION = "action"
STATE = "observation.state"
CAMERA = "observation.images."
SUCCESS = "next.success"
TASK = "task"
TIMESTAMP = "timestamp"
FRAME_INDEX = "frame_index"
EPISODE_INDEX = "episode_index"
INDEX = "index"
TASK_INDEX = "task_index"
BOOKKEEPING = {
    TIMESTAMP: "float32",
    FRAME_INDEX: "int64",
    EPISODE_INDEX: "int64",
    INDEX: "int64",
    TASK_INDEX: "int64",
}
"""Columns that every LeRobot dataset has, and their types."""

RECORDED_TIME = "recorded_timestamp"
"""Ours: seconds as recorded, float64. LeRobot's own loader needs `timestamp` to be frame_index / fps."""
IS_CONTEXT = "is_context"
"""Ours: whether a frame of an imagined episode was given, not imagined."""

SOURCE_ID = "vidworld/episode_id"
SPLIT = "vidworld/split"
OUTCOME = "vidworld/outcome"
ORIGIN = "vidworld/source"
"""Ours, in the episode table: text, the last two as JSON."""
SEED = "vidworld/seed"
SAMPLE = "vidworld/sample"
"""Ours, in the episode table of imagined episodes: together they name the noise, as in rollout.json."""


def camera_key(view: str) -> str:
    """The feature that holds a view: `top` is `observation.images.top`."""
    return CAMERA + check_feature(view)


def check_feature(name: str) -> str:
    """A name that LeRobot accepts for a feature (its `_validate_feature_names`), else DataError."""
    if "/" in name or not name or name.startswith("."):
        raise DataError("name of a LeRobot feature", got=repr(name), expected="a name without '/'")
    return name


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Whether a camera feature is a depth map, in either spelling."""
    facts = feature.get("info") or feature.get("video_info") or {}
    return bool(facts.get("is_depth_map") or facts.get("video.is_depth_map"))


def read_contract(root: Path) -> ActionContract | None:
    """The contract that an export keeps beside LeRobot's own files, or None where there is none."""
    path = root / CONTRACT
    if not path.is_file():
        return None
    try:
        return ActionContract.from_mapping(
            json.loads(path.read_text(encoding="utf-8"))["contract"], where=path
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = error if isinstance(error, UserError) else "not what vidworld writes"
        raise DataError(
            f"action contract: {reason}", where=path, fix="delete the file to do without it"
        ) from None


def json_of(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A mapping that the episode table keeps as JSON; empty where it does not."""
    try:
        value = json.loads(row.get(column) or "{}")
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{column} of episode {row.get(EPISODE_INDEX)}", got=error, expected="JSON") from None
    return value if isinstance(value, dict) else {}
