"""Measure what the lab leaves open, and how often the scripted pick succeeds.

    python tools/bench/lab_outcomes.py --episodes 20 --draws 200 --picks 60

For `container`: the outcomes of each episode's frozen commands over draws of its hidden values from the
prior, as many episodes of each task, with a figure. For `rigid`: the share of scripted picks that lift their
object by 6 cm or more, those left out that miss on purpose.
"""

import concurrent.futures
import itertools
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.errors import ConfigError
from vidworld.plots import COLORS

READOUTS = {
    "push": ("box_travel_m", "pushed: how far the box went (cm)"),
    "strike": ("box_travel_m", "struck: how far the box went (cm)"),
    "topple": ("box_tilt", "pushed high up: how far it tilted (degrees)"),
    "lift": ("box_clearance_m", "gripped and raised: how high it was in the end (cm)"),
}
"""Task -> readout of the last frame, and what it is."""
LIFTED_M, TOPPLED_RAD, PICKED_M = 0.02, 1.0, 0.06


@dataclass(frozen=True)
class Options:
    """Measure the spread of outcomes and the success of picks."""

    episodes: int = 20
    """Of the container, a quarter of them of each task."""
    draws: int = 200
    picks: int = 60
    processes: int = 1
    out: Path = Path("benchmarks/lab.json")
    """Rows are added here."""
    figure: Path | None = None
    """Where the figure is written, PNG."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Add the rows."""
    options = parse(Options, arguments, prog=prog)
    if options.episodes < 4 or options.draws < 2 or options.picks < 1 or options.processes < 1:
        raise ConfigError(
            "options", got=options, expected="4 episodes, 2 draws, a pick and a process or more"
        )
    lifts = lifts_of_picks(options.picks)
    jobs = [
        (task, seed, options.draws) for task in READOUTS for seed in seeds_of(task, options.episodes // 4)
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        finals = list(pool.map(final_outcomes, jobs))
    by_task = {
        task: [final for job, final in zip(jobs, finals, strict=True) if job[0] == task] for task in READOUTS
    }
    rows: dict[str, tuple[float, str]] = {
        "lab.pick_success": (round(float(np.mean(lifts > PICKED_M)), 3), "share")
    }
    for task, columns in by_task.items():
        unit = "rad" if task == "topple" else "m"
        spreads = [float(np.subtract(*np.percentile(final, (90, 10)))) for final in columns]
        rows[f"lab.spread.{task}"] = (round(float(np.median(spreads)), 4), f"{unit}, median p90 - p10")
        rows[f"lab.spread_least.{task}"] = (round(min(spreads), 4), f"{unit}, least p90 - p10")
    for task, bound, word in (("topple", TOPPLED_RAD, "toppled"), ("lift", LIFTED_M, "lifted")):
        shares = [float((final > bound).mean()) for final in by_task[task]]
        rows[f"lab.share.{word}"] = (round(float(np.mean(shares)), 3), "of draws")
        rows[f"lab.share_open.{word}"] = (
            round(float(np.mean([0.05 < share < 0.95 for share in shares])), 3),
            "of episodes in which 5 to 95 % of draws did",
        )
    asked = f"--episodes {options.episodes} --draws {options.draws} --picks {options.picks}"
    add_rows(
        options.out,
        rows,
        device=cpu_name(),
        command=f"python tools/bench/lab_outcomes.py {asked}",
        packages=("mujoco", "numpy"),
    )
    for name, (value, unit) in rows.items():
        print(f"{name:<28} {value:8.4f} {unit}")
    if options.figure:
        draw(by_task, options.figure)
        print(options.figure)


def final_outcomes(job: tuple[str, int, int]) -> np.ndarray:
    """The readout of the last frame over draws of the prior, [draws]."""
    from vidworld.lab.conditional import conditional
    from vidworld.lab.episode import LabConfig, generate

    task, seed, draws = job
    episode = generate("container", seed, LabConfig(exploration=0.0), render=False)
    return conditional(episode, 1, draws).outcomes_NT[READOUTS[task][0]][:, -1]


def seeds_of(task: str, count: int) -> list[int]:
    """The first seeds whose container is to be treated so."""
    from vidworld.lab.episode import LabConfig, generate

    found: list[int] = []
    for seed in itertools.count():
        episode = generate("container", seed, LabConfig(exploration=0.0), render=False)
        if episode.visible["task"] == task:
            found.append(seed)
        if len(found) == count:
            return found
    raise AssertionError


def lifts_of_picks(count: int) -> np.ndarray:
    """How high the first scripted picks lifted their object, in metres; not of those that miss on purpose."""
    from vidworld.lab.episode import LabConfig, generate

    lifts: list[float] = []
    for seed in itertools.count():
        episode = generate("rigid", seed, LabConfig(exploration=0.0), render=False)
        if episode.plan.policy == "script:pick":
            lifts.append(float(episode.outcomes_T["target_lift_m"].max()))
        if len(lifts) == count:
            return np.array(lifts)
    raise AssertionError


def draw(by_task: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """A dot a draw, a column an episode, a panel a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    rng = np.random.default_rng(0)
    for place, (task, columns) in enumerate(by_task.items()):
        axes = figure.add_subplot(2, 2, place + 1)
        scale = 180 / np.pi if task == "topple" else 100
        for index, final in enumerate(columns):
            shift = rng.uniform(-0.3, 0.3, len(final))
            axes.scatter(index + 1 + shift, scale * final, s=7, alpha=0.45, color=COLORS[0], linewidth=0)
            axes.hlines(scale * np.median(final), index + 0.6, index + 1.4, color=COLORS[1], linewidth=2)
        axes.set_title(READOUTS[task][1], fontsize=10, loc="left")
        axes.set_xticks(range(1, len(columns) + 1))
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "episode: the same picture and the same commands, other contents of the box", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "tools/bench/lab_outcomes.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
