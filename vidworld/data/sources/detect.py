"""Find out which format a path is in, and open it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vidworld.data.sources.annotated_video import AnnotatedVideoSource
from vidworld.data.sources.base import Source
from vidworld.data.sources.describe import undescribed
from vidworld.data.sources.folder import FolderSource
from vidworld.data.sources.hdf5 import Hdf5Source
from vidworld.data.sources.lerobot import LeRobotSource
from vidworld.data.sources.rlds import RldsSource
from vidworld.errors import DataError


@dataclass(frozen=True)
class Format:
    """A kind of robot log: how to recognise it, cheaply, and how to open it."""

    name: str
    detects: Callable[[Path], bool]
    open: Callable[[Path], Source]


FORMATS: tuple[Format, ...] = (
    Format("LeRobot v2.0, v2.1, v3.0 (meta/info.json)", LeRobotSource.detects, LeRobotSource),
    Format("mp4 + JSON (annotation/*/*.json)", AnnotatedVideoSource.detects, AnnotatedVideoSource),
    Format("RLDS / Open X-Embodiment (dataset_info.json, features.json)", RldsSource.detects, RldsSource),
    Format("a folder of videos and tables (vidworld.yaml)", FolderSource.detects, FolderSource),
    Format("HDF5 of robomimic, LIBERO, ALOHA, RoboMIND (*.hdf5)", Hdf5Source.detects, Hdf5Source),
)


def open_source(path: Path | str) -> Source:
    """Open robot logs of any known format.

    Raises DataError when there is nothing, when the format is not known, or when the path is one folder too
    high or already a converted dataset.
    """
    path = Path(path)
    if not path.exists():
        looks_remote = len(path.parts) == 2 and not path.is_absolute()
        raise DataError(
            "no such file or folder",
            where=path,
            fix=f"from the Hugging Face Hub: hf download --repo-type dataset {path} --local-dir {path.name}"
            if looks_remote
            else None,
        )
    for known in FORMATS:
        if known.detects(path):
            return known.open(path)
    if (path / "manifest.json").is_file() and (path / "shards").is_dir():
        raise DataError("these are shards already", where=path, fix="vidworld inspect says what they hold")
    inside = [child for child in sorted(path.iterdir()) if _known(child)] if path.is_dir() else []
    if not inside and (advice := undescribed(path)):
        raise advice
    raise DataError(
        "format of the robot logs",
        where=path,
        got="none that is known",
        expected="; ".join(known.name for known in FORMATS),
        fix=f"did you mean {inside[0]}?" if inside else "docs/bring-your-own-data.md says how to add one",
    )


def _known(path: Path) -> bool:
    return any(known.detects(path) for known in FORMATS)
