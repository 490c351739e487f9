"""The same world on a GPU: close to the CPU in float32, usable under bfloat16, gradients intact."""

import pytest
import torch

from vidworld.world.state import WorldState

pytestmark = pytest.mark.gpu


@pytest.fixture
def pair(new_world):
    """One world on the CPU and the same on the GPU."""
    return new_world(), new_world().to("cuda")


def test_float32_agrees_with_the_cpu(pair, prompt, actions):
    host, device = pair
    device.autocast = False
    results = [
        world.rollout(world.reset(prompt(world), num_samples=3, seed=2), actions(world, 8))
        for world in (host, device)
    ]
    torch.testing.assert_close(
        results[1].latents_BTVChw.cpu(), results[0].latents_BTVChw, rtol=1e-2, atol=1e-2
    )


def test_bfloat16_stays_near_and_repeats(pair, prompt, actions):
    host, device = pair
    exact = host.rollout(host.reset(prompt(host)), actions(host, 1)).latents_BTVChw
    first, again = (
        device.rollout(device.reset(prompt(device)), actions(device, 1)).latents_BTVChw for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert (first.cpu() - exact).norm() / exact.norm() < 0.1


def test_states_move_and_save(pair, prompt, actions, tmp_path):
    _, world = pair
    state = world.reset(prompt(world), num_samples=2)
    state.save(tmp_path / "state.safetensors")
    restored = WorldState.load(tmp_path / "state.safetensors", device="cuda")
    commands = actions(world, 3)
    expected = world.rollout(state, commands).latents_BTVChw
    assert torch.equal(world.rollout(restored, commands).latents_BTVChw, expected)
    assert torch.equal(world.rollout(state.to("cpu").to("cuda"), commands).latents_BTVChw, expected)
    branched = world.rollout(state.fork(2), commands).latents_BTVChw
    assert torch.allclose(branched[::2], expected, atol=0.1)


def test_gradients_pass_under_autocast(pair, prompt, actions):
    _, world = pair
    commands = torch.tensor(actions(world, 3), device="cuda", requires_grad=True)
    imagined = world.rollout(world.reset(prompt(world)), commands, decode=False)
    world.decode(imagined.latents_BTVChw).square().mean().backward()
    assert commands.grad is not None
    assert commands.grad.isfinite().all()
    assert (commands.grad != 0).all()
