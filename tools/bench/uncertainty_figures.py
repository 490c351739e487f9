"""Pictures of what uncertainty.py found: reliability, fan charts, the hidden mass, shifted episodes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from uncertainty_calibration import Kind, pooled
from uncertainty_container import Futures, Mass, Narrowing
from uncertainty_truth import QUANTITIES

from vidworld import media
from vidworld.plots import COLORS, FLOOR_COLOR, STYLE, to_png

WORLD, TRUTH, UNIFORM = COLORS[0], "#334155", COLORS[1]
SHOWN = ("box_y", "box_x", "box_tilt")
SCORES = {
    "E": "members disagree (E)",
    "flow": "flow loss",
    "nearest": "nearest neighbour",
    "known": "E, known frames",
    "surprise": "surprise",
    "proprio": "surprise, proprioception",
}
WORDS = {
    "box_x": "box, x (m)",
    "box_y": "box, y (m)",
    "box_z": "box, height (m)",
    "box_tilt": "box, tilt (rad)",
}


def _figure(columns: int, rows: int, width: float = 3.5, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(columns * rows)]


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        media.write_bytes(path, to_png(figure))


def reliability(found: Sequence[Kind], told: Mapping[str, Any], path: Path) -> None:
    """A rank histogram a kind, and a diagram an event."""
    with matplotlib.rc_context(STYLE):
        count = max(len(found), len(told), 1)
        figure, axes = _figure(count, 2 if told else 1)
        for one, ax in zip(found, axes, strict=False):
            prefix = "read" if one.names("read") else "latents"
            for group, color in ((prefix, WORLD), ("proprio", COLORS[2])):
                if (pool := pooled(one, group)) is not None:
                    counts = np.array(pool["rank_counts"], float)
                    density = counts / counts.sum() * len(counts)
                    label = {"read": "outcomes", "latents": "latents", "proprio": "proprioception"}[group]
                    edges = np.arange(len(counts) + 1) / len(counts)
                    ax.stairs(density, edges, color=color, linewidth=1.8, label=f"{label}, {pool['ssr']:.2f}")
            ax.axhline(1, color=FLOOR_COLOR, linestyle="--", linewidth=1.4)
            ax.set_title(one.kind)
            ax.set_xlabel("rank of the truth among samples")
            ax.set_ylabel("density (flat is honest)")
            ax.set_ylim(bottom=0)
            ax.legend(title="spread / skill", fontsize=8, title_fontsize=8, loc="upper center")
        for ax in axes[len(found) : count]:
            ax.set_axis_off()
        if told:
            for (name, one), ax in zip(told.items(), axes[count:], strict=False):
                forecast = np.array([np.nan if v is None else v for v in one["forecast"]])
                frequency = np.array([np.nan if v is None else v for v in one["frequency"]])
                weight = np.array(one["count"], float)
                ax.plot([0, 1], [0, 1], color=FLOOR_COLOR, linestyle="--", linewidth=1.4)
                ax.scatter(forecast, frequency, s=12 + 160 * weight / weight.max(), color=WORLD, zorder=3)
                chance = one["error_by_chance"]
                ax.set_title(f"{name}: error {one['error']:.2f} ({chance:.2f} by chance)", fontsize=9)
                ax.set_xlabel("forecast: share of samples")
                ax.set_ylabel("how often it came")
                ax.set_xlim(-0.04, 1.04)
                ax.set_ylim(-0.04, 1.04)
            for ax in axes[count + len(told) :]:
                ax.set_axis_off()
        _write(figure, path)


def fans(found: Sequence[Kind], path: Path) -> bool:
    """An outcome of an episode of each kind: bands of the samples, and what came. False if none was read."""
    some = [one for one in found if one.fan]
    if not some:
        return False
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(len(some), 1, 3.4, 2.9)
        for one, ax in zip(some, axes, strict=True):
            samples, truth = one.fan["samples"], one.fan["truth"]
            frames = one.fan["context"] + np.arange(samples.shape[1])
            for level, alpha in ((0.9, 0.16), (0.8, 0.2), (0.5, 0.3)):
                low, high = np.quantile(samples, ((1 - level) / 2, (1 + level) / 2), axis=0)
                ax.fill_between(frames, low, high, color=WORLD, alpha=alpha, linewidth=0)
            ax.plot(frames, np.median(samples, 0), color=WORLD, linewidth=1.4, label="samples, 50 80 90 %")
            ax.plot(frames, truth, color=TRUTH, linewidth=1.8, label="what came")
            ax.set_title(f"{one.kind}: {one.fan['name']}")
            ax.set_xlabel("frame")
            unit = one.fan["unit"]
            ax.set_ylabel("share" if unit == "1" else unit)
            ax.legend(fontsize=8)
        _write(figure, path)
    return True


def hidden_mass(
    futures: Futures | None, narrowing: Narrowing | None, mass: Mass | None, leads: Sequence[int], path: Path
) -> None:
    """Outcomes before contact, the spread as frames are shown, the ranks of a probed mass: what there is."""
    panels: list[Callable[[Axes], None]] = []
    if futures is not None and futures.shown:
        panels.append(lambda ax: _outcomes(ax, futures, leads))
    if narrowing is not None:
        panels.append(lambda ax: _narrowing(ax, narrowing))
    if mass is not None:
        panels.append(lambda ax: _mass(ax, mass))
    if not panels:
        return
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(len(panels), 1, 3.9, 3.3)
        for ax, paint in zip(axes, panels, strict=True):
            paint(ax)
        _write(figure, path)


def _outcomes(ax: Axes, futures: Futures, leads: Sequence[int]) -> None:
    shown = futures.shown
    spread = (shown["truth"][:, -1] / shown["scale"]).std(0)
    q = int(np.argmax(spread))
    rows = (
        ("true futures", shown["truth"][:, -1, q], TRUTH),
        ("world", shown["world"][:, -1, q], WORLD),
        ("uniform randomization", shown["uniform"][:, -1, q], UNIFORM),
    )
    for place, (label, values, color) in enumerate(rows):
        ordered = np.sort(values)
        share = (np.arange(len(ordered)) + 0.5) / len(ordered)
        style = "--" if place == 2 else "-"
        ax.plot(ordered, share, color=color, linewidth=2, linestyle=style, label=label)
    ax.set_title(f"Before contact, {leads[-1]} frames on")
    ax.set_xlabel(WORDS[QUANTITIES[q]])
    ax.set_ylabel("share of futures below")
    ax.legend(fontsize=8)


def _narrowing(ax: Axes, found: Narrowing) -> None:
    place = [QUANTITIES.index(name) for name in ("box_x", "box_y")]

    def cm(spread: np.ndarray) -> np.ndarray:
        return 100 * np.linalg.norm(spread[..., place], axis=-1)

    ax.plot(found.contexts, cm(found.truth_KQ), "o-", color=TRUTH, label="truth")
    ax.plot(found.contexts, cm(found.world_KQ), "o-", color=WORLD, label="world")
    ax.plot(
        found.contexts,
        np.full(len(found.contexts), cm(found.uniform_Q)),
        "--",
        color=UNIFORM,
        label="uniform randomization",
    )
    ax.axhline(float(cm(found.ruler_Q)), color=FLOOR_COLOR, linestyle=":", label="noise of the ruler")
    ax.set_title("The more it sees, the surer it is")
    ax.set_xlabel("frames shown")
    ax.set_ylabel("spread of the box's place (cm)")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)


def _mass(ax: Axes, found: Mass) -> None:
    counts = found.counts_R.astype(float)
    groups = int(np.clip(counts.sum() // 5, 4, 11))
    edges = np.linspace(0, len(counts), groups + 1).round().astype(int)
    merged = np.add.reduceat(counts, edges[:-1])
    share = np.diff(edges) / len(counts)
    ax.bar(
        (edges[:-1] + edges[1:]) / 2 / len(counts), merged / counts.sum() / share, share * 0.9, color=WORLD
    )
    ax.axhline(1, color=FLOOR_COLOR, linestyle="--", linewidth=1.4)
    wide = 2 * np.sqrt(share * (1 - share) / counts.sum()) / share
    low, high = np.append(1 - wide, 1 - wide[-1]), np.append(1 + wide, 1 + wide[-1])
    ax.fill_between(
        edges / len(counts), low, high, color=FLOOR_COLOR, alpha=0.35, linewidth=0, step="post", zorder=3
    )
    ax.set_title(f"Mass that futures imply (R2 {found.held_out_r2:.2f})", fontsize=10)
    ax.set_xlabel("rank of what came among samples")
    ax.set_ylabel("density (flat is honest)")
    ax.set_ylim(bottom=0)


def shifted(told: Mapping[str, Mapping[str, np.ndarray]], rows: Mapping[str, Any], path: Path) -> None:
    """Scores of ordinary and shifted episodes, each relative to the ordinary ones' median."""
    shown = {name: told[name] for name in SCORES if name in told}
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(len(shown), 1, 3.9, 3.1)
        for (name, scores), ax in zip(shown.items(), axes, strict=True):
            middle = float(np.median(np.abs(scores["ordinary"]))) + 1e-12
            for place, (shift, values) in enumerate(scores.items()):
                jitter = np.random.default_rng(place).uniform(-0.22, 0.22, len(values))
                relative = np.maximum(values / middle, 1e-2)
                color = TRUTH if shift == "ordinary" else WORLD
                ax.scatter(place + jitter, relative, s=10, color=color, alpha=0.6, linewidth=0)
                row = rows.get(f"uncertainty.ood_auroc.{shift}" + ("" if name == "E" else f".{name}"))
                if row is not None:
                    ax.annotate(
                        f"{row[0]:.2f}", (place, relative.max()), ha="center", va="bottom", fontsize=9
                    )
            ax.set_yscale("log")
            for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                axis(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
            ax.margins(y=0.14)
            ax.tick_params(labelsize=8)
            ax.set_xticks(range(len(scores)), list(scores), rotation=30, ha="right", fontsize=8)
            ax.set_title(f"{SCORES[name]}: AUROC", fontsize=10)
            ax.set_ylabel("score / ordinary median")
        _write(figure, path)


def shift_pictures(ordinary: Sequence[Any], shifted: Mapping[str, Sequence[Any]], path: Path) -> None:
    """The last known frame of a few episodes, ordinary and under each shift."""
    columns = range(min(6, len(ordinary)))
    keys = [ordinary[place].key for place in columns]
    rows = {"ordinary": ordinary, **shifted}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * len(columns) + 0.3, 1.5 * len(rows)), layout="constrained")
        for row, (name, windows) in enumerate(rows.items()):
            by_key = {window.key: window for window in windows}
            for column, key in enumerate(keys):
                ax = figure.add_subplot(len(rows), len(columns), row * len(columns) + column + 1)
                ax.set_xticks([])
                ax.set_yticks([])
                ax.spines[:].set_visible(False)
                if key in by_key:
                    ax.imshow(by_key[key].frames_THWC[by_key[key].context - 1])
                if not column:
                    ax.set_ylabel(name)
        _write(figure, path)
