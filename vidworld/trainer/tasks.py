"""What is trained: modules that turn a batch into losses, one for tokenizers and one for worlds.

Shapes: B batch, T frames (latent ones for a world), V views, C channels, H W pixels, h w latent,
A action dims, S proprio dims, k actions per latent frame, M target streams, X noise dims.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidworld.diffusion.history import draw_starts, imagined_history
from vidworld.diffusion.objective import (
    ObjectiveConfig,
    bootstrap_rows,
    context_levels,
    draw_levels,
    energy_loss,
    noise_like,
    resample_rows,
    shortcut_loss,
)
from vidworld.diffusion.path import mix
from vidworld.diffusion.predict import Predict
from vidworld.errors import ConfigError, DataError
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning
from vidworld.model.normalizer import Normalizer
from vidworld.model.parameters import muon_parameters
from vidworld.model.sequence import SequenceGroup, shard_sequence
from vidworld.model.two_stream import target_predictor
from vidworld.tokenizers.base import chunk_actions, fold_views, to_unit_range
from vidworld.tokenizers.conv import ConvTokenizer
from vidworld.types import Batch, Frames, Layout, SignalLevel


@dataclass(frozen=True)
class Moment:
    """Where in training a micro-batch stands."""

    progress: float = 0.0
    """Share of training done, 0 to 1."""
    micro_batches: int = 0
    """Micro-batches that this rank has had before it."""


N = TypeVar("N", bound=nn.Module)


class Task(nn.Module, ABC, Generic[N]):
    """One forward is one backward, so that DDP and DeepSpeed can wrap it.

    `net` is the module whose weights are trained, averaged and saved.
    """

    net: N
    tokens_per_frame: float = 1.0
    """Tokens that the network reads for a camera frame of a clip, for the log."""

    @abstractmethod
    def forward(self, batch: Batch, generator: torch.Generator, moment: Moment) -> dict[str, Tensor]:
        """Losses of one micro-batch: "loss", and parts for the log without gradient, scalars all.

        Every random tensor comes from `generator`.
        """

    def weight(self, batch: Batch) -> Tensor | None:
        """How much the batch's mean loss counts beside other micro-batches; None when all count alike."""
        return None

    def matrices(self) -> Sequence[nn.Parameter]:
        """Weights for Muon: matrices of hidden layers."""
        return ()

    def compile_parts(self) -> None:
        """Compile what runs in training, in place; names in the state dict stay as they are."""

    def checkpoint_parts(self) -> None:
        """Keep fewer activations and compute them again. Raises ConfigError where that cannot be done."""
        raise ConfigError("engine.checkpoint_activations", got=True, expected="false for this kind of model")

    def share_clips(self, group: SequenceGroup) -> None:
        """Compute together with the other ranks of a group. Raises ConfigError where that cannot be done."""
        raise ConfigError("engine.sequence_parallel", got=group.size, expected="1 for this kind of model")


class TokenizerTask(Task[ConvTokenizer]):
    """Reconstruct frames; views and frames of a clip are so many pictures.

    layouts: how each embodiment of the batches sees, where they differ. Pictures of one size then go through
    the network together and without their padding, which normalisation over a picture would take in.
    """

    def __init__(self, tokenizer: ConvTokenizer, layouts: Sequence[Layout] = ()) -> None:
        super().__init__()
        self.net = tokenizer
        self.layouts = tuple(layouts) if len({_grid(layout) for layout in layouts}) > 1 else ()

    def forward(self, batch: Batch, generator: torch.Generator, moment: Moment) -> dict[str, Tensor]:
        """The tokenizer's own training loss on uint8 video; of several sizes, the mean over all pixels."""
        groups = pictures(batch, self.layouts)
        if len(groups) == 1:
            return self.net.training_loss(groups[0], generator)
        total = sum(group.numel() for group in groups)
        losses: dict[str, Tensor] = {}
        for group in groups:
            share = group.numel() / total
            for name, value in self.net.training_loss(group, generator).items():
                losses[name] = losses[name] + share * value if name in losses else share * value
        return losses

    def weight(self, batch: Batch) -> Tensor | None:
        """Pixels of the batch, where they differ from batch to batch."""
        if not self.layouts:
            return None
        grids = [_grid(self.layouts[index]) for index in batch.embodiment_B.tolist()]
        return torch.tensor(float(sum(views * height * width for views, height, width in grids)))

    def compile_parts(self) -> None:
        """Compile encoder and decoder."""
        dynamic = bool(self.layouts)  # so many pictures of each size in this batch, so many in the next
        self.net.encoder.compile(dynamic=dynamic)
        self.net.decoder.compile(dynamic=dynamic)


