import numpy as np
import pytest

from vidworld.errors import DataError
from vidworld.lab import planar


def frames_of(seed: int, **settings) -> np.ndarray:
    config = planar.PlanarConfig(**settings)
    return np.stack(list(planar.render(planar.simulate(seed, config), config.size)))


def test_same_seed_same_bytes_other_seed_other_bytes():
    assert np.array_equal(frames_of(3, frames=8), frames_of(3, frames=8))
    assert not np.array_equal(frames_of(3, frames=8), frames_of(4, frames=8))


def test_actions_take_each_frame_to_the_next():
    trajectory = planar.simulate(5)
    integrated = trajectory.joints_T2[:-1] + trajectory.actions_T3[:-1, :2] / planar.EMBODIMENT.rate_hz
    np.testing.assert_allclose(integrated, trajectory.joints_T2[1:], atol=1e-9)
    reversed_in_time = trajectory.joints_T2[1:] + trajectory.actions_T3[1:, :2] / planar.EMBODIMENT.rate_hz
    assert np.abs(reversed_in_time - trajectory.joints_T2[1:]).max() > 0.05


def test_the_disc_moves_only_when_touched_and_never_overlaps_the_tip_by_much():
    touched = 0
    for seed in range(20):
        run = planar.simulate(seed)
        gap = np.linalg.norm(run.disc_T2 - run.tip_T2, axis=1) - planar.DISC_RADIUS - planar.TIP_RADIUS
        moved = np.linalg.norm(np.diff(run.disc_T2, axis=0), axis=1) > 1e-9
        touched += moved.any()
        # At full speed the tip covers 0.4 m in a step, so a disc that moves was near at one end of it.
        assert (np.minimum(gap[:-1], gap[1:])[moved] < 0.45).all()
    assert touched >= 8


def test_paint_appears_under_the_brush_and_stays():
    for seed in range(30):
        run = planar.simulate(seed)
        if run.actions_T3[:, 2].any():
            break
    frames = np.stack(list(planar.render(run, 64))).astype(int)
    painted = (np.abs(frames - planar.PAINT_COLOUR.astype(int)).max(-1) < 30).sum((1, 2))
    first = int(np.argmax(run.actions_T3[:, 2] > 0.5))
    assert painted[: first + 1].max() == 0
    assert painted[-1] > 10


def test_source_reads_by_id_and_refuses_others():
    source = planar.PlanarSource(episodes=2, seed=7, config=planar.PlanarConfig(frames=5, size=32))
    assert source.episode_ids() == ["planar-000007", "planar-000008"]
    episode = source.read("planar-000008")
    frames = np.stack(list(episode.views["top"].frames()))
    assert frames.shape == (5, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert len(episode) == 5
    with pytest.raises(DataError, match="planar-000009"):
        source.read("planar-000009")
