"""What must hold over whole episodes: energy, mass and divergence, each with a control that breaks it."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')
pytest.importorskip("numba", reason='needs pip install "vidworld[lab]"')

from vidworld.lab.arm import HOME_J
from vidworld.lab.effect import PHYSICS_S, STEPS
from vidworld.lab.episode import LabConfig, generate
from vidworld.lab.gl import mujoco
from vidworld.lab.rigid import Rigid
from vidworld.lab.scene import Scene, sample_look
from vidworld.lab.smoke import SmokeEffect
from vidworld.lab.smoke_flow import MAX_DIVERGENCE

PLAIN = LabConfig(size=64, exploration=0.0)
OBJECTS = [
    {"shape": shape, "colour": "red", "half_m": 0.03, "x": 0.45, "y": y, "yaw": 0.4}
    for shape, y in (("cube", -0.2), ("ball", 0.0), ("cylinder", 0.2))
]


def thrown_scene() -> Scene:
    """Three objects 10 cm over the table with some speed and spin; the arm rests far from them."""
    effect = Rigid()
    look = sample_look(np.random.default_rng(0), effect.framing, "core")
    scene = Scene(effect, look, {"objects": OBJECTS, "task": "push"}, 64)
    scene.start(np.array(HOME_J) + (2.4, 0, 0, 0, 0, 0, 0), 1.0)
    for index in range(len(OBJECTS)):
        joint = scene.model.body(f"object{index}").jntadr[0]
        place, speed = scene.model.jnt_qposadr[joint], scene.model.jnt_dofadr[joint]
        scene.data.qpos[place + 2] += 0.1
        scene.data.qvel[speed : speed + 6] = (0.2, 0.1, 0.3, 2.0, -1.0, 3.0)
    mujoco.mj_forward(scene.model, scene.data)
    return scene


def energy_of(scene: Scene, name: str) -> float:
    """Kinetic and potential energy of a free body in J."""
    model, data = scene.model, scene.data
    body = model.body(name)
    dofs = slice(int(body.dofadr[0]), int(body.dofadr[0]) + 6)
    mass_VV = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, mass_VV)
    speed_6 = data.qvel[dofs]
    kinetic = 0.5 * speed_6 @ mass_VV[dofs, dofs] @ speed_6
    height = data.qpos[model.jnt_qposadr[body.jntadr[0]] + 2]
    return float(kinetic + body.mass[0] * 9.81 * height)


def energies(scene: Scene, frames: int, each=lambda: None) -> np.ndarray:
    """Energy [physics steps + 1, objects]."""
    names = [f"object{index}" for index in range(len(OBJECTS))]
    rows = [[energy_of(scene, name) for name in names]]
    target_J = np.array(HOME_J) + (2.4, 0, 0, 0, 0, 0, 0)

    def note(dt: float) -> None:
        each()
        rows.append([energy_of(scene, name) for name in names])

    for _ in range(frames):
        scene.step_frame(target_J, 1.0, note)
    return np.array(rows)


def test_thrown_objects_keep_their_energy_in_flight_and_lose_it_on_the_table():
    scene = thrown_scene()
    mass_N = np.array([scene.model.body(f"object{index}").mass[0] for index in range(3)])
    found_SN = energies(scene, 30)
    start_N = found_SN[0]
    # A symplectic step falls g t dt / 2 too far: m g^2 t dt / 2 of energy, known beforehand.
    time_S1 = np.arange(STEPS)[:, None] * PHYSICS_S
    known_SN = start_N - 0.5 * 9.81**2 * PHYSICS_S * time_S1 * mass_N
    np.testing.assert_allclose(found_SN[:STEPS], known_SN, rtol=2e-4)
    # Soft contacts store some energy and give it back, never more: 6 % here.
    lowest_SN = np.minimum.accumulate(found_SN, axis=0)
    assert (found_SN - lowest_SN < 0.08 * start_N).all(), "no contact gives energy"
    assert (found_SN <= start_N).all()
    assert (found_SN[-1] < 0.4 * start_N).all(), "they come down"
    assert (np.ptp(found_SN[-10 * STEPS :], axis=0) < 1e-3 * start_N).all(), "and come to rest"


def test_a_hand_that_helps_is_noticed():
    """Negative control of the test above."""
    scene = thrown_scene()

    def help_along() -> None:
        scene.apply_wrench("object1", np.array([0.1, 0.0, 0.0]), np.zeros(3))

    found_SN = energies(scene, 30, help_along)
    gained = found_SN[:, 1] - np.minimum.accumulate(found_SN[:, 1])
    assert gained.max() > 0.08 * found_SN[0, 1]


def test_smoke_flows_without_divergence_over_a_whole_episode(monkeypatch):
    found = []

    class Watched(SmokeEffect):
        def substep(self, scene, dt):
            super().substep(scene, dt)
            found.append(self._flow.divergence(dt))

    monkeypatch.setattr("vidworld.lab.episode.effect_of", lambda kind, frames: Watched())
    episode = generate("smoke", 2, PLAIN, render=False)
    assert len(found) == 2 * PLAIN.frames
    assert max(found) <= MAX_DIVERGENCE == 1e-5
    smoke, emitted = (episode.outcomes_T[name] for name in ("smoke_l", "emitted_l"))
    assert emitted[-1] > 1
    assert (np.diff(smoke) <= np.diff(emitted) + 1e-6).all(), "what is in the air was given off"


@pytest.mark.parametrize(("seed", "exploration"), [(0, 0.0), (1, 0.0), (8, 0.0), (0, 1.0), (4, 1.0)])
def test_paint_never_grows(seed, exploration):
    episode = generate("paint", seed, dataclasses.replace(PLAIN, exploration=exploration), render=False)
    canvas, brush, lost = (episode.outcomes_T[name] for name in ("canvas_ml", "brush_ml", "lost_ml"))
    change = np.diff(canvas + brush + lost)
    dips = change > 1e-9
    # A dip fills the brush up to its load; at any other time the sum stays, and a brush only gives.
    np.testing.assert_allclose(change[~dips], 0, atol=1e-9)
    assert dips.sum() <= 4
    assert (brush[1:][dips] <= episode.hidden["load_ml"] + 1e-9).all()
    assert (np.diff(brush)[~dips] <= 1e-12).all()
    assert (np.diff(lost) >= -1e-12).all()
    assert canvas[-1] > 0
