import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl
from vidworld.lab.episode import LabConfig, generate
from vidworld.lab.rigid import SPACING_M, Rigid

needs_gl = pytest.mark.skipif(not gl.available(), reason=f"no headless OpenGL: {gl.INSTALL}")
SCRIPTED = LabConfig(exploration=0.0, size=64)


def test_scripted_picks_lift_and_missed_ones_do_not():
    # Over 60 picks: tools/bench/lab_outcomes.py, `lab.pick_success`.
    lifted, missed, pushed = [], [], []
    for seed in range(40):
        episode = generate("rigid", seed, SCRIPTED, render=False)
        lift = episode.outcomes_T["target_lift_m"].max()
        match episode.plan.policy:
            case "script:pick":
                lifted.append(lift > 0.06)
            case "script:pick_miss":
                missed.append(lift > 0.06)
            case "script:push":
                pushed.append(episode.outcomes_T["target_travel_m"][-1] > 0.015)
    assert len(lifted) >= 10
    assert np.mean(lifted) >= 0.8
    assert np.mean(pushed) >= 0.8
    assert not missed or np.mean(missed) < 0.5


def test_objects_stand_apart_and_still_until_they_are_touched():
    for seed in range(5):
        visible = Rigid().sample_visible(np.random.default_rng(seed))
        places = np.array([(item["x"], item["y"]) for item in visible["objects"]])
        gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)[np.triu_indices(len(places), 1)]
        assert (gaps > SPACING_M).all()
    episode = generate("rigid", 1, SCRIPTED, render=False)
    first = {name: column[:8] for name, column in episode.outcomes_T.items() if name.startswith("object")}
    for name, column in first.items():
        assert np.ptp(column) < 2e-3, name


def test_pushed_objects_neither_sink_nor_fly():
    for seed in (2, 4, 9):
        episode = generate("rigid", seed, SCRIPTED, render=False)
        for name, column in episode.outcomes_T.items():
            if name.endswith("_z"):
                assert column.min() > 0.01, name
                assert column.max() < 0.35, name


@needs_gl
def test_objects_are_large_enough_to_matter():
    episode = generate("rigid", 1, LabConfig(frames=2))
    assert episode.masks_THW["object0"][0].sum() > 60
    assert episode.masks_THW["arm"][0].mean() > 0.05
    overlap = sum(mask[0].astype(int) for mask in episode.masks_THW.values())
    assert overlap.max() == 1
