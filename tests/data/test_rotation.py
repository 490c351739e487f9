"""Against matrices composed by hand, against values that SciPy 1.17 gave once, and against each other."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidworld.data import rotation
from vidworld.errors import ConfigError, DataError

ORDERS = ["".join(o) for o in itertools.product("xyz", repeat=3) if o[0] != o[1] != o[2]]
EULER = [f"euler_{order}" for order in ORDERS] + [f"euler_{order.upper()}" for order in ORDERS]
OTHERS = ["quaternion_xyzw", "quaternion_wxyz", "axis_angle", "rot6d", "matrix"]
ALL = [*EULER, *OTHERS]

# scipy.spatial.transform.Rotation.random(3, random_state=0): as_quat, as_euler("xyz"), as_rotvec
SCIPY_QUATERNIONS = np.array(
    [
        [0.579968660977, 0.131559951068, 0.32178033684, 0.73673994488],
        [-0.80602920167, 0.421788513921, -0.41005367048, 0.065325055722],
        [-0.06784102707, 0.269867602679, 0.094673246607, 0.955827415618],
    ]
)
SCIPY = {
    "quaternion_wxyz": np.roll(SCIPY_QUATERNIONS, 1, 1),
    "euler_xyz": [
        [1.268741495725, -0.180370504836, 0.69069520689],
        [-2.538491851495, -0.650926539526, -1.173374702976],
        [-0.092724225798, 0.557114419524, 0.170916989806],
    ],
    "euler_ZYX": [
        [0.69069520689, -0.180370504836, 1.268741495725],
        [-1.173374702976, -0.650926539526, -2.538491851495],
        [0.170916989806, 0.557114419524, -0.092724225798],
    ],
    "axis_angle": [
        [1.27381456194, 0.288951787768, 0.706742461088],
        [-2.432027290943, 1.272660065835, -1.237252589969],
        [-0.137715844134, 0.54782550195, 0.192184679928],
    ],
}


def turn(axis: str, angle: float) -> np.ndarray:
    """A turn written out by hand, as in any textbook."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array(
        {
            "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
            "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
            "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
        }[axis]
    )


def random_matrices(count: int, seed: int = 0) -> np.ndarray:
    quaternions = np.random.default_rng(seed).normal(size=(count, 4))
    return rotation.to_matrix(quaternions, "quaternion_xyzw")


@pytest.mark.parametrize("representation", EULER)
def test_euler_matrices_are_the_products_written_out(representation):
    order = representation.removeprefix("euler_")
    for angles in np.random.default_rng(1).uniform(-3, 3, (5, 3)):
        turns = [turn(axis, angle) for axis, angle in zip(order.lower(), angles, strict=True)]
        # About fixed axes a later turn is applied to what has been turned already: it goes to the left.
        turns = turns if order.isupper() else turns[::-1]
        expected = turns[0] @ turns[1] @ turns[2]
        assert rotation.to_matrix(angles, representation) == pytest.approx(expected, abs=1e-12)


def test_the_two_conventions_differ():
    angles = np.array([0.3, -0.5, 0.7])
    fixed, moving = (rotation.to_matrix(angles, name) for name in ("euler_xyz", "euler_XYZ"))
    assert np.abs(fixed - moving).max() > 0.1
    assert rotation.to_matrix(angles[::-1], "euler_ZYX") == pytest.approx(fixed)


@pytest.mark.parametrize("representation", SCIPY)
def test_values_of_scipy(representation):
    converted = rotation.convert(SCIPY_QUATERNIONS, "quaternion_xyzw", representation)
    assert converted == pytest.approx(np.array(SCIPY[representation]), abs=1e-9)


