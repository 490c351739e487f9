"""Contract files that change numbers, checked on the numbers."""

import dataclasses
import pickle

import numpy as np
import pytest

from vidworld.config import to_mapping
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data import rotation
from vidworld.data.contract_file import read_contracts
from vidworld.data.sources.base import video_of
from vidworld.errors import ConfigError, DataError
from vidworld.types import EmbodimentSpec, Episode

POSE = tuple(Dimension(f"ee_{name}", kind="position") for name in ("x", "y", "z", "roll", "pitch", "yaw"))
ARM = EmbodimentSpec(
    "arm",
    10,
    action=(Dimension("joint_0"), Dimension("joint_1"), Dimension("gripper")),
    proprio=(*POSE, Dimension("gripper", "1", "position")),
    note="from the logs",
)
ROWS = 40


def states() -> np.ndarray:
    """A pose whose yaw passes pi, and a gripper that closes."""
    time = np.linspace(0, 1, ROWS)
    yaw = 2.5 + 1.5 * time
    columns = [100 * time, 50 - time, 0 * time, 0.3 * time, -0.2 * time, yaw, time]
    result = np.stack(columns, 1)
    result[:, 5] = (result[:, 5] + np.pi) % (2 * np.pi) - np.pi
    return result


def actions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-90, 90, (ROWS, 3)) * [1, 1, 0] + [0, 0, 0.2]


@pytest.fixture
def mapped(contract_file):
    """Reads a contract file and maps the robot's numbers: (spec, actions, proprio)."""

    def apply(text, spec=ARM, actions_TA=None, proprio_TS=None):
        described = read_contracts(contract_file(text), [spec])[spec.embodiment]
        episode = Episode(
            "e",
            "arm",
            10,
            {"top": video_of([])},
            actions() if actions_TA is None else actions_TA,
            states() if proprio_TS is None else proprio_TS,
            np.arange(ROWS) / 10,
        )
        assert described.mapping is not None
        assert pickle.loads(pickle.dumps(described.mapping)) == described.mapping
        to_mapping(described.mapping)
        done = described.mapping.mapped(episode)
        assert done.actions_TA.shape == (ROWS, len(described.spec.action))
        assert done.proprio_TS.shape == (ROWS, len(described.spec.proprio))
        return described.spec, done.actions_TA, done.proprio_TS

    return apply


def names(dimensions) -> str:
    return " ".join(dimension.name for dimension in dimensions)


def test_units_are_converted_and_renamed(mapped):
    spec, action, proprio = mapped(
        """
        action: {joint_*: {unit: deg, kind: position, to: rad}}
        proprio: {'ee_[xyz]': {unit: mm, to: m}}
        """
    )
    assert action[:, :2] == pytest.approx(np.deg2rad(actions()[:, :2]))
    assert proprio[:, :3] == pytest.approx(states()[:, :3] / 1000)
    assert (proprio[:, 3:] == states()[:, 3:]).all(), "the others are untouched"
    assert [d.unit for d in spec.action] == ["rad", "rad", "unknown"]
    assert [d.unit for d in spec.proprio[:4]] == ["m", "m", "m", "unknown"]
    assert (
        spec.note
        == "from the logs; action: joint_0, joint_1 = deg to rad; proprio: ee_x, ee_y, ee_z = mm to m"
    )


