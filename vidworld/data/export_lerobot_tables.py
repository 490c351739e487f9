"""The parquet files of a LeRobot dataset: rows of frames, the table of episodes, the table of tasks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidworld.data import lerobot_format as lerobot

MB = 2**20
EPISODES_HELD = 50
"""Rows of the episode table that are written at once."""


@dataclass
class Place:
    """Numbers of a chunk and of a file in it."""

    files_per_chunk: int
    chunk: int = 0
    file: int = 0

    def advance(self) -> None:
        """To the next file, in the next chunk where this one is full."""
        self.chunk, self.file = (
            (self.chunk + 1, 0) if self.file + 1 == self.files_per_chunk else (self.chunk, self.file + 1)
        )


class ParquetFiles:
    """Parquet files of one schema: a row group a table, and a new file before one grows over `file_mb`."""

    def __init__(
        self,
        root: Path,
        pattern: str,
        file_mb: float,
        files_per_chunk: int,
        *,
        schema: pa.Schema | None = None,
    ) -> None:
        self._root, self._pattern, self._schema = root, pattern, schema
        self._limit = file_mb * MB
        self._place = Place(files_per_chunk)
        self._file: Any = None
        self._writer: pq.ParquetWriter | None = None

    def place_for(self, size: int) -> Place:
        """Where the next `size` bytes go, after moving on to the next file if this one would be too large."""
        if self._writer is not None and self._file.tell() + size >= self._limit:
            self.close()
            self._place.advance()
        return self._place

    def write(self, table: pa.Table, place: Place | None = None) -> Place:
        """Append rows, where `place_for` said or says; returns the place."""
        place = place or self.place_for(table.nbytes)
        if self._writer is None:
            path = self._root / self._pattern.format(chunk_index=place.chunk, file_index=place.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            self._writer = pq.ParquetWriter(self._file, self._schema or table.schema, compression="snappy")
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        return place

    def close(self) -> None:
        """Complete the file that is open."""
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = None


class EpisodeTable:
    """The episode table, some rows at a time."""

    def __init__(self, root: Path, file_mb: float, files_per_chunk: int) -> None:
        self._file = ParquetFiles(root, lerobot.EPISODES, file_mb, files_per_chunk)
        self._rows: list[dict[str, Any]] = []
        self._schema: pa.Schema | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Append an episode; its columns are those of the first one."""
        self._rows.append(row)
        if len(self._rows) == EPISODES_HELD:
            self._flush()

    def close(self) -> None:
        """Write what is held, and complete the file."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._schema, self._rows = table.schema, []
        place = self._file.place_for(table.nbytes + 2 * 8 * table.num_rows)
        for column, number in (("chunk_index", place.chunk), ("file_index", place.file)):
            values = pa.array([number] * table.num_rows, pa.int64())
            table = table.append_column(f"{lerobot.EPISODE_TABLES}/{column}", values)
        self._file.write(table, place)


def to_table(columns: Mapping[str, np.ndarray], schema: pa.Schema) -> pa.Table:
    """Columns [T] and [T, D] as a table; vectors have a fixed length."""
    arrays = []
    for column in schema:
        values = np.ascontiguousarray(columns[column.name])
        flat = pa.array(values.reshape(-1))
        vectors = pa.types.is_fixed_size_list(column.type)
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=column.type) if vectors else flat)
    return pa.Table.from_arrays(arrays, schema=schema)


def write_tasks(path: Path, tasks: list[str]) -> None:
    """The text is the index of the table, which only the note for pandas says."""
    note = {
        "index_columns": [lerobot.TASK],
        "column_indexes": [],
        "columns": [
            {
                "name": name,
                "field_name": name,
                "pandas_type": pandas_type,
                "numpy_type": numpy_type,
                "metadata": None,
            }
            for name, pandas_type, numpy_type in (
                (lerobot.TASK_INDEX, "int64", "int64"),
                (lerobot.TASK, "unicode", "object"),
            )
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    schema = pa.schema(
        [(lerobot.TASK_INDEX, pa.int64()), (lerobot.TASK, pa.string())], metadata={"pandas": json.dumps(note)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = pa.array(range(len(tasks)), pa.int64())
    pq.write_table(pa.table([numbers, pa.array(tasks, pa.string())], schema=schema), path)
