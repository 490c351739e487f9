"""The simulator: step imagined robots, as many as fit, from a prompt and actions in raw units.

Shapes: B samples, T frames, V views, C channels, H W pixels, h w latent, A action dims, S proprio dims,
k camera frames (and actions) a latent frame.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vidworld.errors import CheckpointError, ConfigError, ContractError
from vidworld.model.cache import KVCache
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning
from vidworld.model.normalizer import Normalizer
from vidworld.tokenizers.base import Tokenizer, chunk_actions
from vidworld.types import Frames
from vidworld.world.calibration import Calibration
from vidworld.world.codec import Codec, to_video
from vidworld.world.coding import Coding
from vidworld.world.dynamics import imagine, take_in
from vidworld.world.finite import all_finite, require_finite
from vidworld.world.intake import (
    Numbers,
    gather_actions,
    gather_noise,
    gather_prompts,
    gather_proprio,
    gather_rows,
    one_step,
)
from vidworld.world.noise import NoiseStream
from vidworld.world.prompt import Prompt
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.state import Observation, Rollout, WorldState
from vidworld.world.uncertainty import Rows

FRAMES_BETWEEN_CHECKS = 16
"""Frames of a rollout between two looks at whether all is finite; each look waits for the device."""


class WorldModel(nn.Module):
    """A robot's world as it was learnt from its logs.

    Gradients are the caller's choice: nothing here switches them off, and actions that require grad carry it
    through every later frame. Wrap calls in `torch.no_grad()` when simulating only.

    Latents and noise are float32. On CUDA the network and the tokenizer run under bfloat16 autocast unless
    `autocast` is False; on a CPU all is float32. `world.double()` computes in float64.
    """

    def __init__(
        self,
        spec: WorldSpec,
        model: CausalDiT,
        normalizer: Normalizer,
        tokenizer: Tokenizer,
        *,
        autocast: bool = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.model = model
        self.normalizer = normalizer
        self.tokenizer = tokenizer
        self.autocast = autocast
        self.calibration: Calibration | None = None
        """What `load` found beside the weights and applied."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def num_members(self) -> int:
        """Worlds that imagine side by side; more than one in an `Ensemble`."""
        return 1

    @property
    def networks(self) -> list[CausalDiT]:
        """The network of each member."""
        return [self.model]

    def sampler_of(self, member: int, sampler: SamplerConfig) -> SamplerConfig:
        """What a member makes of a sampler."""
        return sampler

    @property
    def digest(self) -> str:
        """Of what fixes the meaning of a state: a state of another world is refused."""
        return self.spec.digest

    @property
    def dtype(self) -> torch.dtype:
        """Precision of latents and noise: that of the weights, float32 at least."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    def reset(
        self,
        prompt: Prompt | Sequence[Prompt],
        num_samples: int = 1,
        seed: int = 0,
        *,
        sample_ids: Sequence[int] | None = None,
        sampler: SamplerConfig | None = None,
        allow_out_of_range: bool = False,
    ) -> WorldState:
        """Begin `num_samples` futures of a prompt; of several prompts of equal length, prompt after prompt.

        An `Ensemble` begins as many of each member: rows go by prompt, then member, then sample.
        `sample_ids` [prompts * num_samples] name the streams of noise; by default 0, 1, 2, ... A prompt
        longer than the window keeps its newest frames (and the sink).
        Raises DataError or ContractError naming what does not fit this world.
        """
        prompts = [prompt] if isinstance(prompt, Prompt) else list(prompt)
        given = gather_prompts(prompts, self.spec, allow_out_of_range=allow_out_of_range)
        rows, ids_B = gather_rows(len(prompts), self.num_members, num_samples, seed, sample_ids)
        embodiment_P = given.embodiment_P.to(self.device)
        latents_PTVChw, coding = self.codec.begin(given.video_PTVHWC.to(self.device))

        k = self.spec.frames_per_step
        proprio_PTS = given.proprio_PTS[:, ::k].to(self.device, self.dtype)
        actions_PTA = self.normalizer.actions(given.actions_PTA.to(self.device, self.dtype), embodiment_P)
        actions_PTkA, keep_PT = chunk_actions(actions_PTA, k)
        has_actions_P1 = given.has_actions_P[:, None].to(self.device)
        conditioning = Conditioning(actions_PTkA, keep_PT & has_actions_P1, embodiment_P)
        known = Frames(latents_PTVChw, self.normalizer.proprio(proprio_PTS, embodiment_P))
        rows = Rows(rows.scene_B.to(self.device), rows.member_B.to(self.device))
        copies_B = rows.scene_B
        has_proprio_P = given.has_proprio_P.to(self.device)
        return self._ground(
            None,
            known[copies_B],
            None if bool(given.has_proprio_P.all()) else has_proprio_P[copies_B],
            conditioning[copies_B],
            NoiseStream(seed, ids_B.to(self.device), self.dtype),
            0,
            sampler or self.spec.sampler,
            None if coding is None else coding.select(copies_B),
            rows,
        )

    def step(
        self,
        state: WorldState,
        action: Numbers,
        *,
        sampler: SamplerConfig | None = None,
        decode: bool = True,
        check: bool = True,
        allow_out_of_range: bool = False,
    ) -> tuple[WorldState, Observation]:
        """Imagine the next frame under an action [B, A] or [A] in raw units ([B, k, A] or [k, A] if k > 1).

        With a time stride k a step is k camera frames: `clip_BkVHWC` of the observation. Pictures follow the
        tokenizer's stream, so that they are those of one decode of the whole; without `decode` it waits.

        K denoising passes against the cache, then one pass that commits the frame to it. `check` looks at the
        action's values (unless it requires grad) and at the result, and so waits for the device.
        Raises ContractError naming the dimension, RolloutDivergedError naming the frame.
        """
        self.require_own(state)
        actions_B1kA = self.normalized_actions(state, one_step(action, self.spec), check, allow_out_of_range)
        state = self._imagine(state, actions_B1kA[:, 0], sampler or self.spec.sampler)
        if check:
            require_finite([all_finite(state.newest)], state.frame - 1)
        return self.look(state, decode)

    def rollout(
        self,
        state: WorldState,
        actions: Numbers,
        *,
        sampler: SamplerConfig | None = None,
        decode: bool = True,
        check: bool = True,
        allow_out_of_range: bool = False,
        noise_BTX: Tensor | None = None,
        progress: Callable[[], object] | None = None,
    ) -> Rollout:
        """Imagine T frames under actions [B, T * k, A] or [T * k, A] in raw units.

        The same as `step` T times, with one decode at the end. `progress` is called after every frame.
        `noise_BTX`: of a world with `noise_dims`, the standard normal noise that selects each frame among the
        possible ones, in place of the streams'; carries gradients. Raises as `step` does; all actions are
        checked before the first frame.
        """
        self.require_own(state)
        actions_BTkA = self.normalized_actions(state, actions, check, allow_out_of_range)
        newest, finite = [], []
        size = (len(state), actions_BTkA.shape[1])
        own_BTX = gather_noise(noise_BTX, size, self.spec, self.device, self.dtype)
        for actions_BkA, noise_BX in zip(actions_BTkA.unbind(1), own_BTX, strict=True):
            state = self._imagine(state, actions_BkA, sampler or self.spec.sampler, noise_BX)
            newest.append(state.newest)
            finite.append(all_finite(state.newest))
            if check and len(finite) == FRAMES_BETWEEN_CHECKS:
                require_finite(finite, state.frame - len(finite))
                finite = []
            if progress is not None:
                progress()
        if check:
            require_finite(finite, state.frame - len(finite))
        frames = Frames.cat(newest, 1) if newest else state.newest[:, :0]
        video_BTVHWC = None
        if decode and state.coding is not None and newest:
            video_BTVHWC, coding = self.codec.show(state.coding, len(newest))
            state = dataclasses.replace(state, coding=coding)
        elif decode:
            video_BTVHWC = self.codec.pictures(frames.latents_BTVChw)
        return Rollout(
            latents_BTVChw=frames.latents_BTVChw,
            proprio_BTS=self.normalizer.denormalize_proprio(frames.proprio_BTS, state.embodiment_B),
            video_BTVHWC=video_BTVHWC,
            state=state,
        )

    def observe(
        self,
        state: WorldState,
        frame: Tensor | np.ndarray,
        *,
        proprio: Numbers | None = None,
        action: Numbers | None = None,
        sampler: SamplerConfig | None = None,
        allow_out_of_range: bool = False,
    ) -> WorldState:
        """Take a real frame as the next one: ground the state again, mid-way.

        frame: uint8 [B, V, H, W, 3], or [V, H, W, 3] for all samples alike. proprio, [B, S] or [S], and the
        action that led here, [B, A] or [A], are in raw units; either may be left out, as in a `Prompt`.
        With a time stride k: the next k frames [B, k, V, H, W, 3], the last one's proprio, and k actions;
        refused after imagined frames, which the tokenizer's encoder has not seen.
        """
        self.require_own(state)
        k = self.spec.frames_per_step
        latents_B1VChw, coding = self.codec.observe(state.coding, frame, len(state))
        dims, size = self.spec.shape, (len(state), 1)
        actions_BkA = torch.zeros(len(state), k, dims.action_dims, dtype=self.dtype, device=self.device)
        if action is not None:
            actions_BkA = self.normalized_actions(
                state, one_step(action, self.spec), True, allow_out_of_range
            )[:, 0]
        proprio_B1S = torch.zeros(*size, dims.proprio_dims, dtype=self.dtype, device=self.device)
        if proprio is not None:
            proprio = proprio if isinstance(proprio, Tensor) else np.asarray(proprio)
            proprio_B1S = gather_proprio(proprio[..., None, :], state.embodiment_B, self.spec, self.dtype)
            proprio_B1S = self.normalizer.proprio(proprio_B1S, state.embodiment_B)
        keep_B1 = torch.full(size, action is not None, device=self.device)
        return self._ground(
            state.cache,
            Frames(latents_B1VChw, proprio_B1S),
            None if proprio is not None else torch.zeros(len(state), dtype=torch.bool, device=self.device),
            Conditioning(actions_BkA[:, None], keep_B1, state.embodiment_B),
            NoiseStream(state.seed, state.sample_ids_B, self.dtype),
            state.frame,
            sampler or self.spec.sampler,
            coding,
            state.rows,
        )

    def fork(self, state: WorldState, index: Tensor | slice | list[int]) -> WorldState:
        """Rows of a state, each with a future of its own: `WorldState.branch`."""
        self.require_own(state)
        return state.branch(index)

    def observation(self, state: WorldState, *, decode: bool = True) -> Observation:
        """The newest frame of a state."""
        return self.look(state, decode)[1]

    @property
    def codec(self) -> Codec:
        """Pictures in and out."""
        return Codec(self.tokenizer, self.spec, self.dtype, self.precision)

    def encode(self, video_BTVHWC: Tensor) -> Tensor:
        """Uint8 pictures to normalised latents [B, T, V, C, h, w]."""
        return self.codec.encode(video_BTVHWC)

    def decode(self, latents_BTVChw: Tensor) -> Tensor:
        """Normalised latents to pixels [B, T, V, C, H, W], about -1 to 1, not clamped; carries gradients.

        With a time stride the first latent is taken for the first of a video.
        """
        return self.codec.decode(latents_BTVChw)

    def look(self, state: WorldState, decode: bool) -> tuple[WorldState, Observation]:
        """What the newest frame shows, and the state with its decoder there."""
        proprio_B1S = self.normalizer.denormalize_proprio(state.newest.proprio_BTS, state.embodiment_B)
        latents_B1VChw = state.newest.latents_BTVChw
        clip_BkVHWC = None
        if decode and state.coding is not None:
            clip_BkVHWC, coding = self.codec.newest(state.coding)
            state = dataclasses.replace(state, coding=coding)
        elif decode:
            clip_BkVHWC = to_video(self.decode(latents_B1VChw))
        return state, Observation(
            latents_BVChw=latents_B1VChw[:, 0],
            proprio_BS=proprio_B1S[:, 0],
            video_BVHWC=None if clip_BkVHWC is None else clip_BkVHWC[:, -1],
            rows=state.rows,
            clip_BkVHWC=clip_BkVHWC,
        )

    def normalized_actions(
        self, state: WorldState, actions: Numbers, check: bool, allow_out_of_range: bool
    ) -> Tensor:
        """Normalised actions [B, T, k, A] from raw ones [B, T * k, A] or [T * k, A]."""
        raw_BTA = gather_actions(
            actions,
            state.embodiment_B,
            self.spec,
            self.dtype,
            check=check,
            allow_out_of_range=allow_out_of_range,
        )
        k = self.spec.frames_per_step
        if raw_BTA.shape[1] % k:
            raise ContractError("number of actions", got=raw_BTA.shape[1], expected=f"a multiple of {k}")
        return self.normalizer.actions(raw_BTA, state.embodiment_B).unflatten(1, (-1, k))

    def _imagine(
        self,
        state: WorldState,
        actions_BkA: Tensor,
        sampler: SamplerConfig,
        noise_BX: Tensor | None = None,
    ) -> WorldState:
        keep_B1 = torch.ones(len(state), 1, dtype=torch.bool, device=self.device)
        conditioning = Conditioning(actions_BkA[:, None], keep_B1, state.embodiment_B)
        stream = NoiseStream(state.seed, state.sample_ids_B, self.dtype)
        with self.precision():
            newest, cache = self._next_frame(state, conditioning, stream, sampler, noise_BX)
        coding = None if state.coding is None else state.coding.imagined(newest.latents_BTVChw)
        return dataclasses.replace(
            state, cache=cache, newest=newest, frame=state.frame + 1, lead=state.lead + 1, coding=coding
        )

    def _ground(
        self,
        cache: KVCache | None,
        known: Frames,
        has_proprio_B: Tensor | None,
        conditioning: Conditioning,
        stream: NoiseStream,
        first_frame: int,
        sampler: SamplerConfig,
        coding: Coding | None,
        rows: Rows,
    ) -> WorldState:
        with self.precision():
            newest, cache = self._take_in(
                cache, known, has_proprio_B, conditioning, first_frame, stream, sampler, rows
            )
        return WorldState(
            cache=cache,
            newest=newest,
            frame=first_frame + known.num_frames,
            seed=stream.seed,
            sample_ids_B=stream.sample_ids_B,
            embodiment_B=conditioning.embodiment_B,
            scene_B=rows.scene_B,
            member_B=rows.member_B,
            world=self.digest,
            coding=coding,
        )

    def _next_frame(
        self,
        state: WorldState,
        conditioning: Conditioning,
        stream: NoiseStream,
        sampler: SamplerConfig,
        noise_BX: Tensor | None,
    ) -> tuple[Frames, KVCache]:
        lead = state.lead + 1
        return imagine(self.model, state.cache, conditioning, state.frame, stream, sampler, lead, noise_BX)

    def _take_in(
        self,
        cache: KVCache | None,
        known: Frames,
        has_proprio_B: Tensor | None,
        conditioning: Conditioning,
        first_frame: int,
        stream: NoiseStream,
        sampler: SamplerConfig,
        rows: Rows,
    ) -> tuple[Frames, KVCache]:
        return take_in(self.model, cache, known, has_proprio_B, conditioning, first_frame, stream, sampler)

    def require_own(self, state: WorldState) -> None:
        """Refuse a state of another world or device with CheckpointError or ConfigError."""
        if state.world != self.digest:
            raise CheckpointError("state of another world", got=f"hash {state.world}", expected=self.digest)
        if state.device != self.device:
            raise ConfigError(
                "device of the state",
                got=state.device,
                expected=self.device,
                fix="use state.to(world.device)",
            )

    def precision(self) -> torch.autocast:
        """The autocast that network and tokenizer run under."""
        enabled = self.autocast and self.device.type == "cuda" and self.dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)
