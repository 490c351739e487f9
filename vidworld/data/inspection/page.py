"""The page of `vidworld inspect --html`: one file that says what a dataset holds and what looks wrong in it.

Its size depends on how much was read, not on how many episodes there are: long lists are cut, and say so.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidworld import media
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.inspection.detectors import silent
from vidworld.data.inspection.figures import TRACES, Signals, draw_lags, draw_lengths, draw_signals
from vidworld.data.inspection.finding import Finding, plain
from vidworld.data.inspection.lag import action_curve, find_pairs, video_curve
from vidworld.data.inspection.survey import Look, Survey
from vidworld.page import Card, Cell, Item, Report

SHEET_ROWS = 8
SHEET_HEIGHT = 88
"""Episodes on a contact sheet, and pixels of a picture's side on it."""
ROWS = 40
"""Rows of a list; manifest.json has all of them."""
DIMENSIONS = 24
"""Dimensions drawn of actions, and of proprioception, per embodiment."""
PER_FIGURE = 8

HOW_TO_READ = (
    "Dashed lines are the 1 % and 99 % quantiles of the training episodes, which scaling sends to -1 and 1. "
    "Dotted lines are the extremes. An action outside the shaded field is refused."
)


def write_page(
    summary: Mapping[str, Any], survey: Survey, findings: Sequence[Finding], path: Path, *, seed: int = 0
) -> Path:
    """Write the page, whole or not at all; returns its path."""
    return build_page(summary, survey, findings, seed=seed).write(path)


def build_page(
    summary: Mapping[str, Any], survey: Survey, findings: Sequence[Finding], *, seed: int = 0
) -> Report:
    """The page. `summary` is what `vidworld inspect --json` prints."""
    manifest = survey.manifest
    looked = f"{len(survey.looks)} of {len(manifest.samples())} episodes read"
    shape = f"{manifest.width}x{manifest.height} at {manifest.fps:g} fps"
    report = Report(manifest.name, f"{manifest.kind} dataset, {shape}, views {', '.join(manifest.views)}")
    report.cards(*_cards(summary, findings, looked))
    _suspicions(report, survey, findings, looked, seed, verified=bool(summary["verified"]))
    _sheets(report, survey)
    for contract in manifest.contracts:
        _embodiment(report, contract, survey)
    _episodes(report, survey)
    _files(report, summary, survey)
    return report


def _cards(summary: Mapping[str, Any], findings: Sequence[Finding], looked: str) -> list[Card]:
    splits = summary["splits"]
    parts = ", ".join(f"{counts['episodes']:,} {name}" for name, counts in splits.items())
    frames, views = summary["frames"], len(summary["views"])
    each = f"{frames:,} frames" + (f" x {views} views" if views > 1 else "")
    total = summary["episodes"] + len(summary["quarantined"])
    return [
        Card("Episodes", f"{summary['episodes']:,}", parts),
        Card("Recorded", _duration(summary["duration_s"]), each),
        Card("Size", _bytes(summary["bytes"]), f"{len(summary['shards']):,} shards"),
        Card(
            "Quarantined",
            f"{len(summary['quarantined']):,}",
            f"of {total:,} episodes",
            good=None if not summary["quarantined"] else False,
        ),
        Card("Suspicious", f"{len(findings)}", looked, good=not findings),
    ]


def _suspicions(
    report: Report, survey: Survey, findings: Sequence[Finding], looked: str, seed: int, *, verified: bool
) -> None:
    report.section("Suspicious")
    if not findings:
        report.text("Nothing looks wrong.")
    report.items(
        *(
            Item(
                _capital(finding.what),
                {"where": finding.where, "got": finding.got, "expected": finding.expected},
                f"{_capital(finding.fix)}.",
            )
            for finding in findings
        )
    )
    quiet = silent(survey, list(findings))
    checksums = "checksums hold" if verified else "checksums were not checked, --verify does"
    note = f"{len(quiet)} detectors found nothing ({looked}, seed {seed}; {checksums})"
    report.details(note, "\n".join(f"{detector.name:<24}{detector.asks}" for detector in quiet))


