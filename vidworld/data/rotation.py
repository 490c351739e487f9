"""Rotations in every representation that robot logs use, and what makes each of them continuous in time.

| name | numbers | meaning |
|---|---|---|
| `euler_xyz`, any order | 3 | angles [rad] about fixed axes: x, then y, then z (roll, pitch, yaw) |
| `euler_XYZ`, any order | 3 | the same about axes that move along; `euler_ZYX` is `euler_xyz` reversed |
| `quaternion_xyzw`, `quaternion_wxyz` | 4 | of unit length; q and -q are the same rotation |
| `axis_angle` | 3 | unit axis times angle [rad], also called rotation vector |
| `rot6d` | 6 | the matrix's first two columns, one after the other (Zhou et al. 2019, arXiv:1812.07035) |
| `matrix` | 9 | row by row |

Everything is float64 and vectorised over leading axes: `values` [..., width], `matrices` [..., 3, 3]. A
matrix takes a vector from the rotated frame to the base frame. Raises DataError for what is no rotation.
"""

import re

import numpy as np

from vidworld.errors import ConfigError, DataError

_WIDTHS = {"quaternion_xyzw": 4, "quaternion_wxyz": 4, "axis_angle": 3, "rot6d": 6, "matrix": 9}

ORTHOGONAL_TOLERANCE = 1e-2
"""Recorded matrices are rounded; columns further from unit length or a right angle are no rotation."""
_GIMBAL_TOLERANCE = 1e-7


def width_of(representation: str) -> int:
    """How many numbers a representation has. Raises ConfigError for one that is not known."""
    if representation in _WIDTHS:
        return _WIDTHS[representation]
    axes = representation.removeprefix("euler_")
    if (
        representation.startswith("euler_")
        and re.fullmatch(r"[xyz]{3}|[XYZ]{3}", axes)
        and axes[0] != axes[1] != axes[2]
    ):
        return 3
    raise ConfigError(
        "rotation representation",
        got=repr(representation),
        expected=f"euler_xyz (fixed axes, any order), euler_XYZ (moving axes), {', '.join(_WIDTHS)}",
    )


def in_radians(representation: str) -> bool:
    """Whether the numbers are angles."""
    return representation == "axis_angle" or representation.startswith("euler_")


def convert(values: np.ndarray, given: str, to: str) -> np.ndarray:
    """Express rotations in another representation; angles come out in [-pi, pi], quaternions with w >= 0."""
    return from_matrix(to_matrix(values, given), to)


def to_matrix(values: np.ndarray, representation: str) -> np.ndarray:
    """Rotation matrices [..., 3, 3] of `values` [..., width]."""
    values = np.asarray(values, np.float64)
    if values.shape[-1:] != (width_of(representation),):
        raise DataError(
            f"rotation as {representation}",
            got=f"{values.shape[-1] if values.ndim else 0} numbers",
            expected=width_of(representation),
        )
    match representation:
        case "quaternion_xyzw":
            return _matrix_of_quaternion(_unit(values, "quaternion"))
        case "quaternion_wxyz":
            return _matrix_of_quaternion(_unit(np.roll(values, -1, -1), "quaternion"))
        case "axis_angle":
            return _matrix_of_quaternion(_exp(values))
        case "rot6d":
            first = _unit(values[..., :3], "first column of rot6d")
            second = values[..., 3:] - (first * values[..., 3:]).sum(-1, keepdims=True) * first
            second = _unit(second, "second column of rot6d")
            return np.stack([first, second, np.cross(first, second)], -1)
        case "matrix":
            return _orthogonal(values.reshape(*values.shape[:-1], 3, 3))
        case _:
            return _matrix_of_euler(values, representation.removeprefix("euler_"))


def from_matrix(matrices: np.ndarray, representation: str) -> np.ndarray:
    """`values` [..., width] of rotation matrices [..., 3, 3]."""
    width_of(representation)
    matrices = np.asarray(matrices, np.float64)
    match representation:
        case "quaternion_xyzw":
            return _quaternion_of_matrix(matrices)
        case "quaternion_wxyz":
            return np.roll(_quaternion_of_matrix(matrices), 1, -1)
        case "axis_angle":
            return _log(_quaternion_of_matrix(matrices))
        case "rot6d":
            return np.concatenate([matrices[..., 0], matrices[..., 1]], -1)
        case "matrix":
            return matrices.reshape(*matrices.shape[:-2], 9)
        case _:
            return _euler_of_quaternion(
                _quaternion_of_matrix(matrices), representation.removeprefix("euler_")
            )


