"""Tables of numbers in files: csv with a header, npz and npy, as named columns.

Cells must be numbers: `nan` and `inf` are read, and the converter then refuses their episode by row and name.
"""

import csv
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vidworld.errors import DataError

MAX_BYTES = 2**30
_DAMAGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise on damaged files."""


def read_columns(path: Path, names: Sequence[str] | None, delimiter: str = ",") -> dict[str, np.ndarray]:
    """Columns by name, each [T] float64; `names` None: all, which for a csv are checked for their names only.

    Raises DataError for a file that is missing, damaged or too large, a missing column, rows of another width
    than the header, and a cell that is no number, with its row and column.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(
                "size of the table", where=path, got=f"{size} bytes", expected=f"at most {MAX_BYTES}"
            )
        match path.suffix:
            case ".csv":
                columns = _read_csv(path, names, delimiter)
            case ".npz" | ".npy":
                columns = _read_numpy(path, names)
            case _:
                raise AssertionError(path.suffix)
    except OSError as error:
        raise DataError("cannot read the table", where=path, got=error.strerror or error) from None
    if not columns:
        raise DataError("no column", where=path)
    lengths = {name: len(columns[name]) for name in names or columns}
    longest, shortest = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
    if lengths[longest] != lengths[shortest]:
        raise DataError(
            f"rows of column {shortest!r}",
            where=path,
            got=lengths[shortest],
            expected=f"{lengths[longest]} as {longest!r}",
        )
    return columns


def _read_csv(path: Path, names: Sequence[str] | None, delimiter: str) -> dict[str, np.ndarray]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            header = [cell.strip() for cell in next(rows, [])]
            if header:
                # numpy.savetxt writes the header as a comment.
                header[0] = header[0].removeprefix("#").strip()
            _check_header(header, path, delimiter)
            _check_names(names, header, path)
            wanted = list(dict.fromkeys(names or ()))
            indices = [header.index(name) for name in wanted]
            values: list[list[float]] = []
            for number, row in enumerate(rows if wanted else ()):
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"cells in row {number}",
                        where=path,
                        got=len(row),
                        expected=f"{len(header)} as the header",
                    )
                values.append([_number(row[i], header[i], number, path) for i in indices])
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError("damaged csv", where=path, got=error) from None
    if names is None:
        return {name: np.zeros(0) for name in header}
    table = np.array(values, np.float64).reshape(len(values), len(wanted))
    return dict(zip(wanted, table.T, strict=True))


def _check_header(header: list[str], path: Path, delimiter: str) -> None:
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError("two columns under one name", where=path, got=repr(twice))
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other:
        raise DataError(
            "one column in the csv",
            where=path,
            got=repr(header[0][:100]),
            expected=f"cells between {delimiter!r}",
            fix=f"say delimiter: {other!r} in the description",
        )
    if header and all(re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", cell, re.IGNORECASE) for cell in header):
        raise DataError("first line of the csv", where=path, got="numbers", expected="names of the columns")


def _number(cell: str, column: str, row: int, path: Path) -> float:
    match cell.strip().lower():
        case "true":
            return 1.0
        case "false":
            return 0.0
    try:
        # Python reads 1_0 as 10; no logger writes so.
        return float(cell if "_" not in cell else "_")
    except ValueError:
        raise DataError(
            f"column {column!r} at row {row}", where=path, got=repr(cell)[:50], expected="a number"
        ) from None


def _read_numpy(path: Path, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Columns of arrays; without `names`, those that hold numbers."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > MAX_BYTES:
                raise DataError("size of the table", where=path, got=f"{unpacked} bytes", expected=MAX_BYTES)
            with np.load(path, allow_pickle=False) as arrays:
                columns = dict(part for name in arrays.files for part in _columns(name, arrays[name]))
        else:
            columns = dict(_columns("", np.load(path, allow_pickle=False)))
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"damaged {path.suffix[1:]}", where=path, got=error or type(error).__name__) from None
    if names is None:
        return {name: column for name, column in columns.items() if column.dtype.kind in "biuf"}
    _check_names(names, list(columns), path)
    for name in names:
        if columns[name].dtype.kind not in "biuf":
            raise DataError(f"column {name!r}", where=path, got=columns[name].dtype, expected="numbers")
    return {name: columns[name].astype(np.float64) for name in names}


def _columns(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """[T] is one column, [T, D] are D, a structured [T] is one a named field; the rest is none."""
    if array.dtype.names:
        fields = ((field, array[field]) for field in array.dtype.names)
        yield from ((field, column) for field, column in fields if column.ndim == 1)
    elif array.ndim == 1:
        yield name or "0", array
    elif array.ndim == 2:
        prefix = f"{name}." if name else ""
        yield from ((f"{prefix}{index}", array[:, index]) for index in range(array.shape[1]))


def _check_names(names: Sequence[str] | None, columns: Sequence[str], path: Path) -> None:
    for name in names or ():
        if name not in columns:
            raise DataError(f"no column {name!r}", where=path, got=", ".join(columns[:20]))