@pytest.mark.parametrize("representation", ALL)
def test_round_trips(representation):
    matrices = random_matrices(200)
    values = rotation.from_matrix(matrices, representation)
    assert values.shape == (200, rotation.width_of(representation))
    assert rotation.to_matrix(values, representation) == pytest.approx(matrices, abs=1e-9)
    # Leading axes of any number, and none.
    shaped = values.reshape(10, 20, -1)
    assert rotation.to_matrix(shaped, representation).shape == (10, 20, 3, 3)
    assert rotation.to_matrix(values[0], representation) == pytest.approx(matrices[0], abs=1e-9)
    assert rotation.convert(values[:0], representation, "rot6d").shape == (0, 6)


ANGLE = st.floats(-np.pi, np.pi)


@settings(deadline=None, max_examples=150)
@given(st.tuples(ANGLE, ANGLE, ANGLE), st.sampled_from(ALL), st.sampled_from(ALL))
def test_any_rotation_through_any_pair(angles, given, to):
    matrix = rotation.to_matrix(np.array(angles), "euler_xyz")
    through = rotation.convert(rotation.from_matrix(matrix, given), given, to)
    # A gimbal lock costs half of the digits.
    assert rotation.angle_between(rotation.to_matrix(through, to), matrix) < 2e-6


@pytest.mark.parametrize("representation", EULER)
def test_gimbal_lock_gives_the_same_rotation(representation):
    order = representation.removeprefix("euler_").lower()
    locked = (0.0, np.pi) if order[0] == order[2] else (np.pi / 2, -np.pi / 2)
    for middle, (first, last) in itertools.product(locked, [(0.3, 1.1), (-2.0, 0.4), (0.0, 0.0)]):
        matrix = rotation.to_matrix(np.array([first, middle, last]), representation)
        found = rotation.from_matrix(matrix, representation)
        assert found[2] == 0, "only a sum of two angles is determined: the third is 0"
        assert rotation.angle_between(rotation.to_matrix(found, representation), matrix) < 1e-6


@pytest.mark.parametrize(
    ("vector", "quaternion"),
    [
        ([0, 0, 0], [0, 0, 0, 1]),
        ([1e-9, 0, 0], [5e-10, 0, 0, 1]),
        ([np.pi, 0, 0], [1, 0, 0, 0]),
        ([0, 0, np.pi / 2], [0, 0, np.sqrt(0.5), np.sqrt(0.5)]),
    ],
)
def test_special_angles(vector, quaternion):
    found = rotation.convert(np.array(vector), "axis_angle", "quaternion_xyzw")
    assert np.abs(found) == pytest.approx(np.array(quaternion), abs=1e-12)
    assert rotation.convert(found, "quaternion_xyzw", "axis_angle") == pytest.approx(vector, abs=1e-12)


# Continuity: a wrist that keeps turning, recorded in wrapping numbers


def spinning(representation: str, count: int = 200) -> np.ndarray:
    """Two turns about a tilted axis, from a tilted start, steps of 3.6 degrees."""
    axis = np.array([0.2, -0.1, 0.97])
    vectors = np.linspace(0, 4 * np.pi, count)[:, None] * axis / np.linalg.norm(axis)
    start = rotation.to_matrix(np.array([0.4, 0.2, 1.0]), "euler_xyz")
    return rotation.from_matrix(rotation.to_matrix(vectors, "axis_angle") @ start, representation)


def largest_step(values: np.ndarray) -> float:
    return float(np.abs(np.diff(values, axis=0)).max())


@pytest.mark.parametrize("representation", ["euler_xyz", "euler_ZYX", "quaternion_xyzw", "quaternion_wxyz"])
def test_jumps_are_repaired_and_the_rotation_stays(representation):
    recorded = spinning(representation)
    assert largest_step(recorded) > 1.0, "the negative control: as recorded, the numbers jump"
    repaired = rotation.continuous(recorded, representation)
    assert largest_step(repaired) < 0.15
    assert (repaired[0] == recorded[0]).all()
    angles = rotation.angle_between(
        rotation.to_matrix(repaired, representation), rotation.to_matrix(recorded, representation)
    )
    assert angles.max() < 1e-9
    assert rotation.continuous(repaired, representation) == pytest.approx(repaired), "nothing left to repair"


