"""A dot on a torus that moves as it is told: the smallest thing that a world model must learn."""

import pytest
import torch

from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape
from vidworld.model.two_stream import target_predictor
from vidworld.types import Frames, SignalLevel

T = 5


def clips(batch, random):
    actions = torch.randint(-1, 2, (batch, T, 2), generator=random).float()
    actions[:, 0] = 0
    place = (torch.randint(0, 8, (batch, 1, 2), generator=random) + actions.cumsum(1)) % 8
    away = (torch.arange(8.0) - place[..., None] + 4) % 8 - 4
    dot = torch.exp(-away.square() / 2)
    picture = dot[:, :, 0, :, None] * dot[:, :, 1, None, :]
    return Frames((picture[:, :, None, None] - 0.1) / 0.2, (place - 3.5) / 3.5), actions


def error(model, frames, actions, random):
    """Error of one-step prediction from pure noise, after frame 0."""
    batch = len(actions)
    context_level = SignalLevel.from_noise(torch.full((batch, T), 0.1))
    noise = frames.map(lambda x: torch.randn(x.shape, generator=random))
    context = frames.map(lambda x, eps: 0.9 * x + 0.1 * eps, noise)
    keep = (torch.arange(T) > 0).expand(batch, T)
    conditioning = Conditioning(actions[:, :, None], keep, torch.zeros(batch, dtype=torch.int64))
    fresh = frames.map(lambda x: torch.randn(x.shape, generator=random))
    predict = target_predictor(model, context, context_level, conditioning)
    clean = predict(fresh, SignalLevel.from_signal(torch.zeros(batch, T)), torch.ones(batch, T))
    return (clean.latents_BTVChw - frames.latents_BTVChw)[:, 1:].square().mean()


@pytest.mark.slow
def test_learns_to_move_as_told():
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = DiTConfig(width=64, depth=4, num_heads=2, num_kv_heads=1, time_every=2)
    model = CausalDiT(config, FrameShape(1, 1, 8, 8, 2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(150):
        loss = error(model, *clips(8, random), random)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        frames, actions = clips(64, random)
        true = error(model, frames, actions, random)
        shuffled = error(model, frames, actions.roll(1, 0), random)
        variance = frames.latents_BTVChw.var()
    assert true < 0.05 * variance
    assert shuffled > 5 * true
