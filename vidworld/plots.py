"""Figures of curves, drawn so that they sit on a light or a dark page.

Text and axes take the colour of the page around them; line colours are chosen to be told apart on both, and
by people with colour-blindness.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#14b8a6")
FLOOR_COLOR = "#94a3b8"
_PAGE_COLOR = "#010203"
"""Stands for the page's own text colour until the figure is put into a page."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "grid.color": _PAGE_COLOR,
    "axes.edgecolor": _PAGE_COLOR,
    "axes.labelcolor": _PAGE_COLOR,
    "text.color": _PAGE_COLOR,
    "text.parse_math": False,
    "xtick.color": _PAGE_COLOR,
    "ytick.color": _PAGE_COLOR,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vidworld",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Line:
    """One curve; None or NaN leaves a gap. `low` and `high` shade a band around it."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float | None] | np.ndarray
    low: Sequence[float | None] | np.ndarray | None = None
    high: Sequence[float | None] | np.ndarray | None = None
    floor: bool = False
    """A baseline or bound: drawn dashed and grey, behind the others."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Units belong into the axis labels."""

    lines: tuple[Line, ...]
    title: str = ""
    x_label: str = ""
    y_label: str = ""


def draw(
    panels: Sequence[Panel], *, columns: int | None = None, panel_size: tuple[float, float] = (5.35, 3.0)
) -> Figure:
    """Draw panels in a grid, `panel_size` inches each; a label has one colour throughout, in one legend on
    top.
    """
    if not panels:
        raise ValueError("a figure of no panels")
    columns = columns or min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines if not line.floor))
    colors = {label: COLORS[index % len(COLORS)] for index, label in enumerate(labels)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * panel_size[0], rows * panel_size[1] + 0.4), layout="constrained")
        handles: dict[str, Any] = {}
        floors: dict[str, str] = {}
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            for line in panel.lines:
                style: dict[str, Any] = {"color": colors.get(line.label), "zorder": 3}
                if line.floor:
                    dashes = floors.setdefault(line.label, ("--", ":", "-.")[len(floors) % 3])
                    style = {"color": FLOOR_COLOR, "linestyle": dashes, "linewidth": 1.6, "zorder": 2}
                y = _numbers(line.y)
                marker = "o" if np.isfinite(y).sum() == 1 else None
                (handle,) = axes.plot(np.asarray(line.x, float), y, marker=marker, **style)
                handles.setdefault(line.label, handle)
                if line.low is not None and line.high is not None:
                    axes.fill_between(
                        np.asarray(line.x, float), _numbers(line.low), _numbers(line.high),
                        color=style["color"], alpha=0.18, linewidth=0,
                    )  # fmt: skip
            axes.set_title(panel.title)
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
            axes.margins(x=0.02)
        if len(handles) > 1:
            width = max(len(label) for label in handles)
            per_row = max(1, min(len(handles), int(columns * panel_size[0] * 12 / (width + 6))))
            figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=per_row)
        return figure


def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element to put into a page; `prefix` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_PAGE_COLOR, "currentColor")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def to_png(figure: Figure, *, dots_per_inch: int = 144) -> bytes:
    """The figure as PNG, dark on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def _numbers(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values])
