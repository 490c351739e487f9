"""Outcomes of imagined futures, read by a readout off their pictures and off the recorded ones alike.

Both go through the same tokenizer and the same ruler, so that its error is in both: if the world is right,
the reading of the recorded frames is like one more sample. Shapes: M samples, C known frames, T frames after
them, V views, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vidworld.errors import DataError
from vidworld.evaluation import events
from vidworld.evaluation.fidelity import difference
from vidworld.evaluation.lab_truth import kind_of
from vidworld.evaluation.quantities import COLOURS, LEAST_PIXELS, Subject
from vidworld.evaluation.readout import Readings, Readout


@dataclass(frozen=True)
class Outcomes:
    """What was read of one window."""

    kind: str
    readings: Mapping[str, tuple[str, np.ndarray, np.ndarray]]
    """Quantity -> unit, samples [M, T], and the recorded frames' [T], NaN where they do not show it.

    Values of a periodic quantity lie within half a period of the recorded one.
    """
    cases: tuple[events.Case, ...]
    """Forecasts of events; what happened is the lab's truth."""


def read_outcomes(
    readout: Readout,
    samples_MTVHWC: np.ndarray,
    bound_TVHWC: np.ndarray,
    known_CVHWC: np.ndarray,
    meta: Mapping[str, Any],
    first: int,
    *,
    where: object,
) -> Outcomes:
    """Read a window of a lab episode; `known` are its C known frames from frame `first` of the episode on.

    `bound` are the recorded frames after them as the tokenizer shows them. Raises DataError for an episode
    that is not of the lab, has several views or no truth, or another size than the readout reads.
    """
    kind = kind_of(meta, where=where)
    if known_CVHWC.shape[1] != 1:
        raise DataError("views to read outcomes off", where=where, got=known_CVHWC.shape[1], expected="one")
    known, count = len(known_CVHWC), len(bound_TVHWC)
    reference_HWC = known_CVHWC[0, 0]

    def read(videos_BTHWC: np.ndarray) -> Readings:
        return readout(videos_BTHWC, kind, np.repeat(reference_HWC[None], len(videos_BTHWC), 0))

    before, after = read(known_CVHWC[None, :, 0]), read(bound_TVHWC[None, :, 0])
    sampled = read(samples_MTVHWC[:, :, 0])
    subject = readout.net.subjects[kind]
    found = {}
    for name, quantity in subject.named.items():
        read_T = np.where(
            counts(after, subject, name)[0], after.quantities[name][0].astype(np.float64), np.nan
        )
        samples_MT = sampled.quantities[name].astype(np.float64)
        if quantity.period is not None:
            samples_MT = read_T + difference(samples_MT, read_T, quantity.period)
        found[name] = (quantity.unit, samples_MT, read_T)
    whole = {
        name: np.concatenate([np.repeat(before.quantities[name], len(row), 0), row], 1)
        for name, row in sampled.quantities.items()
        if not subject.items or _shown(before, name)
    }
    truth = lab_readouts(meta, where=where)
    window = {name: column_T[first : first + known + count] for name, column_T in truth.items()}
    return Outcomes(kind, found, tuple(events.cases(kind, whole, window, known)))


def counts(readings: Readings, subject: Subject, name: str) -> np.ndarray:
    """Whether frames [B, T] show what a quantity is of, as far as the readout sees."""
    told = np.ones(readings.quantities[name].shape, bool)
    if mask := subject.seen_in(name):
        told &= readings.masks[mask].sum((-2, -1)) >= LEAST_PIXELS
    if below := subject.named[name].below:
        told &= readings.quantities[below[0]] < below[1]
    return told


def lab_readouts(meta: Mapping[str, Any], *, where: object) -> dict[str, np.ndarray]:
    """The lab's own readouts of an episode, name -> [T]. Raises DataError where there are none."""
    outcome = meta.get("outcome")
    readouts = outcome.get("readouts") if isinstance(outcome, Mapping) else None
    if not readouts:
        raise DataError("no truth in the episode's outcome", where=where, fix="make it with vidworld lab")
    return {name: np.asarray(column, np.float64) for name, column in readouts.items()}


def _shown(before: Readings, name: str) -> bool:
    """Whether the object that a quantity is of is seen in the last known frame."""
    item = name.rpartition("_")[0]
    return item not in COLOURS or bool(before.masks[item][0, -1].sum() >= LEAST_PIXELS)
