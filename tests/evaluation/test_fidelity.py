"""Errors of readings: identities against plain NumPy, zero for the truth, large for the wrong truth."""

import numpy as np
import pytest

from vidworld.errors import DataError
from vidworld.evaluation.fidelity import (
    centroid,
    difference,
    frame_errors,
    hold,
    horizon_errors,
    iou,
    skill,
)
from vidworld.evaluation.lab_truth import Truth
from vidworld.evaluation.quantities import SUBJECTS
from vidworld.evaluation.readout import Readings

FRAMES, SIZE = 12, 32


def truth_of(kind: str, seed: int) -> Truth:
    """A made-up episode of a kind: a rectangle a mask, and numbers that walk."""
    rng = np.random.default_rng(seed)
    masks = {}
    for name in SUBJECTS[kind].masks:
        mask = np.zeros((FRAMES, SIZE, SIZE), bool)
        for frame, (row, column) in enumerate(rng.integers(0, SIZE - 8, (FRAMES, 2))):
            mask[frame, row : row + 7, column : column + 5] = True
        masks[name] = mask
    walks = {name: np.cumsum(rng.normal(0, 0.1, FRAMES)) for name in SUBJECTS[kind].named}
    return Truth(kind, masks, walks)


def read_of(truth: Truth) -> Readings:
    """Readings of one video that are the truth."""
    return Readings(
        truth.kind,
        {name: mask[None].copy() for name, mask in truth.masks_THW.items()},
        {name: values[None].copy() for name, values in truth.quantities_T.items()},
    )


def test_iou_and_centroid_are_what_counting_pixels_gives():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 5, 9, 13)) < 0.3
    for place in np.ndindex(3, 5):
        both = sum(x and y for x, y in zip(a[place].ravel(), b[place].ravel(), strict=True))
        either = sum(x or y for x, y in zip(a[place].ravel(), b[place].ravel(), strict=True))
        assert iou(a, b)[place] == pytest.approx(both / either)
        rows, columns = np.nonzero(a[place])
        assert np.allclose(centroid(a)[place], (columns.mean() + 0.5, rows.mean() + 0.5))
    nothing = np.zeros((2, 4, 4), bool)
    assert np.isnan(iou(nothing, nothing)).all()
    assert np.isnan(centroid(nothing)).all()
    assert iou(~nothing, nothing).tolist() == [0, 0]
    moved = np.roll(a, (1, 2), (-2, -1))
    inside = a.copy()
    inside[..., -1, :] = inside[..., -2:] = False
    shift = centroid(np.roll(inside, (1, 2), (-2, -1))) - centroid(inside)
    assert np.allclose(shift, (2, 1))
    assert moved.sum() == a.sum()


def test_periodic_differences_are_the_nearest_ones():
    assert difference(np.array(0.05), np.array(np.pi - 0.05), np.pi) == pytest.approx(0.1)
    assert difference(np.array(-1.5), np.array(1.5), np.pi) == pytest.approx(np.pi - 3)
    assert difference(np.array(1.5), np.array(-1.5)) == pytest.approx(3.0)
    read, true = np.random.default_rng(1).uniform(-9, 9, (2, 200))
    assert np.allclose(difference(read, true, np.pi), difference(read + 7 * np.pi, true, np.pi))
    assert np.abs(difference(read, true, np.pi)).max() <= np.pi / 2


@pytest.mark.parametrize("kind", SUBJECTS)
def test_the_truth_has_no_error_and_another_episodes_truth_has(kind):
    truth, other = truth_of(kind, 0), truth_of(kind, 1)
    right, wrong = frame_errors(read_of(truth), truth), frame_errors(read_of(other), truth)
    assert all(np.allclose(errors, 0) for errors in right.values())
    assert right["_".join((SUBJECTS[kind].masks[0], "iou_error"))].shape == (1, FRAMES)
    assert all(np.nanmean(errors) > 0.02 for errors in wrong.values()), wrong
    for name in SUBJECTS[kind].masks:
        assert np.nanmean(wrong[f"{name}_iou_error"]) > 0.5
    for name, things in SUBJECTS[kind].distances.items():
        by_hand = np.mean(
            [
                np.sqrt(sum((other.quantities_T[axis] - truth.quantities_T[axis]) ** 2 for axis in axes))
                for axes in things
            ],
            axis=0,
        )
        assert np.allclose(wrong[name][0], by_hand)


def test_frames_that_show_nothing_do_not_count_and_nothing_read_counts_as_a_side_off():
    truth = truth_of("smoke", 0)
    truth.masks_THW["smoke"][0] = False
    truth.quantities_T["smoke_x"][0] = np.nan
    readings = read_of(truth)
    readings.masks["smoke"][:, 1] = False
    errors = frame_errors(readings, truth)
    assert np.isnan(errors["smoke_x"][0, 0])
    assert np.isnan(errors["smoke_iou_error"][0, 0])
    assert np.isnan(errors["smoke_centre_px"][0, 0])
    assert np.isnan(errors["plume_position_m"][0, 0])
    assert errors["smoke_iou_error"][0, 1] == 1
    assert errors["smoke_centre_px"][0, 1] == SIZE
    table = horizon_errors([errors], [1, 2])
    assert table["smoke_x"] == {"mean": [None, 0.0], "episodes": [0, 1]}


def test_readings_of_other_kinds_or_lengths_are_refused():
    truth = truth_of("liquid", 0)
    with pytest.raises(DataError, match="kind of the readings: got smoke, expected liquid"):
        frame_errors(read_of(truth_of("smoke", 0)), truth)
    with pytest.raises(DataError, match="frames of the readings: got 5, expected 12"):
        frame_errors(read_of(truth)[:, :5], truth)


def test_holding_repeats_one_frame_and_its_error_grows():
    truth = truth_of("liquid", 2)
    truth.quantities_T["fill"][:] = np.linspace(0, 1, FRAMES)
    held = hold(read_of(truth), 0, FRAMES)
    assert np.array_equal(held.masks["liquid"][0, 7], truth.masks_THW["liquid"][0])
    assert np.allclose(frame_errors(held, truth)["fill"][0], np.linspace(0, 1, FRAMES))


def test_horizons_average_over_samples_then_episodes_and_skill_is_their_ratio():
    rng = np.random.default_rng(3)
    long, short = {"fill": rng.random((4, 10))}, {"fill": rng.random((2, 6))}
    table = horizon_errors([long, short], [1, 6, 10])
    expected = [
        np.mean([long["fill"][:, 0].mean(), short["fill"][:, 0].mean()]),
        np.mean([long["fill"][:, 5].mean(), short["fill"][:, 5].mean()]),
        long["fill"][:, 9].mean(),
    ]
    assert table["fill"]["mean"] == pytest.approx(expected)
    assert table["fill"]["episodes"] == [2, 2, 1]

    def row(*means):
        return {"horizons": [1, 2], "fill": {"mean": list(means), "episodes": [1, 1]}}

    assert skill(row(0.1, 0.4), row(0.5, 0.4), row(0.0, 0.4)) == {"horizons": [1, 2], "fill": [0.8, None]}
    assert skill(row(0.5, 0.0), row(0.5, 0.4), row(0.1, 0.0))["fill"] == pytest.approx([0.0, 1.0])
    with pytest.raises(ValueError, match="first frame is 1"):
        horizon_errors([long], [0])
