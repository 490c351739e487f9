"""The peers are what their papers say: identities of preconditioning, and caches that change nothing."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BASELINES = Path(__file__).parents[2] / "tools" / "bench" / "baselines"


@pytest.fixture(scope="module")
def load():
    loaded = []

    def run(name):
        spec = importlib.util.spec_from_file_location(name, BASELINES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    yield run
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def edm(load):
    return load("edm_unet")


@pytest.fixture(scope="module")
def plain(load):
    return load("plain_dit")


def wide(scales):
    return [one.flatten() for one in scales]


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_edm_scales_keep_unit_variance_at_every_level(edm, offset):
    config = edm.EdmConfig(2, sigma_offset=offset)
    sigma = torch.logspace(-3, 2, 30, dtype=torch.float64)
    c_in, c_out, c_skip, c_noise = wide(edm.precondition(sigma, config))
    noise, data = sigma**2 + offset**2, config.sigma_data**2
    torch.testing.assert_close(c_in**2 * (data + noise), torch.ones_like(sigma))
    # Variance of the target (x - c_skip (x + n)) / c_out, Karras et al. 2022, eq. 117 to 131.
    target = ((1 - c_skip) ** 2 * data + c_skip**2 * noise) / c_out**2
    torch.testing.assert_close(target, torch.ones_like(sigma))
    torch.testing.assert_close(c_noise, noise.sqrt().log() / 4)
    # Of all c_skip, this one amplifies the network's errors least (eq. 131).
    for other in (c_skip * 0.9, c_skip * 1.1):
        assert (((1 - other) ** 2 * data + other**2 * noise).sqrt() > c_out).all()


def test_edm_levels_fall_from_five_to_nothing_in_three_steps(edm):
    levels = edm.sigmas(edm.EdmConfig(2)).tolist()
    assert levels[0] == pytest.approx(5)
    assert levels[2] == pytest.approx(2e-3)
    assert levels[3] == 0
    middle = ((5 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert levels[1] == pytest.approx(middle)


def test_the_edm_sampler_ends_at_what_a_perfect_denoiser_says(edm, monkeypatch):
    config = edm.EdmConfig(2, channels=(16, 32), depth=1)
    net = edm.EdmUNet(config)
    truth = edm.to_eight_bits(torch.rand(3, 3, 16, 16) * 2 - 1)
    monkeypatch.setattr(net, "denoise", lambda noisy, *_: (truth, None, None))
    known = torch.zeros(3, 4, 3, 16, 16)
    found = net.sample(known, torch.zeros(3, 4, 2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, truth)


def test_the_edm_network_begins_as_the_skip_and_its_loss_falls(edm):
    torch.manual_seed(0)
    config = edm.EdmConfig(2, channels=(16, 32), depth=1)
    net = edm.EdmUNet(config)
    noisy, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 2.0])
    clean, said, scales = net.denoise(noisy, sigma, torch.zeros(2, 4, 3, 16, 16), torch.zeros(2, 4, 2))
    assert torch.equal(said, torch.zeros_like(said))
    torch.testing.assert_close(clean, edm.to_eight_bits(scales.c_skip * noisy))
    frames = (torch.rand(4, 1, 3, 1, 1) * 2 - 1).expand(4, 6, 3, 16, 16).contiguous()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        loss = net.loss(frames, torch.zeros(4, 5, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_every_input_reaches_the_edm_network(edm):
    torch.manual_seed(0)
    net = edm.EdmUNet(edm.EdmConfig(2, channels=(16, 32), depth=1))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = [torch.randn(1, 3, 16, 16), torch.randn(1), torch.randn(1, 4, 3, 16, 16), torch.randn(1, 4, 2)]
    for one in given:
        one.requires_grad_()
    net(*given).square().sum().backward()
    assert (given[2].grad.abs().sum((0, 2, 3, 4)) > 0).all()
    assert (given[3].grad.abs().sum((0, 2)) > 0).all()
    assert given[1].grad.abs().sum() > 0


def test_v_gives_back_clean_and_noise_and_ddim_is_exact_for_one_sample(plain):
    torch.manual_seed(0)
    x, eps = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double()
    for level in (0.05, 0.5, 0.95):
        t = torch.tensor(level).double()
        alpha, sigma = plain.signal_and_noise(t)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
        z, v = alpha * x + sigma * eps, plain.velocity(x, eps, t)
        torch.testing.assert_close(alpha * z - sigma * v, x)
        torch.testing.assert_close(sigma * z + alpha * v, eps)
        for target in (0.0, 0.3):
            s = torch.tensor(target).double()
            expected = plain.signal_and_noise(s)[0] * x + plain.signal_and_noise(s)[1] * eps
            torch.testing.assert_close(plain.ddim_step(z, v, t, s), expected)


def small(plain):
    torch.manual_seed(0)
    config = plain.PlainConfig(2, channels=4, side=4, width=64, depth=2, window=4, steps=3)
    net = plain.PlainDiT(config).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_patches_come_back(plain):
    z = torch.randn(2, 3, 4, 8, 8)
    x = plain.patchify(z, 2)
    assert x.shape == (2, 3, 16, 16)
    assert torch.equal(plain.unpatchify(x, 2, 8), z)
    # One patch holds one square.
    assert torch.equal(x[0, 0, 1].reshape(4, 2, 2), z[0, 0, :, :2, 2:4])


def test_frames_see_the_past_and_not_the_future(plain):
    net = small(plain)
    z = torch.randn(1, 4, 4, 4, 4).double().requires_grad_()
    led, known = plain.led_by(torch.randn(1, 3, 2).double())
    v, _ = net(z, net.condition(torch.rand(1, 4).double(), led, known.double()))
    v[:, 1].square().sum().backward()
    seen = z.grad.abs().sum((0, 2, 3, 4))
    assert (seen[:2] > 0).all()
    assert (seen[2:] == 0).all()


def test_cached_frames_are_what_a_whole_pass_sees(plain):
    net = small(plain)
    z = torch.randn(2, 4, 4, 4, 4).double()
    t = torch.tensor([[0.1, 0.1, 0.1, 0.7]]).double().expand(2, 4)
    led, known = plain.led_by(torch.randn(2, 3, 2).double())
    condition = net.condition(t, led, known.double())
    whole, _ = net(z, condition)
    cache = net.empty_cache(z)
    for place in range(3):
        one = slice(place, place + 1)
        _, kept = net(z[:, one], condition[:, one], cache.frame, cache, True)
        for layer, (key, value) in enumerate(kept):
            cache.keys[layer, :, :, place], cache.values[layer, :, :, place] = key, value
        cache.seen_W[place] = True
        cache.frame += 1
    step, _ = net(z[:, 3:], condition[:, 3:], cache.frame, cache)
    torch.testing.assert_close(step, whole[:, 3:])
    other, _ = net(z[:, 3:], condition[:, 3:], cache.frame + 1, cache)  # time matters
    assert not torch.allclose(other, whole[:, 3:])


def test_a_rollout_goes_on_when_the_window_is_full_and_listens(plain):
    net = small(plain).float()
    known = torch.randn(2, 3, 4, 4, 4)
    actions = torch.randn(2, 6, 2)

    def roll(future):
        return net.rollout(known, actions[:, :2], future, torch.Generator().manual_seed(0))

    first = roll(actions)
    assert first.shape == (2, 6, 4, 4, 4)
    assert first.isfinite().all()
    assert torch.equal(first, roll(actions))
    changed = actions.clone()
    changed[:, 3] += 1
    other = roll(changed)
    assert torch.equal(first[:, :3], other[:, :3])
    assert not torch.allclose(first[:, 3], other[:, 3])


def test_sizes_are_matched(edm, plain):
    def count(net):
        return sum(parameter.numel() for parameter in net.parameters())

    with torch.device("meta"):
        unet = edm.EdmUNet(edm.matched(edm.EdmConfig(8), 12_000_000))
        dit = plain.PlainDiT(plain.matched(plain.PlainConfig(8, width=256), 12_000_000))
    assert abs(count(unet) - 12e6) < 3e6
    assert abs(count(dit) - 12e6) < 1e6


def squares(count, frames, generator):
    """Pictures [B, T, 3, 16, 16] of a square that moves as it is told, and the commands [B, T, 2]."""
    actions = torch.randint(-1, 2, (count, frames, 2), generator=generator).float()
    place = torch.randint(3, 10, (count, 1, 2), generator=generator) + torch.cat(
        [torch.zeros(count, 1, 2), actions[:, :-1].cumsum(1)], 1
    )
    place = place.clamp(0, 12)
    axis = torch.arange(16)
    inside = [((axis >= place[..., i, None]) & (axis < place[..., i, None] + 4)).float() for i in (0, 1)]
    picture = inside[0][..., :, None] * inside[1][..., None, :]
    return (2 * picture - 1)[:, :, None].expand(-1, -1, 3, -1, -1).contiguous(), actions


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_edm_network_learns_a_square_and_listens_to_its_commands(edm):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = edm.EdmUNet(edm.EdmConfig(2, channels=(32, 64), depth=1))
    steps, frames, lr = 500, 6, 1e-3
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    for step in range(steps):
        pictures, actions = squares(16, frames, generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, 3 * (1 - step / steps))
        loss = net.loss(pictures, actions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    pictures, actions = squares(24, 10, generator)
    known, future, truth = pictures[:, :5], actions[:, 4:9], pictures[:, 5:]

    def error(commands):
        noise = torch.Generator().manual_seed(1)
        return float((net.rollout(known, actions[:, :4], commands, noise) - truth).square().mean())

    held = float((known[:, -1:] - truth).square().mean())
    assert error(future) < 0.5 * held
    assert error(future.roll(1, 0)) > 2 * error(future)
