"""Keep the figures that steer the project: from a demo, or from an evaluation of the CR5 run.

    python tools/bench/steering.py demo outputs/demo
    python tools/bench/steering.py cr5 reports/cr5

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
from vidworld.errors import DataError


@dataclass(frozen=True)
class Options:
    """Keep the figures of a finished demo or evaluation."""

    name: tyro.conf.Positional[Literal["demo", "cr5"]]
    folder: tyro.conf.Positional[Path]
    """The demo's directory, or the evaluation's."""
    device: str
    """Where it ran, such as "NVIDIA H200" or "AMD EPYC, 2 cores"."""
    out: Path = Path("benchmarks")


def main(arguments: Sequence[str], prog: str) -> None:
    """Add one row a figure."""
    options = parse(Options, arguments, prog=prog)
    rows: dict[str, tuple[Any, str]]
    if options.name == "demo":
        record = _read(options.folder / "demo.json")
        if record["state"] != "done":
            raise DataError("the demo did not finish", where=options.folder, fix="run `make demo`")
        summary = record["summary"]
        rows = {
            "demo.psnr_gain.f8": (summary["psnr_gain.f8"], "dB"),
            "demo.shuffle_ratio": (summary["shuffle_ratio.f8"], "ratio"),
            "demo.minutes": (record["minutes"], "min"),
        }
        command = "make demo"
    else:
        metrics = _read(options.folder / "metrics.json")
        summary = metrics["summary"]
        rows = {f"cr5.psnr_gain.h{frames}": (summary[f"psnr_gain.f{frames}"], "dB") for frames in (8, 16, 48)}
        rows |= {
            "cr5.shuffle_ratio": (summary["shuffle_ratio.f16"], "ratio"),
            "cr5.psnr.h16": (summary["psnr.f16"], "dB"),
            "cr5.tokenizer_psnr": (summary["psnr_bound.f16"], "dB"),
            "cr5.contrast_ratio": (summary["contrast_ratio"], "ratio"),
            "cr5.sharpness_ratio": (summary["sharpness_ratio"], "ratio"),
        }
        command = (
            "vidworld eval runs/cr5 data/cr5 --context 4 --frames 48 --samples 2 --windows-per-episode 6"
        )
    add_rows(
        options.out / f"{options.name}.json",
        rows,
        device=options.device,
        command=command,
        packages=("torch",),
    )
    for name, (value, unit) in rows.items():
        print(f"{name:<24} {value:8.3f} {unit}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise DataError("cannot read the figures", where=path, got=error.strerror) from None


if __name__ == "__main__":
    main(sys.argv[1:], "steering.py")