@pytest.mark.parametrize(
    ("facts", "recorded", "expected", "unit", "kind"),
    [
        ("invert: true, kind: position", [0, 0.2, 1], [1, 0.8, 0], "1", "position"),
        ("scale: 12.5, unit: '1'", [0, 0.08, 0.04], [0, 1, 0.5], "1", "position"),
        ("scale: -1, offset: 1", [0, 0.25, 1], [1, 0.75, 0], "1", "position"),
        ("scale: 12.5, threshold: 0.5", [0, 0.08, 0.04], [0, 1, 0], "1", "binary"),
        ("threshold: 0.5, invert: true", [0, 0.51, 0.5], [1, 0, 1], "1", "binary"),
        ("threshold: 0, kind: binary", [-1, 1, -1], [0, 1, 0], "1", "binary"),
    ],
)
def test_gripper_conventions(mapped, facts, recorded, expected, unit, kind):
    table = states()
    table[:3, 6] = recorded
    table[3:, 6] = recorded[0]
    spec, _, proprio = mapped(f"proprio: {{gripper: {{{facts}}}}}", proprio_TS=table)
    assert proprio[:3, 6] == pytest.approx(expected)
    assert (spec.proprio[6].unit, spec.proprio[6].kind) == (unit, kind)
    assert "gripper = " in spec.note


def test_what_is_no_ratio_is_not_inverted(mapped):
    table = states()
    table[7, 6] = 80
    with pytest.raises(
        DataError, match=r"'gripper' to be inverted, at row 7: got 80, expected 0 to 1; give sc"
    ):
        mapped("proprio: {gripper: {invert: true}}", proprio_TS=table)


ROTATION = "rotation: {dims: [ee_roll, ee_pitch, ee_yaw], from: euler_xyz, to: %s}"


@pytest.mark.parametrize(
    "to", ["rot6d", "quaternion_xyzw", "quaternion_wxyz", "axis_angle", "matrix", "euler_ZYX"]
)
def test_rotations_are_expressed_anew_without_jumps(mapped, to):
    spec, action, proprio = mapped(ROTATION % to)
    width = rotation.width_of(to)
    group = spec.proprio[3 : 3 + width]
    assert {(d.rotation, d.kind, d.unit) for d in group} == {
        (to, "position", "rad" if rotation.in_radians(to) else "1")
    }
    assert len({d.name for d in group}) == width
    assert spec.proprio[3 + width :] == ARM.proprio[6:]
    assert (proprio[:, -1] == states()[:, -1]).all()
    truth = rotation.to_matrix(states()[:, 3:6], "euler_xyz")
    found = rotation.to_matrix(proprio[:, 3 : 3 + width], to)
    assert rotation.angle_between(found, truth).max() < 1e-9
    assert np.abs(np.diff(proprio[:, 3 : 3 + width], axis=0)).max() < 0.2
    assert np.abs(np.diff(states()[:, 3:6], axis=0)).max() > 6, "the negative control: as recorded"
    assert (action == actions()).all()


def test_a_rotation_may_be_declared_only(mapped):
    text = ROTATION.replace(", to: %s", "")
    spec, _, proprio = mapped(text)
    assert names(spec.proprio) == names(ARM.proprio)
    assert {d.rotation for d in spec.proprio[3:6]} == {"euler_xyz"}
    assert proprio[:, 5] == pytest.approx(np.unwrap(states()[:, 5]))
    _, _, left = mapped(text.replace("}", ", continuous: false}"))
    assert (left == states()).all()


def test_quaternions_that_flip_their_sign(mapped):
    quaternions = rotation.convert(states()[:, 3:6], "euler_xyz", "quaternion_xyzw")
    quaternions[1::2] *= -1
    table = np.concatenate([states()[:, :3], quaternions], 1)
    spec = dataclasses.replace(
        ARM, proprio=(*POSE[:3], *(Dimension(f"q{axis}", "1", "position") for axis in "xyzw"))
    )
    done, _, proprio = mapped(
        "rotation: {dims: [qx, qy, qz, qw], from: quaternion_xyzw}", spec=spec, proprio_TS=table
    )
    assert names(done.proprio) == names(spec.proprio)
    assert np.abs(np.diff(table[:, 3:], axis=0)).max() > 1, "the negative control"
    assert np.abs(np.diff(proprio[:, 3:], axis=0)).max() < 0.05


