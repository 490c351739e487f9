"""Whether something has happened in a lab episode, told from its outcomes: forecasts of reliability diagrams.

Shapes: any leading axes X, C known frames, T frames after them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from vidworld.evaluation.verification import as_table, bootstrap, interval, reliability

TOPPLED_RAD = 1.0
SPILLED_ML = 2.0
PAINTED_SHARE = 0.005
FALLEN_M = 0.03
LEAST_EPISODES = 5
CHANCE_DRAWS = 400
Values = Mapping[str, np.ndarray]
"""Outcome or reading -> [X, C + T]."""


@dataclass(frozen=True)
class Event:
    """Something that happens once; `now` says for each frame [X, C + T] whether it has."""

    name: str
    kind: str
    now: Callable[[Values, int], np.ndarray]
    meaning: str


def _fallen(values: Values, known: int) -> np.ndarray:
    heights = [column for name, column in values.items() if name.endswith("_z")]
    falls = [np.maximum.accumulate(z, axis=-1) - z > FALLEN_M for z in heights]
    return np.any(falls, axis=0)


EVENTS: Mapping[str, Event] = MappingProxyType(
    {
        event.name: event
        for event in (
            Event(
                "toppled", "container", lambda values, known: values["box_tilt"] > TOPPLED_RAD,
                f"the box is tilted by more than {TOPPLED_RAD:g} rad",
            ),
            Event(
                "spilled", "liquid", lambda values, known: values["spilled_ml"] > SPILLED_ML,
                f"more than {SPILLED_ML:g} mL lie beside the vessels",
            ),
            Event(
                "painted", "paint",
                lambda values, known: (
                    values["coverage"] - values["coverage"][..., known - 1, None] > PAINTED_SHARE
                ),
                f"{PAINTED_SHARE:.1%} more of the canvas is covered than in the last known frame",
            ),
            Event(
                "dropped", "rigid", _fallen,
                f"an object is more than {100 * FALLEN_M:g} cm below its highest place so far",
            ),
        )
    }
)  # fmt: skip
"""By name."""


@dataclass(frozen=True)
class Case:
    """One forecast: T leads of one window."""

    event: str
    probability_T: np.ndarray
    """Share of the samples in which it has happened by then."""
    happened_T: np.ndarray
    """Whether it really has, bool."""


def has_happened(event: Event, values: Values, known: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether it has happened among the known frames, bool [X], and by each later one, bool [X, T]."""
    by_now = np.maximum.accumulate(event.now(values, known), axis=-1)
    return by_now[..., known - 1], by_now[..., known:]


def cases(kind: str, samples: Values, truth: Values, known: int) -> list[Case]:
    """Forecasts of a window from M samples [M, C + T], their known frames included, and the truth [C + T].

    None of an event that has happened already.
    """
    found = []
    for event in (event for event in EVENTS.values() if event.kind == kind):
        before, happened_T = has_happened(event, truth, known)
        if not before:
            _, sampled_MT = has_happened(event, samples, known)
            found.append(Case(event.name, sampled_MT.mean(0), happened_T))
    return found


def summarise(by_episode: Mapping[str, Sequence[Case]], leads: Sequence[int]) -> dict[str, Any]:
    """Reliability of each event over windows and the leads given (counted from 1); ready for JSON.

    `error` is the mean |probability - frequency| over bins of probability, `error_by_chance` what it would be
    on average if every forecast were right, `brier_interval` 95 % over episodes.
    """
    found: dict[str, Any] = {}
    names = dict.fromkeys(case.event for cases in by_episode.values() for case in cases)
    at = [lead - 1 for lead in leads]
    for name in names:
        probabilities, outcomes, sums = [], [], []
        for episode_cases in by_episode.values():
            own = [case for case in episode_cases if case.event == name]
            if own:
                probabilities += [case.probability_T[at] for case in own]
                outcomes += [case.happened_T[at] for case in own]
                apart = [case.probability_T[at] - case.happened_T[at] for case in own]
                sums.append([np.square(apart).sum(), np.size(apart)])
        probability_N = np.concatenate(probabilities)
        diagram = reliability(probability_N, np.concatenate(outcomes))
        found[name] = {
            "kind": EVENTS[name].kind,
            "meaning": EVENTS[name].meaning,
            "leads": list(leads),
            "windows": len(probabilities),
            "episodes": len(sums),
            "base_rate": diagram.base_rate,
            "error": diagram.error,
            "error_by_chance": error_by_chance(probability_N, len(at)),
            "brier": diagram.brier,
            "brier_interval": _brier_interval(np.array(sums)),
            **as_table(diagram),
        }
    return found


def error_by_chance(probability_N: np.ndarray, together: int = 1, seed: int = 0) -> float:
    """Mean error of a diagram if each event came with exactly the forecast probability.

    `together` neighbouring cases are leads of one window and share their luck: an event that has happened
    stays so.
    """
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(CHANCE_DRAWS):
        luck_N = np.repeat(rng.random(len(probability_N) // together), together)
        errors.append(reliability(probability_N, luck_N < probability_N).error)
    return float(np.mean(errors))


def _brier_interval(sums_E2: np.ndarray) -> list[float] | None:
    return interval(bootstrap(sums_E2)) if len(sums_E2) >= LEAST_EPISODES else None
