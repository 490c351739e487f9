"""Views, time strides and channel statistics: identities on random shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vidworld.errors import DataError
from vidworld.tokenizers.base import (
    ChannelStatistics,
    Tokenizer,
    check_size,
    chunk_actions,
    fold_views,
    num_latent_frames,
    to_pixels,
    to_unit_range,
    tokenizer_digest,
    unfold_views,
    usable_frames,
)

SMALL = st.integers(1, 4)


def numbered(*shape: int) -> torch.Tensor:
    """Every element its own number, never 0."""
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64).reshape(shape)


@given(SMALL, SMALL, SMALL)
def test_folding_views_keeps_each_view_together(batch: int, frames: int, views: int) -> None:
    video = numbered(batch, frames, views, 2, 3, 5)
    folded = fold_views(video)
    assert folded.shape == (batch * views, frames, 2, 3, 5)
    for b in range(batch):
        for v in range(views):
            assert torch.equal(folded[b * views + v], video[b, :, v])
    assert torch.equal(unfold_views(folded, views), video)


@given(batch=SMALL, latent_frames=st.integers(1, 6), stride=st.integers(1, 5), dims=SMALL)
def test_chunked_actions_are_those_that_lead_into_the_frame(
    batch: int, latent_frames: int, stride: int, dims: int
) -> None:
    frames = 1 + (latent_frames - 1) * stride
    actions = numbered(batch, frames, dims)
    chunks, keep = chunk_actions(actions, stride)
    assert chunks.shape == (batch, latent_frames, stride, dims)
    assert keep.shape == (batch, latent_frames)
    assert keep.dtype == torch.bool
    assert not keep[:, 0].any()
    assert keep[:, 1:].all()
    assert torch.equal(chunks[:, 0], torch.zeros(batch, stride, dims, dtype=actions.dtype))
    # Latent frame t ends at camera frame t * stride; action i takes camera frame i to i + 1.
    for t in range(1, latent_frames):
        for j in range(stride):
            assert torch.equal(chunks[:, t, j], actions[:, t * stride - stride + j])
    # Every action but the last, which leads out of the clip, is used exactly once and in order.
    assert torch.equal(chunks[:, 1:].flatten(1, 2), actions[:, :-1])


def test_stride_one_gives_the_action_before() -> None:
    actions = numbered(2, 5, 3)
    chunks, _ = chunk_actions(actions, 1)
    assert torch.equal(chunks[:, 1:, 0], actions[:, :4])
    assert not torch.equal(chunks[:, 1:, 0], actions[:, 1:])  # not the action that leaves the frame


def test_gradients_reach_all_actions_but_the_last() -> None:
    actions = numbered(1, 5, 2).requires_grad_()
    chunk_actions(actions, 2)[0].sum().backward()
    assert actions.grad is not None
    assert actions.grad[0, :, 0].tolist() == [1, 1, 1, 1, 0]


@given(frames=st.integers(1, 40), stride=st.integers(1, 6))
def test_time_strides_refuse_what_does_not_divide(frames: int, stride: int) -> None:
    usable = usable_frames(frames, stride)
    assert frames - stride < usable <= frames
    assert num_latent_frames(usable, stride) == 1 + (usable - 1) // stride
    if (frames - 1) % stride:
        with pytest.raises(DataError, match=f"got {frames}, expected 1 more than a multiple .* {stride}"):
            chunk_actions(numbered(1, frames, 1), stride)
        assert usable < frames
    else:
        assert usable == frames


def test_no_frames_are_refused() -> None:
    with pytest.raises(DataError, match="got 0"):
        num_latent_frames(0, 1)


@pytest.mark.parametrize("size", [(50, 64), (64, 72), (8, 16), (0, 16)])
def test_sizes_that_do_not_divide_are_refused_with_a_remedy(size: tuple[int, int]) -> None:
    with pytest.raises(DataError) as caught:
        check_size(*size, 16)
    assert f"got {size[1]}x{size[0]}, expected width and height divisible by 16" in str(caught.value)
    assert "shard the video at" in str(caught.value)


def test_the_size_that_is_suggested_fits() -> None:
    with pytest.raises(DataError, match="at 80x48"):
        check_size(50, 78, 16)
    check_size(48, 80, 16)


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(pixels)
    assert unit.aminmax() == (-1, 1)
    assert torch.equal(to_pixels(unit), pixels)
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_statistics_do_not_depend_on_how_frames_come(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    latents = torch.from_numpy(generator.normal(3.0, 0.2, (sum(sizes), 2, 4, 3, 5)))
    statistics = ChannelStatistics(4)
    for piece in latents.split(sizes):
        statistics.update(piece)
    rows = latents.movedim(2, 0).flatten(1)
    assert torch.allclose(statistics.mean_C, rows.mean(1).float())
    assert torch.allclose(statistics.std_C, rows.std(1, correction=0).float(), rtol=1e-5)
    assert statistics.count == rows.shape[1]


def test_digest_sees_kind_config_names_shapes_and_values() -> None:
    torch.manual_seed(0)
    module = nn.Linear(2, 3)
    same = nn.Linear(2, 3)
    same.load_state_dict(module.state_dict())
    digest = tokenizer_digest("conv", {"a": 1}, module)
    assert tokenizer_digest("conv", {"a": 1}, same) == digest
    with torch.no_grad():
        same.bias[0] += 1e-6
    others = {
        tokenizer_digest("conv", {"a": 1}, same),
        tokenizer_digest("other", {"a": 1}, module),
        tokenizer_digest("conv", {"a": 2}, module),
        tokenizer_digest("conv", {"a": 1}, nn.Sequential(module)),
        digest,
    }
    assert len(others) == 5


def test_digest_does_not_see_memory_layout() -> None:
    module = nn.Conv2d(4, 4, 3)
    before = tokenizer_digest("conv", {}, module)
    module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    assert tokenizer_digest("conv", {}, module) == before


def test_protocol_is_checkable() -> None:
    assert not isinstance(nn.Linear(2, 2), Tokenizer)
