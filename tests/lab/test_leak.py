"""Nothing hidden shows too early: not in the pictures, shadows included, and not in what the arm feels.

For each kind that hides something, the same episode is played with very different hidden values. Until what
is hidden takes part, all frames and all proprioception are the same bit for bit; afterwards they are not.
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import gl
from vidworld.lab.effect import EFFECTS
from vidworld.lab.episode import LabConfig, LabEpisode, generate, resimulate
from vidworld.lab.liquid import TILT_RAD, LiquidEffect
from vidworld.lab.scene import planner

needs_gl = pytest.mark.skipif(not gl.can_render(), reason=f"no headless OpenGL: {gl.INSTALL}")
CONFIG = LabConfig(size=64, variety="full", masks=False)
EXTREMES = {
    "container": (
        {"mass_kg": 8.0, "friction": 0.9, "centre_x_m": 0.02, "centre_y_m": 0.02, "centre_z_m": -0.02},
        {"mass_kg": 0.2, "friction": 0.12, "centre_x_m": -0.02, "centre_y_m": -0.02, "centre_z_m": 0.02},
    ),
    "paint": (
        {"load_ml": 5.5, "depletion_m": 0.5, "viscosity": 0.02},
        {"load_ml": 1.2, "depletion_m": 0.12, "viscosity": 0.4},
    ),
    "smoke": (
        {"wind_x": 0.22, "wind_y": -0.22, "buoyancy": 3.2, "turbulence": 3.0},
        {"wind_x": -0.22, "wind_y": 0.2, "buoyancy": 1.4, "turbulence": 4.0},
    ),
    "liquid": ({"fill": 0.62, "log10_viscosity": -6.0}, {"fill": 0.3, "log10_viscosity": -2.8}),
}


def begins(episode: LabEpisode) -> int:
    """First frame that may show what is hidden, told by what happens and not by pictures."""
    outcomes = episode.outcomes_T
    match episode.kind:
        case "container":
            return int(np.argmax(outcomes["touched"] > 0))
        case "paint":
            return int(np.argmax(outcomes["canvas_ml"] > 0))
        case "smoke":
            return int(np.argmax(outcomes["emitted_l"] > 0))
        case "liquid":
            # The cup's axis is the tool's x axis, either way round.
            upright_T = np.abs(episode.proprio_TS[:, 20])
            return int(np.argmax(upright_T < np.cos(TILT_RAD)))
        case kind:
            raise AssertionError(kind)


@needs_gl
@pytest.mark.parametrize(
    ("kind", "seed", "exploration", "frames"),
    [
        ("container", 2, 0.0, 40),
        ("container", 0, 1.0, 40),
        ("container", 5, 1.0, 24),
        ("paint", 0, 1.0, 30),
        ("smoke", 3, 0.0, 14),
        ("liquid", 0, 0.0, 20),
        ("liquid", 3, 1.0, 10),
    ],
)
def test_nothing_hidden_shows_before_it_takes_part(kind, seed, exploration, frames):
    config = dataclasses.replace(CONFIG, exploration=exploration, frames=frames)
    episode = generate(kind, seed, config, render=False)
    assert episode.hidden
    one, other = (resimulate(episode, {**episode.hidden, **hidden}) for hidden in EXTREMES[kind])
    assert one.frames_THWC is not None
    assert other.frames_THWC is not None
    start = begins(one)
    assert start >= 2
    assert begins(other) == start
    np.testing.assert_array_equal(one.frames_THWC[:start], other.frames_THWC[:start])
    np.testing.assert_array_equal(one.proprio_TS[:start], other.proprio_TS[:start])
    assert (one.frames_THWC[-1] != other.frames_THWC[-1]).any(), "the negative control: later it shows"


def test_every_kind_that_hides_something_is_looked_at():
    hiding = {kind for kind in EFFECTS if generate(kind, 0, LabConfig(frames=2), render=False).hidden}
    assert hiding == set(EXTREMES)


@needs_gl
def test_liquid_in_an_opaque_cup_would_show_by_its_shade_alone(monkeypatch):
    """Negative control: drawn and felt from the first frame on, the fill tells before the cup tilts."""
    episode = generate("liquid", 0, dataclasses.replace(CONFIG, exploration=0.0, frames=6), render=False)
    assert begins(episode) == 0, "it does not tilt within these frames"
    reset = LiquidEffect.reset

    def leaking(self, *arguments):
        reset(self, *arguments)
        self._started = True

    monkeypatch.setattr(LiquidEffect, "reset", leaking)
    one, other = (resimulate(episode, hidden) for hidden in EXTREMES["liquid"])
    assert one.frames_THWC is not None
    assert other.frames_THWC is not None
    assert (one.frames_THWC[0] != other.frames_THWC[0]).any()
    assert (one.proprio_TS[3:] != other.proprio_TS[3:]).any()


def test_the_arm_starts_out_of_touch():
    for seed in (1, 5, 6, 7):
        episode = generate("container", seed, LabConfig(exploration=1.0, frames=2), render=False)
        assert episode.outcomes_T["touched"][0] == 0
        tool_3, _ = planner(None).forward(episode.plan.start_J)
        half_3 = np.array(episode.visible["half_m"])
        box_3 = np.array([episode.visible["x"], episode.visible["y"], half_3[2]])
        assert (np.abs(tool_3 - box_3) > 0.6 * half_3).any(), "not within the box"
