import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.errors import ConfigError, DataError
from vidworld.lab import gl, truth
from vidworld.lab.episode import LabConfig, embodiment_of, generate, resimulate

needs_gl = pytest.mark.skipif(not gl.available(), reason=f"no headless OpenGL: {gl.INSTALL}")
SMALL = LabConfig(frames=40, size=64)
SCRIPTED = dataclasses.replace(SMALL, frames=64, exploration=0.0)


def bytes_of(kind: str, seed: int, frames: int = 24) -> str:
    episode = generate(kind, seed, LabConfig(frames=frames, size=64))
    parts = (episode.frames_THWC, episode.actions_TA, episode.proprio_TS, *episode.masks_THW.values())
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


@needs_gl
@pytest.mark.parametrize("kind", ["rigid", "container"])
def test_equal_bytes_in_another_process_and_after_other_episodes(kind):
    code = (
        "import sys; sys.path.insert(0, 'tests/lab'); from test_episode import bytes_of; "
        f"bytes_of('rigid', 5); print(bytes_of({kind!r}, 2))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == bytes_of(kind, 2)
    assert bytes_of(kind, 2) != bytes_of(kind, 3)


@needs_gl
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "seed", "frames"), [("smoke", 2, 20), ("smoke", 1, 20), ("liquid", 0, 36)])
def test_flows_are_equal_bytes_in_other_processes(kind, seed, frames):
    """Smoke of a pot and a wand, and a pour: with other episodes before, and other counts of threads."""
    code = (
        "import sys; sys.path.insert(0, 'tests/lab'); from test_episode import bytes_of; "
        f"sys.argv[1:] and bytes_of({kind!r}, 7, 5); print(bytes_of({kind!r}, {seed}, {frames}))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, *before],
            env={**os.environ, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for before, threads in (([], "1"), (["after another"], "2"))
    }
    assert said == {bytes_of(kind, seed, frames)}
    assert bytes_of(kind, seed + 1, frames) not in said


RENDERED = """
import sys, numpy as np
from vidworld.lab.episode import LabConfig, generate
kind, frames, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
made = generate(kind, 0, LabConfig(frames=frames, size=128, exploration=0.0))
readouts = np.array([column for _, column in sorted(made.outcomes_T.items())])
np.savez(out, pixels=made.frames_THWC, actions=made.actions_TA, proprio=made.proprio_TS, readouts=readouts)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not all(map(gl.loads, gl.LIBRARIES)), reason="needs both OSMesa and EGL")
@pytest.mark.parametrize(
    ("kind", "frames"), [("rigid", 30), ("container", 30), ("smoke", 16), ("liquid", 36)]
)
def test_a_gpu_draws_what_software_draws(tmp_path, kind, frames):
    """Physics to the bit; pixels to the bit from one process to another, and nearly so between renderers."""
    made = {}
    plain = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    for name, back_end in (("egl", "egl"), ("again", "egl"), ("osmesa", "osmesa")):
        out = tmp_path / f"{name}.npz"
        command = [sys.executable, "-c", RENDERED, kind, str(frames), str(out)]
        subprocess.run(command, env={**plain, "MUJOCO_GL": back_end}, check=True)
        made[name] = dict(np.load(out))
    for part, values in made["egl"].items():
        np.testing.assert_array_equal(values, made["again"][part], part)
        if part != "pixels":
            np.testing.assert_array_equal(values, made["osmesa"][part], part)
    pixels, software = (made[name]["pixels"].astype(int) for name in ("egl", "osmesa"))
    apart = np.abs(pixels - software)
    assert apart.mean() < 1.5, "levels of 255"
    assert (apart > 24).mean() < 0.01, "edges of shadows may fall on the next pixel"
    # Negative control: one frame later is another picture.
    assert np.abs(pixels[1:] - software[:-1]).mean() > apart.mean()


@pytest.mark.skipif(not all(map(gl.loads, gl.LIBRARIES)), reason="needs both OSMesa and EGL")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a GPU's EGL draws other low bits than software")
def test_equal_bytes_with_both_software_renderers():
    code = (
        "import sys; sys.path.insert(0, 'tests/lab'); import test_episode as t; print(t.bytes_of('rigid', 2))"
    )
    plain = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**plain, "MUJOCO_GL": name},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for name in gl.LIBRARIES
    }
    assert len(said) == 1


def test_without_opengl_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gl, "LIBRARIES", {"osmesa": ("libnone.so",)})
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(ConfigError, match="apt-get install libosmesa6"):
        gl.offscreen.__wrapped__(64)


@needs_gl
@pytest.mark.parametrize("seed", [2, 3, 7, 4])
def test_nothing_hidden_shows_before_the_first_contact(seed):
    episode = generate("container", seed, LabConfig(size=64, exploration=0.0, masks=False))
    heavy = {**episode.hidden, "mass_kg": 8.0, "friction": 0.9, "centre_x_m": 0.02, "centre_z_m": -0.02}
    light = {**episode.hidden, "mass_kg": 0.2, "friction": 0.12, "centre_x_m": -0.02, "centre_z_m": 0.02}
    one, other = resimulate(episode, heavy), resimulate(episode, light)
    contact = int(np.argmax(one.outcomes_T["touched"] > 0))
    assert contact > 10
    # The frame in which contact began is the first that may differ.
    assert np.array_equal(one.frames_THWC[:contact], other.frames_THWC[:contact])
    assert np.array_equal(one.proprio_TS[:contact], other.proprio_TS[:contact])
    assert np.array_equal(one.actions_TA, other.actions_TA)
    # The negative control: afterwards they do differ.
    assert not np.array_equal(one.frames_THWC[-1], other.frames_THWC[-1])
    assert not np.array_equal(one.proprio_TS[contact:], other.proprio_TS[contact:])


def test_replays_with_the_same_hidden_values_are_equal():
    episode = generate("container", 3, SCRIPTED, render=False)
    again = resimulate(episode, render=False)
    for name, column in episode.outcomes_T.items():
        assert np.array_equal(column, again.outcomes_T[name]), name
    assert np.array_equal(episode.proprio_TS, again.proprio_TS)
    assert episode.frames_THWC is None
    with pytest.raises(ConfigError, match="hidden values"):
        resimulate(episode, {"mass": 1.0})


def test_hidden_and_visible_come_from_separate_streams():
    plain = generate("container", 5, SCRIPTED, render=False)
    full = generate("container", 5, dataclasses.replace(SCRIPTED, variety="full"), render=False)
    assert plain.hidden["mass_kg"] == full.hidden["mass_kg"]
    assert plain.hidden["friction"] == full.hidden["friction"]
    assert plain.look != full.look


def test_actions_are_what_the_arm_is_told_in_both_modes():
    joint = generate("rigid", 1, SCRIPTED, render=False)
    delta = generate("rigid", 1, dataclasses.replace(SCRIPTED, control="ee_delta"), render=False)
    assert joint.actions_TA.shape == (64, 8)
    assert delta.actions_TA.shape == (64, 7)
    np.testing.assert_array_equal(joint.proprio_TS, delta.proprio_TS)
    # Summed changes of the tool's command take it from the first to the last place.
    travelled = delta.actions_TA[:, :3].sum(0)
    tool = delta.proprio_TS[:, 15:18]
    np.testing.assert_allclose(tool[0] + travelled, tool[-1], atol=0.03)
    # The command of frame t is met at frame t + 1, not at frame t.
    later = np.abs(joint.proprio_TS[1:, :7] - joint.actions_TA[:-1, :7]).mean()
    assert later < np.abs(joint.proprio_TS[:, :7] - joint.actions_TA[:, :7]).mean()
    for episode in (joint, delta):
        spec = embodiment_of(episode.config)
        assert len(spec.action) == episode.actions_TA.shape[1]
        assert len(spec.proprio) == episode.proprio_TS.shape[1]


def test_forces_are_recorded_only_on_request():
    plain = embodiment_of(SMALL)
    asked = embodiment_of(dataclasses.replace(SMALL, forces=True))
    assert not any(dimension.kind == "force" for dimension in plain.proprio)
    assert sum(dimension.kind == "force" for dimension in asked.proprio) == 7
    assert plain.embodiment != asked.embodiment
    episode = generate("rigid", 0, dataclasses.replace(SMALL, forces=True), render=False)
    assert episode.proprio_TS.shape[1] == len(asked.proprio)


def test_a_third_of_the_episodes_explore():
    policies = [generate("rigid", seed, LabConfig(frames=4), render=False).plan.policy for seed in range(60)]
    share = np.mean([policy.startswith("explore") for policy in policies])
    assert 0.2 < share < 0.52
    assert len(set(policies)) >= 5


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="soup"):
        generate("soup", 0, SMALL)
    with pytest.raises(ConfigError, match="seed"):
        generate("rigid", -1, SMALL)
    for wrong in ({"size": 96}, {"frames": 1}, {"frames": 300}, {"exploration": 2.0}, {"variety": "garish"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LabConfig(**wrong)  # type: ignore[arg-type]


def test_masks_are_packed_and_unpacked():
    mask = np.random.default_rng(0).random((5, 16, 12)) < 0.3
    packed = truth.pack_mask(mask)
    assert np.array_equal(truth.unpack_mask(packed), mask)
    for damaged in ({**packed, "shape": [5, 16, 13]}, {**packed, "bits": "!"}, {"shape": [1, 8, 8]}):
        with pytest.raises(DataError, match="packed mask"):
            truth.unpack_mask(damaged)
