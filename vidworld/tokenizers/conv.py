"""Our own tokenizer: a convolutional autoencoder of single frames, spatial stride 8.

It works at half resolution from the start (pixel-unshuffle by 2, then two strided stages), where the same
network trains several times faster than at full resolution.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidworld.config import to_mapping
from vidworld.errors import ConfigError
from vidworld.tokenizers.base import tokenizer_digest
from vidworld.tokenizers.losses import ReconstructionLossConfig, reconstruction_loss
from vidworld.tokenizers.normalised import NormalisedTokenizer
from vidworld.tokenizers.streaming import FrameStreaming

CHUNK_FRAMES = 256


@dataclass(frozen=True)
class ConvTokenizerConfig:
    """Size of the network and how it is trained. Stages run from half to an eighth of the resolution."""

    latent_channels: int = 16
    widths: tuple[int, int, int] = (96, 160, 256)
    """Channels at 1/2, 1/4 and 1/8 of the resolution."""
    encoder_blocks: tuple[int, int, int] = (1, 2, 2)
    """Residual blocks at each of them; those at 1/2 cost most."""
    decoder_blocks: tuple[int, int, int] = (2, 2, 2)
    norm_groups: int = 16
    """Groups of every GroupNorm; must divide all widths."""
    decoder_noise: float = 0.02
    """Noise on the latents in training, relative to each channel's standard deviation."""
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)

    def __post_init__(self) -> None:
        for name in ("latent_channels", "norm_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tokenizer {name}", got=getattr(self, name), expected="at least 1")
        for width in self.widths:
            if width < 1 or width % self.norm_groups:
                raise ConfigError(
                    "tokenizer widths",
                    got=self.widths,
                    expected=f"multiples of norm_groups {self.norm_groups}",
                )
        if min(self.encoder_blocks + self.decoder_blocks) < 0:
            raise ConfigError(
                "tokenizer blocks", got=self.encoder_blocks + self.decoder_blocks, expected="0 or more"
            )
        if self.decoder_noise < 0:
            raise ConfigError("tokenizer decoder_noise", got=self.decoder_noise, expected="0 or more")


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the identity at first."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x_NDhw: Tensor) -> Tensor:
        hidden = self.conv_in(F.silu(self.norm_in(x_NDhw)))
        return x_NDhw + self.conv_out(F.silu(self.norm_out(hidden)))


