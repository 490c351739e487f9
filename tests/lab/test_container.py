import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab.conditional import conditional
from vidworld.lab.container import FRICTION, MASS_KG, Container
from vidworld.lab.episode import LabConfig, generate

SCRIPTED = LabConfig(exploration=0.0, size=64)


def spread_of(task: str, readout: str) -> float:
    """Distance between the 10th and 90th percentile of a readout over draws of what is hidden."""
    for seed in range(40):
        episode = generate("container", seed, SCRIPTED, render=False)
        if episode.visible["task"] == task:
            column = conditional(episode, 1, 24).outcomes_NT[readout]
            final = column.max(1) if readout == "box_clearance_m" else column[:, -1]
            low, high = np.percentile(final, (10, 90))
            return float(high - low)
    raise AssertionError(f"no {task} in 40 seeds")


@pytest.mark.parametrize(
    ("task", "readout", "least"),
    [
        ("push", "box_travel_m", 0.04),
        ("strike", "box_travel_m", 0.015),
        ("topple", "box_travel_m", 0.06),
        ("lift", "box_clearance_m", 0.05),
    ],
)
def test_outcomes_are_truly_uncertain(task, readout, least):
    assert spread_of(task, readout) > least


def test_the_prior_covers_its_ranges_and_the_centre_stays_inside():
    effect = Container()
    rng = np.random.default_rng(0)
    visible = effect.sample_visible(rng)
    draws = [effect.prior(rng, visible) for _ in range(400)]
    masses, frictions = (np.array([d[name] for d in draws]) for name in ("mass_kg", "friction"))
    assert masses.min() < 1.2 * MASS_KG[0]
    assert masses.max() > 0.8 * MASS_KG[1]
    assert np.median(masses) == pytest.approx(np.sqrt(MASS_KG[0] * MASS_KG[1]), rel=0.25)
    assert frictions.min() >= FRICTION[0]
    assert frictions.max() <= FRICTION[1]
    centres = np.abs([[d[f"centre_{axis}_m"] for axis in "xyz"] for d in draws])
    assert (centres <= np.array(visible["half_m"])).all()


def test_friction_decides_how_far_a_struck_box_slides():
    # The negative control of hidden friction: the slipperier box goes farther, the same mass and commands.
    from vidworld.lab.episode import resimulate

    for seed in range(40):
        episode = generate("container", seed, SCRIPTED, render=False)
        if episode.visible["task"] == "strike":
            break
    middle = {**episode.hidden, "mass_kg": 0.5, "centre_x_m": 0.0, "centre_y_m": 0.0, "centre_z_m": -0.01}
    far = resimulate(episode, {**middle, "friction": 0.12}, render=False).outcomes_T["box_travel_m"][-1]
    near = resimulate(episode, {**middle, "friction": 0.9}, render=False).outcomes_T["box_travel_m"][-1]
    assert far > near + 0.004
