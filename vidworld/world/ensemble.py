"""Several worlds that were trained apart, as one: where they disagree, they do not know.

Shapes: B rows of all members, J members, T frames.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vidworld.config import to_mapping
from vidworld.errors import CheckpointError, ConfigError
from vidworld.model.cache import KeyValue, KVCache
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning
from vidworld.types import Frames
from vidworld.world.dynamics import imagine, take_in
from vidworld.world.noise import MAX_MEMBERS, NoiseStream
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.state import WorldState
from vidworld.world.uncertainty import Rows
from vidworld.world.world import WorldModel

MAY_DIFFER = ("sampler", "dataset_digest")
"""Parts of a spec in which members may differ: the first one's sampler holds, and data may be drawn anew."""


class Ensemble(WorldModel):
    """J worlds of one robot, tokenizer and architecture that were trained with seeds of their own.

    It is a world: reset, step, roll out and fork it. `reset` begins `num_samples` futures of each member,
    and every row stays with its member (`state.member_B`). The rows of member 0 are the futures that the
    first world alone would imagine; further members have streams of noise of their own, so that A and E of
    `Observation.uncertainty` are unbiased.

    Deep ensembles (Lakshminarayanan et al. 2017): members that saw the same data share its blind spots, so a
    small E is no guarantee.

        ensemble = vidworld.load(["runs/seed0", "runs/seed1", "runs/seed2", "runs/seed3"])
        state = ensemble.reset(prompt, num_samples=8)          # 32 rows: 4 members of 8
        state, seen = ensemble.step(state, action)
        seen.uncertainty.proprio.epistemic_SX
    """

    def __init__(self, members: Sequence[WorldModel], names: Sequence[object] | None = None) -> None:
        """Raises ConfigError or CheckpointError naming the member that does not fit the first."""
        if not 2 <= len(members) <= MAX_MEMBERS:
            raise ConfigError("members of an ensemble", got=len(members), expected=f"2 to {MAX_MEMBERS}")
        names = [f"member {index}" for index in range(len(members))] if names is None else names
        first = members[0]
        for name, other in zip(names[1:], members[1:], strict=True):
            require_alike(first, other, name)
        super().__init__(first.spec, first.model, first.normalizer, first.tokenizer, autocast=first.autocast)
        self.models = torch.nn.ModuleList(member.model for member in members)
        # Made of one member's spread and error, so its radii are wide enough for the mean of all.
        self.calibration = first.calibration
        self.calibrations = [member.calibration for member in members]
        self._noise_scales = [member.spec.sampler.noise_scale for member in members]

    @property
    def members(self) -> list[WorldModel]:
        """Each member as a world of its own; weights are shared."""
        found = []
        for index, (model, calibration) in enumerate(zip(self.networks, self.calibrations, strict=True)):
            spec = dataclasses.replace(self.spec, sampler=self.sampler_of(index, self.spec.sampler))
            member = WorldModel(spec, model, self.normalizer, self.tokenizer, autocast=self.autocast)
            member.calibration = calibration
            found.append(member.train(self.training))
        return found

    @property
    def networks(self) -> list[CausalDiT]:
        """The members' networks."""
        return [model for model in self.models if isinstance(model, CausalDiT)]

    @property
    def num_members(self) -> int:
        """Worlds that imagine side by side."""
        return len(self.models)

    @property
    def digest(self) -> str:
        """Of what fixes the meaning of a state."""
        return f"{self.spec.digest}x{self.num_members}"

    def sampler_of(self, member: int, sampler: SamplerConfig) -> SamplerConfig:
        """A sampler with the noise scale that a member was calibrated with, unless it has none at all."""
        if sampler.noise_scale is None:
            return sampler
        return dataclasses.replace(sampler, noise_scale=self._noise_scales[member])

    def _next_frame(
        self,
        state: WorldState,
        conditioning: Conditioning,
        stream: NoiseStream,
        sampler: SamplerConfig,
        noise_BX: Tensor | None,
    ) -> tuple[Frames, KVCache]:
        def one(member: int, index_B: Tensor) -> tuple[Frames, KVCache]:
            own = NoiseStream(stream.seed, stream.sample_ids_B[index_B], stream.dtype)
            cache = state.cache.fork(index_B)
            return imagine(
                self.networks[member],
                cache,
                conditioning[index_B],
                state.frame,
                own,
                self.sampler_of(member, sampler),
                state.lead + 1,
                None if noise_BX is None else noise_BX[index_B],
            )

        return self._by_member(state.rows, one)

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
        def one(member: int, index_B: Tensor) -> tuple[Frames, KVCache]:
            return take_in(
                self.networks[member],
                None if cache is None else cache.fork(index_B),
                known[index_B],
                None if has_proprio_B is None else has_proprio_B[index_B],
                conditioning[index_B],
                first_frame,
                NoiseStream(stream.seed, stream.sample_ids_B[index_B], stream.dtype),
                sampler,
            )

        return self._by_member(rows, one)

    def _by_member(
        self, rows: Rows, function: Callable[[int, Tensor], tuple[Frames, KVCache]]
    ) -> tuple[Frames, KVCache]:
        """What each member makes of its rows, in the order of the rows."""
        indices = member_rows(rows.member_B)
        found = [function(member, index_B) for member, index_B in indices]
        return join_rows(found, [index_B for _, index_B in indices])


