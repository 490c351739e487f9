"""Pretrained video autoencoders of diffusers as tokenizers: a closed table of classes, driven as they are.

Shapes: B batch, T frames, C channels, H W pixels, h w latent, k time stride. `encode` gives the mode of the
posterior, never a sample, so that latents repeat.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidworld.errors import CheckpointError, ConfigError, DataError
from vidworld.tokenizers.base import num_latent_frames, tokenizer_digest
from vidworld.tokenizers.normalised import NormalisedTokenizer
from vidworld.tokenizers.streaming import (
    FrameStreaming,
    StreamState,
    advanced,
    next_latent_frames,
    require_batch,
)

DType = Literal["float32", "bfloat16"]
CHUNK_FRAMES = 16
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What holds for all models of one class."""

    form: Literal["causal_cache", "whole", "frames"]
    """How it is driven: piece by piece with a cache, whole videos at once, or frame by frame."""
    channels: str
    """Name of the config entry that holds the latent channels."""
    time_stride: Callable[[Config], int]
    spatial_stride: Callable[[Config], int]
    statistics: Literal["mean_std", "buffers", "scaling_factor"]
    """Where the latents' statistics are: lists in the config, buffers in the weights, or one factor."""


def _halvings(config: Config) -> int:
    return 2 ** sum(map(bool, config["temperal_downsample"]))


def _wan_space(config: Config) -> int:
    return 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)


def _entry(name: str) -> Callable[[Config], int]:
    return lambda config: int(config[name])


def _ltx(name: str, patch: str) -> Callable[[Config], int]:
    def stride(config: Config) -> int:
        if config.get(name) is not None:
            return int(config[name])
        return config[patch] * 2 ** sum(map(bool, config["spatio_temporal_scaling"]))

    return stride


FAMILIES: Mapping[str, Family] = {
    "AutoencoderKLWan": Family("causal_cache", "z_dim", _halvings, _wan_space, "mean_std"),
    "AutoencoderKLQwenImage": Family(
        "causal_cache", "z_dim", _halvings, lambda config: 2 ** len(config["temperal_downsample"]), "mean_std"
    ),
    "AutoencoderKLCosmos": Family(
        "whole",
        "latent_channels",
        _entry("temporal_compression_ratio"),
        _entry("spatial_compression_ratio"),
        "mean_std",
    ),
    "AutoencoderKLLTXVideo": Family(
        "whole",
        "latent_channels",
        _ltx("temporal_compression_ratio", "patch_size_t"),
        _ltx("spatial_compression_ratio", "patch_size"),
        "buffers",
    ),
    "AutoencoderKLHunyuanVideo15": Family(
        "whole",
        "latent_channels",
        _entry("temporal_compression_ratio"),
        _entry("spatial_compression_ratio"),
        "scaling_factor",
    ),
    "AutoencoderDC": Family(
        "frames",
        "latent_channels",
        lambda config: 1,
        lambda config: 2 ** (len(config["encoder_block_out_channels"]) - 1),
        "scaling_factor",
    ),
}