@pytest.mark.parametrize("representation", ["rot6d", "matrix"])
def test_rot6d_and_matrix_have_no_jumps(representation):
    recorded = spinning(representation)
    assert largest_step(recorded) < 0.15
    assert (rotation.continuous(recorded, representation) == recorded).all()


def test_axis_angle_grows_beyond_half_a_turn():
    vectors = np.linspace(0, 4 * np.pi, 100)[:, None] * np.array([[0.6, 0.0, 0.8]])
    recorded = rotation.convert(vectors, "axis_angle", "axis_angle")
    assert largest_step(recorded) > 1.0
    assert rotation.continuous(recorded, "axis_angle") == pytest.approx(vectors, abs=1e-9)


def test_plain_wraps_and_sign_flips():
    yaw = np.array([3.0, 3.1, -3.1, -3.0, 3.1])
    wrapped = np.stack([np.zeros(5), np.zeros(5), yaw], 1)
    turn = 2 * np.pi
    assert rotation.continuous(wrapped, "euler_xyz")[:, 2] == pytest.approx(
        [3.0, 3.1, turn - 3.1, turn - 3.0, 3.1]
    )
    quaternions = np.array([[0, 0, 0.6, 0.8], [0, 0, -0.61, -0.79], [0, 0, 0.62, 0.78]])
    signs = np.sign(rotation.continuous(quaternions, "quaternion_xyzw")[:, 3])
    assert signs.tolist() == [1, 1, 1]


def test_slerp_turns_evenly_and_hits_the_rows():
    times = np.array([0.0, 1.0, 1.5, 4.0])
    axis = np.array([0.36, 0.48, 0.8])
    matrices = rotation.to_matrix(times[:, None] * 0.7 * axis, "axis_angle")
    at = np.array([-1.0, 0.0, 0.25, 1.0, 1.2, 3.3, 4.0, 9.0])
    expected = rotation.to_matrix(np.clip(at, 0, 4)[:, None] * 0.7 * axis, "axis_angle")
    assert rotation.angle_between(rotation.slerp(matrices, times, at), expected).max() < 1e-7
    assert rotation.slerp(matrices[:1], times[:1], at)[3] == pytest.approx(matrices[0])


@pytest.mark.parametrize(
    ("values", "representation", "message"),
    [
        ([[0, 0, 0, 1], [0, 0, 0, 0]], "quaternion_xyzw", "quaternion at row 1: got length 0"),
        ([[0, 0, 0, 1, 0, 0]], "rot6d", "first column of rot6d at row 0"),
        ([[1, 0, 0, 2, 0, 0]], "rot6d", "second column of rot6d at row 0"),
        ([[1, 0, 0, 0, 1, 0, 0, 0, -1]], "matrix", "rotation matrix at row 0"),
        ([[2, 0, 0, 0, 1, 0, 0, 0, 1]], "matrix", "orthogonal columns, determinant 1"),
        ([[0, 0]], "euler_xyz", "rotation as euler_xyz: got 2 numbers, expected 3"),
    ],
)
def test_no_rotations_are_refused(values, representation, message):
    with pytest.raises(DataError, match=message):
        rotation.to_matrix(np.array(values, float), representation)


def test_rounded_matrices_are_mended():
    matrices = random_matrices(20)
    rounded = np.round(matrices, 3).reshape(20, 9)
    mended = rotation.to_matrix(rounded, "matrix")
    assert mended @ np.swapaxes(mended, -1, -2) == pytest.approx(np.broadcast_to(np.eye(3), (20, 3, 3)))
    assert rotation.angle_between(mended, matrices).max() < 2e-3


@pytest.mark.parametrize("name", ["euler", "euler_xxy", "euler_xyZ", "quaternion", "", "rpy"])
def test_unknown_representations(name):
    with pytest.raises(ConfigError, match=f"rotation representation: got {name!r}, expected euler_xyz"):
        rotation.width_of(name)
