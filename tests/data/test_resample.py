import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidworld.contract import Dimension
from vidworld.data import rotation
from vidworld.data.resample import (
    actions_on_grid,
    even_grid,
    proprio_on_grid,
    resample_actions,
    rotation_groups,
    whole_fraction,
)
from vidworld.errors import ContractError, DataError

KINDS = tuple(Dimension(kind, "1", kind) for kind in ("velocity", "delta", "position", "binary", "force"))
YAW = tuple(Dimension(f"r{index}", "rad", "delta", "axis_angle") for index in range(3))
POSE = tuple(Dimension(f"e{index}", "rad", "position", "euler_xyz") for index in range(3))


def clock(count: int, fps: float, jitter: float, seed: int) -> np.ndarray:
    """A wall clock: steps of 1 / fps, each off by up to `jitter` of a step."""
    noise = np.random.default_rng(seed).uniform(-jitter, jitter, count)
    return 100.0 + np.cumsum((1 + noise) / fps)


RATES = st.tuples(st.floats(5, 60), st.floats(0.2, 0.98)).map(lambda pair: (pair[0], pair[0] * pair[1]))
CASE = st.tuples(st.integers(2, 60), RATES, st.floats(0, 0.45), st.integers(0, 2**20))


@settings(deadline=None, max_examples=60)
@given(CASE)
def test_sums_of_deltas_and_constant_velocities_are_kept(case):
    count, (fps, target), jitter, seed = case
    times = clock(count, fps, jitter, seed)
    grid = even_grid(times, target)
    generator = np.random.default_rng(seed)
    actions = generator.normal(size=(count, 5))
    actions[:, [0, 4]] = (0.7, -2.0)
    coarse = actions_on_grid(actions, KINDS, grid)
    assert coarse.shape == (len(grid.at_N), 5)
    assert coarse[:, 1].sum() == pytest.approx(actions[:, 1].sum(), abs=1e-9)
    assert coarse[:, 0] == pytest.approx(0.7)
    assert coarse[:, 4] == pytest.approx(-2.0)
    assert set(coarse[:, 2]) <= set(actions[:, 2]), "positions are picked, never blended"
    assert coarse[-1, 2] == actions[-1, 2]


@settings(deadline=None, max_examples=60)
@given(CASE)
def test_frames_are_the_nearest_and_in_order(case):
    count, (fps, target), jitter, seed = case
    times = clock(count, fps, jitter, seed)
    grid = even_grid(times, target)
    assert grid.frames_N[0] == 0
    assert (np.diff(grid.frames_N) >= 0).all()
    assert np.diff(grid.at_N) == pytest.approx(1 / target)
    assert grid.at_N[-1] <= times[-1] + 1e-3 / target
    assert times[-1] < grid.at_N[-1] + 1 / target
    distances = np.abs(times[None] - grid.at_N[:, None])
    chosen = distances[np.arange(len(grid.at_N)), grid.frames_N]
    assert chosen == pytest.approx(distances.min(1), abs=2e-6)


def test_fifteen_to_ten_by_hand():
    """Rows last 1/15 s and intervals 1/10 s: rows 0 and half of 1, half of 1 and 2, and so on."""
    times = np.arange(6) / 15
    grid = even_grid(times, 10)
    assert grid.frames_N.tolist() == [0, 1, 3, 4], "of two frames that are equally near, the earlier"
    actions = np.tile([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]], (1, 5))
    coarse = actions_on_grid(actions, KINDS, grid)
    assert coarse[:, 1].tolist() == pytest.approx([2.0, 4.0, 6.5, 8.5])
    assert coarse[:, 0].tolist() == pytest.approx([4 / 3, 8 / 3, 13 / 3, 17 / 3])
    assert coarse[:, 2].tolist() == coarse[:, 3].tolist() == [2, 3, 5, 6]


def test_a_clock_that_began_in_1970_gives_the_same():
    actions = np.random.default_rng(0).normal(size=(31, 5))
    near, far = (even_grid(start + np.arange(31) / 15, 10) for start in (0, 1_760_000_000.1))
    assert near.frames_N.tolist() == far.frames_N.tolist()
    assert actions_on_grid(actions, KINDS, near) == pytest.approx(
        actions_on_grid(actions, KINDS, far), abs=1e-4
    )
    held = (actions_on_grid(actions, KINDS, grid)[:, 2].tolist() for grid in (near, far))
    assert next(held) == next(held)


def test_an_even_clock_and_a_whole_fraction_agree_with_decimation():
    actions = np.random.default_rng(0).normal(size=(12, 5))
    grid = even_grid(np.arange(12) / 30, 10)
    assert grid.frames_N.tolist() == [0, 3, 6, 9]
    assert actions_on_grid(actions, KINDS, grid) == pytest.approx(resample_actions(actions, KINDS, 3))


