"""Ranges of tensors: how a sharded run says what each rank holds, gathers the whole, and cuts it anew.

A piece is a contiguous range of a named tensor, flattened in row-major order. DeepSpeed's flat partitions and
FSDP2's rows are both such ranges, so one file format and one gather serve every strategy and number of ranks:

    adamw/net.blocks.0.mlp.down.weight/exp_avg              a whole tensor, in its own shape
    adamw/net.blocks.0.mlp.down.weight/exp_avg@1024:2048    elements 1024 to 2047 of it, one-dimensional
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from vidworld.errors import CheckpointError

BUCKET_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Piece:
    """A flat range of a tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements of the range."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.numel == math.prod(self.shape)


class Held(NamedTuple):
    """A piece and this rank's elements of it, one-dimensional: a view into what is trained."""

    piece: Piece
    values: Tensor


def stored_name(name: str, piece: Piece) -> str:
    """Name in a file of what belongs to a piece."""
    return name if piece.is_whole else f"{name}@{piece.start}:{piece.stop}"


class Gathering:
    """Puts the pieces of all ranks together on the first one. Making it and calling it are collective."""

    def __init__(self, held: Sequence[Held], rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        mine = [piece for piece, _ in held]
        tables: list[list[Piece]] = [mine]
        if world_size > 1:
            tables = [[] for _ in range(world_size)]
            torch.distributed.all_gather_object(tables, mine)
        self._buckets = _buckets(tables)

    def __call__(self, held: Sequence[Held]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the first rank; nothing on the others."""
        values = dict(held)
        whole: dict[str, Tensor] = {}
        for bucket in self._buckets:
            length = max(sum(piece.numel for piece in pieces) for pieces in bucket)
            mine = [values[piece].detach().reshape(-1) for piece in bucket[self.rank]]
            like = held[0].values if held else torch.empty(0)
            filled = sum(map(len, mine))
            mine.append(like.new_zeros(length - filled))
            for pieces, buffer in zip(bucket, self._to_first(torch.cat(mine)), strict=False):
                offset = 0
                for piece in pieces:
                    if piece.name not in whole:
                        whole[piece.name] = torch.empty(piece.shape, dtype=buffer.dtype)
                    flat = whole[piece.name].view(-1)
                    flat[piece.start : piece.stop] = buffer[offset : offset + piece.numel]
                    offset += piece.numel
        return whole

    def _to_first(self, buffer: Tensor) -> list[Tensor]:
        """Every rank's buffer on the CPU of the first rank; an empty list on the others."""
        if self.world_size == 1:
            return [buffer.cpu()]
        received = [torch.empty_like(buffer) for _ in range(self.world_size)] if self.rank == 0 else None
        torch.distributed.gather(buffer, received)
        return [one.cpu() for one in received or ()]


def _buckets(tables: Sequence[Sequence[Piece]]) -> list[list[list[Piece]]]:
    """bucket -> rank -> pieces: the same tensors in a bucket on every rank, about as much in each."""
    by_name = [{piece.name: piece for piece in table} for table in tables]
    shapes = {piece.name: piece.shape for table in tables for piece in table}
    buckets: list[list[list[Piece]]] = []
    filled = BUCKET_ELEMENTS
    for name in sorted(shapes):
        numel = math.prod(shapes[name])
        if filled + numel > BUCKET_ELEMENTS:
            buckets.append([[] for _ in tables])
            filled = 0
        for rank, pieces in enumerate(by_name):
            if name in pieces:
                buckets[-1][rank].append(pieces[name])
        filled += numel
    return buckets


class StoredPieces:
    """Tensors that lie in safetensors files, whole or in pieces; any range of them can be read."""

    def __init__(self, paths: Sequence[Path], where: object) -> None:
        self.where = where
        self._parts: dict[str, list[tuple[int, int, int, str]]] = defaultdict(list)
        self._files: list[Any] = []
        for index, path in enumerate(paths):
            file = safe_open(path, "pt")
            self._files.append(file)
            for key in file.keys():  # noqa: SIM118 - no mapping
                name, _, span = key.rpartition("@")
                if name:
                    start, stop = map(int, span.split(":"))
                else:
                    name, start = key, 0
                    stop = math.prod(file.get_slice(key).get_shape())
                self._parts[name].append((start, stop, index, key))
        self._under: dict[str, list[str]] = defaultdict(list)
        for name, parts in self._parts.items():
            parts.sort()
            folder, slash, last = name.rpartition("/")
            self._under[folder + slash].append(last)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._parts)

    def under(self, prefix: str) -> list[str]:
        """What follows a prefix in the names that have it."""
        return self._under.get(prefix, [])

    def is_scalar(self, name: str) -> bool:
        """Whether a tensor has no dimensions, and so no pieces."""
        index, key = self._parts[name][0][2:]
        return key == name and not self._files[index].get_slice(key).get_shape()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are stored whole."""
        return {
            name: tuple(self._files[parts[0][2]].get_slice(name).get_shape())
            for name, parts in self._parts.items()
            if parts[0][3] == name
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start to stop - 1 of a tensor, flattened.

        Raises CheckpointError when some of them are in no file.
        """
        found, reached = [], start
        for first, last, index, key in self._parts.get(name, ()):
            if first <= reached < min(last, stop):
                found.append(self._slice(index, key, reached - first, min(last, stop) - first))
                reached = min(last, stop)
        if reached < stop:
            raise CheckpointError(
                f"{name} is not all there",
                where=self.where,
                got=f"elements up to {reached}",
                expected=f"elements {start} to {stop}",
                fix="resume with the model and the optimizer that saved it",
            )
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def whole(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor in a shape."""
        return self.read(name, 0, math.prod(shape)).reshape(tuple(shape))

    def _slice(self, index: int, key: str, start: int, stop: int) -> Tensor:
        """A flat range of one stored tensor, reading no more than the rows it lies in."""
        stored = self._files[index].get_slice(key)
        shape = stored.get_shape()
        if not shape:
            return self._files[index].get_tensor(key).reshape(1)
        row = max(1, math.prod(shape[1:]))
        first = start // row
        rows = stored[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]


def pieces_of_flat(
    names: Mapping[int, str], parameters: Sequence[Tensor], offsets: Sequence[int], start: int, stop: int
) -> list[tuple[Piece, slice]]:
    """The pieces in elements start to stop - 1 of a flat buffer, and where each lies from `start` on.

    parameters begin at `offsets` in the buffer; names are by their id.
    """
    found = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        numel = parameter.numel()
        first, last = max(start, offset), min(stop, offset + numel)
        if first < last:
            piece = Piece(names[id(parameter)], tuple(parameter.shape), first - offset, last - offset)
            found.append((piece, slice(first - start, last - start)))
    return found