class WorldTask(Task[CausalDiT]):
    """Denoise target frames given noisy context frames and actions (two streams, see `model.two_stream`).

    temperature, start_noise: the sampler's factors on the noise that `regression` predicts from, and on that
    of `energy` but for the network's own: what a rollout will begin with is what is trained on.
    """

    def __init__(
        self,
        model: CausalDiT,
        normalizer: Normalizer,
        objective: ObjectiveConfig,
        *,
        action_dropout: float = 0.1,
        clip_dropout: float = 0.05,
        temperature: float = 1.0,
        start_noise: float = 1.0,
    ) -> None:
        super().__init__()
        if objective.kind == "energy" and not model.config.noise_dims:
            raise ConfigError("model.noise_dims for objective 'energy'", got=0, expected="above 0")
        self.net, self.normalizer, self.objective = model, normalizer, objective
        self.action_dropout, self.clip_dropout = action_dropout, clip_dropout
        self.temperature = temperature if objective.kind == "regression" else 1.0
        self.start_noise = self.temperature * (1.0 if objective.kind == "shortcut" else start_noise)
        self.num_targets = objective.energy.streams if objective.kind == "energy" else 1
        stride = model.shape.actions_per_frame
        self.tokens_per_frame = model.tokens_per_frame * (1 + self.num_targets) / stride

    def clean(self, batch: Batch) -> Frames:
        """Normalised frames of a batch of latents: one row of proprioception a latent frame."""
        batch = self.widened(batch)
        proprio_BTS = batch.proprio_BTS[:, :: self.net.shape.actions_per_frame]
        clean = Frames(
            self._latents(batch).float(), self.normalizer.proprio(proprio_BTS.float(), batch.embodiment_B)
        )
        return self.unpadded(clean, batch)

    def widened(self, batch: Batch) -> Batch:
        """The same clips padded for a model that also knows wider robots than are in the data."""
        shape, latents_BTVChw = self.net.shape, self._latents(batch)
        _, _, views, _, height, width = latents_BTVChw.shape
        sides = (0, shape.width - width, 0, shape.height - height, 0, 0, 0, shape.views - views)
        actions = shape.action_dims - batch.actions_BTA.shape[-1]
        proprio = shape.proprio_dims - batch.proprio_BTS.shape[-1]
        if not (any(sides) or actions or proprio):
            return batch
        return replace(
            batch,
            latents_BTVChw=F.pad(latents_BTVChw, sides),
            actions_BTA=F.pad(batch.actions_BTA, (0, actions)),
            proprio_BTS=F.pad(batch.proprio_BTS, (0, proprio)),
        )

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents_BTVChw is None:
            raise DataError(
                "batch to train a world on", got="video", expected="latents", fix="encode it first"
            )
        return batch.latents_BTVChw

    def unpadded(self, frames: Frames, batch: Batch) -> Frames:
        """The same frames with zeros for all latents that are padding, whatever stood there."""
        used_EV1hw = self.net.used_latents_EV1hw
        if used_EV1hw is None:
            return frames
        used_B1V1hw = used_EV1hw[batch.embodiment_B][:, None]
        return Frames(frames.latents_BTVChw.where(used_B1V1hw, 0), frames.proprio_BTS)

    def used(self, batch: Batch) -> Tensor | None:
        """Share of each row's latents that is not padding [B]; None where nothing is."""
        used_EV1hw = self.net.used_latents_EV1hw
        return None if used_EV1hw is None else used_EV1hw.flatten(1).float().mean(1)[batch.embodiment_B]

    def known_conditioning(self, batch: Batch) -> Conditioning:
        """All actions that lead into each frame."""
        batch = self.widened(batch)
        actions_BTA = self.normalizer.actions(batch.actions_BTA.float(), batch.embodiment_B)
        actions_BTkA, keep_BT = chunk_actions(actions_BTA, self.net.shape.actions_per_frame)
        return Conditioning(actions_BTkA, keep_BT, batch.embodiment_B, member_B=self._members(keep_BT))

    def _members(self, keep_BT: Tensor) -> Tensor | None:
        """Whose each row is: the members of a shared network take clips in turn."""
        count = self.net.config.members
        return torch.arange(len(keep_BT), device=keep_BT.device) % count if count else None

    def conditioning(self, batch: Batch, generator: torch.Generator) -> Conditioning:
        """Actions that lead into each frame, some hidden: of single frames, and of whole clips."""
        known = self.known_conditioning(batch)
        keep_BT = known.keep_BT
        keep_BT = keep_BT & (_uniform(keep_BT.shape, generator, keep_BT.device) >= self.action_dropout)
        keep_BT = keep_BT & (_uniform(keep_BT[:, :1].shape, generator, keep_BT.device) >= self.clip_dropout)
        noise_BTX = None
        if noise_dims := self.net.config.noise_dims:
            batch_size, num_frames = keep_BT.shape
            shape = (batch_size, self.num_targets * num_frames, noise_dims)
            noise_BTX = torch.zeros(shape, device=keep_BT.device)
            if self.objective.kind == "regression":
                noise_BTX = _normal(shape, generator, keep_BT.device) * self.temperature
            if self.objective.kind == "energy":
                # The stream of the mean, which is the last, keeps its zeros.
                sampled = self.objective.energy.samples * num_frames
                noise_BTX[:, :sampled] = _normal(noise_BTX[:, :sampled].shape, generator, keep_BT.device)
        return replace(known, keep_BT=keep_BT, noise_BTX=noise_BTX)

    def history(
        self,
        batch: Batch,
        clean: Frames,
        noise: Frames,
        level: SignalLevel,
        generator: torch.Generator,
        moment: Moment,
    ) -> Frames:
        """What the context shows: the clean frames, or in the last rows from some frame on imagined ones.

        They are imagined by the weights as they are, one step a frame, with all actions known, seeing context
        at the `level` and with the `noise` that the loss will see too. Where the mean is learnt beside
        samples, every other row imagines the mean.
        """
        config, (batch_size, num_frames) = self.objective, clean.proprio_BTS.shape[:2]
        count = resample_rows(config, batch_size, num_frames, moment.progress, moment.micro_batches)
        if not count:
            return clean
        rows = slice(batch_size - count, batch_size)
        known, noise, level = clean[rows], noise[rows], level[rows]
        conditioning = self.known_conditioning(batch)[rows]
        sampled_B = None
        if noise_dims := self.net.config.noise_dims:
            shape = (count, num_frames, noise_dims)
            noise_BTX = torch.zeros(shape, device=conditioning.keep_BT.device)
            if config.kind != "shortcut":
                noise_BTX = _normal(shape, generator, conditioning.keep_BT.device) * self.temperature
                if config.kind == "energy" and config.energy.mean_weight:
                    sampled_B = torch.arange(count, device=noise_BTX.device) % 2
                    noise_BTX = noise_BTX * sampled_B[:, None, None]
            conditioning = replace(conditioning, noise_BTX=noise_BTX)
        start = self._scaled(noise_like(known, generator=generator))
        if sampled_B is not None:
            start = start.map(lambda tensor: tensor * sampled_B.view(-1, *[1] * (tensor.ndim - 1)))

        def given(history: Frames) -> Predict:
            return target_predictor(self.net, mix(history, noise, level), level, conditioning)

        imagined = imagined_history(
            given,
            known,
            start,
            draw_starts(count, num_frames, generator=generator, device=known.proprio_BTS.device),
            passes=config.resample_passes,
            step=config.one_step,
        )
        return Frames.cat([clean[: batch_size - count], imagined], 0)

    def forward(self, batch: Batch, generator: torch.Generator, moment: Moment) -> dict[str, Tensor]:
        """Shortcut forcing, one-step regression, or the energy score of one-step samples."""
        clean = self.clean(batch)
        conditioning = self.conditioning(batch, generator)
        used_B = self.used(batch)
        context_level = context_levels(clean, self.objective, generator=generator)
        context_noise = noise_like(clean, generator=generator)
        history = self.history(batch, clean, context_noise, context_level, generator, moment)
        context = mix(history, context_noise, context_level)
        predict = target_predictor(self.net, context, context_level, conditioning, self.num_targets)
        match self.objective.kind:
            case "shortcut" | "regression":
                noise = self.unpadded(self._scaled(noise_like(clean, generator=generator)), batch)
                num_bootstrap = bootstrap_rows(
                    self.objective, len(batch.ids), moment.progress, moment.micro_batches
                )
                draws = draw_levels(clean, self.objective, num_bootstrap=num_bootstrap, generator=generator)
                on_rows = partial(predict, rows=slice(0, num_bootstrap))
                return shortcut_loss(predict, on_rows, clean, noise, draws, self.objective, used_B=used_B)
            case "energy":
                tiled = Frames.cat([clean] * self.objective.energy.samples, 1)
                noise = self._scaled(noise_like(tiled, generator=generator))
                if self.objective.energy.mean_weight:
                    noise = Frames.cat([noise, clean.map(torch.zeros_like)], 1)
                return energy_loss(predict, clean, noise, self.objective, used_B=used_B)
            case other:
                raise ConfigError("objective.kind", got=other, expected="shortcut, regression or energy")

    def _scaled(self, noise: Frames) -> Frames:
        """The noise that frames start from, as a rollout's will be."""
        return noise if self.start_noise == 1 else noise.map(lambda tensor: tensor * self.start_noise)

    def matrices(self) -> Sequence[nn.Parameter]:
        """The blocks' matrices."""
        return muon_parameters(self.net)

    def compile_parts(self) -> None:
        """Compile each block."""
        from vidworld.model.compile import compile_blocks

        compile_blocks(self.net)

    def checkpoint_parts(self) -> None:
        """Keep only the input of each block."""
        self.net.checkpoint_blocks = True

    def share_clips(self, group: SequenceGroup) -> None:
        """Compute some frames of every clip."""
        shard_sequence(self.net, group)


def pictures(batch: Batch, layouts: Sequence[Layout] = ()) -> list[Tensor]:
    """Pictures of a video batch in [-1, 1], those of a size together: [N, T, 3, H, W] each.

    layouts: how each embodiment sees, where they differ; what pads their pictures is cut off.
    """
    if batch.video_BTVCHW is None:
        raise DataError("batch to train a tokenizer on", got="latents", expected="video")
    if not layouts:
        return [to_unit_range(fold_views(batch.video_BTVCHW))]
    rows_of: dict[tuple[int, int, int], list[int]] = {}
    for row, embodiment in enumerate(batch.embodiment_B.tolist()):
        rows_of.setdefault(_grid(layouts[embodiment]), []).append(row)
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for (views, height, width), rows in sorted(rows_of.items()):
        video_BTVCHW = batch.video_BTVCHW[rows][:, :, :views, :, :height, :width]
        by_size.setdefault((height, width), []).append(fold_views(video_BTVCHW))
    return [to_unit_range(torch.cat(videos)) for videos in by_size.values()]


def _grid(layout: Layout) -> tuple[int, int, int]:
    return len(layout.views), layout.height, layout.width


def _uniform(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, device=generator.device).to(device)


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device).to(device)