def test_a_gap_in_the_clock_repeats_a_frame_and_adds_nothing():
    times = np.array([0, 0.1, 0.2, 0.9, 1.0, 1.1])
    grid = even_grid(times, 8)
    assert grid.frames_N.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 4]
    delta = actions_on_grid(np.ones((6, 1)), (Dimension("d", "m", "delta"),), grid)
    assert delta.sum() == pytest.approx(6)


def test_states_are_interpolated_by_what_they_are():
    times = np.arange(7) / 15
    dimensions = (Dimension("x", "m", "position"), Dimension("grip", "1", "binary"))
    states = np.stack([np.arange(7.0), np.array([0, 0, 0, 1, 1, 1, 1.0])], 1)
    grid = even_grid(times, 10)
    found = proprio_on_grid(states, dimensions, grid)
    assert found[:, 0] == pytest.approx([0, 1.5, 3, 4.5, 6])
    assert found[:, 1].tolist() == [0, 0, 1, 1, 1]


def test_declared_rotations_turn_the_short_way():
    """Yaw goes from 3.0 over pi to -3.0 (that is, 3.28): linear interpolation would swing through 0."""
    yaw = 3.0 + 0.1 * np.arange(5)
    wrapped = (yaw + np.pi) % (2 * np.pi) - np.pi
    states = np.stack([np.zeros(5), np.zeros(5), wrapped], 1)
    grid = even_grid(np.arange(5) / 15, 10)
    found = proprio_on_grid(states, POSE, grid)
    expected = 3.0 + 0.1 * 1.5 * np.arange(len(grid.at_N))
    difference = rotation.angle_between(
        rotation.to_matrix(found, "euler_xyz"),
        rotation.to_matrix(np.stack([0 * expected, 0 * expected, expected], 1), "euler_xyz"),
    )
    assert difference.max() < 1e-7
    naive = np.interp(grid.at_N, grid.times_T, wrapped)
    assert np.abs(np.cos(naive) - np.cos(expected)).max() > 0.5, "the negative control"
    # Angles that were unwrapped before stay so.
    unwrapped = proprio_on_grid(np.stack([np.zeros(5), np.zeros(5), yaw], 1), POSE, grid)
    assert unwrapped[:, 2] == pytest.approx(expected)


def test_undeclared_angles_that_wrap_are_refused():
    wrapped = (3.0 + 0.1 * np.arange(5) + np.pi) % (2 * np.pi) - np.pi
    grid = even_grid(np.arange(5) / 15, 10)
    with pytest.raises(
        DataError, match=r"'yaw' cannot be resampled: it jumps at row 2: got by 6.18 rad.*dec"
    ):
        proprio_on_grid(wrapped[:, None], (Dimension("yaw", "rad", "position"),), grid)


def product(parts, frame: str) -> np.ndarray:
    total = np.eye(3)
    for part in rotation.to_matrix(parts, "axis_angle"):
        total = part @ total if frame == "base" else total @ part
    return total


@pytest.mark.parametrize("frame", ["base", "end_effector"])
def test_rotation_deltas_are_composed(frame):
    parts = np.random.default_rng(3).normal(size=(12, 3)) * 0.4
    whole = product(parts, frame)
    for coarse in (
        resample_actions(parts, YAW, 3, frame),
        actions_on_grid(parts, YAW, even_grid(np.arange(12) / 15, 10), frame),
    ):
        assert rotation.angle_between(product(coarse, frame), whole) < 1e-6
    summed = np.add.reduceat(parts, np.arange(0, 12, 3))
    assert rotation.angle_between(product(summed, frame), whole) > 0.05, "the negative control: adding"


def test_rotation_deltas_need_a_frame():
    with pytest.raises(DataError, match=r"cannot be put together: got control frame unknown.*control_frame"):
        resample_actions(np.zeros((4, 3)), YAW, 2)


def test_unknown_kinds_are_refused():
    grid = even_grid(np.arange(4) / 15, 10)
    with pytest.raises(DataError, match=r"action 'j' cannot be resampled.*--contract"):
        actions_on_grid(np.zeros((4, 1)), (Dimension("j"),), grid)
    with pytest.raises(DataError, match=r"proprio 'j' cannot be resampled.*--contract"):
        proprio_on_grid(np.zeros((4, 1)), (Dimension("j"),), grid)


def test_groups_are_as_wide_as_they_say():
    assert [group.start for group in rotation_groups((*POSE, Dimension("x"), *POSE, *POSE))] == [0, 4, 7]
    for broken in (POSE[:2], (POSE[0], Dimension("x"), *POSE[1:]), (*POSE[:2], YAW[2])):
        with pytest.raises(ContractError, match=r"rotation that begins with 'e0': expected 3 neighbouring"):
            rotation_groups(broken)


def test_whole_fractions():
    assert [whole_fraction(30, target) for target in (30, 15, 10, 20, 60)] == [1, 2, 3, None, None]
    assert whole_fraction(29.97, 10) == 3
