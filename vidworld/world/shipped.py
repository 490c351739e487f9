"""Worlds that come with the package and are opened by name: `vidworld.load("lab")`."""

from pathlib import Path

from vidworld.errors import CheckpointError
from vidworld.world.spec import FILE_NAME

FOLDER = Path(__file__).resolve().parents[1] / "weights"
"""Of the package: for each name an export, with `prompts/` to begin rollouts with."""
NAMES = ("lab",)


def resolve(path: Path | str) -> Path:
    """The folder of a world: that of the package for a name of `NAMES`, unless a world lies there already.

    Raises CheckpointError where this copy of the package has no weights of that name.
    """
    folder = Path(path)
    if str(path) not in NAMES or (folder / FILE_NAME).is_file():
        return folder
    if not is_here(str(path)):
        raise CheckpointError(
            f"the weights of {str(path)!r} are not in this copy of vidworld",
            where=FOLDER / str(path),
            fix="install a release that has them, or give the directory of a run of your own",
        )
    return FOLDER / str(path)


def is_here(name: str) -> bool:
    """Whether this copy of the package has the weights of a name."""
    return (FOLDER / name / FILE_NAME).is_file()


def prompts_of(folder: Path) -> Path | None:
    """The dataset of episodes that came with a world, if any."""
    prompts = folder / "prompts"
    return prompts if (prompts / "manifest.json").is_file() else None
