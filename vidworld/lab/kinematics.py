"""Inverse kinematics of the arm and smooth paths of its tool.

Damped least squares with a null-space pull towards the home posture (Buss, "Introduction to Inverse
Kinematics", 2009, eq. 11 and section 7). A path whose residual stays large anywhere is rejected whole.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vidworld.lab.gl import mujoco

DAMPING = 1e-4
POSTURE_GAIN = 0.05
RADIAN_M = 0.05
"""A radian of wrong orientation counts as this many metres."""
TOLERANCE_M = 0.01
MOST_STEP_RAD = 0.3
"""Largest change of a joint target in a frame: 3.75 rad/s."""


def rotation_rpy(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Rotation matrix [3, 3] of fixed-axis roll, pitch, yaw in radians."""
    cr, sr, cp, sp = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch)
    cy, sy = np.cos(yaw), np.sin(yaw)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def tool_down(yaw: float) -> np.ndarray:
    """Rotation [3, 3] of a tool that points down; at yaw 0 the gripper opens along y."""
    return rotation_rpy(np.pi, 0.0, yaw)


def minimum_jerk(
    times_N: Sequence[float] | np.ndarray, values_ND: np.ndarray, at_T: np.ndarray
) -> np.ndarray:
    """Values [T, D] at times `at_T`: rest to rest between waypoints with the quintic s^3 (10 - 15 s + 6 s^2).

    Times ascend, in seconds; before the first and after the last waypoint the value is held (Flash and Hogan,
    1985).
    """
    times, values = np.asarray(times_N, float), np.asarray(values_ND, float)
    if len(times) < 2 or (np.diff(times) <= 0).any() or len(values) != len(times):
        raise ValueError(f"waypoints at {list(times)} s; expected two or more ascending times, a value each")
    after = np.clip(np.searchsorted(times, at_T, side="right"), 1, len(times) - 1)
    share = np.clip((at_T - times[after - 1]) / (times[after] - times[after - 1]), 0, 1)
    smooth = (share**3 * (10 - 15 * share + 6 * share**2))[:, None]
    return values[after - 1] + (values[after] - values[after - 1]) * smooth


def slerp(first_33: np.ndarray, last_33: np.ndarray, share_T: np.ndarray) -> np.ndarray:
    """Rotations [T, 3, 3] on the shortest arc from one to another."""
    start, relative, axis, quat, out = np.zeros(4), np.zeros(4), np.zeros(3), np.zeros(4), np.zeros(9)
    mujoco.mju_mat2Quat(start, np.ascontiguousarray(first_33, float).ravel())
    mujoco.mju_mat2Quat(relative, np.ascontiguousarray(first_33.T @ last_33, float).ravel())
    mujoco.mju_quat2Vel(axis, relative, 1.0)
    rotations = []
    for share in share_T:
        quat[:] = start
        mujoco.mju_quatIntegrate(quat, axis, float(share))
        mujoco.mju_quat2Mat(out, quat)
        rotations.append(out.reshape(3, 3).copy())
    return np.array(rotations)


class ArmPlanner:
    """Forward and inverse kinematics of a compiled arm; holds its own state, no scene is touched.

    `joints` are the names of its seven hinges, `tool_offset_3` moves the tool centre point in the
    frame of the site `tool`.
    """

    def __init__(
        self,
        model: Any,
        joints: Sequence[str],
        home_J: np.ndarray,
        tool_offset_3: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        self.model, self.data, self.home_J = model, mujoco.MjData(model), np.asarray(home_J, float)
        ids = [model.joint(name).id for name in joints]
        self._qpos, self._dof = model.jnt_qposadr[ids], model.jnt_dofadr[ids]
        margin = 0.01
        self.low_J, self.high_J = model.jnt_range[ids, 0] + margin, model.jnt_range[ids, 1] - margin
        self._site = model.site("tool").id
        self._body = int(model.site_bodyid[self._site])
        self._offset_3 = np.asarray(tool_offset_3, float)

    def forward(self, joints_J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position [3] in metres and rotation [3, 3] of the tool centre point."""
        self.data.qpos[self._qpos] = joints_J
        mujoco.mj_kinematics(self.model, self.data)
        rotation_33 = self.data.site_xmat[self._site].reshape(3, 3).copy()
        return self.data.site_xpos[self._site] + rotation_33 @ self._offset_3, rotation_33

    def solve(
        self, position_3: np.ndarray, rotation_33: np.ndarray, start_J: np.ndarray, iterations: int = 12
    ) -> tuple[np.ndarray, float]:
        """Joint angles [7] nearest to a pose of the tool, from `start_J`, and the residual in metres."""
        joints_J = np.clip(start_J, self.low_J, self.high_J)
        jacobian = np.zeros((6, self.model.nv))
        error_6, relative, identity = np.zeros(6), np.zeros(4), np.eye(len(joints_J))
        residual = np.inf
        for step in range(iterations + 1):
            point_3, current_33 = self.forward(joints_J)
            error_6[:3] = position_3 - point_3
            mujoco.mju_mat2Quat(relative, (rotation_33 @ current_33.T).ravel())
            mujoco.mju_quat2Vel(error_6[3:], relative, 1.0)
            residual = float(np.linalg.norm(error_6[:3]) + RADIAN_M * np.linalg.norm(error_6[3:]))
            if residual < 1e-5 or step == iterations:
                break
            mujoco.mj_comPos(self.model, self.data)
            mujoco.mj_jac(self.model, self.data, jacobian[:3], jacobian[3:], point_3, self._body)
            arm_6J = jacobian[:, self._dof]
            inverse_J6 = np.linalg.solve(arm_6J @ arm_6J.T + DAMPING * np.eye(6), arm_6J).T
            change_J = inverse_J6 @ error_6
            change_J += (identity - inverse_J6 @ arm_6J) @ (POSTURE_GAIN * (self.home_J - joints_J))
            joints_J = np.clip(joints_J + np.clip(change_J, -0.3, 0.3), self.low_J, self.high_J)
        return joints_J, residual

    def path(
        self, positions_T3: np.ndarray, rotations_T33: np.ndarray, start_J: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Joint targets [T, 7] along poses of the tool; None where one is out of reach or a joint would jump.

        Without `start_J` the first pose is searched from the home posture.
        """
        rotations_T33 = np.broadcast_to(rotations_T33, (len(positions_T3), 3, 3))
        joints_J = self.home_J if start_J is None else np.asarray(start_J, float)
        first = 60 if start_J is None else 12
        rows: list[np.ndarray] = []
        for position_3, rotation_33 in zip(positions_T3, rotations_T33, strict=True):
            found_J, residual = self.solve(position_3, rotation_33, joints_J, 12 if rows else first)
            jumped = (rows or start_J is not None) and np.abs(found_J - joints_J).max() > MOST_STEP_RAD
            if residual > TOLERANCE_M or jumped:
                return None
            joints_J = found_J
            rows.append(found_J)
        return np.array(rows)
