"""Figures of a dataset: signals with their limits, lengths of episodes, correlation by lag.

Shapes: T frames, D dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vidworld.contract import Dimension, Statistics
from vidworld.data.inspection.finding import plain
from vidworld.data.inspection.lag import Curve
from vidworld.plots import COLORS, FLOOR_COLOR, STYLE, Line, Panel, draw

TRACES = 3
"""Episodes drawn over each other in a panel of signals."""
MAX_POINTS = 240
"""Points of a trace; longer ones keep the extremes of each stretch, so that spikes stay."""
BINS = 48


@dataclass(frozen=True)
class Signals:
    """All dimensions of actions or of proprioception."""

    dimensions: tuple[Dimension, ...]
    statistics: Statistics
    traces: Sequence[np.ndarray]
    """Rows [T, D] of a few episodes."""
    values_TD: np.ndarray
    """Rows of all episodes that were read."""
    accepted: tuple[np.ndarray, np.ndarray] | None = None
    """Lowest and highest value [D] that the contract lets through."""


def draw_signals(signals: Signals, first: int, last: int, rate_hz: float) -> Figure:
    """Dimensions `first` to `last`: a few episodes over time, and beside them the distribution over all.

    Counts are on a square-root scale. Dashed lines are the 1 % and 99 % quantiles, which scaling sends to -1
    and 1; dotted ones the extremes; outside the shaded field an action is refused.
    """
    count = last - first
    columns = min(2, count)
    rows = math.ceil(count / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.35 * columns, 1.85 * rows + 0.5), layout="constrained")
        grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[3.4, 1] * columns)
        handles: dict[str, Any] = {}
        for place in range(count):
            row, column = divmod(place, columns)
            time_axes = figure.add_subplot(grid[row, 2 * column])
            value_axes = figure.add_subplot(grid[row, 2 * column + 1], sharey=time_axes)
            handles |= _signal(signals, first + place, time_axes, value_axes, rate_hz)
            if row == rows - 1 or place + columns >= count:
                time_axes.set_xlabel("s")
        figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=len(handles))
    return figure


def _signal(
    signals: Signals, index: int, time_axes: Axes, value_axes: Axes, rate_hz: float
) -> dict[str, Any]:
    dimension, statistics = signals.dimensions[index], signals.statistics
    lowest, highest = statistics.minimum[index], statistics.maximum[index]
    handles: dict[str, Any] = {}
    for number, trace in enumerate(signals.traces[:TRACES]):
        places, values = thinned(trace[:, index])
        (handle,) = time_axes.plot(places / rate_hz, values, color=COLORS[number], linewidth=1.2, zorder=3)
        handles[f"episode {chr(65 + number)}"] = handle
    values_T = signals.values_TD[:, index]
    low, high = min(lowest, float(values_T.min())), max(highest, float(values_T.max()))
    if signals.accepted is not None:
        low, high = min(low, signals.accepted[0][index]), max(high, signals.accepted[1][index])
    pad = 0.08 * (high - low) or 0.5
    counts, edges = np.histogram(values_T, BINS, (low - pad, high + pad))
    counts = np.sqrt(counts)  # so that what a robot does shows beside how long it rests
    value_axes.stairs(
        counts / max(counts.max(), 1), edges, orientation="horizontal", fill=True, color=COLORS[0], alpha=0.55
    )
    for axes in (time_axes, value_axes):
        if signals.accepted is not None:
            handles["accepted"] = axes.axhspan(
                signals.accepted[0][index], signals.accepted[1][index], color=FLOOR_COLOR, alpha=0.13, lw=0
            )
        for style, label, bounds in (
            ("--", "1 % and 99 %", (statistics.q01[index], statistics.q99[index])),
            (":", "extremes", (lowest, highest)),
        ):
            for bound in bounds:
                handles[label] = axes.axhline(bound, color=FLOOR_COLOR, linestyle=style, lw=1.1, zorder=2)
    time_axes.set_ylim(low - pad, high + pad)
    time_axes.margins(x=0.01)
    unit = "" if dimension.unit in ("1", "unknown") else f"  [{_cut(dimension.unit)}]"
    time_axes.set_title(f"{_cut(dimension.name)}{unit}", fontsize=10)
    value_axes.tick_params(labelleft=False, left=False, labelbottom=False, bottom=False)
    value_axes.grid(False)
    value_axes.spines[["bottom", "left"]].set_visible(False)
    value_axes.set_xlim(0, 1.08)
    return handles


def draw_lengths(frames: Sequence[int], fps: float) -> Figure:
    """How many episodes are how long."""
    seconds = np.asarray(frames, float) / fps
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.7, 2.6), layout="constrained")
        axes = figure.add_subplot()
        low, high = float(seconds.min()), float(seconds.max())
        wide = max(high - low, 2 / fps)
        bins = int(np.clip(2 * math.sqrt(len(seconds)), 8, 60))
        axes.hist(
            seconds, bins=bins, range=(low - 0.02 * wide, high + 0.02 * wide), color=COLORS[0], alpha=0.75
        )
        median = float(np.median(seconds))
        axes.axvline(median, color=FLOOR_COLOR, linestyle="--", lw=1.6, zorder=4)
        axes.annotate(
            f" median {median:.3g} s",
            (median, 1),
            xycoords=("data", "axes fraction"),
            va="bottom",
            fontsize=9,
        )
        axes.set_xlabel("length of an episode, s")
        axes.set_ylabel("episodes")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_lags(actions: Curve | None, videos: dict[str, Curve]) -> Figure | None:
    """Correlation by lag, of actions with motion and of pictures with motion; None if neither is known."""
    panels = []
    if actions is not None:
        lines = (_lag_line("actions", actions), _zero(actions))
        panels.append(Panel(lines, "Actions and the motion after them", "lag, frames", "correlation"))
    if videos:
        lines = tuple(_lag_line(view, curve) for view, curve in videos.items())
        zero = _zero(*videos.values())
        panels.append(
            Panel((*lines, zero), "Change of picture and of the robot's state", "lag, frames", "correlation")
        )
    return draw(panels, panel_size=(5.35, 2.5)) if panels else None


def thinned(values_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and values of at most `MAX_POINTS` points that keep the lowest and highest of each stretch."""
    if len(values_T) <= MAX_POINTS:
        return np.arange(len(values_T)), values_T
    places: list[int] = []
    for rows in np.array_split(np.arange(len(values_T)), MAX_POINTS // 2):
        ends = {int(rows[values_T[rows].argmin()]), int(rows[values_T[rows].argmax()])}
        places += sorted(ends)
    return np.array(places), values_T[places]


def _lag_line(label: str, curve: Curve) -> Line:
    return Line(label, curve.lags, curve.mean_L)


def _zero(*curves: Curve) -> Line:
    tops = [float(curve.mean_L.max()) for curve in curves]
    lows = [float(curve.mean_L.min()) for curve in curves]
    return Line("expected peak", [0.0, 0.0], [min(0.0, *lows), max(tops)], floor=True)


def _cut(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 34 else f"{name[:33]}…"