class PretrainedTokenizer(NormalisedTokenizer):
    """One of diffusers' causal autoencoders that sees whole videos at once.

    The weights stay in `dtype`; statistics and their arithmetic are float32. Build it with `wrap`.
    """

    kind = "pretrained"

    def __init__(self, vae: nn.Module, class_name: str, config: Config, dtype: DType) -> None:
        family = FAMILIES[class_name]
        super().__init__(int(config[family.channels]))
        self.class_name, self.config, self.dtype_name = class_name, dict(config), dtype
        self.time_stride = int(family.time_stride(config))
        self.spatial_stride = self.size_multiple = int(family.spatial_stride(config))
        self.weights_digest = _weights_digest(class_name, config, dtype, vae)
        # Past diffusers' own `to`, which warns about precisions even where there is nothing to say.
        self.vae: Any = nn.Module.to(vae, {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
        self.source: Path | None = None
        """Folder of the weights, once they were read from one."""
        self.statistics_from = "nowhere"
        """Where the statistics come from: "nowhere" until they are known."""
        if (found := _own_statistics(family, config, vae, self.latent_channels)) is not None:
            self.set_statistics(*found)
            self.statistics_from = "the model"

    @property
    def digest(self) -> str:
        """Short hash over class, config, precision, weights as they were loaded, and statistics."""
        statistics = [self.mean_C.float().tolist(), self.std_C.float().tolist()]
        return hashlib.sha256(json.dumps([self.weights_digest, statistics]).encode()).hexdigest()[:16]

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Set mean and deviation of the raw latents; raises DataError for what cannot be any."""
        super().set_statistics(mean_C, std_C)
        self.statistics_from = "measurement"

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Video in [-1, 1] to normalised latents [B, 1 + (T-1)/k, C, h, w].

        Raises DataError for a size that does not divide, or T not 1 + nk.
        """
        return self.normalised(self.encode_raw(video_BTCHW)).to(video_BTCHW.dtype)

    def decode(self, latents_BTChw: Tensor) -> Tensor:
        """Normalised latents to video [B, 1 + (T-1)k, 3, H, W], about -1 to 1, not clamped."""
        self.check_latents(latents_BTChw)
        return self._decode_raw(self.denormalised(latents_BTChw)).to(latents_BTChw.dtype)

    def encode_raw(self, video_BTCHW: Tensor) -> Tensor:
        """`encode` without normalisation."""
        self.check_video(video_BTCHW)
        expected = num_latent_frames(video_BTCHW.shape[1], self.time_stride)
        raw_BCThw = self.vae.encode(self._own(video_BTCHW).transpose(1, 2)).latent_dist.mode()
        assert raw_BCThw.shape[2] == expected, (raw_BCThw.shape, expected)
        return raw_BCThw.transpose(1, 2).to(self.mean_C.dtype)

    def _decode_raw(self, raw_BTChw: Tensor) -> Tensor:
        raw_BCThw = self._own(raw_BTChw).transpose(1, 2)
        if self.config.get("timestep_conditioning"):
            # What diffusers' pipeline gives by default: nothing is left to denoise.
            return self.vae.decode(raw_BCThw, raw_BCThw.new_zeros(len(raw_BCThw))).sample.transpose(1, 2)
        return self.vae.decode(raw_BCThw).sample.transpose(1, 2)

    def _own(self, tensor: Tensor) -> Tensor:
        """In the precision of the weights."""
        return tensor.to(next(self.vae.parameters()).dtype)


class FramePretrainedTokenizer(FrameStreaming, PretrainedTokenizer):
    """An autoencoder of single pictures: each frame by itself."""

    def encode_raw(self, video_BTCHW: Tensor) -> Tensor:
        """`encode` without normalisation."""
        self.check_video(video_BTCHW)
        pieces_NCHW = self._own(video_BTCHW).flatten(0, 1).split(CHUNK_FRAMES)
        raw_NChw = torch.cat([self.vae.encode(piece).latent for piece in pieces_NCHW])
        return raw_NChw.unflatten(0, video_BTCHW.shape[:2]).to(self.mean_C.dtype)

    def _decode_raw(self, raw_BTChw: Tensor) -> Tensor:
        pieces_NChw = self._own(raw_BTChw).flatten(0, 1).split(CHUNK_FRAMES)
        video_NCHW = torch.cat([self.vae.decode(piece).sample for piece in pieces_NChw])
        return video_NCHW.unflatten(0, raw_BTChw.shape[:2])


class CachedPretrainedTokenizer(PretrainedTokenizer):
    """Wan's autoencoder and those that share its code: streams with the cache of its convolutions.

    diffusers keeps that cache inside the model, one for all. Here it is handed in and out, so that every
    stream has its own; whole videos go the same way and give the same bits. A latent frame at a time, as
    diffusers does it: the first from one camera frame, later ones from k.
    """

    def start(self, batch: int) -> StreamState:
        """A stream of `batch` videos."""
        return StreamState(batch)

    def encode_next(self, state: StreamState, video_BTCHW: Tensor) -> tuple[StreamState, Tensor]:
        """Normalised latents of the next frames: 1 + nk on the first call, nk on later ones."""
        state, raw_BTChw = self._encode_next(state, video_BTCHW)
        return state, self.normalised(raw_BTChw).to(video_BTCHW.dtype)

    def decode_next(self, state: StreamState, latents_BTChw: Tensor) -> tuple[StreamState, Tensor]:
        """Video of the next latents: the first of a stream gives one frame, each later one k."""
        self.check_latents(latents_BTChw)
        state, video_BTCHW = self._decode_next(state, self.denormalised(latents_BTChw))
        return state, video_BTCHW.to(latents_BTChw.dtype)

    def encode_raw(self, video_BTCHW: Tensor) -> Tensor:
        """`encode` without normalisation."""
        return self._encode_next(self.start(len(video_BTCHW)), video_BTCHW)[1]

    def _encode_next(self, state: StreamState, video_BTCHW: Tensor) -> tuple[StreamState, Tensor]:
        require_batch(state, video_BTCHW)
        self.check_video(video_BTCHW)
        count = next_latent_frames(state, video_BTCHW.shape[1], self.time_stride)
        x_BCTHW = self._own(video_BTCHW).transpose(1, 2)
        if patch := self.config.get("patch_size"):
            from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

            x_BCTHW = patchify(x_BCTHW, patch)
        first = [1] if not state.frames else []
        slots = _slots(state, self.vae.encoder)
        moments = [
            self.vae.quant_conv(self.vae.encoder(piece_BCTHW, feat_cache=slots, feat_idx=[0]))
            for piece_BCTHW in x_BCTHW.split(first + [self.time_stride] * (count - len(first)), 2)
        ]
        raw_BCThw = torch.cat(moments, 2)[:, : self.latent_channels]
        after = advanced(state, video_BTCHW, count, _features(slots, raw_BCThw))
        return after, raw_BCThw.transpose(1, 2).to(self.mean_C.dtype)

    def _decode_raw(self, raw_BTChw: Tensor) -> Tensor:
        return self._decode_next(self.start(len(raw_BTChw)), raw_BTChw)[1]

    def _decode_next(self, state: StreamState, raw_BTChw: Tensor) -> tuple[StreamState, Tensor]:
        require_batch(state, raw_BTChw)
        slots = _slots(state, self.vae.decoder)
        pieces: list[Tensor] = []
        for number, piece_BCThw in enumerate(self._own(raw_BTChw).transpose(1, 2).split(1, 2), state.frames):
            # Wan 2.2 must be told, its residual branch does not cache; the others have no such argument.
            told = {"first_chunk": number == 0} if self.class_name == "AutoencoderKLWan" else {}
            hidden = self.vae.post_quant_conv(piece_BCThw)
            pieces.append(self.vae.decoder(hidden, feat_cache=slots, feat_idx=[0], **told))
        video_BCTHW = torch.cat(pieces, 2)
        if patch := self.config.get("patch_size"):
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            video_BCTHW = unpatchify(video_BCTHW, patch)
        after = advanced(state, raw_BTChw, raw_BTChw.shape[1], _features(slots, raw_BTChw))
        return after, video_BCTHW.transpose(1, 2)


def wrap(vae: nn.Module, class_name: str, config: Config, dtype: DType = "float32") -> PretrainedTokenizer:
    """Make a tokenizer of one of diffusers' autoencoders, in eval mode and without gradients on its weights.

    Raises CheckpointError for one that is not causal or not repeatable, or a class that is not in the table.
    """
    if class_name not in FAMILIES:
        raise CheckpointError(
            "class of the autoencoder",
            got=repr(class_name),
            expected=" or ".join(FAMILIES),
            fix="world models need a causal autoencoder: take one of these",
        )
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, meaning in (("encoder_causal", "frames"), ("decoder_causal", "pictures")):
        if class_name == "AutoencoderKLLTXVideo" and not config.get(name, False):
            raise CheckpointError(
                f"autoencoder whose {meaning} depend on later ones ({name} is false)",
                fix=f'take weights trained with it, or set "{name}": true in its config.json and look at its '
                "reconstructions first",
            )
    if any(config.get("decoder_inject_noise") or ()):
        raise CheckpointError(
            "autoencoder whose decoder draws noise (decoder_inject_noise)", fix="take another"
        )
    if config.get("in_channels", 3) // (config.get("patch_size") or 1) ** 2 != 3 and class_name in (
        "AutoencoderKLWan",
    ):
        raise CheckpointError(
            "channels of the autoencoder's video", got=config["in_channels"], expected="RGB"
        )
    if class_name == "AutoencoderKLHunyuanVideo15":
        vae.use_slicing = True  # type: ignore[assignment]  # its attention mask is wrong for a batch above 1
    match FAMILIES[class_name].form:
        case "causal_cache":
            cls = CachedPretrainedTokenizer
        case "whole":
            cls = PretrainedTokenizer
        case "frames":
            cls = FramePretrainedTokenizer
        case other:
            raise ConfigError("form of the autoencoder", got=other)
    return cls(vae.eval(), class_name, config, dtype).eval().requires_grad_(False)


def _own_statistics(
    family: Family, config: Config, vae: nn.Module, channels: int
) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation [C] as the model says them; None where it says nothing.

    Cosmos lists a value for each channel and each of 16 latent frames. A stream has no such places, so
    they are pooled: the mean of the means, and the deviation within and between them.
    """
    match family.statistics:
        case "mean_std":
            mean, std = config.get("latents_mean"), config.get("latents_std")
            if mean is None or std is None:
                return None
            if len(mean) != len(std) or not len(mean) or len(mean) % channels:
                raise CheckpointError(
                    "latents_mean and latents_std of the autoencoder",
                    got=f"{len(mean)} and {len(std)} values",
                    expected=f"{channels}, one a channel",
                )
            mean_CT = torch.tensor(mean, dtype=torch.float64).view(channels, -1)
            std_CT = torch.tensor(std, dtype=torch.float64).view(channels, -1)
            variance_C = std_CT.square().mean(1) + mean_CT.var(1, correction=0)
            return mean_CT.mean(1).float(), variance_C.sqrt().float()
        case "buffers":
            mean_C, std_C = vae.get_buffer("latents_mean"), vae.get_buffer("latents_std")
            if bool((mean_C == 0).all() and (std_C == 1).all()):
                return None
            return mean_C.detach().float(), std_C.detach().float() / float(config.get("scaling_factor") or 1)
        case "scaling_factor":
            factor = config.get("scaling_factor")
            if factor is None or factor == 1 or not math.isfinite(factor) or factor <= 0:
                return None
            return torch.zeros(channels), torch.full((channels,), 1 / float(factor))
    raise ConfigError("statistics of the autoencoder", got=family.statistics)


def _weights_digest(class_name: str, config: Config, dtype: DType, vae: nn.Module) -> str:
    described = {"config": json.loads(json.dumps(dict(config), default=str)), "dtype": dtype}
    return tokenizer_digest(class_name, described, vae)


_REPEAT = "Rep"
"""How diffusers marks an upsampling that has seen the first frame only; in our states a feature [B, 0]."""


def _slots(state: StreamState, half: nn.Module) -> list[Any]:
    """The cache as diffusers wants it: a new list, so that a state is never written to."""
    count = sum(type(module).__name__.endswith("CausalConv3d") for module in half.modules())
    slots: list[Any] = [None] * count
    for name, feature in state.gathered().features.items():
        slots[int(name)] = feature if feature.numel() else _REPEAT
    return slots


def _features(slots: list[Any], like_B: Tensor) -> dict[str, Tensor]:
    empty = like_B.new_zeros(len(like_B), 0)
    return {
        str(index): empty if isinstance(slot, str) else slot
        for index, slot in enumerate(slots)
        if slot is not None
    }


def require_statistics(tokenizer: object, where: object) -> None:
    """Refuse a pretrained tokenizer whose latents nobody has measured."""
    if isinstance(tokenizer, PretrainedTokenizer) and tokenizer.statistics_from == "nowhere":
        raise DataError(
            f"the config of {tokenizer.class_name} does not say how its latents are spread",
            where=where,
            fix="measure them: run vidworld encode with it, then give the latents' directory as tokenizer",
        )
