import itertools
import math

import pytest
import torch

from vidworld.diffusion.energy import EnergyConfig
from vidworld.diffusion.objective import (
    Draws,
    ObjectiveConfig,
    bootstrap_rows,
    bootstrap_target,
    context_levels,
    draw_levels,
    energy_loss,
    noise_like,
    shortcut_loss,
    weighted_mean,
)
from vidworld.diffusion.samplers import euler
from vidworld.errors import ConfigError
from vidworld.types import Frames, SignalLevel


def scalars(latent: list[float], proprio: list[float] | None = None) -> Frames:
    """One value a frame, one frame a row."""
    x = torch.tensor(latent, dtype=torch.float64)
    s = torch.tensor(proprio or latent, dtype=torch.float64)
    return Frames(x.reshape(-1, 1, 1, 1, 1, 1), s.reshape(-1, 1, 1))


def made_up_model(z, level, step_BT):
    """A prediction that depends on everything: 0.5 z + tau - d + 0.3."""
    return z.map(lambda z: 0.5 * z + level.signal_like(z) - SignalLevel(step_BT).signal_like(z) + 0.3)


def test_bootstrap_target_by_hand():
    z, tau, d = -0.8, 0.25, 0.5

    def f(z: float, tau: float, d: float) -> float:
        return 0.5 * z + tau - d + 0.3

    first = (f(z, tau, 0.25) - z) / 0.75
    middle = z + 0.25 * first
    second = (f(middle, 0.5, 0.25) - middle) / 0.5
    expected = z + 0.75 * (first + second) / 2
    level = SignalLevel.from_signal(torch.tensor([[tau]], dtype=torch.float64))
    target = bootstrap_target(made_up_model, scalars([z]), level, torch.tensor([[d]], dtype=torch.float64))
    assert target.latents_BTVChw.item() == pytest.approx(expected, abs=1e-12)
    assert target.proprio_BTS.item() == pytest.approx(expected, abs=1e-12)
    wrong = z + 0.75 * first
    assert abs(expected - wrong) > 0.01, "the negative control: one half step alone is something else"


