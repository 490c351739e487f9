"""The arm: our own, made of primitives, or any MJCF arm that names its joints as ours does.

What is asked of an MJCF file: seven hinges `joint1`..`joint7`, two slides `finger_joint1`, `finger_joint2`
that open towards their upper limit, and a site `tool` between the finger tips whose z axis points out of the
gripper and whose y axis is the one it opens along. Its base stands at the origin of the world. Actuators,
cameras, lights and tendons of the file are replaced; a keyframe `home` gives the resting posture.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from vidworld.errors import ConfigError
from vidworld.lab.gl import mujoco

JOINTS = tuple(f"joint{index}" for index in range(1, 8))
FINGERS = ("finger_joint1", "finger_joint2")
TOOL = "tool"
HOME_J = (0.0, 0.1, 0.0, -2.1, 0.0, 2.2, np.pi / 4)
STIFFNESS = (4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0)
"""Position gains, N m / rad."""
DAMPING = (450.0, 450.0, 350.0, 350.0, 200.0, 200.0, 200.0)
TORQUE = (87.0, 87.0, 87.0, 87.0, 16.0, 16.0, 16.0)
"""Limits, N m."""
GRIP = (1500.0, 60.0, 40.0)
"""Stiffness N/m, damping N s/m and limit N of a finger."""

MJCF = """
<mujoco model="vidworld_arm">
  <compiler angle="radian" autolimits="true"/>
  <default>
    <joint armature="0.1" damping="1"/>
    <geom contype="2" conaffinity="1" density="500" friction="0.8 0.01 0.001"/>
  </default>
  <asset>
    <material name="shell" rgba="0.92 0.92 0.9 1" specular="0.35" shininess="0.5"/>
    <material name="joint" rgba="0.17 0.19 0.23 1" specular="0.4" shininess="0.6"/>
    <material name="accent" rgba="0.94 0.47 0.11 1" specular="0.3" shininess="0.4"/>
    <material name="pad" rgba="0.24 0.25 0.27 1" specular="0.05" shininess="0.1"/>
  </asset>
  <worldbody>
    <body name="base">
      <geom type="cylinder" size="0.1 0.02" pos="0 0 0.02" material="joint"/>
      <geom type="cylinder" size="0.075 0.085" pos="0 0 0.12" material="shell"/>
      <geom type="cylinder" size="0.077 0.009" pos="0 0 0.2" material="accent"/>
      <body name="link1" pos="0 0 0.333">
        <joint name="joint1" range="-2.8973 2.8973" axis="0 0 1"/>
        <geom type="capsule" size="0.066" fromto="0 0 -0.1 0 0 0" material="shell"/>
        <geom type="cylinder" size="0.069 0.072" euler="1.5708 0 0" material="joint"/>
        <body name="link2" quat="1 -1 0 0">
          <joint name="joint2" range="-1.7628 1.7628" axis="0 0 1"/>
          <geom type="capsule" size="0.061" fromto="0 -0.04 0 0 -0.25 0" material="shell"/>
          <geom type="cylinder" size="0.063 0.011" pos="0 -0.235 0" euler="1.5708 0 0" material="accent"/>
          <body name="link3" pos="0 -0.316 0" quat="1 1 0 0">
            <joint name="joint3" range="-2.8973 2.8973" axis="0 0 1"/>
            <geom type="capsule" size="0.056" fromto="0 0 -0.03 0.0825 0 0" material="shell"/>
            <geom type="cylinder" size="0.06 0.066" pos="0.0825 0 0" euler="1.5708 0 0" material="joint"/>
            <body name="link4" pos="0.0825 0 0" quat="1 1 0 0">
              <joint name="joint4" range="-3.0718 -0.0698" axis="0 0 1"/>
              <geom type="capsule" size="0.053" fromto="0 0.02 0 -0.0825 0.13 0" material="shell"/>
              <body name="link5" pos="-0.0825 0.384 0" quat="1 -1 0 0">
                <joint name="joint5" range="-2.8973 2.8973" axis="0 0 1"/>
                <geom type="capsule" size="0.049" fromto="0 0 -0.24 0 0 -0.03" material="shell"/>
                <geom type="cylinder" size="0.051 0.009" pos="0 0 -0.2" material="accent"/>
                <geom type="cylinder" size="0.053 0.058" euler="1.5708 0 0" material="joint"/>
                <body name="link6" quat="1 1 0 0">
                  <joint name="joint6" range="-0.0175 3.7525" axis="0 0 1"/>
                  <geom type="capsule" size="0.046" fromto="0 0 0 0.088 0 0" material="shell"/>
                  <body name="link7" pos="0.088 0 0" quat="1 1 0 0">
                    <joint name="joint7" range="-2.8973 2.8973" axis="0 0 1"/>
                    <geom type="cylinder" size="0.043 0.048" pos="0 0 0.05" material="joint"/>
                    <geom type="cylinder" size="0.045 0.007" pos="0 0 0.088" material="accent"/>
                    <body name="hand" pos="0 0 0.107" quat="0.9238795 0 0 -0.3826834">
                      <geom type="box" size="0.03 0.082 0.022" pos="0 0 0.014" material="shell"/>
                      <geom type="box" size="0.026 0.078 0.007" pos="0 0 0.042" material="joint"/>
                      <site name="tool" pos="0 0 0.113" size="0.004" group="5"/>
                      <body name="finger1" pos="0 0 0.048">
                        <joint name="finger_joint1" type="slide" axis="0 1 0" range="0 0.045" armature="0.2"
                               damping="10"/>
                        <geom type="box" size="0.013 0.008 0.036" pos="0 0.008 0.036" material="pad"
                              condim="4" friction="1.4 0.02 0.001" priority="1"/>
                      </body>
                      <body name="finger2" pos="0 0 0.048" quat="0 0 0 1">
                        <joint name="finger_joint2" type="slide" axis="0 1 0" range="0 0.045" armature="0.2"
                               damping="10"/>
                        <geom type="box" size="0.013 0.008 0.036" pos="0 0.008 0.036" material="pad"
                              condim="4" friction="1.4 0.02 0.001" priority="1"/>
                      </body>
                    </body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""


