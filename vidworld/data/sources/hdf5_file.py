"""HDF5 files of strangers, opened so that nothing outside the file is read and nothing in it is run.

An HDF5 file may point to others: external links, virtual datasets, raw data in any file of the disk. All of
these are refused, as are soft links, object references and opaque bytes (pickled Python): robot logs need
none of them. Sizes are capped before anything is allocated, and every failure is a DataError that names file
and place.
"""

import contextlib
import json
import mmap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidworld.data.sources.naming import natural
from vidworld.data.sources.picture import decode_picture
from vidworld.data.sources.video_file import MAX_FRAMES, MAX_PIXELS
from vidworld.errors import DataError, require

if TYPE_CHECKING:
    import h5py

SUFFIXES = (".hdf5", ".h5")
SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_NUMBERS = 2**28
MAX_WIDTH = 4096
MAX_CHUNK_BYTES = 2**28
MAX_TEXT = 2**20
_HEAP = b"GCOL\x01\0\0\0"
_BLOCK_BYTES = 2**25
_FOLDERS_LOOKED_AT = 500


def hdf5_files(root: Path, depth: int = 5, most: int | None = None) -> list[Path]:
    """HDF5 files below a folder in natural order, or the file itself; `most` stops early, for detection.

    Folders that may not be read, and links to folders, are passed over.
    """
    if root.is_file():
        return [root] if _is_hdf5(root) else []
    found: list[Path] = []
    level, looked = [root] if root.is_dir() else [], 0
    for _ in range(depth):
        below: list[Path] = []
        for folder in level:
            looked += 1
            if most is not None and looked > _FOLDERS_LOOKED_AT:
                return found
            try:
                children = sorted(folder.iterdir())
            except PermissionError:
                continue
            for child in children:
                if child.is_dir() and not child.is_symlink():
                    below.append(child)
                elif child.suffix.lower() in SUFFIXES and (most is None or _is_hdf5(child)):
                    found.append(child)
                    if most is not None and len(found) >= most:
                        return found
        level = below
    return sorted(found, key=lambda path: natural(path.as_posix()))


def _is_hdf5(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.suffix.lower() in SUFFIXES and file.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


@contextlib.contextmanager
def open_hdf5(path: Path) -> "Iterator[h5py.File]":
    """Open a file for reading; errors of the library inside the block become DataError."""
    library = require("h5py", "hdf5")
    try:
        stat = path.stat()
        _check_heaps(path, stat.st_size, stat.st_mtime_ns)
        with library.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError:
        raise DataError("missing file", where=path) from None
    except (OSError, RuntimeError) as error:
        raise DataError("damaged HDF5 file", where=path, got=str(error)[:200]) from None


@lru_cache(maxsize=64)
def _check_heaps(path: Path, size: int, mtime_ns: int) -> None:
    """Walk the global heaps of one version of a file: the library loops for ever over damaged ones.

    They hold all data of variable length (format specification, III.E): 16 bytes of header, then objects of
    16 bytes and their content, aligned to 8; object 0 is the free rest and counts its own header.
    """
    if size < len(SIGNATURE):
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_HEAP)
        while start >= 0:
            end = start + int.from_bytes(content[start + 8 : start + 16], "little")
            place = start + 16
            while place + 16 <= min(end, size):
                length = int.from_bytes(content[place + 8 : place + 16], "little")
                free = content[place : place + 2] == b"\0\0"
                place += length if free else 16 + (length + 7) // 8 * 8
                if (free and length < 16) or place > end:
                    raise DataError(
                        "damaged HDF5 file", where=path, got=f"a heap at byte {start} that is not whole"
                    )
            start = content.find(_HEAP, start + 16)


def child(group: Any, path: str) -> Any:
    """The group or dataset at a path below `group`, or None; only through plain links."""
    library = require("h5py", "hdf5")
    found = group
    for name in filter(None, path.split("/")):
        if not isinstance(found, library.Group):
            return None
        try:
            link = found.get(name, getlink=True)
            if link is None:
                return None
            if not isinstance(link, library.HardLink):
                kind = "external" if isinstance(link, library.ExternalLink) else "soft"
                raise DataError(
                    f"{kind} link {name!r}",
                    where=group.file.filename,
                    fix="links are not followed; copy the data into the file (h5repack, h5copy)",
                )
            found = found[name]
        except (KeyError, OSError, RuntimeError) as error:
            raise DataError(f"damaged entry {name!r}", where=group.file.filename, got=error) from None
    return found


def names_in(group: Any) -> list[str]:
    """Names in a group in natural order."""
    library = require("h5py", "hdf5")
    if not isinstance(group, library.Group):
        return []
    names = list(group)
    if bad := [name for name in names if not isinstance(name, str)]:
        raise DataError("damaged name", where=group.file.filename, got=repr(bad[0])[:60])
    return sorted(names, key=natural)


def numbers(dataset: Any, where: str) -> np.ndarray:
    """A dataset of numbers as float32 [T, D]; one number a row counts as D = 1."""
    check_storage(dataset, where)
    if dataset.dtype.kind not in "fiub" or dataset.ndim not in (1, 2):
        raise DataError(f"{where} {dataset.shape}", got=dataset.dtype, expected="numbers [T, D]")
    if dataset.size > MAX_NUMBERS or dataset.shape[1:] > (MAX_WIDTH,):
        expected = f"at most {MAX_NUMBERS} numbers, {MAX_WIDTH} a row"
        raise DataError(f"size of {where}", got=dataset.shape, expected=expected)
    try:
        with np.errstate(over="ignore"):
            values = dataset[()].astype(np.float32)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"damaged {where}", got=error) from None
    return values.reshape(len(values), -1) if values.ndim == 1 else values


