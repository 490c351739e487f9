"""Members that share a trunk: each is the network with its merged weights, and no other."""

import dataclasses

import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.model.cache import KVCache
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.model.members import MemberLinear
from vidworld.model.merge import first_member, merge_member, with_fresh_parts
from vidworld.model.parameters import parameter_groups
from vidworld.model.two_stream import cached_predictor, ingest, target_predictor
from vidworld.types import Frames, SignalLevel

SHAPE = FrameShape(views=2, channels=4, height=4, width=4, proprio_dims=3, action_dims=2)
CONFIG = DiTConfig(
    width=32,
    depth=4,
    num_heads=2,
    num_kv_heads=1,
    time_every=2,
    num_registers=1,
    noise_dims=2,
    members=3,
    member_rank=2,
)
EXACT = 1e-12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CausalDiT(CONFIG, SHAPE).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    return model.requires_grad_(False)


def frames(batch, time, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Frames(
        torch.randn(batch, time, 2, 4, 4, 4, generator=generator, dtype=torch.float64),
        torch.randn(batch, time, 3, generator=generator, dtype=torch.float64),
    )


def conditioning(batch, time, members, targets=1):
    generator = torch.Generator().manual_seed(1)
    return Conditioning(
        torch.randn(batch, time, 1, 2, generator=generator, dtype=torch.float64),
        torch.ones(batch, time, dtype=torch.bool),
        torch.zeros(batch, dtype=torch.int64),
        torch.randn(batch, targets * time, 2, generator=generator, dtype=torch.float64),
        members,
    )


def level(batch, time, value=0.6):
    return SignalLevel.from_signal(torch.full((batch, time), value, dtype=torch.float64))


def apart(first: Frames, second: Frames):
    return max(
        float((first.latents_BTVChw - second.latents_BTVChw).abs().max()),
        float((first.proprio_BTS - second.proprio_BTS).abs().max()),
    )


def test_each_row_is_predicted_by_its_member_alone(model):
    """In training (two streams, a subset of rows) and against a cache."""
    member_B = torch.tensor([0, 1, 2, 0, 1])
    given, context = conditioning(5, 4, member_B), frames(5, 4)
    noisy, step = frames(5, 4, seed=2), torch.ones(5, 4, dtype=torch.float64)

    def predicted(given):
        return target_predictor(model, context, level(5, 4, 0.9), given)(noisy, level(5, 4), step)

    whole = predicted(given)
    predict = target_predictor(model, context, level(5, 4, 0.9), given)
    some = predict(noisy[1:4], level(3, 4), step[1:4], rows=slice(1, 4))
    assert apart(whole[1:4], some) < EXACT
    cache = ingest(model, context, level(5, 4, 0.9), given, None)
    following = cached_predictor(model, given.frames(slice(0, 1)), cache)
    following = following(noisy[:, :1], level(5, 1), step[:, :1])
    for member in range(3):
        rows = member_B == member
        alone = merge_member(model, member)
        assert alone.config.members == 0
        own = dataclasses.replace(given[rows], member_B=None)
        found = target_predictor(alone, context[rows], level(5, 4, 0.9)[rows], own)(
            noisy[rows], level(5, 4)[rows], step[rows]
        )
        assert apart(found, whole[rows]) < EXACT
        own_cache: KVCache = ingest(alone, context[rows], level(5, 4, 0.9)[rows], own, None)
        predict = cached_predictor(alone, own.frames(slice(0, 1)), own_cache)
        next_one = predict(noisy[rows][:, :1], level(5, 1)[rows], step[rows][:, :1])
        assert apart(next_one, following[rows]) < EXACT
    # Negative control: another member predicts something else, and so does the trunk.
    assert apart(predicted(dataclasses.replace(given, member_B=(member_B + 1) % 3)), whole) > 1e-3
    assert apart(predicted(dataclasses.replace(given, member_B=None)), whole) > 1e-3


def test_only_a_member_s_own_rows_teach_it(model):
    learning = CausalDiT(CONFIG, SHAPE)
    learning.load_state_dict(model.state_dict())
    learning = learning.double().requires_grad_(True)
    given = conditioning(2, 3, torch.tensor([0, 2]))
    found, _ = learning(
        frames(2, 3), level(2, 3), torch.ones(2, 3, dtype=torch.float64), given, streams=Streams(context=3)
    )
    found.latents_BTVChw.square().sum().backward()
    changes = [p.grad for name, p in learning.named_parameters() if name.endswith(("in_JrI", "out_JOr"))]
    assert len(changes) == 2 * (4 * 4 + 2 * 2)
    for gradient in changes:
        assert gradient is not None
        assert not gradient[1].any()
        assert gradient[0].any()
        assert gradient[2].any()
    assert learning.blocks[0].mlp.down.weight.grad.any()


def test_members_start_apart_but_close():
    torch.manual_seed(0)
    linear = MemberLinear(64, 96, members=4, rank=8)
    torch.nn.init.normal_(linear.weight, std=64**-0.5)
    linear.requires_grad_(False)
    changes = [linear.merged(member) - linear.weight for member in range(4)]
    for change in changes:
        assert 0.05 < float(change.norm() / linear.weight.norm()) < 0.2
        assert int(torch.linalg.matrix_rank(change)) == 8
    assert float((changes[0] * changes[1]).sum().abs() / changes[0].norm() ** 2) < 0.1


def test_a_trained_network_becomes_a_trunk(model):
    """The state dict of a network without members fits, with fresh changes."""
    plain = CausalDiT(dataclasses.replace(CONFIG, members=0), SHAPE)
    assert not any("JrI" in name for name in plain.state_dict())
    shared = CausalDiT(CONFIG, SHAPE)
    weights = with_fresh_parts(plain.state_dict(), shared)
    assert weights.keys() == shared.state_dict().keys()
    shared.load_state_dict(weights)
    assert torch.equal(shared.blocks[0].mlp.down.weight, plain.blocks[0].mlp.down.weight)
    assert first_member(plain) is plain
    assert first_member(shared).config.members == 0


def test_muon_leaves_the_changes_alone(model):
    groups = parameter_groups(model)
    assert all(parameter.ndim == 2 for parameter in groups.matrices)
    assert sum(parameter.ndim == 3 for parameter in groups.vectors) == 2 * (4 * 4 + 2 * 2)


def test_a_member_alone_is_refused():
    with pytest.raises(ConfigError, match="setting 'members' of the model: got 1, expected 0, or 2 and more"):
        dataclasses.replace(CONFIG, members=1)
    with pytest.raises(ConfigError, match="member_rank"):
        dataclasses.replace(CONFIG, member_rank=0)
