"""Events told from outcomes, and if forecasts of them are reliable: coins, and a ruler that reads pixels."""

from types import SimpleNamespace

import numpy as np
import pytest

from vidworld.errors import DataError
from vidworld.evaluation.events import EVENTS, Case, cases, error_by_chance, has_happened, summarise
from vidworld.evaluation.outcomes import read_outcomes
from vidworld.evaluation.quantities import COLOURS, SUBJECTS
from vidworld.evaluation.readout import Readings, Readout


@pytest.mark.parametrize(
    ("name", "values", "by_then"),
    [
        ("toppled", {"box_tilt": [0, 0, 0.5, 1.2, 0.3]}, [0, 1, 1]),
        ("spilled", {"spilled_ml": [0, 0, 1, 1.5, 9]}, [0, 0, 1]),
        ("painted", {"coverage": [0.1, 0.2, 0.203, 0.21, 0.21]}, [0, 1, 1]),
        ("dropped", {"red_z": [0, 0.1, 0.1, 0.05, 0.05], "teal_z": [0] * 5}, [0, 1, 1]),
        ("dropped", {"red_z": [0, 0, 0.02, 0.1, 0.12]}, [0, 0, 0]),
    ],
)
def test_what_has_happened_stays_so(name, values, by_then):
    columns = {key: np.array(row, float) for key, row in values.items()}
    before, after = has_happened(EVENTS[name], columns, known=2)
    assert not before
    assert after.astype(int).tolist() == by_then


def test_what_has_happened_already_is_no_forecast():
    fallen = {"box_tilt": np.array([0, 1.4, 1.4])}
    assert cases("container", {"box_tilt": np.zeros((4, 3))}, fallen, known=2) == []
    (case,) = cases(
        "container", {"box_tilt": np.array([[0, 0, 2.0], [0, 0, 0]])}, {"box_tilt": np.zeros(3)}, 2
    )
    assert case.probability_T.tolist() == [0.5]
    assert case.happened_T.tolist() == [False]
    assert cases("smoke", {}, {}, known=2) == []


def coins(sharpen: float, windows: int = 600) -> dict:
    """Toppled with a known probability; forecasts are pushed away from a half by `sharpen`."""
    rng = np.random.default_rng(0)
    found = {}
    for number in range(windows):
        truly = rng.random()
        said = float(np.clip(0.5 + sharpen * (truly - 0.5), 0, 1))
        samples = rng.random(32) < said
        found[f"e{number}"] = [Case("toppled", np.array([samples.mean()]), np.array([rng.random() < truly]))]
    return summarise(found, [1])


def test_honest_forecasts_are_reliable_and_sharpened_ones_are_not():
    honest, sure = coins(1.0)["toppled"], coins(3.0)["toppled"]
    assert honest["error"] < 2 * honest["error_by_chance"]
    assert honest["error"] < 0.08
    assert sure["error"] > 0.12 > 3 * sure["error_by_chance"]
    assert honest["brier"] < sure["brier"]
    assert honest["brier_interval"][0] < honest["brier"] < honest["brier_interval"][1]
    assert honest["windows"] == honest["episodes"] == 600
    assert honest["base_rate"] == pytest.approx(0.5, abs=0.06)


def test_leads_of_one_window_share_their_luck():
    forecasts = np.repeat(np.random.default_rng(0).random(50), 8)
    assert error_by_chance(forecasts, 8) > 1.5 * error_by_chance(forecasts)


class PixelRuler(Readout):
    """Reads box_tilt off the red channel, and the other quantities off nothing."""

    def __init__(self, kind: str = "container") -> None:
        self.net = SimpleNamespace(subjects={kind: SUBJECTS[kind]})  # type: ignore[assignment]

    def __call__(self, frames_BTHWC, kind, reference_BHWC=None):
        shade_BT = frames_BTHWC[..., 0].mean((-2, -1)) / 100
        subject = self.net.subjects[kind]
        masks = {name: np.ones(frames_BTHWC.shape[:-1], bool) for name in subject.masks}
        values = {name: np.zeros(shade_BT.shape, np.float32) for name in subject.named}
        if kind == "container":
            values |= {"box_tilt": shade_BT, "box_yaw": shade_BT}
        else:
            for colour in COLOURS:
                masks[colour][:] = colour == "red"
            values |= {"red_z": shade_BT, "teal_z": -shade_BT}
        return Readings(kind, masks, values)


def shades(values) -> np.ndarray:
    """Pictures [..., 1, 16, 16, 3] of the shades given."""
    return np.broadcast_to(
        (np.asarray(values)[..., None, None, None, None]).astype(np.uint8), (*np.shape(values), 1, 16, 16, 3)
    )


def test_outcomes_are_read_off_samples_and_truth_alike():
    told = {
        "source": {"world": "lab_container"},
        "outcome": {"readouts": {"box_tilt": [0, 0, 0, 0, 1.5]}},
    }
    samples = shades([[10, 20], [10, 150], [10, 150], [0, 0]])
    found = read_outcomes(PixelRuler(), samples, shades([20, 40]), shades([0, 0]), told, 1, where="e")
    assert found.kind == "container"
    unit, read_MT, read_T = found.readings["box_tilt"]
    assert unit == "rad"
    np.testing.assert_allclose(read_MT, np.array([[10, 20], [10, 150], [10, 150], [0, 0]]) / 100)
    np.testing.assert_allclose(read_T, [0.2, 0.4])
    # Half a turn is none for a box; frames in which the recorded box leans too far do not count.
    leaning = read_outcomes(PixelRuler(), samples, shades([20, 70]), shades([0, 0]), told, 1, where="e")
    _, yaw_MT, yaw_T = leaning.readings["box_yaw"]
    assert np.isnan(yaw_T[1])
    assert np.abs(yaw_MT[:, 0] - yaw_T[0]).max() <= np.pi / 2
    (case,) = found.cases
    assert case.event == "toppled"
    assert case.probability_T.tolist() == [0, 0.5]
    assert case.happened_T.tolist() == [False, True], "frames 3 and 4 of the episode, by the lab's truth"


def test_objects_that_are_not_in_the_scene_drop_nothing():
    told = {"source": {"world": "lab_rigid"}, "outcome": {"readouts": {"object0_z": [0.1, 0.1, 0.0]}}}
    rising = read_outcomes(
        PixelRuler("rigid"), shades([[90, 100]]), shades([0, 0]), shades([0]), told, 0, where="e"
    )
    (case,) = rising.cases
    # What is read where no teal object is falls all the way; only red counts, and it rises.
    assert case.probability_T.tolist() == [0, 0]
    assert case.happened_T.tolist() == [False, True]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "episode to learn from"),
        ({"source": {"world": "lab_container"}, "outcome": {}}, "no truth"),
        ({"source": {"world": "lab_container", "imagined": True}}, "imagined"),
    ],
)
def test_what_cannot_be_read_is_refused(told, message):
    with pytest.raises(DataError, match=message):
        read_outcomes(PixelRuler(), shades([[1]]), shades([1]), shades([0]), told, 0, where="e")
