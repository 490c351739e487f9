"""What can go wrong while the lab makes shards: each time one line, and nothing half-written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vidworld import cli, media
from vidworld.data.shards import ShardWriter

pytest.importorskip("mujoco", reason='needs pip install "vidworld[lab]"')

from vidworld.lab import arm, gl, kernels
from vidworld.lab.effect import EFFECTS
from vidworld.lab.episode import LabConfig, embodiment_of, generate
from vidworld.lab_command import LabSource

needs_gl = pytest.mark.skipif(not gl.can_render(), reason=f"no headless OpenGL: {gl.INSTALL}")
SMALL = ["--episodes", "4", "--frames", "6", "--size", "64", "--workers", "1"]


def second_arm(path: Path, reach: float = 0.43) -> Path:
    """An arm of another maker: a longer or shorter forearm, a round hand, defaults, a keyframe, actuators."""
    text = arm.MJCF.replace('"vidworld_arm"', '"other"').replace("-0.0825 0.384 0", f"-0.0825 {reach} 0")
    text = text.replace('<geom type="box" size="0.03 0.082 0.022"', '<geom type="cylinder" size="0.06 0.022"')
    home = "0 -0.2 0 -2.2 0 2 0.8 0.04 0.04"
    extra = f"""<keyframe><key name="home" qpos="{home}"/></keyframe>
    <actuator><motor joint="joint1"/></actuator><worldbody><light pos="0 0 3"/></worldbody></mujoco>"""
    path.write_text(
        text.replace("</mujoco>", extra).replace('density="500"', 'density="700" rgba="0.2 0.3 0.5 1"')
    )
    return path


def left_in(folder: Path) -> set[str]:
    return {
        path.name
        for path in folder.rglob("*")
        if path.suffix in (".tar", ".partial") or path.name == "manifest.json"
    }


@needs_gl
def test_another_arm_picks_too_and_is_told_apart(tmp_path, capsys):
    robot = second_arm(tmp_path / "other.v2.xml")
    config = LabConfig(size=64, exploration=0.0, robot=robot)
    lifts = []
    for seed in range(12):
        episode = generate("rigid", seed, config, render=False)
        if episode.plan.policy == "script:pick":
            lifts.append(episode.outcomes_T["target_lift_m"].max() > 0.06)
    assert len(lifts) >= 3
    assert np.mean(lifts) >= 0.8
    assert embodiment_of(config).embodiment == "other_v2_joint"
    before = LabSource("rigid", 4, 0, config).fingerprint
    moved = second_arm(tmp_path / "moved.xml")
    assert LabSource("rigid", 4, 0, LabConfig(size=64, exploration=0.0, robot=moved)).fingerprint == before
    second_arm(robot, reach=0.42)
    assert LabSource("rigid", 4, 0, config).fingerprint != before
    asked = ["lab", "rigid", *SMALL, "--robot", str(robot), "--out", str(tmp_path / "data")]
    assert cli.run(asked) == 0
    assert len(left_in(tmp_path / "data")) >= 2
    capsys.readouterr()


def test_an_arm_that_reaches_nothing_is_refused(tmp_path, capsys):
    robot = second_arm(tmp_path / "short.xml", reach=0.05)
    robot.write_text(robot.read_text().replace('pos="0 -0.316 0"', 'pos="0 -0.05 0"'))
    out = tmp_path / "data"
    assert cli.run(["lab", "rigid", *SMALL, "--robot", str(robot), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "no reachable plan in 40 attempts" in said
    assert "another seed or robot" in said
    assert not left_in(out)


def test_an_arm_without_the_named_joints_is_refused_before_anything_is_written(tmp_path, capsys):
    robot = tmp_path / "wrong.xml"
    robot.write_text(arm.MJCF.replace("joint4", "elbow"))
    for asked in (["lab", "rigid", *SMALL], ["lab", "show", "rigid"]):
        assert cli.run([*asked, "--robot", str(robot), "--out", str(tmp_path / "data")]) == 2
        assert "--robot lacks the joint 'joint4'" in capsys.readouterr().err
        assert not (tmp_path / "data").exists()


@needs_gl
def test_a_full_disk_leaves_no_shard_and_the_next_run_continues(tmp_path, capsys, monkeypatch):
    out, write = tmp_path / "data", media.write_png
    asked = ["lab", "rigid", *SMALL, "--out", str(out)]

    def full(*anything):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        assert cli.run(asked) == 2
    assert "no space left" in capsys.readouterr().err
    assert not left_in(out)
    with monkeypatch.context() as patch:
        patch.setattr(media, "write_png", full)
        assert cli.run(asked) == 2
    assert "only the sheet is made" in capsys.readouterr().err
    made = {
        name: (out / "shards" / name).stat().st_mtime_ns for name in left_in(out) if name.endswith(".tar")
    }
    monkeypatch.setattr(media, "write_png", write)
    assert cli.run(asked) == 0
    assert (out / "contact_sheet.png").is_file()
    assert made == {name: (out / "shards" / name).stat().st_mtime_ns for name in made}
    assert cli.run(["inspect", str(out)]) == 0
    capsys.readouterr()


@needs_gl
@pytest.mark.parametrize("kind", EFFECTS)
def test_every_kind_draws_every_size(kind):
    for size in (64, 128, 256):
        episode = generate(kind, 0, LabConfig(frames=2, size=size))
        assert episode.frames_THWC is not None
        assert episode.frames_THWC.shape == (2, size, size, 3)
        assert {mask.shape for mask in episode.masks_THW.values()} == {(2, size, size)}


@needs_gl
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", EFFECTS)
@pytest.mark.parametrize("exploration", [0.0, 1.0])
def test_every_kind_lasts_256_frames(kind, exploration):
    episode = generate(kind, 1, LabConfig(frames=256, size=64, exploration=exploration, variety="full"))
    assert episode.frames_THWC is not None
    assert episode.frames_THWC.shape == (256, 64, 64, 3)
    assert np.isfinite(episode.proprio_TS).all()
    assert all(np.isfinite(column).all() for column in episode.outcomes_T.values())
    moved = np.abs(np.diff(episode.frames_THWC[::8].astype(int), axis=0)).max((1, 2, 3))
    # A script's task may be done before the end; exploration goes on.
    assert np.median(moved if exploration else moved[:8]) > 20


def test_compiling_is_announced_once_and_only_when_it_happens():
    numba = pytest.importorskip("numba")
    said = []

    @numba.njit
    def double(x):
        return 2 * x

    @numba.njit
    def triple(x):
        return 3 * x

    with kernels.compiling(lambda: said.append(1)) as names:
        assert double(2) + triple(2) == 10
        assert double(3) == 6
    assert said == [1]
    assert names == ["double", "triple"]
    with kernels.compiling(lambda: said.append(2)):
        assert double(4) == 8
    assert said == [1]
    assert not kernels.warm_up("rigid", LabConfig(), lambda: said.append(3)), "MuJoCo alone plays it"


@needs_gl
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cold_start_is_announced_and_compiles_all_there_is(tmp_path):
    code = """
