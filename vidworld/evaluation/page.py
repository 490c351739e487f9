"""The report of an evaluation: report.html and film strips.

Shapes: T frames, V views, H W pixels, S proprio dims, M samples.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidworld import media
from vidworld.evaluation.metrics import psnr
from vidworld.evaluation.plots import Line, Panel, draw
from vidworld.evaluation.report import Card, Report
from vidworld.evaluation.study import Clip, Study
from vidworld.world.spec import WorldSpec

STRIP_COLUMNS = 8
MOST_DIMENSIONS = 12
"""Proprioception curves drawn at most."""

HOW_TO_READ = (
    "Every rollout starts from a few recorded frames of an episode that was not trained on, and then sees "
    "only the recorded actions. PSNR (in dB, more is better) compares each imagined frame with the recorded "
    "one. Two lines frame it: holding the last known frame, which a useful model must beat, and the recorded "
    "frame passed through the tokenizer, which no model on it can beat.\n\n"
    "A blurry average scores well in PSNR. So look at single samples first, and at the pixel mean of the "
    "samples only beside them; the last table says in numbers whether rollouts end blurred, grey or frozen."
    "\n\n"
    "The same windows are also rolled out with wrong actions and the same noise. If that makes the error no "
    "larger (ratio 1), the model does not listen to its actions, however good its pictures look."
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
    report.section("How to read this", HOW_TO_READ)
    for warning in metrics["warnings"]:
        report.text(f"Note: {warning}.")
    _pictures(report, metrics)
    _actions(report, metrics)
    _clips(report, study, spec, folder)
    _proprio(report, metrics, study, spec)
    _collapse(report, metrics)
    report.section("Settings")
    shown = {
        key: metrics[key] for key in ("settings", "sampler", "world", "data", "device", "date", "versions")
    }
    report.details("what was measured, on what, with what", json.dumps(shown, indent=1))
    return report.write(folder / "report.html")


def _cards(metrics: Mapping[str, Any]) -> list[Card]:
    summary, frames = metrics["summary"], metrics["settings"]["frames"]
    gains = [int(name.removeprefix("psnr_gain.f")) for name in summary if name.startswith("psnr_gain.")]
    cards = [
        Card(
            f"PSNR gain at frame {horizon}",
            _number(summary[f"psnr_gain.f{horizon}"], "+.1f", " dB"),
            "over holding the last frame",
            good=None if summary[f"psnr_gain.f{horizon}"] is None else summary[f"psnr_gain.f{horizon}"] > 0,
        )
        for horizon in gains
    ]
    ratio = summary["shuffle_ratio"]
    cards.append(
        Card(
            "Shuffled / true actions",
            _number(ratio, ".2f", " x"),
            "pixel error; 1 means that actions are ignored",
            good=None if ratio is None else ratio >= 1.2,
        )
    )
    cards.append(
        Card(
            f"Sample PSNR at frame {frames}",
            _number(summary[f"psnr.f{frames}"], ".1f", " dB"),
            f"of {_number(summary[f'psnr_bound.f{frames}'], '.1f', ' dB')} that the tokenizer allows",
        )
    )
    return cards


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
    }  # fmt: skip
    table = metrics["pictures"]["all"]
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


ACTION_WORDS = {"shuffled": "another window's", "mean": "recorded mean", "late": "one frame late"}


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
    report.section("Clips", "The first frames are recorded; then every column goes its own way.")
    for number, clip in enumerate(study.clips):
        name = f"{clip.window.sample.key} from frame {clip.window.start}"
        for v, view in enumerate(spec.views):
            rows = {"recorded": clip.truth_TVHWC[:, v], "imagined": clip.samples_MTVHWC[0, :, v]}
            if clip.shuffled_TVHWC is not None:
                rows["other actions"] = clip.shuffled_TVHWC[:, v]
            video = media.grid(list(rows.values()), len(rows), labels=list(rows), height=192)
            last = len(clip.truth_TVHWC) - 1
            times = [
                clip.context - 1,
                *np.linspace(clip.context, last, min(STRIP_COLUMNS, last + 1 - clip.context)).round(),
            ]
            times = list(dict.fromkeys(int(time) for time in times))
            labels = ["known", *(f"+{time - clip.context + 1}" for time in times[1:])]
            strip = media.strip(rows, times, labels=labels)
            suffix = f"-{view}" if len(spec.views) > 1 else ""
            media.write_png(folder / f"strip-{number}{suffix}.png", strip)
            found = psnr(clip.samples_MTVHWC[0, -1, v], clip.truth_TVHWC[-1, v])
            where = f"{name}, {view}" if suffix else name
            report.video(video, spec.fps, f"{where}; {found:.1f} dB at the end")
            report.image(strip, f"{where}: frames of the same rollouts")


def _proprio(report: Report, metrics: Mapping[str, Any], study: Study, spec: WorldSpec) -> None:
    if not any(found["dimensions"] for found in metrics["proprio"].values()):
        return
    report.section("Proprioception")
    if study.clips:
        clip = study.clips[0]
        report.figure(
            draw(_curves(clip, spec), panel_size=(5.35, 2.2)),
            f"{clip.window.sample.key} from frame {clip.window.start}: mean of the samples, and the range "
            "that they span.",
        )
    for robot, found in metrics["proprio"].items():
        horizons = found["horizons"]
        rows = [
            [
                name,
                values["unit"],
                *(cell for pair in zip(values["mae"], values["mae_copy"], strict=True) for cell in pair),
            ]
            for name, values in found["dimensions"].items()
        ]
        heads = [head for horizon in horizons for head in (f"frame {horizon}", "held")]
        report.table(
            [robot, "unit", *heads],
            rows,
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
        ["last frames", "rollout / truth", "tokenizer / truth", "meaning"],
        [
            [name, collapse[name]["ratio"], collapse[name]["ratio_bound"], meaning]
            for name, meaning in meanings.items()
        ],
        caption=f"Looks of the last {collapse['last_frames']} frames of single samples against what was "
        "recorded; 1 is alike.",
    )


def _number(value: float | None, form: str, unit: str) -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
