"""The decision table of `objectives.py`: rows, markdown and a figure, from what was measured of each seed."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidworld.plots import COLORS

Found = Mapping[str, Any]
"""Of one seed: "seed", "device", "steps" (objective -> count), "measured" (NAME.kSTEPS -> figures)."""

UNITS = {
    "sharpness": "gradient energy over the truth's",
    "psnr": "dB",
    "crps_latents": "latent standard deviations",
    "crps_moving": "latent standard deviations",
    "crps_proprio": "normalised units",
    "coverage": "share",
    "coverage_proprio": "share",
    "spread_skill": "ratio",
    "spread_skill_proprio": "ratio",
    "fps": "frames/s",
    "fps_alone": "frames/s",
}
MOST_STEPS = 4
"""A default must roll out in real time."""
SHARP = 0.9
"""Of the sharpness of the sharpest shortcut: below it a low CRPS may be bought with blur."""
COLUMNS = (
    ("sharpness", "sharpness (1)"),
    ("psnr", "PSNR, dB"),
    ("crps_latents", "CRPS latents"),
    ("crps_moving", "CRPS moving"),
    ("crps_proprio", "CRPS proprio"),
    ("coverage", "coverage (.90)"),
    ("spread_skill", "spread-skill (1)"),
    ("fps", "frames/s, batch"),
    ("fps_alone", "frames/s, alone"),
)
PANELS = (
    ("crps_moving", "CRPS of moving latents: less is better", None),
    ("crps_proprio", "CRPS of proprioception: less is better", None),
    ("coverage", "coverage of the 90 % interval", 0.9),
    ("spread_skill", "spread-skill ratio", 1.0),
    ("sharpness", "gradient energy over the truth's", 1.0),
    ("fps_alone", "frames/s of one rollout", None),
)


def values_of(found: Sequence[Found], key: str, metric: str) -> list[float]:
    """Of all seeds that have it; frames a second are measured of one alone."""
    cells = [one["measured"].get(key, {}) for one in found]
    return [cell[metric] for cell in cells if metric in cell]


def keys_of(found: Sequence[Found]) -> list[str]:
    """Every NAME.kSTEPS, in the order of measurement."""
    return list(dict.fromkeys(key for one in found for key in one["measured"]))


def rows_of(found: Sequence[Found]) -> dict[str, tuple[float, str]]:
    """`objectives.NAME.kSTEPS.METRIC`: the mean over seeds, with what they are apart in the unit."""
    rows: dict[str, tuple[float, str]] = {}
    for key in keys_of(found):
        for metric, unit in UNITS.items():
            values = values_of(found, key, metric)
            if not values:
                continue
            text = f"{unit}, mean of {len(values)} seeds"
            if len(values) > 1:
                text += f", standard deviation {statistics.stdev(values):.3g}"
            rows[f"objectives.{key}.{metric}"] = (float(f"{statistics.fmean(values):.6g}"), text)
    for name in dict.fromkeys(name for one in found for name in one["steps"]):
        counts = [one["steps"][name] for one in found if name in one["steps"]]
        rows[f"objectives.{name}.steps"] = (round(statistics.fmean(counts)), "optimizer steps")
    return rows


def markdown(found: Sequence[Found]) -> str:
    """The table, ready for docs/diffusion.md: means over seeds, and standard deviations where they matter."""
    lines = ["| objective | K | steps | " + " | ".join(title for _, title in COLUMNS) + " |"]
    lines.append("|---|--:|--:|" + "--:|" * len(COLUMNS))
    for key in keys_of(found):
        name, _, steps = key.rpartition(".k")
        counts = [one["steps"][name] for one in found if name in one["steps"]]
        cells = [name, steps, f"{statistics.fmean(counts):,.0f}" if counts else ""]
        for metric, _ in COLUMNS:
            values = values_of(found, key, metric)
            if not values:
                cells.append("")
                continue
            mean = statistics.fmean(values)
            text = f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"
            if len(values) > 1 and not metric.startswith("fps"):
                text += f" ± {statistics.stdev(values):.1g}"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    seeds = ", ".join(str(one["seed"]) for one in found)
    return "\n".join(lines) + f"\n\nSeeds {seeds}; {found[0]['device']}. {verdict(found)}\n"


def default_of(found: Sequence[Found]) -> str | None:
    """NAME.kSTEPS that the table speaks for, None where no seed has shortcuts.

    Of what a real-time rollout can afford, at most `MOST_STEPS`, and what is nearly as sharp as the sharpest
    shortcut: that of least CRPS over moving latents. Another one within a standard error over seeds, of fewer
    steps, is preferred.
    """
    few = [key for key in keys_of(found) if int(key.rpartition(".k")[2]) <= MOST_STEPS]
    sharp = {key: statistics.fmean(values_of(found, key, "sharpness")) for key in few}
    shortcuts = [value for key, value in sharp.items() if key.startswith("shortcut.")]
    if not shortcuts:
        return None
    scores = {
        key: values_of(found, key, "crps_moving") for key in few if sharp[key] >= SHARP * max(shortcuts)
    }
    means = {key: statistics.fmean(values) for key, values in scores.items()}
    best = min(means, key=lambda key: means[key])
    values = scores[best]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    good = [key for key, mean in means.items() if mean <= means[best] + error]
    return min(good, key=lambda key: (int(key.rpartition(".k")[2]), means[key]))


def verdict(found: Sequence[Found]) -> str:
    """The default in words."""
    key = default_of(found)
    if key is None:
        return "No default: shortcuts are not measured yet."
    name, _, steps = key.rpartition(".k")
    return (
        f"Default: {name} in {steps} step{'s' if steps != '1' else ''} a frame, the least CRPS over moving "
        f"latents of what takes at most {MOST_STEPS} steps and is at least {SHARP:.0%} as sharp as shortcuts."
    )


def paint(found: Sequence[Found], path: Path) -> None:
    """A dot a seed and a bar at their mean, a panel a figure, a column an objective with its steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = keys_of(found)
    names = list(dict.fromkeys(key.rpartition(".k")[0] for key in keys))
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    for place, (metric, title, wanted) in enumerate(PANELS):
        axes = figure.add_subplot(2, 3, place + 1)
        if wanted is not None:
            axes.axhline(wanted, color="0.5", linewidth=1, linestyle="--")
        for column, key in enumerate(keys):
            values = values_of(found, key, metric)
            color = COLORS[names.index(key.rpartition(".k")[0])]
            axes.scatter([column] * len(values), values, s=22, color=color, zorder=3)
            if not values:
                continue
            axes.hlines(statistics.fmean(values), column - 0.3, column + 0.3, color=color, linewidth=2)
        if metric.startswith("fps"):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10, loc="left")
        labels = [f"{name}\nK = {steps}" for name, _, steps in (key.rpartition(".k") for key in keys)]
        axes.set_xticks(range(len(keys)), labels, fontsize=8)
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
