"""Print every row of benchmarks/*.json; the newest row of a name counts.

    python tools/bench/table.py [--prefix demo.] [--directory benchmarks] [--command]

A row is {"name", "value", "unit", "device", "versions", "date", "command"}; a file is a list of rows, later
ones newer where the dates are equal. Other scripts in this folder add theirs with `add_rows`.
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vidworld.config import parse
from vidworld.errors import DataError

FIELDS = ("name", "value", "unit", "device", "versions", "date", "command")


@dataclass(frozen=True)
class Options:
    """Print the measured figures."""

    directory: Path = Path("benchmarks")
    prefix: str = ""
    """Only names that begin with it."""
    command: bool = False
    """Also print the command that repeats each figure."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Print one line per name."""
    options = parse(Options, arguments, prog=prog)
    rows = newest(read_rows(options.directory))
    rows = [row for row in rows if row["name"].startswith(options.prefix)]
    if not rows:
        raise DataError(f"no benchmark rows with prefix {options.prefix!r}", where=options.directory)
    widths = [max(len(_cell(row, field)) for row in rows) for field in ("name", "value", "unit")]
    for row in rows:
        name, value, unit = (_cell(row, field) for field in ("name", "value", "unit"))
        print(
            f"{name:<{widths[0]}}  {value:>{widths[1]}} {unit:<{widths[2]}}  {row['date']}  {row['device']}"
        )
        if options.command:
            print(f"    {row['command']}")


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """All rows of all files, files by name. Raises DataError for a row that breaks the schema."""
    rows: list[dict[str, Any]] = []
    for path in sorted(directory.glob("*.json")):
        try:
            loaded = json.loads(path.read_text())
        except ValueError as error:
            raise DataError("not valid JSON", where=path, got=str(error)) from None
        for row in loaded if isinstance(loaded, list) else [loaded]:
            if not isinstance(row, dict) or set(row) != set(FIELDS):
                raise DataError("benchmark row", where=path, got=row, expected=", ".join(FIELDS))
            rows.append(row)
    return rows


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of the latest date for each name, sorted by name."""
    latest: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = latest.get(row["name"])
        if known is None or row["date"] >= known["date"]:
            latest[row["name"]] = row
    return [latest[name] for name in sorted(latest)]


def add_rows(
    path: Path,
    values: Mapping[str, tuple[float, str]],
    *,
    device: str,
    command: str,
    packages: Sequence[str] = (),
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Append rows of name -> (value, unit) to a file, dated today, with the versions of `packages`.

    `measured` holds "versions" and "date" of figures that come from elsewhere.
    """
    kept = json.loads(path.read_text()) if path.exists() else []
    here = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    facts = {"device": device, **(measured or here), "command": command}
    kept += [{"name": name, "value": value, "unit": unit, **facts} for name, (value, unit) in values.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")


def cpu_name() -> str:
    """The processor's model and the number of cores, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores"


def _cell(row: dict[str, Any], field: str) -> str:
    value = row[field]
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/table.py")
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
