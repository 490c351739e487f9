"""The report of an evaluation: report.html and film strips.

Shapes: T frames, V views, H W pixels, S proprio dims, M samples.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidworld import media
from vidworld.evaluation.calibration_page import write_calibration
from vidworld.evaluation.disagreement import rank_correlation, write_scenes, write_spread
from vidworld.evaluation.drift_page import write_drift
from vidworld.evaluation.metrics import psnr
from vidworld.evaluation.study import Clip, Study
from vidworld.evaluation.windows import Window
from vidworld.page import Card, Report
from vidworld.plots import Line, Panel, draw, to_png
from vidworld.world.spec import WorldSpec

STRIP_COLUMNS = 8
RATIO_TARGET = 1.2
TABLE_FRAMES = (1, 8, 16, 48)
"""Frames of the horizon in the table of proprioception, beside the last one."""

MOST_DIMENSIONS = 12
"""Proprioception curves drawn at most."""

CLIP_HEIGHT = 192
IMAGINED_COLOR = (245, 158, 11)
IMAGINED_BAR = 4
"""Colour, and height in pixels, of the bar over imagined frames."""

ACTION_WORDS = {"shuffled": "another window's", "mean": "recorded mean", "late": "one frame late"}

HOW_TO_READ = (
    "Every rollout starts from a few recorded frames and then sees only the recorded actions. PSNR (in "
    "dB, more is better) compares each imagined frame with the recorded one. Two lines frame it: "
    "holding the last known frame, which a useful model must beat, and the recorded frame passed "
    "through the tokenizer, which no model on it can beat.\n\n"
    "A blurry average scores well in PSNR, so judge by single samples and by the clips; the last table "
    "says in numbers whether rollouts end grey, blurred or frozen. The same windows are also rolled out "
    "with wrong actions and the same noise: if that makes the error no larger (ratio 1), the model does "
    "not listen to its actions, however good its pictures look."
)


def write_report(metrics: Mapping[str, Any], study: Study, spec: WorldSpec, folder: Path) -> Path:
    """Write report.html and strip-*.png into a folder; returns the report's path."""
    data, settings = metrics["data"], metrics["settings"]
    subtitle = (
        f"{data['windows']} windows of {data['episodes']} "
        f"{'held-out ' if settings['split'] == 'val' else ''}episodes, "
        f"{settings['context']} known frames, then {settings['frames']} imagined "
        f"({settings['frames'] / spec.fps:.2g} s), {settings['samples']} samples each"
    )
    report = Report(f"World model on {data['name']}", subtitle)
    report.cards(*_cards(metrics))
    if metrics["warnings"]:
        report.section("What to look into")
        for warning in metrics["warnings"]:
            report.text(f"{warning[0].upper()}{warning[1:]}.")
    report.section("How to read this", HOW_TO_READ)
    _pictures(report, metrics)
    _clips(report, study, spec, folder)
    _actions(report, metrics)
    _proprio(report, metrics, study, spec)
    _collapse(report, metrics)
    for robot, found in metrics.get("uncertainty", {}).items():
        write_spread(report, robot, found)
    if scenes := metrics.get("scenes"):
        write_scenes(report, scenes, rank_correlation(scenes))
    for robot, found in metrics.get("calibration", {}).items():
        write_calibration(report, robot, found)
    for robot, found in metrics.get("drift", {}).items():
        media.write_bytes(folder / f"drift-{robot}.png", to_png(write_drift(report, robot, found)))
    report.section("Settings")
    shown = {
        key: metrics[key] for key in ("settings", "sampler", "world", "data", "device", "date", "versions")
    }
    report.details("what was measured, on what, with what", json.dumps(shown, indent=1))
    return report.write(folder / "report.html")


def _cards(metrics: Mapping[str, Any]) -> list[Card]:
    summary, frames = metrics["summary"], metrics["settings"]["frames"]
    gains = [int(name.removeprefix("psnr_gain.f")) for name in summary if name.startswith("psnr_gain.")]
    cards = []
    for horizon in gains:
        gain = summary[f"psnr_gain.f{horizon}"]
        cards.append(
            Card(
                f"PSNR gain at frame {horizon}",
                _number(gain, "+.1f", " dB"),
                f"over holding the last frame{_interval(metrics, f'psnr_gain.f{horizon}', '+.1f')}",
                good=None if gain is None else gain > 0,
            )
        )
    ratio = summary["shuffle_ratio"]
    cards.append(
        Card(
            "Shuffled / true actions",
            _number(ratio, ".2f", " x"),
            f"pixel error; 1: ignores its actions{_interval(metrics, 'shuffle_ratio', '.2f')}",
            good=None if ratio is None else ratio >= RATIO_TARGET,
        )
    )
    cards.append(
        Card(
            f"PSNR at frame {frames}",
            _number(summary[f"psnr.f{frames}"], ".1f", " dB"),
            f"held: {_number(summary[f'psnr_copy.f{frames}'], '.1f', '')}, "
            f"tokenizer's bound: {_number(summary[f'psnr_bound.f{frames}'], '.1f', '')}",
        )
    )
    return cards