def test_one_big_step_of_the_target_is_two_half_steps():
    """At tau = 0 and d = 1 the target is exactly where Euler's method with two steps ends."""
    z = scalars([0.3, -1.2])
    level = SignalLevel.from_signal(torch.zeros(2, 1, dtype=torch.float64))
    target = bootstrap_target(made_up_model, z, level, torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close(target.latents_BTVChw, euler(made_up_model, z, 2).latents_BTVChw)


def test_shortcut_loss_by_hand():
    clean, noise = scalars([1.0, 2.0], [0.5, -0.5]), scalars([-1.0, 0.4], [0.2, 0.1])
    tau = torch.tensor([[0.5], [0.75]], dtype=torch.float64)
    step = torch.tensor([[0.5], [1 / 16]], dtype=torch.float64)
    draws = Draws(SignalLevel.from_signal(tau), step, num_bootstrap=1)
    losses = shortcut_loss(made_up_model, made_up_model, clean, noise, draws, ObjectiveConfig())

    def f(z: float, tau: float, d: float) -> float:
        return 0.5 * z + tau - d + 0.3

    def bootstrap_row(x: float, eps: float) -> float:
        z = 0.5 * eps + 0.5 * x
        first = (f(z, 0.5, 0.25) - z) / 0.5
        middle = z + 0.25 * first
        second = (f(middle, 0.75, 0.25) - middle) / 0.25
        return (f(z, 0.5, 0.5) - (z + 0.5 * (first + second) / 2)) ** 2

    def flow_row(x: float, eps: float) -> float:
        return (f(0.25 * eps + 0.75 * x, 0.75, 1 / 16) - x) ** 2

    bootstrap = (0.9 * 0.5 + 0.1) * (bootstrap_row(1.0, -1.0) + 0.2 * bootstrap_row(0.5, 0.2))
    flow = (0.9 * 0.75 + 0.1) * (flow_row(2.0, 0.4) + 0.2 * flow_row(-0.5, 0.1))
    assert losses["bootstrap"].item() == pytest.approx(bootstrap, rel=1e-9)
    assert losses["flow"].item() == pytest.approx(flow, rel=1e-9)
    assert losses["loss"].item() == pytest.approx((bootstrap + flow) / 2, rel=1e-9)
    assert not losses["flow"].requires_grad


def test_regression_by_hand(generator):
    """From pure noise in one step, whatever the ramp: no level and no step size is drawn."""
    config = ObjectiveConfig(kind="regression", ramp=(0.9, 0.1), bootstrap_start=0.0)
    clean, noise = scalars([1.0, 2.0], [0.5, -0.5]), scalars([-1.0, 0.4], [0.2, 0.1])
    assert bootstrap_rows(config, 2, 0.9, 0) == 0
    assert config.one_step == 1
    before = generator.get_state()
    draws = draw_levels(clean, config, num_bootstrap=0, generator=generator)
    assert torch.equal(generator.get_state(), before)
    losses = shortcut_loss(made_up_model, made_up_model, clean, noise, draws, config)

    def row(x: float, eps: float) -> float:
        return (0.5 * eps + 0.0 - 1.0 + 0.3 - x) ** 2

    latents = (row(1.0, -1.0) + row(2.0, 0.4)) / 2
    proprio = (row(0.5, 0.2) + row(-0.5, 0.1)) / 2
    assert losses["loss"].item() == pytest.approx(latents + 0.2 * proprio, rel=1e-9)
    assert losses["latents"].item() == pytest.approx(latents, rel=1e-9)


def test_the_perfect_model_of_a_known_frame_has_no_loss(draw_frames, generator):
    """Where the clean frames are known, predicting them is right at every d."""
    clean, noise, config = draw_frames(8), draw_frames(8), ObjectiveConfig()
    draws = draw_levels(clean, config, num_bootstrap=4, generator=generator)
    losses = shortcut_loss(lambda *_: clean, lambda *_: clean[:4], clean, noise, draws, config)
    assert losses["loss"].item() < 1e-20


def test_no_gradient_through_bootstrap_targets(draw_frames, generator):
    clean, noise, config = draw_frames(4), draw_frames(4), ObjectiveConfig()
    draws = draw_levels(clean, config, num_bootstrap=4, generator=generator)
    student = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def model(gain):
        return lambda z, level, step: z.map(lambda z: gain * z)

    shortcut_loss(model(student), model(teacher), clean, noise, draws, config)["loss"].backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_weights_learn_under_autocast_though_the_target_used_them_without_gradient(generator):
    clean = two_modes(8, generator)
    noise, config, model = noise_like(clean, generator=generator), ObjectiveConfig(), Denoiser()
    draws = draw_levels(clean, config, num_bootstrap=8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        losses = shortcut_loss(model, model, clean, noise, draws, config)
    assert losses["loss"].dtype == torch.float32
    losses["loss"].backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_all_frames_masked_gives_exactly_zero(draw_frames, generator):
    clean, noise, config = draw_frames(), draw_frames(), ObjectiveConfig()
    draws = draw_levels(clean, config, num_bootstrap=1, generator=generator)
    gain = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def predict(z, level, step):
        return z.map(lambda z: gain * z)

    nothing = torch.zeros(4, 3)
    losses = shortcut_loss(predict, predict, clean, noise, draws, config, frame_weight_BT=nothing)
    losses["loss"].backward()
    assert gain.grad is not None
    assert [value.item() for value in losses.values()] == [0.0] * 5
    assert gain.grad.item() == 0.0


def test_masked_frames_do_not_count_and_accumulation_matches_one_large_batch(draw_frames, generator):
    clean, noise, config = draw_frames(6), draw_frames(6), ObjectiveConfig(proprio_weight=0.5)
    draws = draw_levels(clean, config, num_bootstrap=0, generator=generator)
    weight = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0]]).double()

    def loss(rows, frame_weight, denominator=None):
        part = Draws(draws.level[rows], draws.step_BT[rows], 0)
        return shortcut_loss(
            made_up_model, made_up_model, clean[rows], noise[rows], part, config,
            frame_weight_BT=frame_weight, denominator=denominator,
        )["loss"].item()  # fmt: skip

    whole = loss(slice(None), weight)
    parts = [loss(rows, weight[rows], weight.sum()) for rows in (slice(0, 3), slice(3, 6))]
    assert sum(parts) == pytest.approx(whole, rel=1e-12)
    naive = sum(loss(rows, weight[rows]) for rows in (slice(0, 3), slice(3, 6))) / 2
    assert abs(naive - whole) > 1e-3, "the negative control: means of unequal parts differ"
    broken = clean.map(
        lambda tensor: torch.where(weight.view(6, 3, *[1] * (tensor.ndim - 2)) > 0, tensor, math.nan)
    )
    masked = shortcut_loss(
        made_up_model, made_up_model, broken, noise, draws, config, frame_weight_BT=weight
    )["loss"].item()
    assert masked == pytest.approx(whole, rel=1e-12)