def member_rows(member_B: Tensor) -> list[tuple[int, Tensor]]:
    """The members that have rows, and which."""
    rows: dict[int, list[int]] = {}
    for row, member in enumerate(member_B.tolist()):
        rows.setdefault(member, []).append(row)
    return [(member, torch.tensor(rows[member], device=member_B.device)) for member in sorted(rows)]


def join_rows(parts: Sequence[tuple[Frames, KVCache]], indices: Sequence[Tensor]) -> tuple[Frames, KVCache]:
    """Frames and caches of the rows at `indices`, put back in the order of all rows."""
    if len(parts) == 1:
        return parts[0]
    place_B = torch.argsort(torch.cat(list(indices)))
    frames = Frames.cat([one for one, _ in parts], 0)[place_B]
    layers = zip(*(cache.layers for _, cache in parts), strict=True)
    joined = [
        KeyValue(*(torch.cat(tensors, 0).index_select(0, place_B) for tensors in zip(*of_layer, strict=True)))
        for of_layer in layers
    ]
    newest = [cache.newest for _, cache in parts if cache.newest is not None]
    return frames, KVCache(tuple(joined), Frames.cat(newest, 0)[place_B] if newest else None)


def require_alike(first: WorldModel, other: WorldModel, name: object) -> None:
    """Refuse a world that cannot be a member beside `first`, with CheckpointError that says in what."""
    if first.tokenizer.digest != other.tokenizer.digest:
        raise CheckpointError(
            "tokenizer of a member",
            where=name,
            got=other.tokenizer.digest,
            expected=f"{first.tokenizer.digest}, as of the first",
            fix="train all members on one tokenizer, with `seed` alone changed",
        )
    contracts = {contract.embodiment: contract for contract in other.spec.contracts}
    for contract in first.spec.contracts:
        if contract.embodiment in contracts:
            contract.require_equal(contracts[contract.embodiment], where=name)
    for path, own, its in differences(first.spec, other.spec):
        raise CheckpointError(
            f"`{path}` of a member",
            where=name,
            got=its,
            expected=f"{own}, as of the first",
            fix="train all members from one YAML, with `seed` alone changed",
        )


def differences(first: WorldSpec, other: WorldSpec) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names and both values of what differs in two specs and may not."""

    def walk(path: str, own: Any, its: Any) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(own, dict) and isinstance(its, dict):
            for key in own | its:
                yield from walk(f"{path}.{key}" if path else key, own.get(key), its.get(key))
        elif own != its:
            yield path, own, its

    plain = [{k: v for k, v in to_mapping(spec).items() if k not in MAY_DIFFER} for spec in (first, other)]
    yield from walk("", *plain)
