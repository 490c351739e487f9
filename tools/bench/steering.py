"""Keep the figures that steer the project: from a demo, or from evaluations of the CR5 run or the mixed run.

    python tools/bench/steering.py demo outputs/demo
    python tools/bench/steering.py cr5 reports/cr5
    python tools/bench/steering.py mixed reports/mixed_cr5 reports/mixed_droid reports/mixed_bridge

Reads what the commands measured (demo.json, metrics.json), and adds rows to benchmarks/<name>.json.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from table import add_rows

from vidworld.config import parse
from vidworld.errors import ConfigError, DataError

Rows = dict[str, tuple[Any, str]]
EVALUATE = "vidworld eval --context 4 --samples 2"


@dataclass(frozen=True)
class Options:
    """Keep the figures of a finished demo or evaluation."""

    name: tyro.conf.Positional[Literal["demo", "cr5", "mixed"]]
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """The demo's directory, or the evaluation's; for `mixed` one of each robot."""
    device: str | None = None
    """Where it ran; default: as the evaluation says."""
    minutes: float | None = None
    """Of `make demo` on a fresh clone, install included; default: without the install."""
    out: Path = Path("benchmarks")


def main(arguments: Sequence[str], prog: str) -> None:
    """Add one row a figure."""
    options = parse(Options, arguments, prog=prog)
    match options.name:
        case "demo":
            rows, command = demo_rows(_only(options)), "make demo"
            if options.minutes is not None:
                rows["demo.minutes"] = (options.minutes, "min, install included")
        case "cr5":
            rows, command = cr5_rows(_only(options)), f"{EVALUATE} runs/cr5 data/cr5 --frames 48"
        case "mixed":
            rows = {name: row for folder in options.folders for name, row in mixed_rows(folder).items()}
            command = f"{EVALUATE} runs/mixed data/<robot>"
        case other:
            raise AssertionError(other)
    report = options.folders[0] / "report" if options.name == "demo" else options.folders[0]
    metrics = _read(report / "metrics.json")
    add_rows(
        options.out / f"{options.name}.json",
        rows,
        device=options.device or metrics["device"],
        command=command,
        measured={"versions": metrics["versions"], "date": metrics["date"][:10]},
    )
    for name, (value, unit) in rows.items():
        print(f"{name:<24} {value:8.3f} {unit}")


def demo_rows(folder: Path) -> Rows:
    """Gain, faithfulness and minutes of a finished demo."""
    record = _read(folder / "demo.json")
    if record["state"] != "done":
        raise DataError("the demo did not finish", where=folder, fix="run `make demo`")
    summary = record["summary"]
    return {
        "demo.psnr_gain.f8": (summary["psnr_gain.f8"], "dB"),
        "demo.shuffle_ratio": (summary["shuffle_ratio.f8"], "ratio"),
        "demo.minutes": (record["minutes"], "min"),
    }


def cr5_rows(folder: Path) -> Rows:
    """Gains over the horizon, faithfulness, and what a collapse would lower."""
    summary = _read(folder / "metrics.json")["summary"]
    gains = {f"cr5.psnr_gain.h{frames}": (summary[f"psnr_gain.f{frames}"], "dB") for frames in (8, 16, 48)}
    return gains | {
        "cr5.shuffle_ratio": (summary["shuffle_ratio.f16"], "ratio"),
        "cr5.psnr.h16": (summary["psnr.f16"], "dB"),
        "cr5.tokenizer_psnr": (summary["psnr_bound.f16"], "dB"),
        "cr5.contrast_ratio": (summary["contrast_ratio"], "ratio"),
        "cr5.sharpness_ratio": (summary["sharpness_ratio"], "ratio"),
    }


def mixed_rows(folder: Path) -> Rows:
    """Gain and tokenizer bound at every horizon of one robot's evaluation, and its faithfulness."""
    metrics = _read(folder / "metrics.json")
    summary, name = metrics["summary"], f"mixed.{Path(metrics['data']['directory']).name}"
    units = {"psnr_gain": "dB", "psnr_bound": "dB", "shuffle_ratio": "ratio"}
    rows: Rows = {}
    for key, value in summary.items():
        measure, _, frame = key.partition(".f")
        if frame and measure in units and value is not None:
            rows[f"{name}.{measure}.h{frame}"] = (value, units[measure])
    return rows


def _only(options: Options) -> Path:
    if len(options.folders) != 1:
        raise ConfigError("folders", got=len(options.folders), expected=f"one for {options.name!r}")
    return options.folders[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise DataError("cannot read the figures", where=path, got=error.strerror) from None


if __name__ == "__main__":
    main(sys.argv[1:], "steering.py")
