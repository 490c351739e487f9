"""Skill is what it says: 1 for the oracle, 0 for holding still, and silent where nothing can be foreseen."""

import numpy as np
import pytest

from vidworld.evaluation.fidelity import hold
from vidworld.evaluation.lab_truth import Truth
from vidworld.evaluation.quantities import SUBJECTS
from vidworld.evaluation.readout import Readings
from vidworld.evaluation.skill import HEADLINE, headline_errors, in_words, ruler_error, skills, too_blunt
from vidworld.lab.effect import EFFECTS

EPISODES, SAMPLES = 30, 3


def errors(mean, rng, names=("coverage", "streak_iou_error")):
    return [{name: mean * rng.uniform(0.8, 1.2, (SAMPLES, 2)) for name in names} for _ in range(EPISODES)]


def test_oracle_is_one_and_holding_is_nothing():
    rng = np.random.default_rng(0)
    held, oracle = errors(1.0, rng), errors(0.2, rng)
    assert skills(oracle, held, oracle, 0)[""].value == pytest.approx(1)
    assert skills(held, held, oracle, 0)[""].value == pytest.approx(0)
    worse = skills(errors(1.8, rng), held, oracle, 1)["coverage"]
    assert worse.value == pytest.approx((1 - 1.8) / (1 - 0.2), abs=0.1)
    half = skills(errors(0.6, rng), held, oracle, 1)
    assert half[""].used == ("coverage", "streak_iou_error")
    assert half[""].interval is not None
    assert half[""].interval[0] < 0.5 < half[""].interval[1]
    assert half[""].interval[1] - half[""].interval[0] < 0.2
    assert "0.6" in in_words("coverage", half["coverage"])


def test_what_the_oracle_cannot_foresee_does_not_count():
    rng = np.random.default_rng(0)
    held, oracle = errors(1.0, rng), errors(0.2, rng)
    for one in oracle:
        one["coverage"] = one["coverage"] * 5  # as bad as holding
    table = skills(errors(0.6, rng), held, oracle, 0)
    assert table["coverage"].value is None
    assert table["coverage"].episodes == EPISODES
    assert table[""].used == ("streak_iou_error",)


def test_a_blunt_quantity_is_left_out_unless_there_is_no_other():
    rng = np.random.default_rng(0)
    held, oracle, seen = errors(1.0, rng), errors(0.2, rng), errors(0.6, rng)
    for one in seen:
        one["coverage"] = one["coverage"] * 3
    assert skills(seen, held, oracle, 0, leave_out=["coverage"])[""].value == pytest.approx(0.5, abs=0.1)
    assert skills(seen, held, oracle, 0)[""].value < 0
    both = skills(seen, held, oracle, 0, leave_out=["coverage", "streak_iou_error"])
    assert both[""].used == ("coverage", "streak_iou_error")


def test_episodes_that_show_nothing_are_left_out_of_all_three():
    rng = np.random.default_rng(0)
    held, oracle, seen = errors(1.0, rng), errors(0.2, rng), errors(0.6, rng)
    for number in range(10):
        for three in (held, oracle, seen):
            three[number]["coverage"][:] = np.nan
    assert skills(seen, held, oracle, 0)["coverage"].episodes == 20


def scene_of(colours, shift=0):
    """Two frames in which each colour is a square somewhere else."""
    subject = SUBJECTS["rigid"]
    masks = {name: np.zeros((2, 32, 32), bool) for name in subject.masks}
    values = {name: np.full(2, np.nan) for name in subject.named}
    for number, colour in enumerate(colours):
        masks[colour][:, 4:8, 4 + 8 * number + shift : 8 + 8 * number + shift] = True
        values |= {f"{colour}_{axis}": np.full(2, 0.1 * number + 0.01 * shift) for axis in "xyz"}
    return masks, values


def test_masks_are_judged_where_the_truth_shows_them_whatever_was_read():
    masks, values = scene_of(["red", "blue"])
    truth = Truth("rigid", masks, values)
    read_masks, read_values = scene_of(["red"], shift=2)
    read_masks["green"][:] = True  # imagined, and not there
    read = Readings(
        "rigid",
        {name: mask[None] for name, mask in read_masks.items()},
        {name: np.nan_to_num(value)[None] for name, value in read_values.items()},
    )
    found = headline_errors(read, truth)
    assert set(found) == set(HEADLINE["rigid"])
    # Red overlaps half of its union's third, blue is missed, green does not count.
    assert found["object_iou_error"] == pytest.approx(np.full((1, 2), ((1 - 1 / 3) + 1) / 2))
    exact = Readings("rigid", {n: m[None] for n, m in masks.items()}, {n: v[None] for n, v in values.items()})
    assert headline_errors(exact, truth)["object_iou_error"] == pytest.approx(np.zeros((1, 2)))
    assert headline_errors(hold(exact, 0, 2), truth)["object_position_m"] == pytest.approx(np.zeros((1, 2)))


def card(kind, bad=()):
    subject = SUBJECTS[kind]
    return {
        "quantities": {
            name: {"r2": 0.1 if name in bad else 0.95, "frames": 10, "mae": 0.02} for name in subject.named
        },
        "masks": {name: {"iou": 0.3 if name in bad else 0.9} for name in subject.masks},
        "distances": {name: {"mean": 0.01} for name in subject.distances},
    }


@pytest.mark.parametrize("kind", EFFECTS)
def test_every_kind_has_headlines_that_a_ruler_tells_of(kind):
    assert too_blunt(kind, card(kind)) == ()
    for name in HEADLINE[kind]:
        assert "ruler" in ruler_error(name, kind, card(kind))


def test_what_is_made_of_blunt_parts_is_blunt():
    assert too_blunt("smoke", card("smoke", ["smoke"])) == ("smoke_iou_error",)
    assert too_blunt("smoke", card("smoke", ["smoke_x"])) == ()
    assert too_blunt("smoke", card("smoke", ["smoke_x", "smoke_y"])) == ("plume_position_m",)
    assert too_blunt("liquid", card("liquid", ["spilled_ml"])) == ("spilled_ml",)
    assert too_blunt("rigid", card("rigid", ["red", "blue", "green"])) == ("object_iou_error",)