from vidworld.lab.episode import LabConfig, generate
from vidworld.lab.kernels import compiling, warm_up
for kind in ("paint", "smoke", "liquid"):
    assert warm_up(kind, LabConfig(), lambda: print("announced", kind))
    with compiling(lambda: None) as names:
        for seed, exploration in ((0, 0.0), (1, 1.0), (2, 0.0)):
            generate(kind, seed, LabConfig(size=64, exploration=exploration))
    assert not names, names
"""
    cold = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    outputs = [
        subprocess.run([sys.executable, "-c", code], env=cold, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert outputs[0].returncode == 0, outputs[0].stderr
    assert outputs[0].stdout.split() == ["announced", "paint", "announced", "smoke", "announced", "liquid"]
    assert "AssertionError" in outputs[1].stderr, "the second time all is cached"
    assert "announced" not in outputs[1].stdout


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """Process ids of the spawned workers of a running command."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        child for child in map(int, children) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@needs_gl
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes in /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_after_a_kill_the_next_run_makes_the_same_bytes(tmp_path, victim):
    asked = ["container", "--episodes", "140", "--frames", "4", "--size", "64", "--workers", "2"]
    command = [sys.executable, "-m", "vidworld", "lab", *asked, "--out"]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list(out.glob(".partial/train-*.json")):  # written after its shard
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers_of(process)[0] if victim == "worker" else process.pid, signal.SIGKILL)
    said = process.communicate(timeout=600)[1]
    if victim == "worker":
        assert process.returncode == 1
        assert "a worker process died" in said
        assert "Traceback" not in said
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("shards/*.tar"))
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(".partial/*.tar")}
    assert kept
    for folder in (out, whole):
        assert subprocess.run([*command, str(folder)], capture_output=True).returncode == 0
    both = [{p.name: p.read_bytes() for p in (folder / "shards").glob("*.tar")} for folder in (out, whole)]
    assert both[0] == both[1]
    now = {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("*.tar")}
    assert kept.items() <= now.items(), "finished shards are kept"