def _sheets(report: Report, survey: Survey) -> None:
    manifest = survey.manifest
    report.section("Cameras")
    if manifest.kind == "latents":
        report.text("Latents are not pictures: the first three channels are shown as red, green and blue.")
    for view in manifest.views:
        shown = _sheet_looks(survey, view)
        if not shown:
            continue
        height = SHEET_HEIGHT if manifest.width <= 2 * manifest.height else SHEET_HEIGHT * 3 // 4
        rows = {_row_name(look, shown): _small(look.views[view].thumbnails, height) for look in shown}
        columns = max(map(len, rows.values()))
        labels = [f"{round(100 * place / max(columns - 1, 1))} %" for place in range(columns)]
        sheet = media.strip(rows, range(columns), labels=labels, height=height)
        report.image(
            sheet, f"{view}: {len(shown)} episodes, each spread over the frames that were read", lossy=True
        )


def _sheet_looks(survey: Survey, view: str) -> list[Look]:
    """Episodes for a contact sheet: spread over the dataset, and some of every embodiment."""
    pictured = [look for look in survey.looks if look.views[view].thumbnails]
    robots = list(dict.fromkeys(look.sample.embodiment for look in pictured))
    share = max(2, SHEET_ROWS // max(len(robots), 1))
    shown = []
    for robot in robots[:SHEET_ROWS]:
        own = [look for look in pictured if look.sample.embodiment == robot]
        places = np.unique(np.linspace(0, len(own) - 1, min(share, len(own))).round().astype(int))
        shown += [own[place] for place in places]
    return shown


def _row_name(look: Look, shown: Sequence[Look]) -> str:
    name = look.sample.key
    if len({other.sample.embodiment for other in shown}) > 1:
        name = f"{plain(look.sample.embodiment)}: {name}"
    return name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"


def _small(thumbnails: Sequence[np.ndarray], height: int) -> np.ndarray:
    pictures = np.stack(thumbnails)
    source_height, source_width = pictures.shape[1:3]
    width = max(1, round(source_width * height / source_height))
    return media.fit(pictures, width=width, height=height, mode="stretch")


def _embodiment(report: Report, contract: ActionContract, survey: Survey) -> None:
    looks = survey.of(contract.embodiment)
    samples = [s for s in survey.manifest.samples() if s.embodiment == contract.embodiment]
    frames = sum(sample.frames for sample in samples)
    report.section(f"Embodiment {contract.embodiment}")
    report.text(
        f"{len(samples):,} episodes, {frames:,} frames. {contract.rate_hz:g} actions a second, control frame "
        f"{contract.control_frame}, contract {contract.digest}."
        + (f"\n\n{_capital(contract.note)}." if contract.note else "")
    )
    for role, dimensions, statistics, accepted in (
        ("Action", contract.action, contract.action_statistics, contract.accepted_range),
        ("Proprioception", contract.proprio, contract.proprio_statistics, None),
    ):
        if not dimensions:
            continue
        report.heading(f"{role}: {len(dimensions)} dimensions")
        _dimension_table(report, dimensions, statistics, accepted)
        if not looks:
            continue
        rows = [look.actions_TA if role == "Action" else look.proprio_TS for look in looks]
        places = np.unique(np.linspace(0, len(looks) - 1, min(TRACES, len(looks))).round().astype(int))
        drawn = Signals(
            dimensions, statistics, [rows[place] for place in places], np.concatenate(rows), accepted
        )
        names = ", ".join(
            f"{chr(65 + number)} {looks[place].sample.episode_id}" for number, place in enumerate(places)
        )
        most = min(len(dimensions), DIMENSIONS)
        for first in range(0, most, PER_FIGURE):
            last = min(first + PER_FIGURE, most)
            caption = f"Episodes {names}; beside them how often each value was read (square roots)."
            if last == most:
                caption += f" {HOW_TO_READ if accepted else HOW_TO_READ.rpartition(' An ')[0]}"
            report.figure(draw_signals(drawn, first, last, contract.rate_hz), caption if last == most else "")
        if len(dimensions) > most:
            report.text(f"{len(dimensions) - most} more dimensions are not drawn.")
    _lags(report, contract, looks, survey)


def _dimension_table(
    report: Report,
    dimensions: Sequence[Dimension],
    statistics: Statistics,
    accepted: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    headers = ["name", "unit", "kind", "minimum", "1 %", "mean", "99 %", "maximum"]
    if accepted is not None:
        headers += ["accepted from", "to"]
    rows: list[list[Cell]] = []
    for index, dimension in enumerate(dimensions):
        columns = (
            statistics.minimum,
            statistics.q01,
            statistics.mean,
            statistics.q99,
            statistics.maximum,
            *(accepted or ()),
        )
        numbers = [_Figures(column[index]) for column in columns]
        rows.append([dimension.name, dimension.unit, dimension.kind, *numbers])
    report.table(headers, rows)


class _Figures(float):
    """A float that a table shows with four significant figures."""

    def __format__(self, _: str) -> str:
        return f"{float(self):.4g}"


def _lags(report: Report, contract: ActionContract, looks: Sequence[Look], survey: Survey) -> None:
    pairs = find_pairs(contract, looks)
    curve = action_curve(contract, looks, pairs)
    videos = {
        view: found
        for view in survey.manifest.views
        if (found := video_curve(survey, looks, view)) is not None
    }
    if not looks:
        return
    report.heading("Timing")
    if curve is None:
        report.text("Too few numbers of proprioception or episodes follow an action to judge its timing.")
    if not videos:
        report.text("Too few episodes in which picture and robot move to judge the timing of the video.")
    figure = draw_lags(curve, videos)
    if figure is None:
        return
    drives = "; ".join(
        f"{contract.action[p.action].name} drives {contract.proprio[p.proprio].name} ({p.correlation:.2f})"
        for p in pairs[:12]
    )
    report.figure(
        figure,
        "Mean over episodes. A clear peak beside 0 is a shift; correlations below 0.25 say little."
        + (f" {drives}." if drives else ""),
    )


def _episodes(report: Report, survey: Survey) -> None:
    manifest = survey.manifest
    samples = manifest.samples()
    report.section("Episodes")
    if samples:
        report.figure(draw_lengths([sample.frames for sample in samples], manifest.fps))
    report.table(
        ["split", "episodes", "frames", "duration"],
        [
            [name, len(own), sum(s.frames for s in own), _duration(sum(s.frames for s in own) / manifest.fps)]
            for name in ("train", "val")
            for own in [manifest.samples(name)]
        ],
    )
    counts = Counter(sample.text for sample in samples)
    shown = counts.most_common(ROWS)
    report.heading(f"Texts: {len(counts):,} different")
    report.table(
        ["episodes", "text"],
        [[count, text or "(none)"] for text, count in shown],
        caption=_more(len(counts), len(shown)),
    )
    report.heading(f"Quarantined: {len(manifest.quarantined):,}")
    if not manifest.quarantined:
        report.text("Every episode of the source is here.")
        return
    bad = manifest.quarantined[:ROWS]
    report.table(
        ["episode", "reason"],
        [[one.episode_id, one.reason] for one in bad],
        caption=_more(len(manifest.quarantined), len(bad)),
    )


def _files(report: Report, summary: Mapping[str, Any], survey: Survey) -> None:
    manifest = survey.manifest
    report.section("Files and provenance")
    report.text(
        f"Digest {manifest.digest}, made by {manifest.created_by or 'unknown'}, schema "
        f"{manifest.schema_version}."
    )
    shards = manifest.shards[:ROWS]
    report.table(
        ["shard", "split", "episodes", "frames", "size", "sha256"],
        [
            [
                shard.file,
                shard.split,
                len(shard.samples),
                sum(sample.frames for sample in shard.samples),
                _bytes(shard.bytes),
                f"{shard.sha256[:16]}…",
            ]
            for shard in shards
        ],
        caption=_more(len(manifest.shards), len(shards)),
    )
    if manifest.tokenizer is not None:
        report.details("tokenizer", json.dumps(manifest.tokenizer, indent=1))
    if manifest.options:
        report.details("conversion options", _clipped(manifest.options))
    contracts = {contract.embodiment: contract.to_mapping() for contract in manifest.contracts}
    report.details("action contracts", _clipped(contracts))


def _clipped(mapping: Mapping[str, Any], most: int = 20_000) -> str:
    text = json.dumps(mapping, indent=1, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}\n… manifest.json has the rest"


def _more(total: int, shown: int) -> str:
    return f"{total - shown:,} more are in manifest.json." if total > shown else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
