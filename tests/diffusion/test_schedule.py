import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidworld.diffusion.schedule import autoregressive, check_schedule, full_sequence, pyramid


def test_small_matrices_by_hand():
    assert autoregressive(2, 2).tolist() == [[2, 2], [1, 2], [0, 2], [0, 1], [0, 0]]
    assert full_sequence(3, 2).tolist() == [[2, 2, 2], [1, 1, 1], [0, 0, 0]]
    assert pyramid(3, 2, lag=1).tolist() == [[2, 2, 2], [1, 2, 2], [0, 1, 2], [0, 0, 1], [0, 0, 0]]


@given(frames=st.integers(1, 9), steps=st.integers(1, 8), data=st.data())
def test_every_column_descends_from_pure_noise_to_clean(frames, steps, data):
    lag = data.draw(st.integers(0, steps))
    matrix = pyramid(frames, steps, lag)
    assert matrix.shape == (lag * (frames - 1) + steps + 1, frames)
    for column in matrix.T:
        assert column[0] == steps
        assert column[-1] == 0
        assert set(np.diff(column)) <= {0, -1}
        assert -np.diff(column).sum() == steps


@pytest.mark.parametrize(
    ("matrix", "complaint"),
    [
        ([[1, 2], [0, 1], [0, 0]], "frame 0 .* starts at pure noise"),
        ([[2, 2], [1, 1], [0, 1]], "frame 1 .* ends clean"),
        ([[2, 2], [0, 1], [1, 0], [0, 0]], "frame 0 .* never grows noisier"),
        ([[2], [2], [0]], "pass 0 .* denoises nothing"),
        ([[2, 2]], "expected whole numbers"),
        ([[2.0], [0.0]], "expected whole numbers"),
    ],
)
def test_faulty_matrices_are_refused(matrix, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_schedule(np.array(matrix), 2)


@pytest.mark.parametrize(("frames", "steps", "lag"), [(0, 4, 1), (3, 0, 0), (3, 4, 5), (3, 4, -1)])
def test_impossible_orders_are_refused(frames, steps, lag):
    with pytest.raises(ValueError, match="expected at least one frame"):
        pyramid(frames, steps, lag)
