"""The same rollouts faster: fixed buffers, K passes a frame, and on a GPU one graph a frame.

Shapes: B samples, T frames, V views, C channels, H W pixels, h w latent, A action dims, S proprio dims,
k camera frames (and actions) a latent frame.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vidworld.errors import ConfigError
from vidworld.model.compile import MAX_GRAPHS
from vidworld.model.fp8 import use_fp8, why_not
from vidworld.model.streaming import StreamKernels
from vidworld.types import Frames
from vidworld.world.capture import captured
from vidworld.world.codec import Codec, to_video
from vidworld.world.coding import Coding
from vidworld.world.finite import all_finite, require_finite
from vidworld.world.frame_loop import FrameLoop
from vidworld.world.intake import Numbers, one_step
from vidworld.world.member_loops import MemberLoops
from vidworld.world.spec import SamplerConfig
from vidworld.world.state import Observation, Rollout, WorldState
from vidworld.world.world import FRAMES_BETWEEN_CHECKS, WorldModel

Module = TypeVar("Module", bound=nn.Module)


class RolloutEngine:
    """Rolls a world out fast; `rollout` and `step` mean what they mean in `WorldModel`.

    What differs: nothing carries gradients, one sampler holds for all, and between `load` and `state` the
    engine itself keeps the state, in buffers for as many samples as were loaded. Keys and values are kept in
    fixed slots, each frame is committed in the first pass of the next one, and what the passes of a frame
    share is computed once. Frames are equal to the world's up to rounding.

    compile: `torch.compile` the blocks and the noise; takes up to minutes, once, and minutes more with
    "autotune", which tries several kernels for each matrix product. graphs: on CUDA, capture
    each frame as one graph. Either falls back with a warning where it fails. half: bfloat16 autocast; by
    default as the world, which has it on CUDA alone. A CPU with bfloat16 instructions is about twice as fast
    with it, and others are slower. Under autocast the engine holds half-precision copies of the weights: make
    another engine when they change. residual: what the stream between blocks is kept in under autocast, by
    default as in training; "autocast" halves what large batches move and rounds what each block adds.
    kernels: names of `vidworld.model.streaming.StreamKernels`, to run where they can (on CUDA). products:
    "fp8" computes the large matrix products under autocast in 8-bit floats (`vidworld.model.fp8`): faster at
    large batches on an H100, best with all kernels, and less exact, so look at what it does to your world;
    where it does not run, it warns and leaves them in bfloat16.

        engine = RolloutEngine(world)
        rollout = engine.rollout(state, actions)      # values in, values out

        engine.load(state)                            # or step by step, without copies in between
        seen = engine.step(action)
        state = engine.state()
    """

    def __init__(
        self,
        world: WorldModel,
        *,
        sampler: SamplerConfig | None = None,
        compile: bool | Literal["autotune"] = False,
        graphs: bool = True,
        half: bool | None = None,
        residual: Literal["float32", "autocast"] | None = None,
        kernels: Collection[str] = (),
        products: Literal["autocast", "fp8"] = "autocast",
    ) -> None:
        if products not in ("autocast", "fp8"):
            raise ConfigError("products of the engine", got=products, expected="autocast | fp8")
        if unknown := set(kernels) - set(StreamKernels._fields):
            raise ConfigError(
                "kernels of the engine", got=sorted(unknown), expected=" | ".join(StreamKernels._fields)
            )
        self._kernels = tuple(kernels)
        self.world = world
        self.sampler = sampler or world.spec.sampler
        self._compiler: Callable[..., Any] | None = (
            functools.partial(_compile, autotune=compile == "autotune") if compile else None
        )
        self._graphs = graphs and world.device.type == "cuda"
        with world.precision():
            self._half = torch.is_autocast_enabled(world.device.type) if half is None else half
        self._models = [_halved(model) if self._half else model for model in world.networks]
        if residual is not None and self._half:
            for model in self._models:  # copies
                model.config = dataclasses.replace(model.config, residual=residual)
        if products == "fp8":
            reason = why_not(world.device) if self._half else "bfloat16 autocast is off"
            if reason is None:
                self._models = [use_fp8(model) for model in self._models]
            else:
                warnings.warn(f"matrix products are not in fp8: {reason}", stacklevel=2)
        tokenizer = world.tokenizer
        if self._half and isinstance(tokenizer, nn.Module):
            tokenizer = _halved(tokenizer)
        self._codec = Codec(tokenizer, world.spec, world.dtype, self._precision)
        self._loop: FrameLoop | MemberLoops | None = None
        self._runs: dict[tuple[bool, bool, bool], Callable[[], None]] = {}
        self._look: Callable[[], None] | None = None
        self._given: WorldState | None = None
        """What was loaded: its samples are those of the loop."""
        self._current: WorldState | None = None
        """A state that is where the loop is, if there is one."""
        self._coding: Coding | None = None

    @property
    def frame(self) -> int:
        """Latent frames known so far."""
        return self._running().frame

    @torch.no_grad()
    def load(self, state: WorldState) -> None:
        """Go on from a state, which stays as it is; buffers and graphs are made anew for another batch size.

        Raises CheckpointError or ConfigError for a state of another world or device.
        """
        self.world.require_own(state)
        if self._loop is None or not self._loop.fits(state):
            self._loop = self._make(state)
            self._runs, self._look = {}, None
        self._loop.load(state)
        self._given = self._current = state
        self._coding = state.coding

    @torch.no_grad()
    def state(self) -> WorldState:
        """A copy of where the engine stands; takes one pass if the newest frame is not committed yet."""
        loop, given = self._running(), self._given
        assert given is not None
        if loop.uncommitted:
            self._run(loop, ends=True)
            loop.uncommitted = False
        self._current = dataclasses.replace(
            given,
            cache=loop.cache(),
            newest=loop.clean.map(torch.clone),
            frame=loop.frame,
            lead=loop.lead,
            coding=self._coding,
        )
        return self._current

    @torch.no_grad()
    def step(
        self, action: Numbers, *, decode: bool = True, check: bool = True, allow_out_of_range: bool = False
    ) -> Observation:
        """Imagine the next frame; arguments, result and errors are those of `WorldModel.step`."""
        loop, given = self._running(), self._given
        assert given is not None
        world = self.world
        actions_B1kA = world.normalized_actions(
            given, one_step(action, world.spec), check, allow_out_of_range
        )
        newest = self._advance(actions_B1kA)
        if check:
            require_finite([all_finite(newest)], loop.frame - 1)
        clip_BkVHWC = None
        if decode and self._coding is not None:
            clip_BkVHWC, self._coding = self._codec.newest(self._coding)
        elif decode:
            clip_BkVHWC = self._newest_picture()
        return Observation(
            latents_BVChw=newest.latents_BTVChw[:, 0],
            proprio_BS=self._proprio(newest)[:, 0],
            video_BVHWC=None if clip_BkVHWC is None else clip_BkVHWC[:, -1],
            rows=given.rows,
            clip_BkVHWC=clip_BkVHWC,
        )

    @torch.no_grad()
    def rollout(
        self,
        state: WorldState,
        actions: Numbers,
        *,
        decode: bool = True,
        check: bool = True,
        allow_out_of_range: bool = False,
        progress: Callable[[], object] | None = None,
    ) -> Rollout:
        """Imagine T frames from a state; arguments, result and errors are those of `WorldModel.rollout`."""
        world = self.world
        world.require_own(state)
        actions_BTkA = world.normalized_actions(state, actions, check, allow_out_of_range)
        if state is not self._current:
            self.load(state)
        loop = self._running()
        frames: list[Frames] = []
        for actions_BkA in actions_BTkA.split(1, 1):
            frames.append(self._advance(actions_BkA))
            if check and len(frames) % FRAMES_BETWEEN_CHECKS == 0:
                self._check(frames[-FRAMES_BETWEEN_CHECKS:], loop.frame)
            if progress is not None:
                progress()
        if check:
            self._check(frames[len(frames) // FRAMES_BETWEEN_CHECKS * FRAMES_BETWEEN_CHECKS :], loop.frame)
        imagined = Frames.cat(frames, 1) if frames else loop.clean[:, :0].map(torch.clone)
        video_BTVHWC = None
        if decode and self._coding is not None and frames:
            video_BTVHWC, self._coding = self._codec.show(self._coding, len(frames))
        elif decode:
            video_BTVHWC = self._codec.pictures(imagined.latents_BTVChw)
        return Rollout(
            latents_BTVChw=imagined.latents_BTVChw,
            proprio_BTS=self._proprio(imagined),
            video_BTVHWC=video_BTVHWC,
            state=self.state(),
        )

    def _running(self) -> FrameLoop | MemberLoops:
        if self._loop is None:
            raise ConfigError("an engine without a state", fix="call load(state) first")
        return self._loop

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._half)

    def _make(self, state: WorldState) -> FrameLoop | MemberLoops:
        settings: dict[str, Any] = {
            "dtype": self.world.dtype,
            "cache_dtype": torch.bfloat16 if self._half else next(self._models[0].parameters()).dtype,
            "compiler": self._compiler,
            "kernels": self._kernels,
        }
        with self._precision():
            if len(self._models) > 1:
                samplers = [self.world.sampler_of(m, self.sampler) for m in range(len(self._models))]
                return MemberLoops(self._models, samplers, state.member_B, **settings)
            return FrameLoop(self._models[0], self.sampler, len(state), **settings)

    def _advance(self, actions_B1kA: Tensor) -> Frames:
        """The next frame, as a copy."""
        loop = self._running()
        loop.actions_B1kA.copy_(actions_B1kA)
        loop.begin()
        self._run(loop, ends=False)
        loop.uncommitted = True
        self._current = None
        newest = loop.clean.map(torch.clone)
        if self._coding is not None:
            self._coding = self._coding.imagined(newest.latents_BTVChw)
        return newest

    def _run(self, loop: FrameLoop | MemberLoops, *, ends: bool) -> None:
        """The frame begun, or if a rollout `ends` the commit of its newest one."""
        variant = (ends, loop.uncommitted, loop.is_full)
        if variant not in self._runs:
            self._runs[variant] = self._runner(loop, *variant)
        self._runs[variant]()

    def _runner(
        self, loop: FrameLoop | MemberLoops, ends: bool, commits: bool, full: bool
    ) -> Callable[[], None]:
        def run() -> None:
            with self._precision():
                if ends:
                    loop.commit(full=full)
                else:
                    loop.run(commits=commits, full=full)

        if not self._graphs:
            return run
        return captured(run, loop.changed(), name="a frame of the rollout")

    def _newest_picture(self) -> Tensor:
        """Uint8 pictures [B, 1, V, H, W, 3] of the newest frame."""
        loop = self._running()
        if not self._graphs:
            return to_video(self._codec.decode(loop.clean.latents_BTVChw))
        if self._look is None:
            shown = to_video(self._codec.decode(loop.clean.latents_BTVChw))

            def look() -> None:
                shown.copy_(to_video(self._codec.decode(loop.clean.latents_BTVChw)))

            self._shown, self._look = shown, captured(look, [shown], name="the decoder")
        self._look()
        return self._shown.clone()

    def _proprio(self, frames: Frames) -> Tensor:
        assert self._given is not None
        return self.world.normalizer.denormalize_proprio(frames.proprio_BTS, self._given.embodiment_B)

    def _check(self, frames: list[Frames], after: int) -> None:
        require_finite([all_finite(frame) for frame in frames], after - len(frames))


def _halved(module: Module) -> Module:
    """A copy with matrices and convolutions in bfloat16, which autocast would make of them in each pass."""
    halved = copy.deepcopy(module)
    for part in halved.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d):
            part.to(torch.bfloat16)
    return halved


def _compile(function: Callable[..., Any], *, autotune: bool) -> Callable[..., Any]:
    """`function` compiled for the shapes it meets; where that fails it warns and runs as it is."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
    options: dict[str, Any] | None = {"max_autotune_gemm": True} if autotune else None
    compiled = torch.compile(function, dynamic=False, fullgraph=True, options=options)
    works = True

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except Exception as error:
                works = False
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                warnings.warn(f"{function.__name__} runs without compilation: {reason}", stacklevel=2)
        return function(*arguments)

    return run
