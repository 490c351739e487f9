"""One frame of a rollout after the other, in buffers that stay where they are.

Computes what `dynamics.imagine` does, in K passes through the network instead of K + 1. Inference only; a
`WorldState` goes in and comes out by copy. Shapes: B samples, F frames of a pass, k actions a frame, P passes
of a frame, Q conditions of a frame, D width, X noise dims.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vidworld.diffusion.path import constant_level, mix
from vidworld.model.cache import KVCache
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning
from vidworld.model.ring import Clock
from vidworld.model.streaming import StreamedDiT
from vidworld.model.two_stream import CONTEXT_STEP
from vidworld.types import Frames, SignalLevel
from vidworld.world.dynamics import sample
from vidworld.world.noise_ahead import NoiseAhead
from vidworld.world.spec import SamplerConfig
from vidworld.world.state import WorldState


class FrameLoop:
    """The buffers and the computation of B rollouts, a frame at a time.

    Put the frame's actions into `actions_B1kA`, call `begin`, then `run` (or a graph of it); `clean` holds
    the frame. It is committed in the first pass of the next frame, or by `commit`.
    """

    def __init__(
        self,
        model: CausalDiT,
        sampler: SamplerConfig,
        batch: int,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        kernels: Collection[str] = (),
    ) -> None:
        self.model, self.sampler, self.batch = model, sampler, batch
        shape, config = model.shape, model.config
        self.clock = Clock(sampler.window, sampler.sink)
        self.net = StreamedDiT(
            model, self.clock, batch, dtype=cache_dtype, compiler=compiler, kernels=kernels
        )
        device = self.net.device

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.noise = NoiseAhead(
            shape,
            config.noise_dims,
            batch,
            dtype=dtype,
            device=device,
            compile=compiler is not None,
            starts=sampler.start_noise * sampler.temperature > 0,
            contexts=sampler.context_noise > 0,
        )
        self.noise_scale_3 = zeros(3) + 1
        """Factors on the noise of this frame: of latents, proprioception, the model's."""
        self.actions_B1kA = zeros(batch, 1, shape.actions_per_frame, shape.action_dims)
        self.embodiment_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.keep_B1 = torch.ones(batch, 1, dtype=torch.bool, device=device)
        size = (shape.views, shape.channels, shape.height, shape.width)
        self.clean = Frames(zeros(batch, 1, *size), zeros(batch, 1, shape.proprio_dims))
        """The newest frame."""
        self.noisy = self.clean.map(torch.zeros_like)
        """The newest frame as it is committed."""
        self.older = self.clean.map(torch.zeros_like)
        """The frame before that, as it was committed: what the newest one had before it."""
        tokens_B1kD, condition_B1D = self._condition(self.conditioning, self._levels([(0.0, CONTEXT_STEP)]))
        self.tokens_B1kD = torch.zeros_like(tokens_B1kD)
        self.condition_B1D = torch.zeros_like(condition_B1D)
        self.frame = self.lead = 0
        self.uncommitted = False
        self.of_passes_1PD = self._levels(_passes(sampler, dtype))
        self.of_commit_11D = self._levels([(1 - sampler.context_noise, CONTEXT_STEP)])

    @property
    def conditioning(self) -> Conditioning:
        """Of the frame now."""
        noise_BX = self.noise.parts[2]
        if noise_BX is not None and self.sampler.scales_noise:
            noise_BX = noise_BX * self.noise_scale_3[2]
        return Conditioning(
            self.actions_B1kA,
            self.keep_B1,
            self.embodiment_B,
            None if noise_BX is None else noise_BX[:, None],
        )

    @property
    def is_full(self) -> bool:
        """Whether all slots are in sight, of the frame now and of the one it commits."""
        return self.clock.is_full(self.net.num_frames - 1 - int(self.uncommitted))

    def fits(self, state: WorldState) -> bool:
        """Whether a state has as many rows."""
        return len(state) == self.batch

    def cache(self) -> KVCache:
        """A copy of the committed frames."""
        newest = self.noisy.map(torch.clone) if self.model.config.previous_frame else None
        return replace(self.net.cache(), newest=newest)

    def load(self, state: WorldState) -> None:
        """Go on where a state stands."""
        self.net.load(state.cache)
        self.noise.load(state.seed, state.sample_ids_B)
        self.embodiment_B.copy_(state.embodiment_B)
        self.clean.map(lambda own, new: own.copy_(new), state.newest)
        if state.cache.newest is not None:
            self.noisy.map(lambda own, new: own.copy_(new), state.cache.newest)
        self.frame, self.lead, self.uncommitted = state.frame, state.lead, False

    def changed(self) -> list[Tensor]:
        """Every buffer that `run` and `commit` change."""
        kept = (self.clean, self.noisy, self.older)
        frames = [part for one in kept for part in (one.latents_BTVChw, one.proprio_BTS)]
        return [*self.net.buffers(), *frames, self.tokens_B1kD, self.condition_B1D]

    def begin(self) -> None:
        """Move the clock and the noise on to the next frame."""
        self.noise.go_to(self.frame)
        self.net.begin()
        self.frame, self.lead = self.frame + 1, self.lead + 1
        if self.sampler.scales_noise:
            factors = self.sampler.factors(self.lead)
            self.noise_scale_3.copy_(torch.tensor(factors, dtype=self.noise_scale_3.dtype))

    def run(self, *, commits: bool, full: bool) -> None:
        """Denoise the frame begun; with `commits` the frame before is committed on the way."""
        start, context, _ = self.noise.parts
        if self.sampler.scales_noise:
            latents, proprio, _ = self.noise_scale_3
            start = Frames(start.latents_BTVChw * latents, start.proprio_BTS * proprio)
        conditioning = self.conditioning
        tokens_B1kD, conditions_BPD = self._condition(conditioning, self.of_passes_1PD)
        versions, conditions = [tokens_B1kD], [conditions_BPD]
        if self.sampler.guidance:
            without_B1kD, conditions_BPD = self._condition(conditioning.without_actions(), self.of_passes_1PD)
            versions.append(without_B1kD)
            conditions.append(conditions_BPD)
        # The commit's, then pass after pass those of its versions.
        conditions_BQD = torch.cat([self.condition_B1D, torch.stack(conditions, 2).flatten(1, 2)], 1)
        modulation = self.net.modulation(conditions_BQD)
        index = 0

        def predict(z: Frames, level: SignalLevel, step_BT: Tensor) -> Frames:
            nonlocal index
            before = commits and index == 0
            tokens = [self.tokens_B1kD, *versions] if before else versions
            row = 1 + index * len(versions)
            found = self.net(
                Frames.cat([*([self.noisy] if before else []), *[z] * len(versions)], 1),
                torch.cat(tokens, 1),
                self.embodiment_B,
                modulation,
                slice(row - int(before), row + len(versions)),
                self._previous([*([self.older] if before else []), *[self.noisy] * len(versions)]),
                commits=before,
                first=index == 0,
                full=full,
            )
            index += 1
            if len(versions) == 1:
                return found
            scale = self.sampler.guidance
            return found[:, :1].map(lambda c, u: c + scale * (c - u), found[:, 1:])

        clean = sample(predict, start, self.sampler)
        noisy = mix(clean, context, constant_level(clean, 1 - self.sampler.context_noise))
        quiet = Conditioning(self.actions_B1kA, self.keep_B1, self.embodiment_B)
        _, condition_B1D = self._condition(quiet, self.of_commit_11D)
        self.clean.map(lambda own, new: own.copy_(new), clean)
        self.older.map(lambda own, new: own.copy_(new), self.noisy)
        self.noisy.map(lambda own, new: own.copy_(new), noisy)
        self.tokens_B1kD.copy_(tokens_B1kD)
        self.condition_B1D.copy_(condition_B1D)

    def commit(self, *, full: bool) -> None:
        """Commit the newest frame in a pass of its own, for a state to be taken."""
        self.net.before.copy_(self.net.now)
        self.net(
            self.noisy,
            self.tokens_B1kD,
            self.embodiment_B,
            self.net.modulation(self.condition_B1D),
            slice(0, 1),
            self._previous([self.older]),
            commits=True,
            first=True,
            full=full,
        )

    def _previous(self, frames: list[Frames]) -> Frames | None:
        """What the network is given of the frames before those of a pass."""
        return Frames.cat(frames, 1) if self.model.config.previous_frame else None

    def _condition(self, conditioning: Conditioning, of_levels_1QD: Tensor) -> tuple[Tensor, Tensor]:
        """Action tokens [B, 1, k, D] and conditions [B, Q, D]."""
        tokens_B1kD = self.model.action_embedding(conditioning)
        return tokens_B1kD, self.model.condition_embedding.join(of_levels_1QD, tokens_B1kD, conditioning)

    def _levels(self, passes: list[tuple[float, float]]) -> Tensor:
        """What level and step size of each pass add to its condition, [1, Q, D]."""
        told = torch.tensor(passes, dtype=self.noise.now_BX.dtype, device=self.net.device)
        level = SignalLevel.from_signal(told[None, :, 0])
        return self.model.condition_embedding.of_level(level, told[None, :, 1])


def _passes(sampler: SamplerConfig, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Signal level and step size that the sampler asks for in each pass of a frame."""
    asked: list[tuple[float, float]] = []

    def record(z: Frames, level: SignalLevel, step_BT: Tensor) -> Frames:
        asked.append((float(level.signal), float(step_BT)))
        return z

    sample(record, Frames(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)), sampler)
    return asked