def test_frames_without_proprioception(draw_frames, generator):
    clean, noise, config = draw_frames(proprio=0), draw_frames(proprio=0), ObjectiveConfig()
    draws = draw_levels(clean, config, num_bootstrap=2, generator=generator)
    losses = shortcut_loss(made_up_model, made_up_model, clean, noise, draws, config)
    assert losses["proprio"].item() == 0.0
    assert losses["loss"].isfinite()


def test_levels_and_steps_follow_their_grids(draw_frames, generator):
    config = ObjectiveConfig(pure_noise_fraction=0.3)
    clean = draw_frames(2000, 8, shape=(1, 1, 1, 1), proprio=1)
    draws = draw_levels(clean, config, num_bootstrap=1000, generator=generator)
    tau, step = draws.level.signal, draws.step_BT
    assert set(step[:1000].unique().tolist()) == {1.0, 0.5, 0.25, 0.125}
    assert step[1000:].unique().tolist() == [1 / 16]
    on_grid = tau[:1000] / step[:1000]
    assert torch.equal(on_grid, on_grid.round())
    assert ((tau + step)[:1000] <= 1).all()
    for size in (1.0, 0.5, 0.25, 0.125):
        levels, counts = tau[:1000][step[:1000] == size].unique(return_counts=True)
        assert levels.tolist() == [i * size for i in range(round(1 / size))]
        assert counts.min() > 0.8 * counts.float().mean(), "uniform"
    flow = tau[1000:]
    assert (flow == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert flow[flow > 0].mean().item() == pytest.approx(0.5, abs=0.02)
    assert flow.max() < 1


def test_context_levels_are_a_little_noisy(draw_frames, generator):
    clean = draw_frames(500, 8, shape=(1, 1, 1, 1), proprio=1)
    noise = context_levels(clean, ObjectiveConfig(context_noise=0.3), generator=generator).noise
    assert noise.min() >= 0
    assert noise.max() <= 0.3
    assert noise.mean().item() == pytest.approx(0.15, abs=0.01)


def test_draws_are_a_function_of_the_generator(draw_frames):
    clean, config = draw_frames(), ObjectiveConfig()

    def draw(seed: int):
        fresh = torch.Generator().manual_seed(seed)
        draws = draw_levels(clean, config, num_bootstrap=1, generator=fresh)
        return torch.cat(
            [draws.level.signal, draws.step_BT, noise_like(clean, generator=fresh).proprio_BTS[..., 0]]
        )

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_bootstrap_rows_keep_their_share_at_any_batch_size():
    config = ObjectiveConfig(bootstrap_fraction=0.25, bootstrap_start=0.2)
    assert bootstrap_rows(config, 64, 0.1, 0) == 0
    assert {bootstrap_rows(config, 64, 0.2, count) for count in range(20)} == {16}
    for batch_size in (1, 2, 3, 7):
        rows = [bootstrap_rows(config, batch_size, 0.5, count) for count in range(100)]
        assert sum(rows) == pytest.approx(25 * batch_size, abs=1)
        assert max(rows) - min(rows) == 1
    assert bootstrap_rows(ObjectiveConfig(finest_steps=1), 64, 0.9, 0) == 0
    assert bootstrap_rows(ObjectiveConfig(bootstrap_fraction=1.0), 5, 0.9, 3) == 5


def test_config_out_of_range_is_refused():
    for wrong in (
        {"finest_steps": 12},
        {"context_noise": 1.5},
        {"bootstrap_fraction": -0.1},
        {"ramp": (-0.9, 0.1)},
        {"proprio_weight": -1.0},
    ):
        with pytest.raises(ConfigError):
            ObjectiveConfig(**wrong)


def test_weighted_mean_of_nothing_is_zero():
    assert weighted_mean(torch.full((2, 2), math.inf), torch.zeros(2, 2)).item() == 0.0
    assert weighted_mean(torch.zeros(0, 2), torch.zeros(0, 2)).item() == 0.0


class Denoiser(torch.nn.Module):
    """A small network for frames of one value each."""

    def __init__(self, noise_dims: int = 0) -> None:
        super().__init__()
        self.noise_dims = noise_dims
        sizes = (3 + noise_dims, 64, 64, 1)
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.layers = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])

    def forward(self, z: Frames, level: SignalLevel, step_BT: torch.Tensor) -> Frames:
        x = z.latents_BTVChw
        told = torch.stack([level.signal, step_BT.log2() / 4], -1)
        xi = torch.randn(*told.shape[:2], self.noise_dims)
        out = self.layers(torch.cat([x.flatten(2), told, xi], -1))
        return Frames(out.reshape(x.shape), torch.zeros_like(z.proprio_BTS))


