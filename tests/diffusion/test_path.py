import pytest
import torch

from vidworld.diffusion.path import (
    advance,
    clean_from,
    constant_level,
    mix,
    noise_from,
    shift,
    velocity,
)
from vidworld.types import Frames, SignalLevel


def assert_frames_close(got: Frames, expected: Frames, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got.latents_BTVChw, expected.latents_BTVChw, rtol=0, atol=atol)
    torch.testing.assert_close(got.proprio_BTS, expected.proprio_BTS, rtol=0, atol=atol)


def test_ends_of_the_path_are_exact(draw_frames):
    clean, noise = draw_frames(), draw_frames()
    assert torch.equal(mix(clean, noise, constant_level(clean, 1.0)).latents_BTVChw, clean.latents_BTVChw)
    assert torch.equal(mix(clean, noise, constant_level(clean, 0.0)).proprio_BTS, noise.proprio_BTS)


def test_a_little_context_noise_is_a_little(draw_frames):
    """The reversed direction, which two public ports shipped, would turn 0.1 of noise into 0.9."""
    clean, noise = draw_frames(), draw_frames()
    tenth = torch.full((4, 3), 0.1, dtype=torch.float64)

    def error(level: SignalLevel) -> float:
        return (mix(clean, noise, level).latents_BTVChw - clean.latents_BTVChw).std().item()

    spread = (noise.latents_BTVChw - clean.latents_BTVChw).std().item()
    assert error(SignalLevel.from_noise(tenth)) == pytest.approx(0.1 * spread)
    assert error(SignalLevel.from_signal(tenth)) == pytest.approx(0.9 * spread), "the negative control"


def test_each_frame_has_its_own_level(draw_frames):
    clean, noise = draw_frames(), draw_frames()
    signal_BT = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64).expand(4, 3)
    z = mix(clean, noise, SignalLevel.from_signal(signal_BT))
    assert torch.equal(z.latents_BTVChw[:, 0], noise.latents_BTVChw[:, 0])
    assert torch.equal(z.latents_BTVChw[:, 2], clean.latents_BTVChw[:, 2])
    middle = (clean.proprio_BTS[:, 1] + noise.proprio_BTS[:, 1]) / 2
    torch.testing.assert_close(z.proprio_BTS[:, 1], middle)


def test_both_ends_are_recovered_from_a_point_and_its_velocity(draw_frames, generator):
    clean, noise = draw_frames(), draw_frames()
    level = SignalLevel.from_signal(torch.rand(4, 3, generator=generator, dtype=torch.float64) * 0.99)
    z = mix(clean, noise, level)
    slope = velocity(clean, z, level)
    assert_frames_close(slope, clean.map(torch.sub, noise))
    assert_frames_close(clean_from(z, slope, level), clean)
    assert_frames_close(noise_from(z, slope, level), noise)
    assert_frames_close(advance(noise, slope, level.signal), z)
    assert_frames_close(advance(noise, slope, 1.0), clean)


def test_velocity_of_clean_frames_is_finite(draw_frames):
    clean = draw_frames()
    slope = velocity(draw_frames(), clean, constant_level(clean, 1.0))
    assert slope.latents_BTVChw.isfinite().all()


def test_shift_moves_large_latents_towards_noise_and_leaves_small_ones():
    signal = torch.linspace(0, 1, 11, dtype=torch.float64)
    level = SignalLevel.from_signal(signal)
    torch.testing.assert_close(shift(level, 4096).signal, signal)
    torch.testing.assert_close(shift(level, 100).signal, signal)
    shifted = shift(level, 4 * 4096).signal
    torch.testing.assert_close(shifted[[0, -1]], signal[[0, -1]])
    assert (shifted[1:-1] < signal[1:-1]).all()
    assert shifted[5].item() == pytest.approx(1 - 2 * 0.5 / 1.5)


def test_levels_stay_exact_for_half_precision_frames():
    frames = Frames(torch.zeros(1, 2, 1, 1, 1, 1).bfloat16(), torch.zeros(1, 2, 1).bfloat16())
    assert constant_level(frames, 0.3).signal.dtype == torch.float32
