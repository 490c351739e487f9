"""`vidworld eval`: measure a world model on held-out episodes, and write metrics.json and report.html.

Frames of the horizon are counted from 1. Errors of pixels are means of squares, with pixels from 0 to 1.
"""

import datetime
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from vidworld.evaluation.grounding import file_digest
from vidworld.evaluation.metrics import horizon_table
from vidworld.evaluation.output import output_directory
from vidworld.evaluation.page import write_report
from vidworld.evaluation.study import Measured, Study, measure
from vidworld.evaluation.windows import WRONG, Plan, Settings, plan_windows
from vidworld.world.load import find, load
from vidworld.world.world import WorldModel

RECORD = "metrics.json"
REPORT = "report.html"
SCHEMA_VERSION = 1

HORIZONS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
HEADLINES = (8, 16, 48)
"""Frames of the horizon that the summary names, beside the last one."""


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
    out: Path
    """Directory to write; it must not exist."""
    device: str | None = None
    """Default: the GPU if there is one."""
    json: bool = False
    """Print metrics.json to standard output instead of a summary."""
    overwrite: bool = False
    """Replace an earlier evaluation in --out."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Entry point of `vidworld eval`."""
    options = parse(Options, arguments, prog=prog)
    with output_directory(options.out, RECORD, overwrite=options.overwrite) as folder:
        files = find(options.run)
        world = load(options.run, options.device)
        origin = {
            "run": str(options.run),
            "checkpoint": files.checkpoint,
            "weights_sha256": file_digest(files.weights),
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
    metrics, study = _measure(world, dataset_dir, settings, origin or {})
    write_report(metrics, study, world.spec, folder)
    (folder / RECORD).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def evaluate(world: WorldModel, dataset_dir: Path | str, settings: Settings | None = None) -> dict[str, Any]:
    """Measure a world on a dataset and return what metrics.json holds, writing nothing.

    Raises DataError, ContractError or ConfigError naming what does not fit.
    """
    return _measure(world, dataset_dir, settings or Settings(), {})[0]


def _measure(
    world: WorldModel, dataset_dir: Path | str, settings: Settings, origin: Mapping[str, Any]
) -> tuple[dict[str, Any], Study]:
    dataset = ShardDataset.open(dataset_dir)
    plan = plan_windows(dataset, world.spec, settings)
    for embodiment in plan.embodiments:
        warn_constant(world.spec.contracts[world.spec.embodiment_index(embodiment)])
    began = time.perf_counter()
    with tqdm(total=len(plan.windows), unit="window", desc="eval", disable=None) as bar:
        study = measure(world, dataset, settings, plan=plan, progress=bar.update)
    seconds = time.perf_counter() - began
    found = summarise(study, settings, world.spec.frames_per_step)
    spec, manifest = world.spec, dataset.manifest
    metrics = {
        "kind": "evaluation",
        "schema_version": SCHEMA_VERSION,
        "summary": found.pop("summary"),
        "warnings": found.pop("warnings"),
        "settings": to_mapping(settings_only(settings)),
        "sampler": to_mapping(settings.sampler(spec.sampler)),
        "world": {
            **origin,
            "digest": spec.digest,
            "tokenizer_digest": spec.tokenizer_digest or world.tokenizer.digest,
            "trained_on": spec.dataset_digest,
            "views": list(spec.views),
            "height": spec.height,
            "width": spec.width,
            "fps": spec.fps,
            "parameters": sum(parameter.numel() for parameter in world.model.parameters()),
        },
        "data": {
            "directory": str(dataset_dir),
            "name": manifest.name,
            "digest": manifest.digest,
            "contracts": {name: manifest.contract(name).digest for name in plan.embodiments},
            **_described(plan),
        },
        **found,
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
    return _plain(metrics), study


def settings_only(settings: Settings) -> Settings:
    """The settings of a study without those of the command."""
    names = Settings.__dataclass_fields__
    return Settings(**{name: getattr(settings, name) for name in names})


def summarise(study: Study, settings: Settings, frames_per_step: int = 1) -> dict[str, Any]:
    """Tables over the horizon of all that was measured, and a summary of a few figures under dotted names."""
    horizons = tuple(dict.fromkeys([h for h in HORIZONS if h < settings.frames] + [settings.frames]))
    pictures: dict[str, Any] = {"all": _pictures(study.measured, horizons)}
    names = {"views": _by_view(study.measured), "embodiments": _by_embodiment(study.measured)}
    for kind, groups in names.items():
        if len(groups) > 1:
            pictures[kind] = {name: _pictures(group, horizons) for name, group in groups.items()}
    everything = [found for one in study.measured for found in one.views.values()]
    actions = _actions(study, horizons)
    collapse = _collapse(everything)
    summary = _summary(pictures["all"], actions, collapse, settings.frames)
    proprio = {
        name: _proprio(group, horizons, frames_per_step) for name, group in names["embodiments"].items()
    }
    return {
        "summary": summary,
        "warnings": _warnings(study, summary, collapse),
        "pictures": pictures,
        "actions": actions,
        "collapse": collapse,
        "proprio": proprio,
        "curve": _pictures(study.measured, range(1, settings.frames + 1)),
        "windows": [_window(one, horizons) for one in study.measured],
    }


def _by_view(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    views = list(dict.fromkeys(view for one in measured for view in one.views))
    return {
        view: [Measured(one.window, one.partner, {view: one.views[view]}, one.proprio) for one in measured]
        for view in views
    }


def _by_embodiment(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    names = dict.fromkeys(one.window.sample.embodiment for one in measured)
    return {name: [one for one in measured if one.window.sample.embodiment == name] for name in names}


PICTURE_METRICS = (
    "psnr", "psnr_mean", "psnr_median", "psnr_best", "psnr_copy", "psnr_bound", "gain",
    "ssim", "ssim_copy", "ssim_bound", "crps", "mse", "mse_copy",
)  # fmt: skip


def _pictures(measured: Sequence[Measured], horizons: Sequence[int]) -> dict[str, Any]:
    """Means over windows and views."""
    rows = [
        {name: found[name] for name in PICTURE_METRICS} for one in measured for found in one.views.values()
    ]
    table = horizon_table(rows, horizons)
    table["windows"] = table.pop("episodes")
    return table


def _actions(study: Study, horizons: Sequence[int]) -> dict[str, Any]:
    """Pixel errors under wrong actions over those under true ones with the same noise; denoising losses."""
    rollout: dict[str, Any] = {"horizons": list(horizons)}
    for kind in WRONG:
        rows = [
            found
            for one in study.measured
            if kind != "shuffled" or one.partner is not None
            for found in one.views.values()
        ]
        if not rows:
            rollout[kind] = None
            continue
        wrong_T = np.mean([found[f"mse_{kind}"] for found in rows], 0)
        true_T = np.mean([found["mse_first"] for found in rows], 0)
        rollout[kind] = {
            "ratio": [_ratio(wrong_T[h - 1], true_T[h - 1]) for h in horizons],
            "ratio_all": _ratio(wrong_T.mean(), true_T.mean()),
            "curve": [_ratio(wrong, true) for wrong, true in zip(wrong_T, true_T, strict=True)],
        }
    same = [one for one in study.measured if one.partner and one.partner.sample == one.window.sample]
    return {"rollout": rollout, "denoising": study.denoising, "partners_of_the_same_episode": len(same)}


def _collapse(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Looks of the last frames against the truth's: 1 is alike, 0 is blurred, grey or frozen."""
    tail = max(1, len(rows[0]["psnr"]) // 4)
    found: dict[str, Any] = {"last_frames": tail}
    for name in ("contrast", "sharpness", "motion"):
        truth, bound, model = (
            float(np.mean([row[f"{name}_{who}"][-tail:].mean() for row in rows]))
            for who in ("truth", "bound", "model")
        )
        found[name] = {"ratio": _ratio(model, truth), "ratio_bound": _ratio(bound, truth)}
    return found


def _summary(
    pictures: Mapping[str, Any], actions: Mapping[str, Any], collapse: Mapping[str, Any], frames: int
) -> dict[str, float | None]:
    horizons: list[int] = pictures["horizons"]
    summary: dict[str, float | None] = {}
    for horizon in [h for h in horizons if h in HEADLINES or h == frames]:
        place, mean = horizons.index(horizon), pictures["mean"]
        summary[f"psnr_gain.f{horizon}"] = mean["gain"][place]
        summary[f"psnr.f{horizon}"] = mean["psnr"][place]
        summary[f"psnr_bound.f{horizon}"] = mean["psnr_bound"][place]
        for kind in WRONG:
            ratios = actions["rollout"][kind]
            name = "shuffle" if kind == "shuffled" else kind
            summary[f"{name}_ratio.f{horizon}"] = ratios and ratios["ratio"][place]
    shuffled = actions["rollout"]["shuffled"]
    summary["shuffle_ratio"] = shuffled and shuffled["ratio_all"]
    for name in ("contrast", "sharpness", "motion"):
        summary[f"{name}_ratio"] = collapse[name]["ratio"]
    return summary


LEAST = {"contrast": 0.6, "sharpness": 0.4, "motion": 0.3}
"""Below these shares of the tokenizer's own a rollout counts as collapsed."""


def _warnings(study: Study, summary: Mapping[str, float | None], collapse: Mapping[str, Any]) -> list[str]:
    """What a reader must not overlook, in plain words."""
    found = []
    frames = len(next(iter(study.measured[0].views.values()))["psnr"])
    gain, ratio = summary[f"psnr_gain.f{frames}"], summary["shuffle_ratio"]
    if gain is not None and gain <= 0:
        found.append(f"at frame {frames} the rollout is no better than holding the last known frame")
    if ratio is None:
        found.append("there is but one window: actions could not be shuffled")
    elif ratio < 1.05:
        found.append(f"wrong actions hardly make the rollout worse (x {ratio:.2f}): it ignores them")
    words = {"contrast": "grey", "sharpness": "blurred", "motion": "frozen"}
    for name, least in LEAST.items():
        share, bound = collapse[name]["ratio"], collapse[name]["ratio_bound"]
        if share is not None and bound and share < least * bound:
            found.append(f"the rollout ends {words[name]}: {name} is {share:.2f} of the truth's")
    if any(one.partner and one.partner.sample == one.window.sample for one in study.measured):
        found.append("some shuffled actions are from another window of the same episode")
    if study.plan.too_short:
        keys = ", ".join(sample.key for sample in study.plan.too_short[:4])
        found.append(f"{len(study.plan.too_short)} episodes are too short for the horizon ({keys}, ...)")
    return found


def _proprio(measured: Sequence[Measured], horizons: Sequence[int], frames_per_step: int) -> dict[str, Any]:
    """Absolute errors in units, mean over windows; where time is compressed, at whole steps only."""
    names = list(measured[0].proprio)
    steps = [h // frames_per_step for h in horizons if h % frames_per_step == 0]
    dimensions = {}
    for name in names:
        rows = [{key: one.proprio[name][key] for key in ("mae", "mae_copy", "crps")} for one in measured]
        table = horizon_table(rows, steps)
        dimensions[name] = {"unit": measured[0].proprio[name]["unit"], **table["mean"]}
    return {"horizons": [step * frames_per_step for step in steps], "dimensions": dimensions}


def _window(one: Measured, horizons: Sequence[int]) -> dict[str, Any]:
    return {
        "key": one.window.sample.key,
        "episode_id": one.window.sample.episode_id,
        "start": one.window.start,
        "shuffled_with": one.partner and f"{one.partner.sample.key}@{one.partner.start}",
        "psnr": {view: [float(found["psnr"][h - 1]) for h in horizons] for view, found in one.views.items()},
        "gain": {view: [float(found["gain"][h - 1]) for h in horizons] for view, found in one.views.items()},
    }


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "episodes": len({window.sample.key for window in plan.windows}),
        "windows": len(plan.windows),
        "too_short": [f"{sample.key} ({sample.frames} frames)" for sample in plan.too_short],
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


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
        case float():
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
    lines += [f"warning: {warning}" for warning in metrics["warnings"]]
    return "\n".join([*lines, f"report: {out / REPORT}"])
