"""The state of imagined worlds as an immutable value, and what a step lets you see of it.

Shapes: B samples, V views, H W pixels, S proprio dims, k camera frames a step.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidworld.errors import CheckpointError, DataError
from vidworld.model.cache import KeyValue, KVCache
from vidworld.types import Frames
from vidworld.world import noise
from vidworld.world.coding import Coding
from vidworld.world.uncertainty import Rows, Uncertainty

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class WorldState:
    """Everything that the future of B samples depends on, but for their actions and the weights.

    Nothing is ever changed in place: an old state stays valid, and stepping it again with the same actions
    repeats the same future.
    """

    cache: KVCache
    """Keys and values of the context frames."""
    newest: Frames
    """Normalised latents [B, 1, V, C, h, w] and proprioception [B, 1, S] of the newest frame."""
    frame: int
    """Latent frames known so far: the index of the next one in the noise streams."""
    seed: int
    sample_ids_B: Tensor
    """Int64; with the seed they name each sample's stream of noise."""
    embodiment_B: Tensor
    """Int64 index into the world's contracts."""
    scene_B: Tensor
    """Int64: the prompt, counted from 0, that each row began from. Rows of one scene are futures of it."""
    member_B: Tensor
    """Int64: the member of an `Ensemble` that imagines each row; all 0 for one world."""
    world: str
    """`WorldModel.digest` of the world that made it; another world refuses it."""
    coding: Coding | None = None
    """Where the tokenizer stands; None for one of single frames, which remembers nothing."""
    lead: int = 0
    """Latent frames imagined since the last known one."""

    def __len__(self) -> int:
        return len(self.sample_ids_B)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.sample_ids_B.device

    @property
    def rows(self) -> Rows:
        """Which rows are futures of one scene, and whose."""
        return Rows(self.scene_B, self.member_B)

    def select(self, index: Tensor | slice | list[int]) -> "WorldState":
        """Rows in a new order; each keeps its stream of noise, so a row given twice has one future twice."""
        index_B = self._rows(index)
        return dataclasses.replace(
            self,
            cache=self.cache.fork(index_B),
            newest=self.newest[index_B],
            sample_ids_B=self.sample_ids_B[index_B],
            embodiment_B=self.embodiment_B[index_B],
            scene_B=self.scene_B[index_B],
            member_B=self.member_B[index_B],
            coding=None if self.coding is None else self.coding.select(index_B),
        )

    def branch(self, index: Tensor | slice | list[int]) -> "WorldState":
        """Rows in a new order, each with a future of its own.

        The first copy of a row keeps its stream, and with it the future that the row would have had; further
        copies get streams that depend on the row and the number of the copy alone.
        """
        rows = self._rows(index).tolist()
        seen: dict[int, int] = {}
        copies = []
        for row in rows:
            copies.append(seen.get(row, 0))
            seen[row] = copies[-1] + 1
        chosen = self.select(rows)
        copy_B = torch.tensor(copies, dtype=torch.int64, device=self.device)
        ids_B = noise.fork_ids(self.seed, chosen.sample_ids_B, self.frame, copy_B)
        return dataclasses.replace(chosen, sample_ids_B=ids_B)

    def fork(self, n: int) -> "WorldState":
        """n futures of every sample, side by side: rows b * n to b * n + n - 1 of [B * n] come from b."""
        return self.branch(torch.arange(len(self)).repeat_interleave(n))

    def to(self, device: torch.device | str) -> "WorldState":
        """Move to a device."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> "WorldState":
        """Cut the gradient here: truncated backpropagation through time."""
        return self._map(Tensor.detach)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file atomically, with the counters as JSON in its header."""
        path = Path(path)
        header = {
            "schema_version": SCHEMA_VERSION,
            "frame": self.frame,
            "lead": self.lead,
            "seed": self.seed,
            "world": self.world,
            "layers": len(self.cache.layers),
            "coding": None if self.coding is None else self.coding.header(),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        # Copies, because safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors().items()
        }
        save_file(tensors, temporary, metadata={"vidworld_state": json.dumps(header)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path | str, *, device: torch.device | str = "cpu") -> "WorldState":
        """Read what `save` wrote; raises CheckpointError when it is missing or damaged."""
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = json.loads((file.metadata() or {}).get("vidworld_state", "null"))
                if not isinstance(header, dict) or header.get("schema_version") != SCHEMA_VERSION:
                    raise CheckpointError(
                        "not a saved world state of this version",
                        where=path,
                        got=None if header is None else header.get("schema_version"),
                        expected=SCHEMA_VERSION,
                    )
                tensor = file.get_tensor
                ids_B = tensor("sample_ids")
                # Files from before there were members hold one world's rows, of scenes that nobody noted.
                known = set(file.keys())
                scene_B, member_B = (
                    tensor(name) if name in known else torch.zeros_like(ids_B) for name in ("scene", "member")
                )
                layers = tuple(
                    KeyValue(tensor(f"cache.{i}.key"), tensor(f"cache.{i}.value"))
                    for i in range(header["layers"])
                )
                newest = None
                if "cache.newest.latents" in known:  # of worlds that read the previous frame
                    newest = Frames(tensor("cache.newest.latents"), tensor("cache.newest.proprio"))
                return cls(
                    cache=KVCache(layers, newest),
                    newest=Frames(tensor("newest.latents"), tensor("newest.proprio")),
                    frame=header["frame"],
                    seed=header["seed"],
                    sample_ids_B=ids_B,
                    embodiment_B=tensor("embodiment"),
                    scene_B=scene_B,
                    member_B=member_B,
                    world=header["world"],
                    coding=Coding.restore(coding, tensor) if (coding := header.get("coding")) else None,
                    lead=header.get("lead", 0),
                )
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError("cannot read the world state", where=path, got=str(error)) from None

    def _tensors(self) -> dict[str, Tensor]:
        cached = {
            f"cache.{i}.{name}": tensor
            for i, layer in enumerate(self.cache.layers)
            for name, tensor in (("key", layer.key), ("value", layer.value))
        }
        if (newest := self.cache.newest) is not None:
            cached["cache.newest.latents"] = newest.latents_BTVChw
            cached["cache.newest.proprio"] = newest.proprio_BTS
        return (
            cached
            | {
                "newest.latents": self.newest.latents_BTVChw,
                "newest.proprio": self.newest.proprio_BTS,
                "sample_ids": self.sample_ids_B,
                "embodiment": self.embodiment_B,
                "scene": self.scene_B,
                "member": self.member_B,
            }
            | ({} if self.coding is None else self.coding.tensors())
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> "WorldState":
        return dataclasses.replace(
            self,
            cache=self.cache.map(function),
            newest=self.newest.map(function),
            sample_ids_B=function(self.sample_ids_B),
            embodiment_B=function(self.embodiment_B),
            scene_B=function(self.scene_B),
            member_B=function(self.member_B),
            coding=None if self.coding is None else self.coding.map(function),
        )

    def _rows(self, index: Tensor | slice | list[int]) -> Tensor:
        if isinstance(index, slice):
            return torch.arange(len(self), device=self.device)[index]
        index_B = torch.as_tensor(index, dtype=torch.int64, device=self.device).reshape(-1)
        if len(index_B) and not (-len(self) <= int(index_B.min()) and int(index_B.max()) < len(self)):
            raise DataError("row of the state", got=index_B.tolist(), expected=f"below {len(self)}")
        return index_B % max(len(self), 1)


@dataclass(frozen=True)
class Observation:
    """What a step shows: the newest frame of every sample."""

    latents_BVChw: Tensor
    """Normalised latents; `WorldModel.decode` turns them into pixels that carry gradients."""
    proprio_BS: Tensor
    """In the contract's units, padded with zeros to the widest embodiment; carries gradients."""
    video_BVHWC: Tensor | None
    """Uint8 RGB, or None when decoding was not asked for."""
    rows: Rows
    """Which rows are futures of one scene, and whose."""
    clip_BkVHWC: Tensor | None = None
    """All k camera frames of the step, of which `video_BVHWC` is the last; None like it."""

    @property
    def uncertainty(self) -> Uncertainty:
        """How sure the world is of this frame, from the spread over its samples and members."""
        return Uncertainty(self.rows, self.latents_BVChw, self.proprio_BS, self.video_BVHWC)


@dataclass(frozen=True)
class Rollout:
    """What a rollout shows: the imagined frames, without the prompt's."""

    latents_BTVChw: Tensor
    proprio_BTS: Tensor
    """In the contract's units; one row a latent frame."""
    video_BTVHWC: Tensor | None
    """Uint8 RGB, k camera frames a latent frame; None when decoding was not asked for."""
    state: WorldState
    """After the last frame; stepping on continues the same future."""

    @property
    def uncertainty(self) -> Uncertainty:
        """How sure the world is of these frames; every part has their time axis behind that of scenes."""
        return Uncertainty(self.state.rows, self.latents_BTVChw, self.proprio_BTS, self.video_BTVHWC)