def two_modes(count: int, generator: torch.Generator) -> Frames:
    """Half of the frames near -1 and half near +1: the future that a mean gets wrong."""
    x = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return Frames(x.reshape(count, 1, 1, 1, 1, 1), torch.zeros(count, 1, 0))


def train(objective: ObjectiveConfig, steps: int) -> dict[int, torch.Tensor]:
    """Train on two modes; samples, by the number of sampling steps, and at 0 one step from no noise."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Denoiser(noise_dims=2 if objective.kind == "energy" else 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
        clean = two_modes(256, generator)
        if objective.kind == "energy":
            noise = noise_like(Frames.cat([clean] * objective.energy.samples, 1), generator=generator)
            if objective.energy.mean_weight:
                noise = Frames.cat([noise, clean.map(torch.zeros_like)], 1)
            losses = energy_loss(model, clean, noise, objective)
        else:
            rows = bootstrap_rows(objective, 256, step / steps, step)
            draws = draw_levels(clean, objective, num_bootstrap=rows, generator=generator)
            losses = shortcut_loss(
                model, model, clean, noise_like(clean, generator=generator), draws, objective
            )
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        noise = noise_like(two_modes(2000, generator), generator=generator)
        drawn = {steps: euler(model, noise, steps) for steps in (4, 1)}
        drawn[0] = euler(model, noise.map(torch.zeros_like), 1)
        return {steps: frames.latents_BTVChw.flatten() for steps, frames in drawn.items()}


def share_in_modes(x: torch.Tensor) -> float:
    """Share of samples near a mode, 0 if a mode is missed."""
    near = [((x - mode).abs() < 0.4).double().mean().item() for mode in (-1, 1)]
    return sum(near) if min(near) > 0.25 else 0.0


def test_shortcuts_learn_both_modes_in_one_step_and_plain_flow_does_not():
    shortcut = train(ObjectiveConfig(bootstrap_fraction=0.5), 1300)
    assert share_in_modes(shortcut[4]) > 0.8
    assert share_in_modes(shortcut[1]) > 0.7
    plain = train(ObjectiveConfig(bootstrap_fraction=0.0), 300)
    assert share_in_modes(plain[1]) < 0.1, "the negative control: one step of plain flow matching is the mean"


def test_energy_score_learns_both_modes_in_one_step():
    samples = train(ObjectiveConfig(kind="energy", energy=EnergyConfig(patch=1, samples=4)), 800)[1]
    assert share_in_modes(samples) > 0.75


def test_the_mean_is_learnt_beside_both_modes():
    energy = EnergyConfig(patch=1, samples=4, mean_weight=1.0)
    drawn = train(ObjectiveConfig(kind="energy", energy=energy), 800)
    assert share_in_modes(drawn[1]) > 0.75
    assert drawn[0].abs().max() < 0.2
    without = train(ObjectiveConfig(kind="energy", energy=EnergyConfig(patch=1, samples=4)), 800)
    assert without[0].abs().mean() > 0.3, "negative control: not trained for, no noise gives any sample"


def test_regression_learns_the_mean_whatever_the_noise():
    """And hence neither mode: what it is not for."""
    samples = train(ObjectiveConfig(kind="regression"), 300)[1]
    assert samples.abs().max() < 0.2
    assert share_in_modes(samples) == 0
