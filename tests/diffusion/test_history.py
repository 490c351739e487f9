"""Imagined histories: what each pass makes exactly, what stays known, and that no gradient goes through."""

import pytest
import torch

from vidworld.diffusion.history import draw_starts, imagined_history
from vidworld.diffusion.objective import ObjectiveConfig, resample_rows
from vidworld.errors import ConfigError
from vidworld.types import Frames


def follow(history: Frames, gain: torch.Tensor | float = 0.9):
    """A model that sees only the frame before: x_t = gain x_{t-1} + noise_t + d."""

    def predict(z, level, step_BT):
        def one(z, seen):
            before = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1]], 1)
            return gain * before + z + step_BT.reshape(*step_BT.shape, *[1] * (z.ndim - 2))

        return z.map(one, history)

    return predict


def rollout(known: Frames, noise: Frames, start: int, frames: int) -> torch.Tensor:
    """The same model, frame after frame, for one row's proprioception."""
    newest, found = known.proprio_BTS[0, start - 1], []
    for t in range(start, start + frames):
        newest = 0.9 * newest + noise.proprio_BTS[0, t] + 1.0
        found.append(newest)
    return torch.stack(found)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_so_many_passes_are_so_many_frames_of_a_rollout(draw_frames, passes: int) -> None:
    known, noise = draw_frames(1, 8), draw_frames(1, 8)
    start = 2
    got = imagined_history(follow, known, noise, torch.tensor([start]), passes=passes, step=1.0)
    expected = rollout(known, noise, start, 6)
    torch.testing.assert_close(got.proprio_BTS[0, start : start + passes], expected[:passes])
    apart = (got.proprio_BTS[0, start + passes] - expected[passes]).abs().max()
    assert apart > 1e-3, "negative control: the frame after saw less of the rollout"


def test_frames_before_the_start_stay_bit_by_bit_and_all_after_are_imagined(draw_frames) -> None:
    known, noise = draw_frames(3, 8), draw_frames(3, 8)
    starts = [1, 4, 6]
    got = imagined_history(follow, known, noise, torch.tensor(starts), passes=2, step=1.0)
    for row, start in enumerate(starts):
        for name in ("latents_BTVChw", "proprio_BTS"):
            old, new = getattr(known, name)[row], getattr(got, name)[row]
            assert torch.equal(new[:start], old[:start])
            assert (new[start:] != old[start:]).flatten(1).all()


def test_no_gradient_through_the_history(draw_frames) -> None:
    known, noise = draw_frames(), draw_frames()
    gain = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    graded = []

    def given(history):
        graded.append(torch.is_grad_enabled())
        return follow(history, gain)

    history = imagined_history(given, known, noise, torch.tensor([1] * 4), passes=2, step=1.0)
    assert not history.latents_BTVChw.requires_grad
    assert not history.proprio_BTS.requires_grad
    assert graded == [False, False]
    assert torch.is_grad_enabled()
    assert follow(known, gain)(noise, None, torch.ones(4, 3)).proprio_BTS.requires_grad, "negative control"


def test_starts_are_uniform_over_frames_that_somebody_sees(generator) -> None:
    starts = draw_starts(6000, 8, generator=generator, device=torch.device("cpu"))
    values, counts = starts.unique(return_counts=True)
    assert values.tolist() == [1, 2, 3, 4, 5, 6], "7, the last, is seen by no target"
    assert counts.min() > 0.85 * counts.float().mean()
    assert draw_starts(5, 3, generator=generator, device=torch.device("cpu")).tolist() == [1] * 5


def test_rows_keep_their_share_once_it_has_begun() -> None:
    config = ObjectiveConfig(resample_fraction=0.3, resample_start=0.6)
    assert {resample_rows(config, 64, 16, 0.59, count) for count in range(9)} == {0}
    rows = [resample_rows(config, 4, 16, 0.6, count) for count in range(100)]
    assert sum(rows) == 120
    assert set(rows) == {1, 2}
    assert resample_rows(config, 64, 2, 0.9, 0) == 0, "two frames: nobody sees an imagined one"
    assert resample_rows(ObjectiveConfig(), 64, 16, 1.0, 5) == 0


def test_the_step_size_that_is_told_is_one_that_is_learnt() -> None:
    assert ObjectiveConfig().one_step == 1.0
    assert ObjectiveConfig(kind="energy", bootstrap_fraction=0.0).one_step == 1.0
    assert ObjectiveConfig(bootstrap_fraction=0.0).one_step == 1 / 16
    assert ObjectiveConfig(finest_steps=1).one_step == 1.0


@pytest.mark.parametrize(
    "wrong", [{"resample_fraction": 1.2}, {"resample_start": -0.1}, {"resample_passes": 0}]
)
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ObjectiveConfig(**wrong)