class Layers(nn.Sequential):
    """Layers one after another, compiled as one graph: of torch's own `forward` only its parts would be."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input)
        return input


class ConvTokenizer(FrameStreaming, NormalisedTokenizer):
    """Per-frame convolutional autoencoder: f8, normalised latents, decoder robust to noise on them.

    >>> tokenizer = ConvTokenizer(ConvTokenizerConfig(widths=(32, 48, 64)))
    >>> tokenizer.encode(torch.zeros(1, 4, 3, 64, 96)).shape
    torch.Size([1, 4, 16, 8, 12])

    `encoder` and `decoder` may be compiled in place (`tokenizer.encoder.compile()`): training then runs the
    compiled graphs, while encode and decode, which see many shapes, stay eager.
    """

    kind = "conv"
    spatial_stride = 8
    size_multiple = 16
    time_stride = 1

    def __init__(self, config: ConvTokenizerConfig = ConvTokenizerConfig()) -> None:
        super().__init__(config.latent_channels)
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        # The layout in which both cuDNN and oneDNN convolve without transposing.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def digest(self) -> str:
        """Short hash over config, weights and statistics; reads all weights."""
        return tokenizer_digest(self.kind, to_mapping(self.config), self)

    def encode(self, video_BTCHW: Tensor, *, chunk: int = CHUNK_FRAMES) -> Tensor:
        """Video in [-1, 1] to normalised latents [B, T, C, H/8, W/8], `chunk` frames at a time.

        Raises DataError for a size not divisible by 16.
        """
        return self.normalised(self.encode_raw(video_BTCHW, chunk=chunk)).to(video_BTCHW.dtype)

    def decode(self, latents_BTChw: Tensor, *, chunk: int = CHUNK_FRAMES) -> Tensor:
        """Normalised latents to video [B, T, 3, H, W], about -1 to 1, not clamped."""
        self.check_latents(latents_BTChw)
        raw = self.denormalised(latents_BTChw)
        return self.decode_raw(raw, chunk=chunk).to(latents_BTChw.dtype)

    def encode_raw(self, video_BTCHW: Tensor, *, chunk: int = CHUNK_FRAMES) -> Tensor:
        """`encode` without normalisation."""
        self.check_video(video_BTCHW)
        return per_frame(self.encoder.forward, video_BTCHW, chunk)

    def decode_raw(self, latents_BTChw: Tensor, *, chunk: int = CHUNK_FRAMES) -> Tensor:
        """`decode` without normalisation."""
        self.check_latents(latents_BTChw)
        return per_frame(self.decoder.forward, latents_BTChw, chunk)

    def training_loss(self, video: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of a batch in [-1, 1], [B, T, 3, H, W] or [B, 3, H, W]: see `reconstruction_loss`.

        The decoder sees latents with noise of `decoder_noise` times their standard deviation in this batch,
        so that the encoder cannot outgrow the noise. All randomness comes from `generator`, on any device.
        """
        video_BTCHW = video if video.ndim == 5 else video[:, None]
        self.check_video(video_BTCHW)
        images_NCHW = video_BTCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        latents_NChw = self.encoder(images_NCHW)
        scale = latents_NChw.detach().float().std((0, 2, 3), keepdim=True) * self.config.decoder_noise
        noise = torch.randn(latents_NChw.shape, generator=generator, device=generator.device)
        noisy_NChw = latents_NChw + (scale * noise.to(latents_NChw.device)).to(latents_NChw.dtype)
        return reconstruction_loss(self.decoder(noisy_NChw), images_NCHW, latents_NChw, self.config.loss)


def _encoder(config: ConvTokenizerConfig) -> Layers:
    half, quarter, eighth = config.widths
    blocks = _blocks(config, config.encoder_blocks)
    return Layers(
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, half, 3, padding=1),
        *blocks[0],
        nn.Conv2d(half, quarter, 4, stride=2, padding=1),
        *blocks[1],
        nn.Conv2d(quarter, eighth, 4, stride=2, padding=1),
        *blocks[2],
        nn.GroupNorm(config.norm_groups, eighth),
        nn.SiLU(),
        nn.Conv2d(eighth, config.latent_channels, 3, padding=1),
    )


def _decoder(config: ConvTokenizerConfig) -> Layers:
    half, quarter, eighth = config.widths
    blocks = _blocks(config, config.decoder_blocks)
    return Layers(
        nn.Conv2d(config.latent_channels, eighth, 3, padding=1),
        *blocks[2],
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(eighth, quarter, 3, padding=1),
        *blocks[1],
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(quarter, half, 3, padding=1),
        *blocks[0],
        nn.GroupNorm(config.norm_groups, half),
        nn.SiLU(),
        nn.Conv2d(half, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )


def _blocks(config: ConvTokenizerConfig, counts: tuple[int, int, int]) -> list[list[nn.Module]]:
    return [
        [ResidualBlock(width, config.norm_groups) for _ in range(count)]
        for width, count in zip(config.widths, counts, strict=True)
    ]


def per_frame(function: Callable[[Tensor], Tensor], video_BTCHW: Tensor, chunk: int) -> Tensor:
    """Fold time into the batch, run `chunk` frames at a time, and unfold."""
    if chunk < 1:
        raise ConfigError("chunk", got=chunk, expected="at least 1 frame")
    frames_NCHW = video_BTCHW.flatten(0, 1)
    pieces = [
        function(piece.contiguous(memory_format=torch.channels_last)) for piece in frames_NCHW.split(chunk)
    ]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return joined.contiguous().unflatten(0, video_BTCHW.shape[:2])
