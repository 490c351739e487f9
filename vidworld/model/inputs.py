"""What goes into the model beside the frames: their shape, what conditions them, who sees whom in time.

Shapes: B batch, T frames, A action dims, S proprio dims, k actions per latent frame, X noise dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidworld.contract import ActionContract
from vidworld.errors import ConfigError
from vidworld.model.rectangles import StreamSizes


@dataclass(frozen=True)
class FrameShape:
    """The shape of one frame as the model sees it: latents of all views, proprioception, actions."""

    views: int
    channels: int
    """Latent channels."""
    height: int
    """Latent rows."""
    width: int
    """Latent columns."""
    proprio_dims: int
    """Of the widest embodiment; the others are padded."""
    action_dims: int
    """Of the widest embodiment; the others are padded."""
    actions_per_frame: int = 1
    """Actions that lead into one latent frame: the time stride of the tokenizer."""
    num_embodiments: int = 1
    embodiment_action_dims: tuple[int, ...] = ()
    """Action dimensions each embodiment uses; empty when all use all. What lies beyond is never read."""
    embodiment_proprio_dims: tuple[int, ...] = ()
    """The same for proprioception; predictions beyond are exactly zero."""
    embodiment_views: tuple[int, ...] = field(default=(), metadata={"omit_default": True})
    """Views each embodiment has, the first ones; empty when all have all. Of the others nothing is read, no
    token sees them, and predictions there are exactly zero."""
    embodiment_heights: tuple[int, ...] = field(default=(), metadata={"omit_default": True})
    """The same for latent rows."""
    embodiment_widths: tuple[int, ...] = field(default=(), metadata={"omit_default": True})
    """The same for latent columns."""

    def __post_init__(self) -> None:
        for name in ("views", "channels", "height", "width", "actions_per_frame", "num_embodiments"):
            if getattr(self, name) < 1:
                raise ConfigError(f"frame shape {name}", got=getattr(self, name), expected="at least 1")
        for name, least in (
            ("action_dims", 0),
            ("proprio_dims", 0),
            ("views", 1),
            ("height", 1),
            ("width", 1),
        ):
            plural = f"{name}s" if name in ("height", "width") else name
            widest, used = getattr(self, name), getattr(self, f"embodiment_{plural}")
            fits = not used or (
                len(used) == self.num_embodiments and least <= min(used) <= max(used) <= widest
            )
            if widest < least or not fits:
                raise ConfigError(
                    f"frame shape embodiment_{plural}",
                    got=used,
                    expected=f"{self.num_embodiments} counts from {least} to {widest}",
                )

    @classmethod
    def from_contracts(
        cls,
        contracts: Sequence[ActionContract],
        *,
        views: int,
        channels: int,
        height: int,
        width: int,
        actions_per_frame: int = 1,
        grids: Sequence[tuple[int, int, int]] = (),
    ) -> "FrameShape":
        """The shape that holds every embodiment of a dataset, in the order of its contracts.

        grids: (views, height, width) of each, where they differ; see `embodiment_views`.
        """
        action_dims = tuple(len(contract.action) for contract in contracts)
        proprio_dims = tuple(len(contract.proprio) for contract in contracts)
        return cls(
            views=views,
            channels=channels,
            height=height,
            width=width,
            proprio_dims=max(proprio_dims),
            action_dims=max(action_dims),
            actions_per_frame=actions_per_frame,
            num_embodiments=len(contracts),
            embodiment_action_dims=action_dims,
            embodiment_proprio_dims=proprio_dims,
            embodiment_views=tuple(grid[0] for grid in grids),
            embodiment_heights=tuple(grid[1] for grid in grids),
            embodiment_widths=tuple(grid[2] for grid in grids),
        )

    def grid(self, embodiment: int) -> tuple[int, int, int]:
        """(views, height, width) that an embodiment uses."""
        return (
            self.embodiment_views[embodiment] if self.embodiment_views else self.views,
            self.embodiment_heights[embodiment] if self.embodiment_heights else self.height,
            self.embodiment_widths[embodiment] if self.embodiment_widths else self.width,
        )

    @property
    def is_padded(self) -> bool:
        """Whether the pictures of some embodiment are padded."""
        whole = (self.views, self.height, self.width)
        return any(self.grid(index) != whole for index in range(self.num_embodiments))


@dataclass(frozen=True)
class Conditioning:
    """What the caller decides about each frame: the actions that lead into it, the robot, the randomness."""

    actions_BTkA: Tensor
    """Normalised actions; those of frame t lead from frame t-1 into frame t."""
    keep_BT: Tensor
    """Bool; False puts the learned "no action" in their place: unknown, dropped, or before frame 0."""
    embodiment_B: Tensor
    """Index of the embodiment, int64."""
    noise_BTX: Tensor | None = None
    """Normal noise that selects one joint future of a frame; None means zeros."""
    member_B: Tensor | None = None
    """Which member each row is of, int64, where several share the network; None for the trunk alone."""

    def __getitem__(self, rows: Any) -> "Conditioning":
        """A subset of the batch."""
        noise, member = (None if one is None else one[rows] for one in (self.noise_BTX, self.member_B))
        return Conditioning(
            self.actions_BTkA[rows], self.keep_BT[rows], self.embodiment_B[rows], noise, member
        )

    def frames(self, index: slice) -> "Conditioning":
        """A range of frames of every row."""
        noise = None if self.noise_BTX is None else self.noise_BTX[:, index]
        return replace(
            self,
            actions_BTkA=self.actions_BTkA[:, index],
            keep_BT=self.keep_BT[:, index],
            noise_BTX=noise,
        )

    def without_actions(self) -> "Conditioning":
        """The same frames with every action unknown: the unconditional side of action guidance."""
        return replace(self, keep_BT=torch.zeros_like(self.keep_BT))


@dataclass(frozen=True)
class Streams:
    """Who sees whom along time: one context stream and `targets` target streams of the same frames.

    The time axis is [past cached frames][context T frames][target stream 1: T frames]...[target stream M].
    Cached frames are seen by all. Context frame i sees context <= i. Target frame i sees context < i and
    itself, which is exactly what a frame sees that is denoised against a KV cache of the frames before it.
    Frame i has position past + i in every stream.
    """

    context: int
    targets: int = 0
    past: int = 0
    """Cached frames before the context; the model fills it in."""

    @property
    def num_queries(self) -> int:
        """Frames given to the model, all streams together."""
        return self.context * (1 + self.targets)

    @property
    def num_keys(self) -> int:
        """Frames that can be looked at, cached ones included."""
        return self.past + self.num_queries

    @property
    def all_visible(self) -> bool:
        """Whether no mask is needed: one new frame that sees the cache and itself."""
        return self.num_queries == 1

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether query frame `query` sees key frame `key` (integer tensors that broadcast)."""
        query_stream, query_frame = query // self.context, query % self.context
        key_stream, key_frame = (key - self.past) // self.context, (key - self.past) % self.context
        itself = (key_stream == query_stream) & (key_frame == query_frame)
        earlier_context = (key_stream == 0) & (key_frame < query_frame)
        return (key < self.past) | itself | earlier_context

    @property
    def sizes(self) -> StreamSizes:
        """The same as plain numbers."""
        return StreamSizes(self.context, self.targets, self.past)

    def query_positions(self, device: torch.device) -> Tensor:
        """Time position of each given frame: [num_queries] int64."""
        return torch.arange(self.past, self.past + self.context, device=device).repeat(1 + self.targets)

    def key_positions(self, device: torch.device) -> Tensor:
        """Time position of each key, which for cached frames is the slot: [num_keys] int64."""
        return torch.cat([torch.arange(self.past, device=device), self.query_positions(device)])


@dataclass(frozen=True)
class FrameCausal:
    """`streams` of `tokens` tokens a frame on one axis: a token sees all tokens of the frames it sees."""

    streams: Streams
    tokens: int

    @property
    def num_queries(self) -> int:
        """Tokens given to the model."""
        return self.streams.num_queries * self.tokens

    @property
    def num_keys(self) -> int:
        """Tokens that can be looked at."""
        return self.streams.num_keys * self.tokens

    @property
    def all_visible(self) -> bool:
        """Whether no mask is needed."""
        return self.streams.all_visible

    @property
    def sizes(self) -> StreamSizes:
        """The same as plain numbers."""
        return self.streams.sizes._replace(tokens=self.tokens)

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether query token `query` sees key token `key` (integer tensors that broadcast)."""
        return self.streams.visible(query // self.tokens, key // self.tokens)