def _interval(metrics: Mapping[str, Any], name: str, form: str) -> str:
    interval = metrics["intervals"].get(name)
    return "" if interval is None else f" (95 %: {interval[0]:{form}} to {interval[1]:{form}})"


def _pictures(report: Report, metrics: Mapping[str, Any]) -> None:
    curve = metrics["curve"]
    x, mean, error = curve["horizons"], curve["mean"], curve["standard_error"]
    samples = metrics["settings"]["samples"]

    def line(label: str, name: str, *, floor: bool = False, band: bool = False) -> Line:
        low = high = None
        if band and all(one is not None for one in error[name]):
            low = [a - b for a, b in zip(mean[name], error[name], strict=True)]
            high = [a + b for a, b in zip(mean[name], error[name], strict=True)]
        return Line(label, x, mean[name], low, high, floor=floor)

    psnr_lines = [line("single sample", "psnr", band=True)]
    if samples > 1:
        psnr_lines += [
            line(f"pixel mean of {samples}", "psnr_mean"),
            line(f"best of {samples}", "psnr_best"),
        ]
    psnr_lines += [
        line("last frame held", "psnr_copy", floor=True),
        line("tokenizer's bound", "psnr_bound", floor=True),
    ]
    ssim_lines = [
        line("single sample", "ssim", band=True),
        line("last frame held", "ssim_copy", floor=True),
        line("tokenizer's bound", "ssim_bound", floor=True),
    ]
    report.section("Pictures").figure(
        draw(
            [
                Panel(tuple(psnr_lines), "PSNR", "imagined frame", "dB"),
                Panel(tuple(ssim_lines), "SSIM", "imagined frame", ""),
            ]
        ),
        "Mean over windows; the band is one standard error.",
    )
    names = {
        "psnr": "sample", "psnr_mean": "pixel mean", "psnr_median": "median", "psnr_best": "best",
        "psnr_copy": "held", "psnr_bound": "bound", "gain": "gain", "ssim": "SSIM", "ssim_copy": "SSIM held",
        "lpips": "LPIPS", "lpips_copy": "LPIPS held",
    }  # fmt: skip
    table = metrics["pictures"]["all"]
    names = {name: told for name, told in names.items() if name in table["mean"]}
    report.table(
        ["frame", *names.values()],
        [
            [horizon, *(table["mean"][name][place] for name in names)]
            for place, horizon in enumerate(table["horizons"])
        ],
        caption="PSNR in dB of single samples, of the pixel mean and median of the samples and of the best "
        "one over the horizon; of the last frame held, and of the tokenizer's bound. Gain: sample - held.",
    )
    for kind in ("views", "embodiments"):
        groups = metrics["pictures"].get(kind, {})
        if groups:
            report.table(
                [kind.removesuffix("s"), *(f"gain at {horizon}" for horizon in table["horizons"])],
                [[name, *group["mean"]["gain"]] for name, group in groups.items()],
                caption=f"PSNR gain over the last frame held in dB, by {kind.removesuffix('s')}.",
            )


def _actions(report: Report, metrics: Mapping[str, Any]) -> None:
    rollout = metrics["actions"]["rollout"]
    kinds = [kind for kind in ACTION_WORDS if rollout[kind]]
    report.section("Does it listen to its actions?")
    horizons = rollout["horizons"]
    lines = [Line(ACTION_WORDS[kind], horizons, rollout[kind]["ratio"]) for kind in kinds]
    lines.append(Line("true actions", horizons, [1.0] * len(horizons), floor=True))
    panels = [Panel(tuple(lines), "Rollout error, wrong / true actions", "imagined frame", "ratio")]
    report.figure(draw(panels, columns=1, panel_size=(8.0, 3.0)), "1: wrong actions do no harm.")
    report.table(
        ["actions", *(f"frame {horizon}" for horizon in horizons), "all of them"],
        [[ACTION_WORDS[kind], *rollout[kind]["ratio"], rollout[kind]["ratio_all"]] for kind in kinds],
        caption="Mean squared pixel error of rollouts under wrong actions, divided by that under the true "
        "ones with the same noise.",
    )
    denoising = metrics["actions"]["denoising"]
    if denoising:
        names = {
            "ratio_shuffled": "shuffled", "ratio_zero": "middle of the range", "ratio_shifted": "late",
            "ratio_dropped": "unknown", "proprio_ratio_shuffled": "proprio, shuffled",
        }  # fmt: skip
        report.table(
            ["embodiment", *names.values()],
            [[robot, *(found.get(name) for name in names)] for robot, found in denoising.items()],
            caption="Denoising loss of single frames after true context under wrong actions, divided by that "
            "under the true ones, at the same noise and levels.",
        )


