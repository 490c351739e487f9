"""Write the `vidworld.yaml` of a folder of videos that has none, as far as the names of its files tell."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from vidworld.data.sources.folder import DESCRIPTIONS
from vidworld.data.sources.naming import guess_dimension, natural
from vidworld.data.sources.tables import read_columns
from vidworld.data.sources.video_file import measured_fps
from vidworld.errors import DataError

VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm")
TABLES = (".csv", ".npz", ".npy")
DEPTH = 3
MAX_FILES = 10_000
_ACTION_WORDS = ("action", "act", "cmd", "command", "target", "ctrl", "control")
_TIME_WORDS = ("timestamp", "timestamps", "time", "t", "stamp")


class UndescribedFolderError(DataError):
    """A folder of videos without a description: one line, and below it a description to save."""

    def __init__(self, folder: Path, videos: int, description: str) -> None:
        super().__init__(
            f"no {DESCRIPTIONS[0]}",
            where=folder,
            got=f"{videos} videos",
            fix=f"save the lines below as {folder / DESCRIPTIONS[0]}, correct them, repeat the command",
        )
        self.description = description

    def __str__(self) -> str:
        return f"{super().__str__()}\n\n{self.description}"


def undescribed(folder: Path) -> UndescribedFolderError | None:
    """The error for a folder with videos, up to three folders down, and nothing that says what they are."""
    if not folder.is_dir():
        return None
    some = islice(_files(folder, DEPTH), MAX_FILES)
    found = sorted(some, key=lambda path: natural(path.as_posix()))
    videos = [path for path in found if path.suffix.lower() in VIDEOS]
    tables = [path for path in found if path.suffix.lower() in TABLES]
    if not videos:
        return None
    pattern, views, episodes = _video_pattern(videos, {path.stem for path in tables})
    rows = _row_pattern(tables, episodes)
    return UndescribedFolderError(
        folder, len(videos), "\n".join(_lines(folder, videos[0], pattern, views, episodes, rows))
    )


def _files(folder: Path, depth: int, below: Path = Path()) -> Iterator[Path]:
    """Files up to `depth` folders down, relative to `folder`."""
    for child in sorted((folder / below).iterdir()):
        if child.is_file():
            yield below / child.name
        elif child.is_dir() and depth > 1 and not child.name.startswith("."):
            yield from _files(folder, depth - 1, below / child.name)


def _video_pattern(videos: Sequence[Path], tables: set[str]) -> tuple[str, list[str], list[str]]:
    """Pattern, cameras and episodes of the video files that are laid out like the first one."""
    suffix, depth = videos[0].suffix, len(videos[0].parts)
    alike = [path for path in videos if path.suffix == suffix and len(path.parts) == depth]
    stems = list(dict.fromkeys(path.stem for path in alike))
    folders = list(dict.fromkeys(path.parent.name for path in alike))
    front = "/".join(videos[0].parts[:-2])
    front += "/" if front else ""
    if len(folders) == 1:
        front += f"{folders[0]}/" if folders[0] else ""
        split = [stem.rpartition("_") for stem in stems]
        cameras = list(dict.fromkeys(last for _, _, last in split))
        counts = Counter(first for first, _, _ in split)
        regular = set(counts.values()) == {len(cameras)} and len(cameras) > 1
        if regular and all(counts) and not any(camera.isdecimal() for camera in cameras):
            return f"{front}{{episode}}_{{view}}{suffix}", cameras, list(counts)
        return f"{front}{{episode}}{suffix}", ["camera"], stems
    by_camera = set(stems) & tables or (len(folders) < len(stems) and not set(folders) & tables)
    if by_camera:
        return f"{front}{{view}}/{{episode}}{suffix}", folders, stems
    return f"{front}{{episode}}/{{view}}{suffix}", stems, folders


def _row_pattern(tables: Sequence[Path], episodes: Sequence[str]) -> tuple[str, Path] | None:
    """The pattern that has a table for most episodes, and its first table."""
    found: dict[str, list[Path]] = {}
    for path in tables:
        for episode in {*path.parts[:-1], path.stem} & set(episodes):
            parts = ["{episode}" if part == episode else part for part in path.parts[:-1]]
            stem = "{episode}" if path.stem == episode else path.stem
            found.setdefault("/".join((*parts, stem + path.suffix)), []).append(path)
    if not found:
        return None
    pattern = max(found, key=lambda name: len(found[name]))
    return pattern, found[pattern][0]


def _lines(
    folder: Path,
    video: Path,
    pattern: str,
    views: list[str],
    episodes: list[str],
    rows: tuple[str, Path] | None,
) -> Iterator[str]:
    """The description, with a comment where it was guessed."""
    try:
        fps, said = measured_fps(folder / video), f"as {video} says"
    except DataError:
        fps, said = None, f"{video} cannot be read"
    yield f"fps: {fps or 10:g}  # frames and rows a second, {said}"
    yield f"views: [{', '.join(map(_quoted, views))}]"
    yield f"videos: {_quoted(pattern)}  # {len(episodes)} episodes: {', '.join(episodes[:3])} ..."
    if rows is None:
        yield 'rows: "{episode}.csv"  # none found: a csv (header, one row a frame), npz or npy an episode'
        yield "action:  # the columns that are commands"
        yield '  "action_*": {unit: unknown, kind: unknown}  # kind: position, velocity, delta, binary, force'
        return
    yield f"rows: {_quoted(rows[0])}"
    try:
        columns = list(read_columns(folder / rows[1], None))
    except DataError as error:
        yield f"# {error}"
        columns = ["action"]
    names = list(dict.fromkeys(_pattern_of(column) for column in columns))
    times = [name for name in names if name.lower() in _TIME_WORDS]
    left = [name for name in names if name not in times]
    actions = [name for name in left if _words(name)[0] in _ACTION_WORDS]
    doubt = "" if actions else "  # which columns are commands? the names do not say: move them here"
    actions = actions or left[:1]
    proprio = [name for name in left if name not in actions]
    if times:
        yield f"timestamps: {_quoted(times[0])}  # seconds; else add timestamp_unit: ms, us or ns"
    yield f"action:{doubt or '  # kind: position, velocity, delta, binary or force'}"
    yield from map(_column, actions)
    if proprio:
        yield "proprio:  # what the robot measures of itself; delete what is not"
        yield from map(_column, proprio)


def _column(name: str) -> str:
    guess = guess_dimension(name.removesuffix("*").rstrip("._"))
    return f'  {_quoted(name)}: {{unit: "{guess.unit}", kind: {guess.kind}}}'


def _pattern_of(column: str) -> str:
    """Numbered columns under one name: `action.3` is one of `action.*`."""
    first, mark, last = column.rpartition(".")
    return f"{first}.*" if mark and last.isdecimal() and first else column


def _words(name: str) -> list[str]:
    return name.lower().replace(".", "_").replace("-", "_").replace("/", "_").split("_")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
