"""Pack a trained world into the package, where its name opens it, and measure what rounding costs.

    python tools/bench/ship.py runs/lab --precision int8 --data data/lab/smoke data/lab/paint --card card.md

Writes vidworld/weights/NAME: the export, the prompts that are there already, the run's settings and thinned
training log. Nothing is replaced unless it is small enough and loses no more than --most-loss-db on held-out
windows, beside the same rollouts of the run. Adds rows `flagship.shipped.*` to benchmarks/flagship.json.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.evaluate import evaluate
from vidworld.evaluation.export import PROMPTS, export, write_manifest
from vidworld.evaluation.windows import Settings
from vidworld.quantize import Precision, relative_errors
from vidworld.world.load import load, open_world
from vidworld.world.shipped import FOLDER, NAMES
from vidworld.world.world import WorldModel

LOG_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pack a run into the package."""

    run: tyro.conf.Positional[Path]
    """Directory of the trained world."""
    data: tuple[Path, ...]
    """Datasets whose held-out episodes tell what rounding costs."""
    name: str = "lab"
    """By which it is opened."""
    precision: Precision = "int8"
    prompts: Path | None = None
    """Dataset to begin rollouts with; default: the one that is there."""
    tokenizer_run: Path | None = None
    """Run that trained the tokenizer, whose settings are kept too."""
    card: Path | None = None
    """Markdown to end the model card with: data, minutes, figures, limits."""
    most_mib: float = 18.0
    """Of everything but the prompts."""
    most_loss_db: float = 0.2
    """PSNR at the last frame that rounding may cost, a dataset."""
    frames: int = 24
    context: int = 8
    episodes: int = 16
    device: str | None = None
    weights: Path = FOLDER
    """Folder of the package that holds a folder a name."""
    rows: Path = Path("benchmarks/flagship.json")


def main(arguments: Sequence[str], prog: str) -> None:
    """Export, measure, put in place, add the rows."""
    options = parse(Options, arguments, prog=prog)
    if options.name not in NAMES:
        raise ConfigError("--name", got=options.name, expected=" or ".join(NAMES))
    if not options.data:
        raise ConfigError("--data", got="nothing", expected="datasets to measure on")
    place = options.weights / options.name
    prompts = options.prompts or place / PROMPTS
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ship-", dir=place.parent) as name:
        folder = Path(name) / "new"
        folder.mkdir()
        export(options.run, folder, options.precision, prompts=prompts)
        keep_recipe(options, folder)
        write_manifest(folder)
        mib = size_mib(folder)
        if mib > options.most_mib:
            raise DataError("size of what is shipped", got=f"{mib:.1f} MiB", expected=options.most_mib)
        rows = measured(options, folder) | {"flagship.shipped.mib": (round(mib, 2), "MiB")}
        if place.exists():
            place.rename(Path(name) / "old")
        folder.rename(place)
    device = cpu_name() if options.device in (None, "cpu") else str(options.device)
    command = " ".join(["python", "tools/bench/ship.py", *arguments])
    add_rows(options.rows, rows, device=device, command=command, packages=("torch",))
    for row, (value, unit) in rows.items():
        print(f"{row:<44} {value:10.4g} {unit}")
    print(f'{place}: vidworld.load("{options.name}")')


def size_mib(folder: Path) -> float:
    """Of all files but the prompts."""
    files = (path for path in folder.rglob("*") if path.is_file() and PROMPTS not in path.parts)
    return sum(path.stat().st_size for path in files) / 2**20


def keep_recipe(options: Options, folder: Path) -> None:
    """The settings and thinned logs of the runs, paths from where this is called, and the card's end."""
    runs = {"world": options.run} | ({"tokenizer": options.tokenizer_run} if options.tokenizer_run else {})
    (folder / "recipe").mkdir()
    for what, run in runs.items():
        settings, log = run / "config.yaml", run / "metrics.jsonl"
        if settings.is_file():
            text = settings.read_text().replace(f"{Path.cwd()}/", "")
            (folder / "recipe" / f"{what}.yaml").write_text(text)
        if log.is_file():
            (folder / "recipe" / f"{what}.jsonl").write_text(thinned(log.read_text()))
    if options.card is not None:
        card = folder / "README.md"
        card.write_text(f"{card.read_text()}\n{options.card.read_text()}")


def thinned(log: str) -> str:
    """At most about `LOG_ROWS` of a log's lines, evenly spaced, the last one among them."""
    lines = log.splitlines()
    every = -(-len(lines) // LOG_ROWS)
    kept = [line for index, line in enumerate(lines) if (len(lines) - 1 - index) % every == 0]
    return "".join(f"{json.dumps(json.loads(line))}\n" for line in kept)


def measured(options: Options, folder: Path) -> dict[str, tuple[float, str]]:
    """Errors of weights, and what held-out rollouts lose. Raises DataError where it is too much."""
    run, packed = load(options.run, options.device), load(folder, options.device)
    # Of what the file holds: members' changes by themselves, not merged.
    held = open_world(options.run, calibrated=False).model.state_dict()
    errors = relative_errors(held, options.precision)
    begun = "flagship.shipped"
    rows = {
        f"{begun}.weight_error": (round(fmean(errors.values()), 5), "of a tensor's norm, mean"),
        f"{begun}.weight_error_most": (round(max(errors.values()), 5), "of a tensor's norm, largest"),
    }
    for data in options.data:
        kind, last = data.name, f"f{options.frames}"
        before, after = (summary(world, data, options) for world in (run, packed))
        loss = before[f"psnr.{last}"] - after[f"psnr.{last}"]
        rows |= {
            f"{begun}.psnr_run.{kind}.{last}": (round(before[f"psnr.{last}"], 3), "dB"),
            f"{begun}.psnr_loss.{kind}.{last}": (round(loss, 3), "dB"),
            f"{begun}.shuffle_ratio.{kind}": (round(after["shuffle_ratio"], 3), "1"),
        }
        if loss > options.most_loss_db:
            raise DataError(
                f"PSNR lost to {options.precision} on {kind} at frame {options.frames}",
                got=f"{loss:.2f} dB",
                expected=f"at most {options.most_loss_db}",
                fix="take another --precision",
            )
    return rows


def summary(world: WorldModel, data: Path, options: Options) -> dict[str, float]:
    """Headline figures of `vidworld eval`."""
    settings = Settings(
        episodes=options.episodes,
        windows_per_episode=2,
        context=options.context,
        frames=options.frames,
        samples=1,
        clips=0,
    )
    found = evaluate(world, data, settings)
    at = found["pictures"]["all"]["horizons"].index(options.frames)
    return {
        f"psnr.f{options.frames}": found["pictures"]["all"]["mean"]["psnr"][at],
        "shuffle_ratio": found["summary"]["shuffle_ratio"] or float("nan"),
    }


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "python tools/bench/ship.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