def _clips(report: Report, study: Study, spec: WorldSpec, folder: Path) -> None:
    if not study.clips:
        return
    report.section(
        "Clips", "All columns begin with the same recorded frames. A bar on top marks what is imagined."
    )
    for number, clip in enumerate(study.clips):
        for v, view in enumerate(spec.views):
            suffix = f"-{view}" if len(spec.views) > 1 else ""
            rows = {"recorded": clip.truth_TVHWC[:, v], "imagined": clip.samples_MTVHWC[0, :, v]}
            if clip.shuffled_TVHWC is not None:
                rows["other actions"] = clip.shuffled_TVHWC[:, v]
            marked = [_marked(rows[name], 0 if name == "recorded" else clip.context) for name in rows]
            video = media.grid(marked, len(rows), labels=list(rows), height=CLIP_HEIGHT)
            report.video(video, spec.fps, _caption(clip, v, suffix and f", {view}"))
            others = {"another sample": clip.samples_MTVHWC[1, :, v]} if len(clip.samples_MTVHWC) > 1 else {}
            strip = _strip(
                {name: rows[name] for name in ("recorded", "imagined")} | others | rows, clip.context
            )
            media.write_png(folder / f"strip-{number}{suffix}.png", strip)
            report.image(strip)


def _caption(clip: Clip, v: int, view: str) -> str:
    decibels = psnr(clip.samples_MTVHWC[0, -1, v], clip.truth_TVHWC[-1, v])
    caption = f"{_named(clip.window)}{view}: {decibels:.1f} dB at the end."
    if clip.partner is not None and clip.shuffled_TVHWC is not None:
        caption += f" The other actions are those of {_named(clip.partner)}."
    return f"{caption} {clip.note}".strip()


def _named(window: Window) -> str:
    return f"{window.sample.key} from frame {window.start}"


def _marked(video_THWC: np.ndarray, context: int) -> np.ndarray:
    """Enlarge a video, and put a bar over all frames from `context` on if it is not 0."""
    marked = media.enlarge(video_THWC, CLIP_HEIGHT).copy()
    if context:
        marked[context:, :IMAGINED_BAR] = IMAGINED_COLOR
    return marked


def _strip(rows: Mapping[str, np.ndarray], context: int) -> np.ndarray:
    last = len(rows["recorded"]) - 1
    spaced = np.linspace(context, last, min(STRIP_COLUMNS, last + 1 - context)).round().astype(int).tolist()
    labels = ["known", *(f"+{time - context + 1}" for time in spaced)]
    return media.strip(rows, [context - 1, *spaced], labels=labels)


def _proprio(report: Report, metrics: Mapping[str, Any], study: Study, spec: WorldSpec) -> None:
    if not any(found["dimensions"] for found in metrics["proprio"].values()):
        return
    report.section("Proprioception")
    if study.clips:
        clip = study.clips[0]
        report.figure(
            draw(_curves(clip, spec), panel_size=(5.35, 2.2)),
            f"{_named(clip.window)}: mean of the samples, and the range that they span.",
        )
    for robot, found in metrics["proprio"].items():
        horizons = found["horizons"]
        places = [i for i, h in enumerate(horizons) if h in TABLE_FRAMES or h == horizons[-1]]
        report.table(
            [robot, "unit", *(head for i in places for head in (f"frame {horizons[i]}", "held"))],
            [
                [name, values["unit"], *(values[error][i] for i in places for error in ("mae", "mae_copy"))]
                for name, values in found["dimensions"].items()
            ],
            caption="Mean absolute error of the mean of the samples, and of holding the last known value.",
            digits=4,
        )


def _curves(clip: Clip, spec: WorldSpec) -> list[Panel]:
    k = spec.frames_per_step
    seconds_T = np.arange(len(clip.proprio_TS)) * k / spec.fps
    known = len(clip.proprio_TS) - clip.predicted_MTS.shape[1]
    panels = []
    for s, dimension in enumerate(clip.contract.proprio[:MOST_DIMENSIONS]):
        # The curve leaves from the last known value.
        start_M1 = np.full((len(clip.predicted_MTS), 1), clip.proprio_TS[known - 1, s])
        values_MT = np.concatenate([start_M1, clip.predicted_MTS[:, :, s]], 1)
        imagined = Line(
            "imagined", seconds_T[known - 1 :], values_MT.mean(0), values_MT.min(0), values_MT.max(0)
        )
        recorded = Line("recorded", seconds_T, clip.proprio_TS[:, s])
        panels.append(Panel((recorded, imagined), dimension.name, "s", dimension.unit))
    return panels


def _collapse(report: Report, metrics: Mapping[str, Any]) -> None:
    collapse = metrics["collapse"]
    meanings = {
        "contrast": "spread of the pixels; low is grey",
        "sharpness": "energy of edges; low is blurred, high is noise",
        "motion": "change from frame to frame; low is frozen, high is flicker",
    }
    report.section("Does it hold to the end?")
    report.table(
        ["last frames", "what it is", "rollout / truth", "tokenizer / truth"],
        [
            [name, meaning, collapse[name]["ratio"], collapse[name]["ratio_bound"]]
            for name, meaning in meanings.items()
        ],
        caption=f"Looks of the last {collapse['last_frames']} frames of single samples against what was "
        "recorded; 1 is alike.",
    )


def _number(value: float | None, form: str, unit: str) -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
