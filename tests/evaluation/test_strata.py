"""What happens in a frame, from the lab's truth or from what changes; and calibration told apart by it."""

import dataclasses

import numpy as np
import pytest

from vidworld.contract import Statistics
from vidworld.evaluation.calibration import Verified, summarise, tally
from vidworld.evaluation.strata import CONTACT, MOVING, STATIC, contact, kind_of_lab, strata

T = 6


def meta(kind: str, **readouts: list[float]) -> dict:
    return {"source": {"world": f"lab_{kind}"}, "outcome": {"readouts": readouts}}


@pytest.mark.parametrize(
    ("told", "touching"),
    [
        (meta("container", touched=[0, 0, 1, 1, 1, 1]), [0, 0, 1, 1, 1, 1]),
        (
            meta("rigid", object0_x=[0, 0, 0.01, 0.01, 0.01, 0.0105], object1_z=[0] * 5 + [0.1]),
            [0, 0, 1, 0, 0, 1],
        ),
        (meta("paint", canvas_ml=[0, 0, 0.1, 0.2, 0.2, 0.2]), [0, 0, 1, 1, 0, 0]),
        (
            meta("liquid", cup_ml=[9, 9, 8, 8, 8, 8], received_ml=[0, 0, 1, 1, 1.1, 1.1], spilled_ml=[0] * 6),
            [0, 0, 1, 0, 0, 0],
        ),
        (meta("smoke", smoke_l=[0, 1, 2, 3, 4, 5]), [0] * 6),
    ],
)  # fmt: skip
def test_contact_comes_from_the_labs_truth(told, touching):
    found = contact(told)
    assert found is not None
    assert found.astype(int).tolist() == touching


def test_other_logs_tell_no_contact():
    assert contact({}) is None
    assert contact({"source": {"world": "planar"}, "outcome": {"readouts": {"x": [0.0]}}}) is None
    assert kind_of_lab({"source": {"origin": {"world": "lab_smoke"}}}) == "smoke"
    assert kind_of_lab({"source": {"dataset": "cr5"}}) is None


def test_pictures_or_proprioception_move():
    frames = np.zeros((T, 1, 20, 20, 3), np.uint8)
    frames[2:, 0, :1, :1] = 15  # below the change that counts
    frames[3:, 0, 5, 5, 0] = 200  # 1 of 400 pixels
    proprio = np.zeros((T, 2))
    proprio[5, 1] = 0.02
    statistics = Statistics.of(np.random.default_rng(0).uniform(0, 1, (500, 2)))
    assert strata(frames, proprio, statistics).tolist() == [STATIC, STATIC, MOVING, STATIC, MOVING]
    touching = np.array([1, 1, 0, 0, 0, 0], bool)
    assert strata(frames, proprio, statistics, touching).tolist() == [CONTACT, STATIC, MOVING, STATIC, MOVING]
    assert strata(frames[:, :, :4], proprio[:, :0], statistics).tolist() == [STATIC] * 5


def window(rng: np.random.Generator, kind: str) -> Verified:
    """Honest in static frames, four times too sure in contact: twice that many frames."""
    stratum_T = np.array([STATIC, CONTACT, CONTACT])
    wide_T = np.where(stratum_T == CONTACT, 4.0, 1.0)
    truth_T = rng.normal(size=3) * wide_T
    one = tally(rng.normal(size=(24, 3, 1)), truth_T[:, None], rng)
    names = ("pixels", "pixels moving", "pixels still")
    return Verified(
        dict.fromkeys(names, one), np.zeros(3), np.zeros((24, 3, 0)), np.zeros((3, 0)), stratum_T, kind
    )


def test_calibration_is_told_apart_by_stratum_and_kind():
    rng = np.random.default_rng(0)
    found = summarise([(f"{kind}-{n}", window(rng, kind)) for kind in ("rigid", "paint") for n in range(150)])
    assert {name: one["frames"] for name, one in found["strata"].items()} == {"contact": 600, "static": 300}
    ratio = {name: one["quantities"]["pixels"]["spread_skill"] for name, one in found["strata"].items()}
    assert ratio["static"] == pytest.approx(1, abs=0.1)
    assert ratio["contact"] == pytest.approx(0.25, abs=0.04)
    mixed = found["quantities"]["pixels"]["pooled"]["spread_skill"]
    assert ratio["contact"] < mixed < ratio["static"], "a mean over all frames hides both"
    assert set(found["kinds"]) == {"rigid", "paint"}
    assert found["kinds"]["paint"]["windows"] == 150
    both = sum(one["strata"]["contact"]["frames"] for one in found["kinds"].values())
    assert both == 600
    parts = [one["quantities"]["pixels"]["rank_counts"] for one in found["strata"].values()]
    assert np.sum(parts, 0).tolist() == found["quantities"]["pixels"]["pooled"]["rank_counts"]


def test_strata_of_latent_frames_are_those_of_their_last_camera_frame():
    rng = np.random.default_rng(1)
    one = window(rng, "rigid")
    assert one.stratum_T is not None
    six = dataclasses.replace(one, stratum_T=np.repeat(one.stratum_T, 2), floor_T=np.zeros(6))
    assert six.within("pixels", CONTACT).cases_T.tolist() == [0, 1, 1]