def test_columns_are_kept_in_the_order_asked_for(mapped):
    spec, action, proprio = mapped("action_keep: [gripper, joint_0]\nproprio_keep: ['ee_[yx]', gripper]")
    assert (names(spec.action), names(spec.proprio)) == ("gripper joint_0", "ee_x ee_y gripper")
    assert (action == actions()[:, [2, 0]]).all()
    assert (proprio == states()[:, [0, 1, 6]]).all()
    everything = "action_keep: [gripper, '*']"
    assert names(mapped(everything)[0].action) == "gripper joint_0 joint_1"


def test_the_next_state_as_action(mapped):
    spec, action, proprio = mapped("action_from: next_state\n" + ROTATION % "rot6d")
    assert spec.action == spec.proprio
    assert (action[:-1] == proprio[1:]).all()
    assert (action[-1] == proprio[-1]).all(), "no frame follows the last"
    assert "the action is the state of the next frame: ee_x" in spec.note


def test_the_change_of_state_as_action(mapped):
    table = states()
    table[:, 6] = np.arange(ROWS) % 2
    spec, action, proprio = mapped(
        """
        control_frame: base
        proprio: {gripper: {kind: binary}}
        action_from: {ee_*: state_delta, gripper: next_state}
        rotation: {dims: [ee_roll, ee_pitch, ee_yaw], from: euler_xyz, to: axis_angle}
        """,
        proprio_TS=table,
    )
    assert names(spec.action) == "ee_x ee_y ee_z ee_rx ee_ry ee_rz gripper"
    assert [d.kind for d in spec.action] == ["delta"] * 6 + ["binary"]
    assert np.cumsum(action[:-1, :3], axis=0) + table[0, :3] == pytest.approx(table[1:, :3])
    assert (action[:-1, 6] == table[1:, 6]).all()
    turned = rotation.to_matrix(table[0, 3:6], "euler_xyz")
    for row in range(ROWS - 1):
        turned = rotation.to_matrix(action[row, 3:6], "axis_angle") @ turned
        truth = rotation.to_matrix(table[row + 1, 3:6], "euler_xyz")
        assert rotation.angle_between(turned, truth) < 1e-7
    assert np.abs(action[:, 3:6]).max() < 0.1, "small, also where yaw wraps"
    assert action[-1, :6] == pytest.approx(0)
    assert proprio.shape[1] == 7


def test_changes_of_wrapping_angles_need_a_rotation(mapped):
    with pytest.raises(
        DataError, match=r"'ee_yaw' cannot be an action by its change: it jumps at row 17.*declare"
    ):
        mapped("action_from: state_delta\ncontrol_frame: base\nproprio: {ee_yaw: {unit: rad}}")


def test_degrees_do_not_pass_for_radians(mapped):
    table = states()
    table[:, 3:6] = np.rad2deg(table[:, 3:6])
    with pytest.raises(DataError, match=r"angles ee_roll, .*got 179.*, expected radians; .*to: rad"):
        mapped(ROTATION % "rot6d", proprio_TS=table)
    said = "proprio: {'ee_[rp]*': {unit: deg, to: rad}, ee_yaw: {unit: deg, to: rad}}"
    _, _, proprio = mapped(f"{said}\n{ROTATION % 'rot6d'}", proprio_TS=table)
    assert proprio == pytest.approx(mapped(ROTATION % "rot6d")[2])


def test_differently_mapped_never_looks_equal(contract_file):
    """Even where the same dimensions and the same statistics come out."""
    texts = [
        "note: x",
        "note: x\nproprio: {gripper: {invert: true}}",
        "note: x\nproprio: {gripper: {scale: -1, offset: 1}}",
        "note: x\nproprio: {gripper: {threshold: 0.5, kind: position}}",
        "note: x\n" + ROTATION % "euler_xyz",
        "note: x\n" + (ROTATION % "euler_xyz").replace("}", ", continuous: false}"),
        "note: x\naction_from: next_state",
    ]
    digests = set()
    for text in texts:
        spec = read_contracts(contract_file(text), [ARM])["arm"].spec
        still, idle = (Statistics.of(np.zeros((1, len(role)))) for role in (spec.action, spec.proprio))
        contract = ActionContract("arm", 10, spec.action, spec.proprio, still, idle, note=spec.note)
        assert ActionContract.from_mapping(contract.to_mapping()) == contract
        digests.add(contract.digest)
    assert len(digests) == len(texts)


