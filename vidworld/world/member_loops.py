"""The frame loops of an ensemble as one: each member runs its own rows, all of them in one graph.

Shapes: B rows of all members, k actions a frame.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from vidworld.model.cache import KVCache
from vidworld.model.dit import CausalDiT
from vidworld.types import Frames
from vidworld.world.ensemble import join_rows, member_rows
from vidworld.world.frame_loop import FrameLoop
from vidworld.world.spec import SamplerConfig
from vidworld.world.state import WorldState


class MemberLoops:
    """What `FrameLoop` is to one network, for the rows of several; rows stay with their members."""

    def __init__(
        self,
        models: Sequence[CausalDiT],
        samplers: Sequence[SamplerConfig],
        member_B: Tensor,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        kernels: Collection[str] = (),
    ) -> None:
        self.member_B = member_B
        self.rows = [index_B for _, index_B in member_rows(member_B)]
        settings: dict[str, Any] = {
            "dtype": dtype,
            "cache_dtype": cache_dtype,
            "compiler": compiler,
            "kernels": kernels,
        }
        self.loops = [
            FrameLoop(models[member], samplers[member], len(index_B), **settings)
            for member, index_B in member_rows(member_B)
        ]

        def whole(part: Tensor) -> Tensor:
            return part.new_zeros(len(member_B), *part.shape[1:])

        self.actions_B1kA = whole(self.loops[0].actions_B1kA)
        self.clean = self.loops[0].clean.map(whole)
        """The newest frame of every row."""

    @property
    def frame(self) -> int:
        """Latent frames known so far."""
        return self.loops[0].frame

    @property
    def lead(self) -> int:
        """Latent frames imagined since the last known one."""
        return self.loops[0].lead

    @property
    def uncommitted(self) -> bool:
        """Whether the newest frame is not in the cache yet."""
        return self.loops[0].uncommitted

    @uncommitted.setter
    def uncommitted(self, value: bool) -> None:
        for loop in self.loops:
            loop.uncommitted = value

    @property
    def is_full(self) -> bool:
        """Whether all slots are in sight, of the frame now and of the one it commits."""
        return self.loops[0].is_full

    def fits(self, state: WorldState) -> bool:
        """Whether a state's rows are of the members that these are."""
        return torch.equal(self.member_B, state.member_B)

    def load(self, state: WorldState) -> None:
        """Go on where a state stands."""
        for loop, index_B in zip(self.loops, self.rows, strict=True):
            loop.load(state.select(index_B))
        self.clean.map(lambda own, new: own.copy_(new), state.newest)

    def changed(self) -> list[Tensor]:
        """Every buffer that `run` and `commit` change."""
        own = [self.clean.latents_BTVChw, self.clean.proprio_BTS]
        return own + [buffer for loop in self.loops for buffer in (*loop.changed(), loop.actions_B1kA)]

    def begin(self) -> None:
        """Move clocks and noise on to the next frame."""
        for loop in self.loops:
            loop.begin()

    def run(self, *, commits: bool, full: bool) -> None:
        """Denoise the frame begun; with `commits` the frame before is committed on the way."""
        for loop, index_B in zip(self.loops, self.rows, strict=True):
            loop.actions_B1kA.copy_(self.actions_B1kA[index_B])
            loop.run(commits=commits, full=full)
            self.clean.map(lambda own, new, at=index_B: own.index_copy_(0, at, new), loop.clean)

    def commit(self, *, full: bool) -> None:
        """Commit the newest frame in a pass of its own, for a state to be taken."""
        for loop in self.loops:
            loop.commit(full=full)

    def cache(self) -> KVCache:
        """A copy of the committed frames, in the order of the rows."""
        parts: list[tuple[Frames, KVCache]] = [(loop.clean, loop.cache()) for loop in self.loops]
        return join_rows(parts, self.rows)[1]
