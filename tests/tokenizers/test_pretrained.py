"""Tiny models of diffusers' real classes as tokenizers: strides, parity, causality, statistics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidworld.errors import CheckpointError, DataError
from vidworld.tokenizers.base import Tokenizer, fold_views, unfold_views
from vidworld.tokenizers.pretrained import PretrainedTokenizer, require_statistics, wrap
from vidworld.tokenizers.store import load_tokenizer
from vidworld.tokenizers.streaming import StreamingTokenizer

# name: time stride, spatial stride, latent channels, whether it streams
FACTS = {
    "wan2.1": (4, 8, 4, True),
    "wan2.2": (4, 16, 4, True),
    "qwen": (4, 8, 4, True),
    "cosmos": (8, 8, 4, False),
    "ltx": (8, 32, 8, False),
    "hunyuan": (4, 16, 4, False),
    "dc": (1, 8, 4, True),
}
Folders = dict[str, Path]
Make = Callable[..., Any]


@pytest.fixture(params=FACTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(name: str, vae_folders: Folders) -> PretrainedTokenizer:
    loaded = load_tokenizer(vae_folders[name])
    assert isinstance(loaded, PretrainedTokenizer)
    return loaded


def video(tokenizer: Tokenizer, latent_frames: int = 3, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    frames = 1 + (latent_frames - 1) * tokenizer.time_stride
    size = (tokenizer.spatial_stride * 2, tokenizer.spatial_stride)
    return torch.rand(batch, frames, 3, *size, generator=generator) * 2 - 1


@torch.no_grad()
def test_strides_and_shapes(name: str, tokenizer: PretrainedTokenizer) -> None:
    found = (tokenizer.time_stride, tokenizer.spatial_stride, tokenizer.latent_channels)
    assert (*found, isinstance(tokenizer, StreamingTokenizer)) == FACTS[name]
    assert isinstance(tokenizer, Tokenizer)
    clip = video(tokenizer)
    latents = tokenizer.encode(clip)
    assert latents.shape == (2, 3, tokenizer.latent_channels, 2, 1)
    assert tokenizer.decode(latents).shape == clip.shape
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


@torch.no_grad()
def test_it_computes_what_diffusers_does(name: str, tokenizer: PretrainedTokenizer, vae: Make) -> None:
    reference, clip = vae(name), video(tokenizer, batch=1)
    if name == "dc":
        raw = reference.encode(clip[0]).latent[None]
        shown = reference.decode(raw[0]).sample[None]
    else:
        raw = reference.encode(clip.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
        shown = reference.decode(raw.transpose(1, 2)).sample.transpose(1, 2)
    mean, std = tokenizer.mean_C[:, None, None], tokenizer.std_C[:, None, None]
    latents = tokenizer.encode(clip)
    torch.testing.assert_close(latents, (raw - mean) / std, rtol=1e-4, atol=1e-5)
    assert (latents - raw).abs().max() > 1e-3 or tokenizer.statistics_from == "nowhere"
    decoded = tokenizer.decode((raw - mean) / std)
    if FACTS[name][3] and name != "dc":
        decoded = decoded.clamp(-1, 1)  # diffusers clamps, which would stop gradients
    torch.testing.assert_close(decoded, shown, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_frames_do_not_depend_on_later_ones(tokenizer: PretrainedTokenizer) -> None:
    clip, other = video(tokenizer), video(tokenizer, seed=1)
    known = 1 + tokenizer.time_stride
    mixed = torch.cat([clip[:, :known], other[:, known:]], 1)
    latents, latents_mixed = tokenizer.encode(clip), tokenizer.encode(mixed)
    assert torch.equal(latents[:, :2], latents_mixed[:, :2])
    assert not torch.equal(latents[:, 2], latents_mixed[:, 2])
    changed = torch.cat([latents[:, :2], latents_mixed[:, 2:]], 1)
    shown, shown_changed = tokenizer.decode(latents), tokenizer.decode(changed)
    assert torch.equal(shown[:, :known], shown_changed[:, :known])
    assert not torch.equal(shown[:, known:], shown_changed[:, known:])


@torch.no_grad()
def test_views_go_into_the_batch(tokenizer: PretrainedTokenizer) -> None:
    clip = torch.stack([video(tokenizer, seed=seed) for seed in (0, 1)], 2)
    latents = unfold_views(tokenizer.encode(fold_views(clip)), 2)
    alone = tokenizer.encode(clip[:, :, 1])
    torch.testing.assert_close(latents[:, :, 1], alone, rtol=1e-4, atol=1e-5)


def test_gradients_reach_actions_through_it(tokenizer: PretrainedTokenizer) -> None:
    latents = torch.randn(1, 2, tokenizer.latent_channels, 1, 1, requires_grad=True)
    tokenizer.decode(latents).square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().amax((0, 2, 3, 4)).min() > 0


@torch.no_grad()
def test_bfloat16_weights(name: str, vae_folders: Folders, tokenizer: PretrainedTokenizer) -> None:
    if name == "cosmos":
        pytest.skip("PyTorch's avg_pool3d knows no bfloat16 on a CPU")
    half = load_tokenizer(vae_folders[name], dtype="bfloat16")
    assert isinstance(half, PretrainedTokenizer)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.mean_C.dtype == torch.float32
    assert half.digest != tokenizer.digest
    clip = video(tokenizer)
    latents, exact = half.encode(clip), tokenizer.encode(clip)
    assert latents.dtype == torch.float32
    assert 0 < (latents - exact).square().mean() < 0.05 * exact.var()


def test_sizes_and_lengths_that_do_not_fit(tokenizer: PretrainedTokenizer) -> None:
    stride, k = tokenizer.spatial_stride, tokenizer.time_stride
    with pytest.raises(DataError, match=f"divisible by {stride}; shard the video at {stride}x{stride}"):
        tokenizer.encode(torch.zeros(1, 1, 3, stride + 1, stride))
    if k > 1:
        with pytest.raises(DataError, match=f"got {k}, .*time stride {k}; take 1 or {1 + k} frames"):
            tokenizer.encode(torch.zeros(1, k, 3, stride, stride))
    with pytest.raises(DataError, match="latents to decode"):
        tokenizer.decode(torch.zeros(1, 1, tokenizer.latent_channels + 1, 1, 1))
    with pytest.raises(DataError, match="float video"):
        tokenizer.encode(torch.zeros(1, 1, 3, stride, stride, dtype=torch.uint8))


def test_where_statistics_come_from(vae: Make, vae_folders: Folders) -> None:
    found = {name: load_tokenizer(folder) for name, folder in vae_folders.items()}
    wan, cosmos, dc, ltx = (found[name] for name in ("wan2.1", "cosmos", "dc", "ltx"))
    assert isinstance(wan, PretrainedTokenizer)
    torch.testing.assert_close(wan.std_C, torch.tensor([1.0, 2.0, 0.5, 1.5]))
    assert isinstance(cosmos, PretrainedTokenizer)
    # Two values a channel, means .1 and .3, deviations 1 and 1.5: pooled within and between.
    torch.testing.assert_close(cosmos.mean_C, torch.full((4,), 0.2))
    torch.testing.assert_close(cosmos.std_C, torch.full((4,), (0.5 * (1 + 1.5**2) + 0.01) ** 0.5))
    assert isinstance(dc, PretrainedTokenizer)
    torch.testing.assert_close(dc.std_C, torch.full((4,), 2.5))
    assert isinstance(ltx, PretrainedTokenizer)
    assert ltx.statistics_from == "nowhere"
    with pytest.raises(DataError, match=r"AutoencoderKLLTXVideo does not say .*run vidworld encode"):
        require_statistics(ltx, "here")
    before = ltx.digest
    ltx.measure_statistics([video(ltx, batch=8, latent_frames=5)])
    latents = ltx.encode(video(ltx, batch=8, latent_frames=5))
    torch.testing.assert_close(latents.mean((0, 1, 3, 4)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 1, 3, 4), correction=0), torch.ones(8), atol=1e-3, rtol=0)
    assert ltx.digest != before
    require_statistics(ltx, "here")
    require_statistics(wan, "here")
    model = vae("ltx")
    model.latents_std.fill_(3.0)
    torch.testing.assert_close(
        wrap(model, "AutoencoderKLLTXVideo", model.config).std_C, torch.full((8,), 3.0)
    )


def test_what_is_not_causal_or_not_repeatable_is_refused(vae: Make) -> None:
    for changes, message in (
        ({"decoder_causal": False}, r"pictures depend on later ones \(decoder_causal is false\); .*\"decode"),
        ({"encoder_causal": False}, r"frames depend on later ones \(encoder_causal is false\)"),
        ({"decoder_inject_noise": (True,) * 5}, "draws noise"),
    ):
        model = vae("ltx", **changes)
        with pytest.raises(CheckpointError, match=message):
            wrap(model, "AutoencoderKLLTXVideo", model.config)
    model = vae("wan2.1")
    with pytest.raises(CheckpointError, match="got 'AutoencoderKLMochi', expected AutoencoderKLWan or "):
        wrap(model, "AutoencoderKLMochi", model.config)
    with pytest.raises(CheckpointError, match="got 3 and 4 values, expected 4, one a channel"):
        wrap(model, "AutoencoderKLWan", dict(model.config) | {"latents_mean": [0, 0, 0]})


@torch.no_grad()
def test_a_decoder_that_denoises_is_given_nothing_to_denoise(vae: Make) -> None:
    model = vae("ltx", timestep_conditioning=True)
    tokenizer = wrap(model, "AutoencoderKLLTXVideo", model.config)
    latents = torch.randn(1, 2, 8, 1, 1)
    expected = model.decode(latents.transpose(1, 2), torch.zeros(1)).sample.transpose(1, 2)
    assert torch.equal(tokenizer.decode(latents), expected)
