"""Pieces of a video give the bits of the whole; sessions that take turns do not disturb each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidworld.errors import DataError
from vidworld.tokenizers.conv import ConvTokenizer
from vidworld.tokenizers.pretrained import wrap
from vidworld.tokenizers.store import load_tokenizer
from vidworld.tokenizers.streaming import StreamingTokenizer, StreamState

FRAMES = 13


@pytest.fixture(params=["wan2.1", "wan2.2", "qwen", "dc", "conv"])
def tokenizer(
    request: pytest.FixtureRequest,
    vae_folders: dict[str, Path],
    make_tokenizer: Callable[..., ConvTokenizer],
) -> StreamingTokenizer:
    found = make_tokenizer() if request.param == "conv" else load_tokenizer(vae_folders[request.param])
    assert isinstance(found, StreamingTokenizer)
    return found


def clip(seed: int = 0, batch: int = 2, frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, 32, 32, generator=generator) * 2 - 1


def snapshot(state: StreamState) -> dict[str, Tensor]:
    return {name: feature.clone() for name, feature in state.features.items()}


def same(state: StreamState, before: dict[str, Tensor]) -> bool:
    return state.features.keys() == before.keys() and all(
        torch.equal(state.features[name], before[name]) for name in before
    )


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1, 4, 4, 4], [5, 8], [1, 8, 4], [9, 4]])
def test_pieces_give_the_bits_of_the_whole(tokenizer: StreamingTokenizer, pieces: list[int]) -> None:
    video = clip()
    whole = tokenizer.encode(video)
    state, found = tokenizer.start(2), []
    for piece in video.split(pieces, 1):
        state, latents = tokenizer.encode_next(state, piece)
        found.append(latents)
    joined = torch.cat(found, 1)
    k = tokenizer.time_stride
    assert state.frames == joined.shape[1] == 1 + (FRAMES - 1) // k
    if isinstance(tokenizer, ConvTokenizer) or k == 1:  # other batches of frames, other rounding
        torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(joined, whole)
    shown = tokenizer.decode(whole)
    latent_pieces = [1 + (pieces[0] - 1) // k, *(piece // k for piece in pieces[1:])]
    state, found = tokenizer.start(2), []
    for piece in whole.split(latent_pieces, 1):
        state, frames = tokenizer.decode_next(state, piece)
        found.append(frames)
    assert [frames.shape[1] for frames in found] == pieces
    if k == 1:
        torch.testing.assert_close(torch.cat(found, 1), shown, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(torch.cat(found, 1), shown)


@torch.no_grad()
def test_sessions_that_take_turns_do_not_disturb_each_other(tokenizer: StreamingTokenizer) -> None:
    videos = [clip(seed) for seed in (1, 2, 3)]
    k = tokenizer.time_stride
    pieces = [1] + [k] * ((FRAMES - 1) // k)

    def turns(number: int, states: list[StreamState], out: list[list[Tensor]]) -> None:
        for step, _ in enumerate(pieces):
            for session in range(number):
                piece = videos[session].split(pieces, 1)[step]
                states[session], latents = tokenizer.encode_next(states[session], piece)
                out[session].append(latents)

    together: list[list[Tensor]] = [[], [], []]
    turns(3, [tokenizer.start(2) for _ in videos], together)
    alone: list[list[Tensor]] = [[]]
    turns(1, [tokenizer.start(2)], alone)
    assert torch.equal(torch.cat(together[0], 1), torch.cat(alone[0], 1))
    assert not torch.equal(torch.cat(together[0], 1), torch.cat(together[1], 1))

    latents = [torch.cat(one, 1) for one in together]
    states = [tokenizer.start(2) for _ in latents]
    shown: list[list[Tensor]] = [[], [], []]
    for step in range(len(pieces)):
        for session in (2, 0, 1):
            states[session], frames = tokenizer.decode_next(states[session], latents[session][:, step, None])
            shown[session].append(frames)
    for session in range(3):
        state, frames = tokenizer.start(2), []
        for step in range(len(pieces)):
            state, piece = tokenizer.decode_next(state, latents[session][:, step, None])
            frames.append(piece)
        assert torch.equal(torch.cat(shown[session], 1), torch.cat(frames, 1))


@torch.no_grad()
def test_states_are_values(tokenizer: StreamingTokenizer) -> None:
    """A state steps twice to the same result, is left as it was, and its rows may be forked."""
    latents = tokenizer.encode(clip())
    state = tokenizer.start(2)
    for step in range(3):
        before, taken = snapshot(state), state.frames
        first, shown = tokenizer.decode_next(state, latents[:, step, None])
        again, shown_again = tokenizer.decode_next(state, latents[:, step, None])
        assert torch.equal(shown, shown_again)
        assert same(first, snapshot(again))
        assert same(state, before)
        assert state.frames == taken
        rows = torch.tensor([1, 1, 0])
        forked, shown_forked = tokenizer.decode_next(state.select(rows), latents[rows, step, None])
        torch.testing.assert_close(shown_forked, shown[rows], rtol=1e-4, atol=1e-5)
        assert forked.batch == 3
        assert all(len(feature) == 3 for feature in forked.features.values())
        assert all(len(feature) == 2 for feature in state.select(rows).features.values())  # shared until then
        alone = state.select(rows).select(torch.tensor([2])).gathered()
        assert all(torch.equal(feature, state.features[name][:1]) for name, feature in alone.features.items())
        state = first
    if tokenizer.time_stride > 1:
        # The memory counts: without it the same latents show something else.
        _, forgetful = tokenizer.decode_next(
            StreamState(2, 3, tokenizer.decode_next(tokenizer.start(2), latents[:, :1])[0].features),
            latents[:, 3, None],
        )
        assert not torch.equal(forgetful, tokenizer.decode_next(state, latents[:, 3, None])[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "qwen"])
def test_the_bits_are_those_of_diffusers(name: str, vae: Callable[..., Any]) -> None:
    """With identities for its 1x1 convolutions, which it runs over all frames at once, rounding otherwise."""
    model = vae(name)
    for conv in (model.quant_conv, model.post_quant_conv):
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight.squeeze().fill_diagonal_(1.0)
    tokenizer = wrap(model, type(model).__name__, model.config)
    video = clip()
    expected = model.encode(video.transpose(1, 2)).latent_dist.mode()
    raw = tokenizer.encode_raw(video)
    assert torch.equal(raw, expected.transpose(1, 2))
    assert isinstance(tokenizer, StreamingTokenizer)
    tokenizer.set_statistics(torch.zeros(4), torch.ones(4))
    state, shown = tokenizer.start(2), []
    for latents in raw.split(1, 1):
        state, frames = tokenizer.decode_next(state, latents)
        shown.append(frames)
    reference = model.decode(expected).sample.transpose(1, 2)
    assert torch.equal(torch.cat(shown, 1).clamp(-1, 1), reference)


def test_what_does_not_fit_the_stream_is_refused(vae_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(vae_folders["wan2.1"])
    assert isinstance(tokenizer, StreamingTokenizer)
    state, _ = tokenizer.encode_next(tokenizer.start(2), clip(frames=5))
    for frames in (1, 3, 5):
        with pytest.raises(DataError, match=f"next frames of the stream: got {frames}, expected a multiple"):
            tokenizer.encode_next(state, clip(frames=frames))
    with pytest.raises(DataError, match=r"number of frames: got 4, .*take 1 or 5"):
        tokenizer.encode_next(tokenizer.start(2), clip(frames=4))
    with pytest.raises(DataError, match="videos of the stream: got 3, expected 2"):
        tokenizer.encode_next(state, clip(batch=3, frames=4))
    with pytest.raises(DataError, match="videos of the stream: got 1, expected 2"):
        tokenizer.decode_next(state, torch.zeros(1, 1, 4, 4, 4))
