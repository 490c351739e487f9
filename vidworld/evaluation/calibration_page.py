"""What calibration looks like: figures and tables of a report, and lines for the terminal."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vidworld.page import Report
from vidworld.plots import COLORS, Line, Panel, draw

NBSP = "\N{NO-BREAK SPACE}"
MOST_OUTCOMES = 2
MOST_LINES = len(COLORS)
"""Curves drawn at most, those with the worst ratios: each has a colour of its own."""

HOW_TO_READ = (
    "A world that samples futures also says how sure it is, by how far they spread. That is honest if what "
    "really happened looks like one more sample. Spread / skill is the standard deviation of the samples "
    "over the error of their mean, both unbiased for the number of samples: 1 is honest, below 1 "
    "overconfident. Coverage is how often the truth lies between the samples' quantiles. The rank histogram "
    "counts between which samples the truth lies: flat is honest, a valley says that the samples are too "
    "alike, a slope that they lean to one side.\n\n"
    "Pixels are compared with the recorded frames as the tokenizer shows them: its own error is told apart."
)


def write_calibration(report: Report, robot: str, found: Mapping[str, Any]) -> None:
    """Add the section of one robot."""
    quantities = found["quantities"]
    report.section(f"Is it honest about what it does not know? ({robot})", HOW_TO_READ)
    drawn = _drawn(quantities)
    ratios = [
        Line(name, quantities[name]["leads"], _finite(quantities[name]["spread_skill"])) for name in drawn
    ]
    leads = quantities[drawn[0]]["leads"]
    ratios.append(Line("honest", leads, [1.0] * len(leads), floor=True))
    level = max(quantities[drawn[0]]["coverage"], key=float)
    covered = [Line(name, quantities[name]["leads"], quantities[name]["coverage"][level]) for name in drawn]
    covered.append(Line("honest", leads, [float(level)] * len(leads), floor=True))
    histograms = [Line(name, *_density(quantities[name]["pooled"]["rank_counts"])) for name in drawn]
    histograms.append(Line("honest", [0, 1], [1.0, 1.0], floor=True))
    spreads = [
        Line("spread of the samples", leads, quantities["pixels"]["spread"]),
        Line("error of their mean", leads, quantities["pixels"]["error"]),
        Line("tokenizer's error", leads, np.sqrt(found["floor"]), floor=True),
    ]
    report.figure(
        draw(
            [
                Panel(tuple(ratios), "Spread / skill", "imagined frame", "ratio"),
                Panel(
                    tuple(covered), f"Coverage of the {float(level):.0%} interval", "imagined frame", "share"
                ),
                Panel(tuple(histograms), "Rank histogram", "rank of the truth / samples", "density"),
            ],
            columns=3,
            panel_size=(3.6, 3.0),
        ),
        f"{found['samples']} samples, {found['episodes']} episodes.",
    )
    panel = Panel(tuple(spreads), "Spread and error of pixels", "imagined frame", "share of the range")
    report.figure(draw([panel], panel_size=(10.7, 2.6)))
    levels = list(quantities[drawn[0]]["coverage"])
    report.table(
        ["quantity", "unit", "spread / skill", "95 %", *(f"in {float(one):.0%}" for one in levels),
         "last CRPS", "flat ranks, p"],
        [_row(name, one, levels) for name, one in quantities.items()],
        caption="Over all leads, with the interval over episodes; in 90%: coverage of that interval. p: "
        "chance of so uneven a rank histogram at the last lead if the samples were honest, from one window "
        "an episode (proprioception only: pixels of a picture depend on each other).",
        digits=3,
    )  # fmt: skip
    _write_strata(report, found, levels[-1])
    if "events" in found:
        _write_events(report, found["events"])
    if bands := found["bands"]:
        report.text(
            f"Bands of {bands['level']:.0%} for whole rollouts of all proprioception, fitted on "
            f"{bands['episodes_fitted']} episodes, held {bands['held']:.0%} of {bands['episodes_tried']} "
            "others."
        )


def _write_strata(report: Report, found: Mapping[str, Any], level: str) -> None:
    """Where the spread is honest and where not: by what happens in a frame, and by kind of the lab."""
    parts = {name: one for name, one in found["strata"].items() if one["frames"]}
    for kind, one in found.get("kinds", {}).items():
        parts |= {
            f"{kind}, {name}": inner for name, inner in one["strata"].items() if len(found["kinds"]) > 1
        }
    rows = []
    for part, one in parts.items():
        for name in _drawn(one["quantities"], pooled=True):
            pooled = one["quantities"][name]
            span = pooled["spread_skill_interval"]
            rows.append(
                [part.replace(" ", NBSP), one["frames"], name.replace(" ", NBSP), pooled["spread_skill"],
                 _span(span), pooled["coverage"][level], pooled["crps"]]
            )  # fmt: skip
    if rows:
        report.table(
            ["frames of", "frames", "quantity", "spread / skill", "95 %", f"in {float(level):.0%}", "CRPS"],
            rows,
            caption="Told apart by what happens in a frame. Contact: the lab says that the robot and what it "
            "acts on touch. Moving: pictures or proprioception change. Static: neither.",
            digits=3,
        )


def _write_events(report: Report, found: Mapping[str, Any]) -> None:
    """A reliability diagram of each event."""
    panels = []
    for name, one in found.items():
        panels.append(
            Panel(
                (
                    Line(name, *_filled(one["forecast"], one["frequency"])),
                    Line("honest", [0, 1], [0, 1], floor=True),
                ),
                f"{name.capitalize()} ({one['kind']})",
                "forecast: share of samples",
                "how often it came",
            )
        )
    report.figure(
        draw(panels, columns=min(4, len(panels)), panel_size=(3.2, 3.2)),
        "When so many samples say that it will happen, how often does it?",
    )
    report.table(
        ["event", "meaning", "windows", "came in", "error", "by chance", "Brier score", "95 %"],
        [
            [name, one["meaning"], one["windows"], one["base_rate"], one["error"], one["error_by_chance"],
             one["brier"], _span(one["brier_interval"], 3)]
            for name, one in found.items()
        ],
        caption="Error: mean distance of forecast and frequency; so few cases would show the error “by "
        "chance” if every forecast were right. Events are read off the samples' pictures by the readout; "
        "what happened is the lab's truth.",
        digits=3,
    )  # fmt: skip


def calibration_lines(robot: str, found: Mapping[str, Any]) -> list[str]:
    """A summary for the terminal."""
    lines = [f"calibration of {robot}, {found['samples']} samples (spread / skill, coverage):"]
    for name in _drawn(found["quantities"]):
        pooled = found["quantities"][name]["pooled"]
        covered = ", ".join(
            f"{float(level):.0%}: {'-' if share is None else format(share, '.0%')}"
            for level, share in pooled["coverage"].items()
        )
        ratio = pooled["spread_skill"]
        lines.append(f"  {name:<28} {'-' if ratio is None else format(ratio, '.2f'):>5}   {covered}")
    for stratum, one in found["strata"].items():
        pooled = one["quantities"]["pixels moving"]
        ratio = pooled["spread_skill"]
        shown = format(ratio, ".2f") if ratio is not None and np.isfinite(ratio) else "-"
        lines.append(f"  {stratum} ({one['frames']} frames), moving pixels: {shown}")
    for name, one in found.get("events", {}).items():
        lines.append(
            f"  {name}: reliability error {one['error']:.3f} ({one['error_by_chance']:.3f} by chance), "
            f"came in {one['base_rate']:.0%} of {one['windows']} windows"
        )
    return lines


def _drawn(quantities: Mapping[str, Any], *, pooled: bool = False) -> list[str]:
    """Moving pixels, all pixels, and the dimensions and outcomes whose ratios are farthest from 1."""
    pictures = [name for name in ("pixels", "pixels moving") if np.any(quantities[name]["cases"])]

    def distance(name: str) -> float:
        one = quantities[name] if pooled else quantities[name]["pooled"]
        ratio = one["spread_skill"]
        return abs(np.log(ratio)) if ratio and np.isfinite(ratio) else np.inf

    outcomes, dimensions = (
        sorted((name for name in quantities if name.startswith(prefix)), key=distance)[::-1]
        for prefix in ("read", "proprio")
    )
    outcomes = outcomes[:MOST_OUTCOMES]
    return pictures + outcomes + dimensions[: MOST_LINES - len(pictures) - len(outcomes)]


def _finite(values: list[float | None]) -> list[float | None]:
    return [value if value is not None and np.isfinite(value) else None for value in values]


def _density(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Centres of ranks from 0 to 1, and their density, 1 if flat."""
    density_R = np.asarray(counts) * len(counts) / max(1, sum(counts))
    return (np.arange(len(counts)) + 0.5) / len(counts), density_R


def _filled(forecast: list[float | None], frequency: list[float | None]) -> tuple[list[float], list[float]]:
    """Both of the bins that hold cases."""
    pairs = [(x, y) for x, y in zip(forecast, frequency, strict=True) if x is not None and y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _span(span: list[float] | None, digits: int = 2) -> str:
    return "–" if span is None else f"{span[0]:.{digits}f}{NBSP}to{NBSP}{span[1]:.{digits}f}"


def _row(name: str, one: Mapping[str, Any], levels: list[str]) -> list[Any]:
    pooled, span = one["pooled"], one["pooled"]["spread_skill_interval"]
    return [
        name.replace(" ", NBSP),
        one["unit"],
        pooled["spread_skill"],
        _span(span),
        *(pooled["coverage"][level] for level in levels),
        one["crps"][-1],
        one["p_flat"][-1] if "p_flat" in one else None,
    ]
