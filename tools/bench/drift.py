"""Does a world hold over hundreds of frames? Drift of several datasets side by side, with rows and pictures.

    python tools/bench/drift.py lab --data data/lab/rigid data/lab/paint --frames 512 --docs docs

Every rollout begins at its episode's first frames and goes on under recorded commands, as `vidworld eval
--drift` does. Rows `drift.<dataset>.*`, at another temperature such as 0 `drift.t0.<dataset>.*`: PSNR over
holding the last frame while the recording lasts, PSNR of what never moves at the beginning and in the last
quarter, contrast, sharpness and motion of the last quarter over the recording's, jumps that come back with
the window, and a view returned to. --docs gets images/drift.png, the curves, and images/drift.jpg, a rollout
of each (drift-t0.png and so on).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from table import add_rows, cpu_name

from vidworld import media
from vidworld.config import parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, VidworldError
from vidworld.evaluation.drift import drift
from vidworld.evaluation.drift_page import smooth
from vidworld.evaluation.windows import Settings, plan_windows
from vidworld.plots import Line, Panel, draw, to_png
from vidworld.world.load import load

SHOWN = (1, 32, 64, 128, 256, 384, 512)
"""Frames of the picture, as far as rollouts go."""
JPEG_QUALITY = 80


@dataclass(frozen=True, kw_only=True)
class Options:
    """Imagine hundreds of frames of several datasets, and measure whether they hold."""

    run: tyro.conf.Positional[Path]
    """Directory of a trained world, or the name of one that comes along."""
    data: tuple[Path, ...]
    """Datasets of videos of its robot."""
    frames: int = 512
    episodes: int = 8
    """Of each dataset, at most 8."""
    context: int = 8
    temperature: float | None = None
    """In place of the world's own: 0 is the mean of the future."""
    split: str = "val"
    seed: int = 0
    device: str | None = None
    docs: Path | None = None
    """Folder whose images/ gets the pictures."""
    out: Path = Path("benchmarks/drift.json")

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("--data", got="nothing", expected="one dataset or more")


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure one dataset after another; rows are added as soon as they are known."""
    options = parse(Options, arguments, prog=prog)
    world = load(options.run, options.device)
    settings = Settings(
        split=options.split, half="both", episodes=options.episodes, windows_per_episode=1,
        context=options.context, frames=1, temperature=options.temperature, seed=options.seed,
    )  # fmt: skip
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else cpu_name()
    mark = "drift" if options.temperature is None else f"drift.t{options.temperature:g}"
    found: dict[str, dict[str, Any]] = {}
    shown: dict[str, np.ndarray] = {}
    times = [time for time in SHOWN if time <= options.frames]
    for directory in options.data:
        dataset = ShardDataset.open(directory)
        windows = plan_windows(dataset, world.spec, settings).windows
        pieces: list[np.ndarray] = []

        def watch(row: int, first: int, video_TVHWC: np.ndarray, pieces: list[np.ndarray] = pieces) -> None:
            if row == 0:
                inside = [time - 1 - first for time in times if 0 <= time - 1 - first < len(video_TVHWC)]
                pieces.extend(video_TVHWC[inside, 0])

        name = directory.name
        found[name] = drift(world, dataset, settings, windows, options.frames, watch=watch)
        shown[name] = np.stack(pieces)
        rows = {f"{mark}.{name}.{key}": row for key, row in figures(found[name]).items()}
        for key, (value, unit) in rows.items():
            print(f"{key:<40} {value:10.4g} {unit}", flush=True)
        add_rows(
            options.out, rows, device=device, packages=("torch",),
            command=" ".join(["python", "tools/bench/drift.py", *arguments]),
        )  # fmt: skip
    if options.docs is not None:
        picture(found, shown, times, options.docs / "images" / mark.replace(".", "-"))


def figures(found: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """What the curves come to, with units; what a dataset does not allow is left out."""
    rollouts, frames = found["rollouts"], found["frames"]
    count = f"{rollouts} rollouts of {frames} frames"
    rows = {
        "gain_while_recorded": (found["gain_while_recorded_db"], f"dB over the last frame held, {count}"),
        "background.begin": (found["background_begin_db"], f"dB of what never moves, first 16, {count}"),
        "background.end": (found["background_end_db"], f"dB of what never moves, last quarter, {count}"),
        "jump_ratio": (
            found["jump_ratio"],
            f"1, motion at the worst phase of {found['turn']} frames, {count}",
        ),
    }
    rows |= {
        f"{name}.end": (value, f"of the recording's, last quarter, {count}")
        for name, value in found["end"].items()
    }
    if (view := found.get("returned")) is not None:
        rows |= {
            f"returned.{name.removeprefix('psnr_')}": (
                view[name],
                f"dB to the last known view, {rollouts} ways",
            )
            for name in ("psnr_turn", "psnr_return", "psnr_bound")
        }
    return {name: (float(f"{value:.4g}"), unit) for name, (value, unit) in rows.items() if value is not None}


def picture(
    found: Mapping[str, Mapping[str, Any]],
    shown: Mapping[str, np.ndarray],
    times: Sequence[int],
    path: Path,
) -> None:
    """Curves of all datasets in one figure, PATH.png, and a rollout of each in one strip, PATH.jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    panels = []
    for key, title, unit in (
        ("background_psnr", "What does not move", "PSNR [dB]"),
        ("sharpness_ratio", "Sharpness", "imagined / recorded"),
        ("motion_ratio", "Motion", "imagined / recorded"),
    ):
        lines = [
            Line(name, np.arange(1, one["frames"] + 1), smooth(one["curves"][key]))
            for name, one in found.items()
        ]
        if unit != "PSNR [dB]":
            last = max(one["frames"] for one in found.values())
            lines.append(Line("as recorded", [1, last], [1.0, 1.0], floor=True))
        panels.append(Panel(tuple(lines), title, "imagined frame", unit))
    media.write_bytes(path.with_suffix(".png"), to_png(draw(panels, columns=3, panel_size=(3.9, 3.0))))
    labels = [f"frame {time}" for time in times]
    drawn = media.strip(shown, list(range(len(times))), labels=labels)
    Image.fromarray(drawn).save(path.with_suffix(".jpg"), quality=JPEG_QUALITY)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/drift.py")
    except VidworldError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