def load_arm(robot: Path | None = None) -> Any:
    """The arm as a `mujoco.MjSpec` with our own actuators: seven joint servos, then two fingers.

    Raises ConfigError for a file that is missing, is no MJCF, or lacks a joint or site that is needed.
    """
    if robot is None:
        spec = mujoco.MjSpec.from_string(MJCF)
    elif not Path(robot).is_file():
        raise ConfigError("--robot", got=f"{robot}, no such file", expected="an MJCF file")
    else:
        try:
            spec = mujoco.MjSpec.from_file(str(robot))
            spec.compile()
        except ValueError as error:
            raise ConfigError("--robot is no MJCF that compiles", where=robot, got=error) from None
        _check(spec, robot)
    for elements in (spec.actuators, spec.tendons, spec.cameras, spec.lights):
        for element in list(elements):
            spec.delete(element)
    for body in spec.bodies:
        if body.name != "world":
            body.gravcomp = 1
            # The arm meets the world (contype 1) and never itself.
            for geom in body.geoms:
                if geom.contype or geom.conaffinity:
                    geom.contype, geom.conaffinity = 2, 1
    _forget_defaults(spec)
    for name, stiffness, damping, torque in zip(JOINTS, STIFFNESS, DAMPING, TORQUE, strict=True):
        _add_servo(spec, name, stiffness, damping, torque)
    for name in FINGERS:
        _add_servo(spec, name, *GRIP)
    return spec


def fingerprint_of(robot: Path) -> str:
    """Digest of a file's arm as MuJoCo compiles it, meshes and textures included; not of where it lies."""
    model = load_arm(robot).compile()
    content = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return hashlib.sha256(content.tobytes()).hexdigest()


def home_of(spec: Any, robot: Path | None) -> np.ndarray:
    """Resting posture [7] in radians: the keyframe `home` of a file, or the middle of each joint's range."""
    if robot is None:
        return np.array(HOME_J)
    model = spec.compile()
    ids = [model.joint(name).id for name in JOINTS]
    keys = [model.key(index) for index in range(model.nkey)]
    for key in keys:
        if key.name == "home":
            return np.array(key.qpos[model.jnt_qposadr[ids]], float)
    return model.jnt_range[ids].mean(axis=1)


def _forget_defaults(spec: Any) -> None:
    """Reset the file's main defaults, which the table and the objects added later would take over."""
    plain = mujoco.MjSpec().default
    for name in (
        "contype",
        "conaffinity",
        "condim",
        "group",
        "priority",
        "density",
        "margin",
        "gap",
        "solmix",
    ):
        setattr(spec.default.geom, name, getattr(plain.geom, name))
    for name in ("friction", "solref", "solimp", "rgba"):
        setattr(spec.default.geom, name, list(getattr(plain.geom, name)))
    spec.default.geom.material = ""
    for name in ("armature", "frictionloss", "margin"):
        setattr(spec.default.joint, name, getattr(plain.joint, name))


def _add_servo(spec: Any, joint: str, stiffness: float, damping: float, limit: float) -> None:
    servo = spec.add_actuator(name=f"servo_{joint}", target=joint)
    servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
    servo.gaintype, servo.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
    servo.gainprm[0] = stiffness
    servo.biasprm[:3] = [0.0, -stiffness, -damping]
    servo.forcelimited, servo.forcerange = True, [-limit, limit]


def _check(spec: Any, robot: Path) -> None:
    """Refuse a file that lacks what the lab addresses by name."""
    hinge, slide = mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE
    types = {joint.name: joint.type for joint in spec.joints}
    wanted = {**dict.fromkeys(JOINTS, hinge), **dict.fromkeys(FINGERS, slide)}
    missing = [name for name, kind in wanted.items() if types.get(name) != kind]
    if missing:
        raise ConfigError(
            f"--robot lacks the joint {missing[0]!r}",
            where=robot,
            got=", ".join(name for name in types if name) or "no named joints",
            expected="hinges joint1..joint7, slides finger_joint1 and finger_joint2",
        )
    if TOOL not in {site.name for site in spec.sites}:
        raise ConfigError(
            f"--robot lacks the site {TOOL!r}",
            where=robot,
            fix=f'add <site name="{TOOL}" .../> between the finger tips, z out of the gripper',
        )
    model = spec.compile()
    free = [name for name in wanted if not model.jnt_limited[model.joint(name).id]]
    if free:
        raise ConfigError(f"--robot: joint {free[0]!r} has no range", where=robot)