def is_vector(dataset: Any, widest: int) -> bool:
    """Whether an entry holds rows of floats, at most so wide."""
    shape = getattr(dataset, "shape", None)
    return shape is not None and len(shape) == 2 and 0 < shape[1] <= widest and dtype_of(dataset).kind == "f"


def dtype_of(dataset: Any) -> np.dtype:
    """The type of a dataset's values, if there can be such a type."""
    try:
        return dataset.dtype
    except (TypeError, ValueError) as error:
        raise DataError(f"type of {dataset.name!r}", where=dataset.file.filename, got=error) from None


def check_storage(dataset: Any, where: str) -> None:
    """Refuse what is no dataset, or one whose bytes lie in other files or make no sense."""
    library = require("h5py", "hdf5")
    if not isinstance(dataset, library.Dataset):
        raise DataError(f"no dataset {where}")
    dtype = dtype_of(dataset)
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{where} lies in another file", fix="copy the data into the file (h5repack)")
    if library.check_ref_dtype(dtype) is not None or dtype.kind == "V":
        raise DataError(f"type of {where}", got="references or opaque bytes", expected="numbers or pictures")
    chunk = int(np.prod(dataset.chunks)) * dtype.itemsize if dataset.chunks else 0
    if chunk > MAX_CHUNK_BYTES:
        raise DataError(f"chunk size of {where}", got=f"{chunk} bytes", expected=f"at most {MAX_CHUNK_BYTES}")


def camera_kind(dataset: Any) -> str:
    """`raw` for uint8 [T, H, W, 3]; `encoded` for a JPEG or PNG a row, padded or not; else nothing."""
    library = require("h5py", "hdf5")
    if not isinstance(dataset, library.Dataset):
        return ""
    dtype = dtype_of(dataset)
    if dtype == np.uint8 and dataset.ndim == 4 and dataset.shape[3] == 3:
        return "raw"
    of_any_length = library.check_vlen_dtype(dtype)
    strings = library.check_string_dtype(dtype)
    if dataset.ndim == 1 and (of_any_length in (np.uint8, np.int8) or strings is not None):
        return "encoded"
    return "encoded" if dtype in (np.uint8, np.int8) and dataset.ndim == 2 else ""


def check_camera(dataset: Any, where: str) -> None:
    """Refuse pictures that are too large or too many, before any is read."""
    check_storage(dataset, where)
    shape = dataset.shape
    pixels = shape[1] * shape[2] if len(shape) == 4 else 0
    row = shape[1] if len(shape) == 2 else 0
    if shape[0] > MAX_FRAMES or pixels > MAX_PIXELS or row > 4 * MAX_PIXELS:
        raise DataError(f"size of {where}", got=shape, expected=f"at most {MAX_PIXELS} pixels a picture")


def frames(path: Path, dataset_path: str) -> Iterator[np.ndarray]:
    """RGB frames [H, W, 3] of a camera, in the channel order of the file, a block at a time."""
    where = f"{dataset_path!r} in {path}"
    with open_hdf5(path) as file:
        dataset = child(file, dataset_path)
        check_camera(dataset, where)
        kind = camera_kind(dataset)
        count = len(dataset)
        row = max(1, int(np.prod(dataset.shape[1:])))
        block = max(dataset.chunks[0] if dataset.chunks else 1, 1)
        block = min(block, max(1, _BLOCK_BYTES // row)) if kind == "raw" else 1
        for start in range(0, count, block):
            try:
                rows = dataset[start : start + block]
            except (OSError, RuntimeError, ValueError) as error:
                raise DataError(f"damaged picture {start} of {where}", got=error) from None
            for index, value in enumerate(rows, start):
                if kind == "raw":
                    yield value
                else:
                    content = value if isinstance(value, bytes) else np.asarray(value).tobytes()
                    yield decode_picture(content, f"picture {index} of {dataset_path!r}", path)


def attribute(entry: Any, name: str) -> Any:
    """A text or number attribute, or None. Pickled or referring ones are refused, never loaded."""
    where = f"attribute {name!r} in {entry.file.filename}"
    if name not in entry.attrs:
        return None
    try:
        value = entry.attrs[name]
    except (OSError, RuntimeError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"damaged {where}", got=error) from None
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, (str, bool, int, float, np.integer, np.floating, np.bool_)):
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise DataError(f"length of {where}", got=len(value), expected=f"at most {MAX_TEXT}")
        return value.item() if isinstance(value, np.generic) else value
    raise DataError(where, got=type(value).__name__, expected="text or a number", fix="it is never unpickled")


def json_attribute(entry: Any, name: str) -> dict[str, Any]:
    """An attribute that holds a JSON object as text; nothing where there is no such attribute."""
    text = attribute(entry, name)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DataError(f"attribute {name!r}", where=entry.file.filename, got=str(text)[:60], expected="JSON")
    return content


def text_of(dataset: Any, where: str) -> str:
    """Text in a dataset of one string, or of the first of several; empty where there is none."""
    if dataset is None:
        return ""
    check_storage(dataset, where)
    library = require("h5py", "hdf5")
    if library.check_string_dtype(dataset.dtype) is None or not dataset.size or dataset.ndim > 1:
        return ""
    value = dataset[()] if dataset.ndim == 0 else dataset[0]
    return value.decode(errors="replace").strip() if isinstance(value, bytes) else str(value).strip()