def test_digests_of_before_stay():
    """Written by vidworld 0.1, before dimensions could be part of a rotation."""
    plain = Dimension("v", "m/s", "velocity")
    assert to_mapping(plain) == {"name": "v", "unit": "m/s", "kind": "velocity"}
    assert to_mapping(dataclasses.replace(plain, rotation="rot6d"))["rotation"] == "rot6d"
    statistics = Statistics.of(np.array([[0.0], [1.0]]))
    contract = ActionContract("arm", 10, (plain,), (plain,), statistics, statistics)
    assert contract.digest == "96bd385849e5b921"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "action: {joint_0: {unit: deg, to: m}}",
            r"unit conversion in 'joint_0' of action of .*: got deg to m, exp",
        ),
        ("action: {joint_0: {to: rad}}", "unit conversion .*got unknown to rad"),
        ("action: {joint_0: {unit: deg, to: rad, scale: 2}}", "both `to` and `scale` or `offset`"),
        ("action: {joint_0: {scale: big}}", "setting 'scale' in 'joint_0'"),
        ("action: {joint_0: {scale: 0}}", "scale in 'joint_0' of action of .*: got 0, expected not 0"),
        ("action: {joint_0: {offset: .nan}}", "offset.*nan"),
        ("proprio: {gripper: {threshold: .inf}}", "threshold.*inf"),
        ("action: {joint_0: {invrt: true}}", "unknown setting 'invrt' .*did you mean 'invert'"),
        ("rate_hz: 0", "rate_hz .*got 0.0, expected rows a second, more than 0"),
        ("action_keep: [grip]", r"no dimension is called 'grip' in action_keep .*did you mean 'gripper'"),
        ("action_from: next", "action_from in .*got next, expected next_state or state_delta"),
        ("action_from: {elbow: next_state}", "no dimension is called 'elbow' in action_from"),
        ("action_from: next_state\nproprio: {ee_x: {kind: unknown}}", "kind of 'ee_x'.*say it under proprio"),
        (
            "action_from: state_delta\n" + ROTATION % "rot6d",
            "state_delta with a rotation .*got control_frame unknown, expected control_frame: base",
        ),
        (
            "rotation: {dims: [ee_roll], from: euler_xyz}",
            "dims of a rotation .*got ee_roll, expected 3 names",
        ),
        (
            "rotation: {dims: [a, b, c], from: euler_xyz}",
            "no rotation a, b, c .*expected action or proprio to have",
        ),
        ("rotation: {dims: [ee_roll, ee_pitch, ee_yaw]}", "rotation without 'from'"),
        ("rotation: [{from: euler_xyz}]", "rotation without 'dims'"),
        (ROTATION % "rpy", "rotation representation: got 'rpy'"),
        (ROTATION % "rot6d, of: state", "of in rotation of .*got state, expected action or proprio"),
        (ROTATION % "rot6d, of: action", "no rotation .*expected action to have all"),
        (ROTATION % "rot6d, contnuous: true", "did you mean 'continuous'"),
        (
            "proprio: {ee_yaw: {kind: delta}}\n" + ROTATION % "rot6d",
            "kinds of the rotation .*got delta, position",
        ),
        ("proprio: {'ee_*': {kind: unknown}}\n" + ROTATION % "rot6d", "kinds of the rotation .*got unknown"),
        (
            "proprio: {ee_yaw: {unit: deg}}\n" + ROTATION % "rot6d",
            "unit of the rotation .*got deg, .*`to: rad`",
        ),
        ("proprio: {ee_x: {name: ee_y}}", "two proprio dimensions of one name: got 'ee_y'"),
    ],
)
def test_mistakes_are_named(mapped, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        mapped(text)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