def continuous(values_TK: np.ndarray, representation: str) -> np.ndarray:
    """The same rotations [T, width] without the jumps that a representation makes where the motion has none.

    Euler angles grow beyond pi instead of wrapping to -pi, quaternions keep their sign, axis-angle vectors
    grow beyond half a turn. The first row stays; of all that mean the same rotation, each next row takes the
    nearest to the one before. In a gimbal lock Euler angles may jump all the same.
    """
    result_TK = np.array(values_TK, np.float64)
    for row in range(1, len(result_TK)):
        result_TK[row] = _nearest(result_TK[row], result_TK[row - 1], representation)
    return result_TK


def nearest_branch(values_TK: np.ndarray, like_TK: np.ndarray, representation: str) -> np.ndarray:
    """The same rotations [T, width], each written in the way that is nearest to another row [T, width]."""
    pairs = zip(values_TK, like_TK, strict=True)
    rows = [_nearest(values, like, representation) for values, like in pairs]
    return np.array(rows).reshape(np.shape(values_TK))


def angle_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angle [...] in rad of the rotation between matrices [..., 3, 3]."""
    relative = np.swapaxes(first, -1, -2) @ second
    return np.linalg.norm(_log(_quaternion_of_matrix(relative)), axis=-1)


def power(matrices: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """A share of each rotation [..., 3, 3]: turn about the same axis by `fractions` [...] of the angle."""
    vectors = _log(_quaternion_of_matrix(matrices))
    return _matrix_of_quaternion(_exp(vectors * np.asarray(fractions)[..., None]))


def slerp(matrices_T33: np.ndarray, times_T: np.ndarray, at_N: np.ndarray) -> np.ndarray:
    """Rotations [N, 3, 3] at other times, at constant angular velocity between the neighbouring rows.

    Times before the first or after the last row get that row. Times are ascending.
    """
    after = np.clip(np.searchsorted(times_T, at_N, side="right"), 1, max(len(times_T) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(times_T) - 1)
    gaps = np.where(after > before, times_T[after] - times_T[before], 1.0)
    shares = np.clip((at_N - times_T[before]) / gaps, 0.0, 1.0)
    start = matrices_T33[before]
    return start @ power(np.swapaxes(start, -1, -2) @ matrices_T33[after], shares)


# Quaternions, here always x y z w


def _unit(values: np.ndarray, what: str) -> np.ndarray:
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    if (norms < 1e-6).any():
        row = int(np.flatnonzero(norms.reshape(-1) < 1e-6)[0])
        raise DataError(f"{what} at row {row}", got="length 0", expected="a rotation")
    return values / norms


def _orthogonal(matrices: np.ndarray) -> np.ndarray:
    """The rotation matrices nearest to rounded ones (polar decomposition)."""
    if not matrices.size:
        return matrices
    left, sizes, right = np.linalg.svd(matrices)
    bad = (np.abs(sizes - 1).max(-1) > ORTHOGONAL_TOLERANCE) | (np.linalg.det(matrices) < 0)
    if bad.any():
        row = int(np.flatnonzero(bad.reshape(-1))[0])
        raise DataError(
            f"rotation matrix at row {row}", got="no rotation", expected="orthogonal columns, determinant 1"
        )
    return left @ right


def _matrix_of_quaternion(quaternions: np.ndarray) -> np.ndarray:
    x, y, z, w = np.moveaxis(quaternions, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _quaternion_of_matrix(matrices: np.ndarray) -> np.ndarray:
    """Unit quaternions with w >= 0, through the largest of the four components (Shepperd 1978)."""
    # Row i of this symmetric matrix is 4 q_i q: the one with the largest diagonal loses no digits.
    products = np.zeros((*matrices.shape[:-2], 4, 4))
    trace = np.trace(matrices, axis1=-2, axis2=-1)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        products[..., i, i] = 1 + 2 * matrices[..., i, i] - trace
        products[..., i, j] = products[..., j, i] = matrices[..., i, j] + matrices[..., j, i]
        products[..., i, 3] = products[..., 3, i] = matrices[..., k, j] - matrices[..., j, k]
    products[..., 3, 3] = 1 + trace
    largest = np.argmax(np.diagonal(products, axis1=-2, axis2=-1), -1)
    quaternions = np.take_along_axis(products, largest[..., None, None], -2)[..., 0, :]
    quaternions = quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)
    return np.where(quaternions[..., 3:] < 0, -quaternions, quaternions)


def _exp(vectors: np.ndarray) -> np.ndarray:
    """Quaternions of axis-angle vectors; sin(a/2)/a is 1/2 at angle 0."""
    half = np.linalg.norm(vectors, axis=-1, keepdims=True) / 2
    return np.concatenate([vectors * np.sinc(half / np.pi) / 2, np.cos(half)], -1)


def _log(quaternions: np.ndarray) -> np.ndarray:
    """Axis-angle vectors of quaternions with w >= 0, angles up to pi."""
    sines = np.linalg.norm(quaternions[..., :3], axis=-1, keepdims=True)
    angles = 2 * np.arctan2(sines, quaternions[..., 3:])
    small = sines < 1e-12
    return quaternions[..., :3] * np.where(small, 2.0, angles / np.where(small, 1.0, sines))


# Euler angles


def _matrix_of_euler(angles: np.ndarray, order: str) -> np.ndarray:
    """Fixed axes: the last turn is leftmost. Moving axes: the first is."""
    first, second, third = (_turn(angles[..., index], axis) for index, axis in enumerate(order.lower()))
    return first @ second @ third if order.isupper() else third @ second @ first


def _turn(angles: np.ndarray, axis: str) -> np.ndarray:
    """Turn about one axis of the frame [..., 3, 3]."""
    cos, sin = np.cos(angles), np.sin(angles)
    result = np.zeros((*angles.shape, 3, 3))
    here = "xyz".index(axis)
    one, two = (here + 1) % 3, (here + 2) % 3
    result[..., here, here] = 1
    result[..., one, one], result[..., one, two] = cos, -sin
    result[..., two, one], result[..., two, two] = sin, cos
    return result


def _euler_of_quaternion(quaternions: np.ndarray, order: str) -> np.ndarray:
    """Angles in [-pi, pi] in any order (Bernardes and Viollet 2022, doi:10.1371/journal.pone.0276302).

    In a gimbal lock only a sum or difference of two angles is determined: the third is then 0.
    """
    extrinsic = order.islower()
    i, j, k = ("xyz".index(axis) for axis in (order if extrinsic else order[::-1]).lower())
    symmetric = i == k
    if symmetric:
        k = 3 - i - j
    sign = (i - j) * (j - k) * (k - i) / 2
    x, w = quaternions[..., :3], quaternions[..., 3]
    if symmetric:
        a, b, c, d = w, x[..., i], x[..., j], x[..., k] * sign
    else:
        a, b = w - x[..., j], x[..., i] + x[..., k] * sign
        c, d = x[..., j] + w, x[..., k] * sign - x[..., i]
    middle = 2 * np.arctan2(np.hypot(c, d), np.hypot(a, b))
    half_sum, half_difference = np.arctan2(b, a), np.arctan2(d, c)
    low, high = middle <= _GIMBAL_TOLERANCE, np.pi - middle <= _GIMBAL_TOLERANCE
    angles = [half_sum - half_difference, middle, half_sum + half_difference]
    angles = angles if extrinsic else angles[::-1]
    angles[0] = np.where(low, 2 * half_sum, angles[0])
    angles[0] = np.where(high, (-2 if extrinsic else 2) * half_difference, angles[0])
    angles[2] = np.where(low | high, 0.0, angles[2])
    if not symmetric:
        angles[2 if extrinsic else 0] *= sign
        angles[1] = angles[1] - np.pi / 2
    angles = np.stack(angles, -1)
    return angles - 2 * np.pi * np.round(angles / (2 * np.pi))


def _nearest(values: np.ndarray, like: np.ndarray, representation: str) -> np.ndarray:
    """Of all ways [K] to write one rotation, the nearest to `like` [K]."""
    match representation:
        case "quaternion_xyzw" | "quaternion_wxyz":
            choices = np.stack([values, -values])
        case "rot6d" | "matrix":
            return values
        case "axis_angle":
            # About one axis, angles a whole number of turns apart are the same; at angle 0 any axis will do.
            angle, along = np.linalg.norm(values), np.linalg.norm(like)
            axis = values / angle if angle > 1e-9 else like / along if along > 1e-9 else np.zeros(3)
            turns = np.round((like @ axis - angle) / (2 * np.pi))
            choices = np.stack([values, axis * (angle + 2 * np.pi * turns)])
        case _:
            # (a, b, c) is (a + pi, -b, c + pi) if the first axis is also the last, else pi - b in the middle.
            order = representation.removeprefix("euler_").lower()
            flipped = [np.pi, 0.0 if order[0] == order[2] else np.pi, np.pi] + values * [1, -1, 1]
            choices = np.stack([values, flipped])
            choices = choices + 2 * np.pi * np.round((like - choices) / (2 * np.pi))
    return choices[np.argmin(np.abs(choices - like).sum(-1))]
