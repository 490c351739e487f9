"""`vidworld eval`: measure a world model on held-out episodes; write metrics.json, report.html and strips."""

import datetime
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from vidworld import __version__
from vidworld.config import parse, to_mapping
from vidworld.contract import warn_constant
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError
from vidworld.evaluation.calibration_page import calibration_lines
from vidworld.evaluation.disagreement import SCENES, rank, scenes_csv
from vidworld.evaluation.drift import drift
from vidworld.evaluation.drift_page import drift_line
from vidworld.evaluation.futures import Roller
from vidworld.evaluation.grounding import file_digest
from vidworld.evaluation.page import write_report
from vidworld.evaluation.study import Study, measure
from vidworld.evaluation.tables import summarise
from vidworld.evaluation.windows import Plan, Settings, chosen_half, plan_windows
from vidworld.output import output_directory
from vidworld.world.build import narrow
from vidworld.world.ensemble import Ensemble
from vidworld.world.load import asked_members, find, load
from vidworld.world.spec import WorldSpec
from vidworld.world.world import WorldModel

RECORD = "metrics.json"
REPORT = "report.html"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Measure a world model on held-out episodes.

    Rolls it out from many windows of recorded episodes under the recorded actions, and compares with what
    happened, with holding the last frame, and with the best that its tokenizer can show. Writes metrics.json,
    report.html and film strips.
    """

    run: tyro.conf.Positional[Path]
    """Directory of a trained world: a run or an export."""
    data: tyro.conf.Positional[Path]
    """Dataset directory of videos, of the same robot."""
    members: tuple[Path, ...] = ()
    """Further members of an ensemble with `run`: the same world, trained with other seeds. Or a number, or
    `all`: so many of the members that `run` itself holds. Each imagines --samples futures, and what they
    disagree in is told apart."""
    out: Path
    """Directory to write; it must not exist."""
    device: str | None = None
    """Default: the GPU if there is one."""
    uncalibrated: bool = False
    """Leave out the run's calibration.json."""
    json: bool = False
    """Print metrics.json to standard output instead of a summary."""
    overwrite: bool = False
    """Replace an earlier evaluation in --out."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Entry point of `vidworld eval`."""
    options = parse(Options, arguments, prog=prog)
    with output_directory(options.out, RECORD, overwrite=options.overwrite) as folder:
        paths, count = asked_members(options.run, options.members)
        files = find(paths[0])
        world = load(paths, options.device, calibrated=not options.uncalibrated, members=count)
        origin = {
            "run": str(options.run),
            "checkpoint": files.checkpoint,
            "weights_sha256": file_digest(files.weights),
            **({"runs": _members(paths)} if len(paths) > 1 else {}),
            "command": [prog, *arguments],
        }
        metrics = run(world, options.data, options, folder, origin=origin)
    print(json.dumps(metrics, indent=1) if options.json else _lines(metrics, options.out))


