"""The convolutional tokenizer: shapes, identities, and what a few seconds of training make of it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from vidworld.errors import ConfigError, DataError
from vidworld.tokenizers.base import Tokenizer, fold_views, unfold_views
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig, ResidualBlock

Make = Callable[..., ConvTokenizer]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def video(*lead: int, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*lead, 3, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (96, 128), (64, 64)])
def test_shapes_at_any_size_divisible_by_16(make_tokenizer: Make, size: tuple[int, int]) -> None:
    tokenizer = make_tokenizer()
    clip = video(2, 3, height=size[0], width=size[1])
    latents = tokenizer.encode(clip)
    assert latents.shape == (2, 3, 16, size[0] // 8, size[1] // 8)
    assert latents.is_contiguous()
    assert tokenizer.decode(latents).shape == clip.shape


def test_it_is_a_tokenizer() -> None:
    tokenizer = ConvTokenizer(ConvTokenizerConfig(widths=(16, 16, 16), latent_channels=4))
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.spatial_stride, tokenizer.time_stride, tokenizer.latent_channels) == (8, 1, 4)
    assert tokenizer.encode(video(1, 1)).shape[2] == 4


@pytest.mark.parametrize("size", [(50, 64), (64, 56), (24, 24), (8, 16)])
def test_other_sizes_are_refused(make_tokenizer: Make, size: tuple[int, int]) -> None:
    tokenizer = make_tokenizer()
    clip = video(1, 1, height=size[0], width=size[1])
    for function in (tokenizer.encode, tokenizer.encode_raw):
        with pytest.raises(DataError, match=f"got {size[1]}x{size[0]}, expected width and height divisible"):
            function(clip)
    with pytest.raises(DataError, match="divisible by 16"):
        tokenizer.training_loss(clip, torch.Generator())


def test_other_shapes_and_dtypes_are_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    for wrong in (video(2), video(1, 2).transpose(2, -1), video(1, 0), torch.zeros(1, 1, 1, 16, 16)):
        with pytest.raises(DataError, match=r"expected \[B, T, 3, H, W\]"):
            tokenizer.encode(wrong)
    with pytest.raises(DataError, match="to_unit_range"):
        tokenizer.encode(torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"expected \[B, T, 16, h, w\]"):
        tokenizer.decode(torch.zeros(1, 1, 8, 4, 4))
    with pytest.raises(DataError, match="shape"):
        tokenizer.decode(torch.zeros(1, 1, 1, 4, 4))  # would broadcast


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": (16, 24, 32)},
        {"norm_groups": 0},
        {"latent_channels": 0},
        {"encoder_blocks": (0, -1, 1)},
        {"decoder_noise": -0.1},
    ],
)
def test_impossible_configs_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        ConvTokenizerConfig(**wrong)  # type: ignore[arg-type]


def test_views_folded_into_the_batch_equal_each_view_alone(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    clip = video(2, 3, 2)
    together = unfold_views(tokenizer.encode(fold_views(clip)), 2)
    for view in range(2):
        assert close(together[:, :, view], tokenizer.encode(clip[:, :, view]))
    assert not close(together[:, :, 0], together[:, :, 1])


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunks_bound_memory_and_change_nothing(make_tokenizer: Make, chunk: int) -> None:
    tokenizer = make_tokenizer()
    seen = []
    clip = video(2, 3)
    latents, decoded = tokenizer.encode(clip), tokenizer.decode(tokenizer.encode(clip))
    handles = [
        first.register_forward_hook(lambda _module, given, _result: seen.append(len(given[0])))
        for first in (tokenizer.encoder[0], tokenizer.decoder[0])
    ]
    assert close(tokenizer.encode(clip, chunk=chunk), latents)
    assert close(tokenizer.decode(latents, chunk=chunk), decoded)
    assert max(seen) == min(chunk, 6)
    for handle in handles:
        handle.remove()


def test_a_chunk_of_nothing_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(ConfigError, match="chunk"):
        make_tokenizer().encode(video(1, 1), chunk=0)


def test_each_frame_stands_for_itself(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    clip = video(1, 4)
    changed = clip.clone()
    changed[:, 2] = -changed[:, 2]
    same = (tokenizer.encode(clip) - tokenizer.encode(changed)).abs().amax((0, 2, 3, 4)) < 1e-5
    assert same.tolist() == [True, True, False, True]


def test_channels_last_and_contiguous_agree(make_tokenizer: Make) -> None:
    tokenizer, plain = make_tokenizer(), make_tokenizer()
    for parameter in plain.parameters():
        parameter.data = parameter.data.contiguous()
    assert tokenizer.encoder.get_parameter("1.weight").is_contiguous(memory_format=torch.channels_last)
    assert not plain.encoder.get_parameter("1.weight").is_contiguous(memory_format=torch.channels_last)
    clip = video(2, 2)
    frames = clip.flatten(0, 1)
    assert close(plain.encoder(frames).unflatten(0, (2, 2)), tokenizer.encode_raw(clip))
    odd = clip.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert close(tokenizer.encode(odd), tokenizer.encode(clip))


def test_normalisation_is_the_affine_map_it_says(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    clip = video(1, 2)
    raw = tokenizer.encode_raw(clip)
    mean, std = tokenizer.mean_C[:, None, None], tokenizer.std_C[:, None, None]
    assert close(tokenizer.encode(clip), (raw - mean) / std)
    assert close(tokenizer.decode(tokenizer.encode(clip)), tokenizer.decode_raw(raw))
    assert not close(tokenizer.encode(clip), raw)


def test_statistics_that_cannot_be_divided_by_are_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    ones = torch.ones(16)
    for mean, std in ((ones[:4], ones[:4]), (ones, 0 * ones), (ones * torch.nan, ones), (ones, ones / 0)):
        with pytest.raises(DataError, match="latent statistics"):
            tokenizer.set_statistics(mean, std)
    with pytest.raises(DataError, match="at least one"):
        tokenizer.measure_statistics([])


def test_gradients_reach_pixels_and_latents(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    clip = video(1, 2).requires_grad_()
    tokenizer.decode(tokenizer.encode(clip)).square().sum().backward()
    assert clip.grad is not None
    assert clip.grad.abs().sum() > 0


def test_double_precision_is_kept(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    single = tokenizer.encode(video(1, 1))
    double = tokenizer.double().encode(video(1, 1).double())
    assert double.dtype == torch.float64
    assert close(double.float(), single)


def test_a_fresh_residual_block_is_the_identity() -> None:
    block = ResidualBlock(16, 4)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), x)


def test_training_noise_comes_from_the_generator_alone(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    clip = video(2, 2)

    def loss(noise_seed: int, global_seed: int) -> float:
        torch.manual_seed(global_seed)
        return float(tokenizer.training_loss(clip, torch.Generator().manual_seed(noise_seed))["loss"])

    assert loss(1, 0) == loss(1, 5)
    assert loss(1, 0) != loss(2, 0)
    silent = make_tokenizer(decoder_noise=0.0)
    seeds = (1, 2)
    first, second = (
        float(silent.training_loss(clip, torch.Generator().manual_seed(seed))["loss"]) for seed in seeds
    )
    assert first == second


def test_videos_and_images_train_alike(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    clip = video(2, 3)
    of_video = tokenizer.training_loss(clip, torch.Generator().manual_seed(0))
    of_images = tokenizer.training_loss(clip.flatten(0, 1), torch.Generator().manual_seed(0))
    assert {name: float(value) for name, value in of_video.items()} == {
        name: float(value) for name, value in of_images.items()
    }
    assert {"loss", "psnr"} <= of_video.keys()


def test_noise_is_relative_to_the_latents(make_tokenizer: Make) -> None:
    """Larger latents and a decoder to match must give the same pictures, or the scale would run off."""
    tokenizer, scaled = make_tokenizer(), make_tokenizer()
    scaled.encoder.get_parameter(f"{len(scaled.encoder) - 1}.weight").mul_(10)
    scaled.encoder.get_parameter(f"{len(scaled.encoder) - 1}.bias").mul_(10)
    scaled.decoder.get_parameter("0.weight").div_(10)
    clip = video(2, 2)
    losses = [each.training_loss(clip, torch.Generator().manual_seed(0)) for each in (tokenizer, scaled)]
    assert float(losses[1]["l2"]) == pytest.approx(float(losses[0]["l2"]), rel=1e-3)
    assert float(losses[1]["latent"]) == pytest.approx(100 * float(losses[0]["latent"]), rel=1e-3)


def test_training_learns_the_shapes(trained: SimpleNamespace, toy: SimpleNamespace) -> None:
    assert trained.losses[0] > 1.0
    assert sum(trained.losses[-10:]) / 10 < 0.12
    mean_picture = trained.train.mean(0, keepdim=True).expand_as(trained.held_out)
    untrained = ConvTokenizer(toy.config).requires_grad_(False)
    found = {
        name: toy.psnr(picture, trained.held_out)
        for name, picture in {
            "trained": trained.tokenizer.decode(trained.tokenizer.encode(trained.held_out)),
            "untrained": untrained.decode(untrained.encode(trained.held_out)),
            "mean": mean_picture,
        }.items()
    }
    assert found["trained"] > 29
    assert found["trained"] > found["mean"] + 8
    assert found["untrained"] < found["mean"]


def test_held_out_latents_are_normalised(trained: SimpleNamespace) -> None:
    latents = trained.tokenizer.encode(trained.held_out)
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.1
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 0.1
    raw = trained.tokenizer.encode_raw(trained.held_out)
    assert (raw.std((0, 1, 3, 4)) - 1).abs().max() > 0.2


def test_the_decoder_bears_noise_on_its_latents(trained: SimpleNamespace, toy: SimpleNamespace) -> None:
    tokenizer, truth = trained.tokenizer, trained.held_out
    latents = tokenizer.encode(truth)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    clean, light, heavy = (
        toy.psnr(tokenizer.decode(latents + scale * noise), truth) for scale in (0, 0.02, 1)
    )
    assert clean - light < 0.2
    assert clean - heavy > 3  # else the latents would not matter and the line above would say nothing
