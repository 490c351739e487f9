"""Files that a log names: found inside the dataset's own folder, or refused."""

from pathlib import Path, PurePosixPath

from vidworld.errors import DataError


def inside(root: Path, relative: object, *, where: object) -> Path:
    """The file at a path that a log gives relative to its dataset.

    Logs come from strangers: a path that is no text, is absolute, goes up with `..`, or leads out of `root`
    through a link raises DataError that names `where` it was written. The file need not exist.
    """
    if not isinstance(relative, str) or not relative or "\0" in relative or "\\" in relative:
        raise DataError("file name", where=where, got=repr(relative)[:100], expected="a relative path")
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise DataError("file name leaves the dataset", where=where, got=relative[:200])
    target = root / path
    try:
        resolved = target.resolve()
    except (OSError, RuntimeError) as error:
        raise DataError("file name", where=where, got=f"{relative[:200]} ({error})") from None
    if not resolved.is_relative_to(root.resolve()):
        raise DataError(
            "link leaves the dataset",
            where=where,
            got=relative[:200],
            fix="copy the files into the dataset: cp -rL",
        )
    return target