def run(
    world: WorldModel,
    dataset_dir: Path | str,
    settings: Settings,
    folder: Path,
    *,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure, and write metrics.json, report.html and strip-*.png into a folder; returns the metrics.

    `origin` is added to what the metrics say of the world, such as the run that it was loaded from.
    """
    metrics, study, spec = _measure(world, dataset_dir, settings, origin or {})
    write_report(metrics, study, spec, folder)
    if "scenes" in metrics:
        (folder / SCENES).write_text(scenes_csv(metrics["scenes"]))
    (folder / RECORD).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def evaluate(
    world: WorldModel,
    dataset_dir: Path | str,
    settings: Settings | None = None,
    *,
    engine: Roller | None = None,
) -> dict[str, Any]:
    """Measure a world on a dataset and return what metrics.json holds, writing nothing.

    `engine` rolls out in place of a `RolloutEngine` of the world, such as a baseline that passes for one.
    Raises DataError, ContractError or ConfigError naming what does not fit.
    """
    return _measure(world, dataset_dir, settings or Settings(), {}, engine)[0]


def _measure(
    world: WorldModel,
    dataset_dir: Path | str,
    settings: Settings,
    origin: Mapping[str, Any],
    engine: Roller | None = None,
) -> tuple[dict[str, Any], Study, WorldSpec]:
    dataset = ShardDataset.open(dataset_dir)
    world = world_of(world, dataset, settings.split)
    if settings.rank_scenes and world.num_members < 2:
        raise ConfigError(
            "--rank-scenes",
            got="one world",
            expected="an ensemble, whose members can disagree",
            fix="name others with --members",
        )
    settings = replace(settings, half=chosen_half(settings, dataset, world.calibration))
    plan = plan_windows(dataset, world.spec, settings)
    for embodiment in plan.embodiments:
        warn_constant(world.spec.contracts[world.spec.embodiment_index(embodiment)])
    began = time.perf_counter()
    with tqdm(total=len(plan.windows), unit="window", desc="eval", disable=None) as bar:
        study = measure(world, dataset, settings, plan=plan, progress=bar.update, engine=engine)
    drifted = {}
    if settings.drift is not None:
        # One sample each: what a world alone does, also of an ensemble.
        first = world.members[0] if isinstance(world, Ensemble) else world
        drifted = {
            robot: drift(first, dataset, settings, plan.of(robot), settings.drift)
            for robot in plan.embodiments
        }
    seconds = time.perf_counter() - began
    found = summarise(study, settings, world.spec.frames_per_step)
    spec, manifest = world.spec, dataset.manifest
    metrics = {
        "kind": "evaluation",
        "schema_version": SCHEMA_VERSION,
        **{name: found.pop(name) for name in ("summary", "intervals", "warnings")},
        "settings": to_mapping(_settings_only(settings)),
        "sampler": to_mapping(settings.sampler(spec.sampler)),
        "world": {
            **origin,
            "digest": spec.digest,
            "calibrated": world.calibration is not None,
            "tokenizer_digest": spec.tokenizer_digest or world.tokenizer.digest,
            "dataset_digest": spec.dataset_digest,
            "views": list(spec.views),
            "height": spec.height,
            "width": spec.width,
            "fps": spec.fps,
            "members": world.num_members,
            "parameters": sum(parameter.numel() for parameter in world.model.parameters()),
        },
        "data": {
            "directory": str(dataset_dir),
            "name": manifest.name,
            "digest": manifest.digest,
            "same_as_trained_on": manifest.digest == spec.dataset_digest,
            "contracts": {name: manifest.contract(name).digest for name in plan.embodiments},
            **_described(plan),
        },
        **found,
        **({"drift": drifted} if drifted else {}),
        **({"scenes": rank(found["windows"])} if settings.rank_scenes else {}),
        "seconds": round(seconds, 3),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device(world.device),
        "versions": {
            "vidworld": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    return _plain(metrics), study, spec


def _members(paths: Sequence[Path]) -> list[dict[str, str]]:
    """Where the members of an ensemble are, and what they are."""
    return [{"run": str(path), "weights_sha256": file_digest(find(path).weights)} for path in paths]


def world_of(world: WorldModel, dataset: ShardDataset, split: str) -> WorldModel:
    """The world of the embodiments of a split, where the whole world's see differently."""
    if not world.spec.layouts:
        return world
    return narrow(world, list(dict.fromkeys(one.embodiment for one in dataset.manifest.samples(split))))


def _settings_only(settings: Settings) -> Settings:
    """The settings of a study without those of the command."""
    names = Settings.__dataclass_fields__
    return Settings(**{name: getattr(settings, name) for name in names})


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "episodes": len({window.sample.key for window in plan.windows}),
        "windows": len(plan.windows),
        "too_short": [f"{sample.key} ({sample.frames} frames)" for sample in plan.too_short],
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def _plain(value: Any) -> Any:
    """Floats of six digits, and None for those that are not finite."""
    match value:
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case float() | np.floating():
            return float(f"{value:.6g}") if math.isfinite(value) else None
        case _:
            return value


def _lines(metrics: Mapping[str, Any], out: Path) -> str:
    """A summary for the terminal."""
    data, table = metrics["data"], metrics["pictures"]["all"]
    lines = [f"{data['windows']} windows of {data['episodes']} episodes of {data['name']}"]
    header = ("frame", "model dB", "copy dB", "bound dB", "gain dB", "shuffled / true")
    shuffled = metrics["actions"]["rollout"]["shuffled"]
    lines.append("  ".join(f"{name:>9}" for name in header))
    for place, horizon in enumerate(table["horizons"]):
        values = [table["mean"][name][place] for name in ("psnr", "psnr_copy", "psnr_bound", "gain")]
        values.append(shuffled and shuffled["ratio"][place])
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append("  ".join(f"{cell:>9}" for cell in (horizon, *cells)))
    for robot, found in metrics.get("calibration", {}).items():
        lines += calibration_lines(robot, found)
    for robot, found in metrics.get("uncertainty", {}).items():
        if (unknown := found["pixels"]["unknown"]) is not None:
            lines.append(
                f"{robot}, pixels at frame {found['frames'][-1]}: open {found['pixels']['open'][-1]:.4f}, "
                f"unknown {unknown[-1]:.4f}, error {found['pixels']['error'][-1]:.4f} (standard deviations)"
            )
    if scenes := metrics.get("scenes"):
        least = ", ".join(f"{scene['key']}@{scene['start']} ({scene['unknown']:.4f})" for scene in scenes[:5])
        lines.append(f"least known, to collect next: {least}; all in {out / SCENES}")
    for robot, found in metrics.get("drift", {}).items():
        lines.append(drift_line(robot, found))
    lines += [f"warning: {warning}" for warning in metrics["warnings"]]
    return "\n".join([*lines, f"report: {out / REPORT}"])
