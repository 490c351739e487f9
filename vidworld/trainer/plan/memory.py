"""Memory of training, part by part: what is kept for the backward pass is traced, not guessed.

The model's own code runs on tensors without data (torch's fake tensors), and every tensor that autograd keeps
is counted once by its storage. For compiled blocks the joint graph is cut as torch.compile cuts it (min-cut
rematerialisation), and what the forward graph hands to the backward graph is counted.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vidworld.model.config import DiTConfig
from vidworld.model.dit import Axis, CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.model.rope import Rotation
from vidworld.types import Frames, SignalLevel

GIB = 2**30
# Two rows: with one, torch treats the batch axis as a constant.
TRACED_ROWS = 2
# bfloat16, as training computes on a GPU.
HALF = torch.bfloat16


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass."""

    per_row: float
    """For each clip of a micro-batch."""
    weight_copies: int
    """Casts of weights, whatever the batch."""


@dataclass(frozen=True)
class Activations:
    """What one forward pass keeps, by part."""

    space_block: Kept
    """A block without time attention."""
    time_block: Kept
    """A block with it."""
    input_block: float
    """Bytes a row of a block's input, all that checkpointing keeps."""
    outside: Kept
    """Embeddings, heads and conditions."""
    num_space: int
    num_time: int

    def per_row(self, *, checkpointed: bool) -> float:
        """Bytes a clip of a whole forward pass."""
        if checkpointed:
            blocks = (self.num_space + self.num_time) * self.input_block
        else:
            blocks = self.num_space * self.space_block.per_row + self.num_time * self.time_block.per_row
        return blocks + self.outside.per_row

    @property
    def weight_copies(self) -> int:
        """Bytes of the weights' casts, kept by all blocks."""
        return (
            self.num_space * self.space_block.weight_copies
            + self.num_time * self.time_block.weight_copies
            + self.outside.weight_copies
        )

    @property
    def largest_block(self) -> float:
        """Bytes a row of the block that keeps most."""
        return max(self.space_block.per_row, self.time_block.per_row if self.num_time else 0.0)


@functools.lru_cache(maxsize=32)
def trace_activations(
    config: DiTConfig, shape: FrameShape, streams: Streams, *, bf16: bool = True, compiled: bool = True
) -> Activations:
    """Count what a training pass over clips of `streams` keeps, eager or with compiled blocks."""
    num_time = sum(map(config.attends_time, range(config.depth)))
    with _without_data(), torch.autocast("cpu", HALF, enabled=bf16):
        model = CausalDiT(config, shape)
        whole = _kept_by(lambda: _forward(model, streams), list(model.parameters()))
        last = config.time_every - 1
        eager = {index: _block(model, streams, index, compiled=False) for index in {0, last}}
        chosen = {index: _block(model, streams, index, compiled=True) for index in {0, last} if compiled}
        tokens = streams.num_queries * model.tokens_per_frame
    blocks = chosen or eager
    num_space = config.depth - num_time
    outside = Kept(
        max(0.0, whole.per_row - num_space * eager[0].per_row - num_time * eager[last].per_row),
        max(
            0, whole.weight_copies - num_space * eager[0].weight_copies - num_time * eager[last].weight_copies
        ),
    )
    wide = 2 if bf16 and config.residual == "autocast" else 4
    return Activations(
        blocks[0], blocks[last], float(tokens * config.width * wide), outside, num_space, num_time
    )


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _forward(model: CausalDiT, streams: Streams) -> Tensor:
    """A training pass over fake clips."""
    shape, frames = model.shape, streams.num_queries
    size = (TRACED_ROWS, frames)
    noise_dims = model.config.noise_dims
    conditioning = Conditioning(
        torch.zeros(*size, shape.actions_per_frame, shape.action_dims),
        torch.ones(size, dtype=torch.bool),
        torch.zeros(TRACED_ROWS, dtype=torch.int64),
        torch.zeros(*size, noise_dims) if noise_dims else None,
    )
    latents = torch.zeros(*size, shape.views, shape.channels, shape.height, shape.width)
    level = SignalLevel.from_signal(torch.ones(size))
    predicted, _ = model(
        Frames(latents, torch.zeros(*size, shape.proprio_dims)),
        level,
        torch.ones(size),
        conditioning,
        streams=streams,
    )
    return predicted.latents_BTVChw.sum() + predicted.proprio_BTS.sum()


def _block(model: CausalDiT, streams: Streams, index: int, *, compiled: bool) -> Kept:
    block, width = model.blocks[index], model.config.width
    size = (TRACED_ROWS, streams.num_queries)
    x_BTND = torch.zeros(*size, model.tokens_per_frame, width)
    if model.config.residual == "autocast" and torch.is_autocast_enabled("cpu"):
        x_BTND = x_BTND.to(HALF)
    x_BTND.requires_grad_()
    condition_BTD = torch.zeros(*size, width, requires_grad=True)
    space, time = model._axes(streams, x_BTND, torch.zeros(TRACED_ROWS, dtype=torch.int64))
    shared = [condition_BTD, *_tensors(space), *_tensors(time)]
    if not compiled:
        return _kept_by(lambda: block(x_BTND, condition_BTD, space, time), list(block.parameters()), shared)
    return _kept_compiled(block, x_BTND, condition_BTD, space, time)


def _kept_by(run: Callable[[], Any], weights: Sequence[Tensor], shared: Sequence[Tensor] = ()) -> Kept:
    """What autograd keeps while `run` runs, each storage once, without weights and what all blocks share."""
    known = {tensor.untyped_storage()._cdata for tensor in (*weights, *shared)}
    shapes = {tuple(sorted(weight.shape)) for weight in weights if weight.ndim > 1}
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, (tensor, tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return _sorted_out([tensor for key, (tensor, _) in kept.items() if key not in known], shapes)


def _sorted_out(tensors: Sequence[Tensor], weight_shapes: set[tuple[int, ...]]) -> Kept:
    """Casts of weights apart from everything that grows with the batch."""
    rows = copies = 0
    for tensor in tensors:
        size = tensor.untyped_storage().nbytes()
        if tuple(sorted(tensor.shape)) in weight_shapes:
            copies += size
        else:
            rows += size
    return Kept(rows / TRACED_ROWS, copies)


def _kept_compiled(block: nn.Module, x_BTND: Tensor, condition_BTD: Tensor, space: Axis, time: Axis) -> Kept:
    """What the forward graph of a compiled block hands to its backward graph."""
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    names, weights = zip(*block.named_parameters(), strict=True)
    axes = (_tensors(space), _tensors(time))
    saved: list[Tensor] = []

    def forward(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        outputs: Any = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        for node in outputs[1:]:
            value = node.meta.get("val") if node is not None else None
            # The input of the block is kept too; weights, conditions and angles are nobody's own.
            is_input = node is not None and node.op == "placeholder"
            if isinstance(value, Tensor) and (not is_input or value.shape == x_BTND.shape):
                saved.append(value)
        return make_boxed_func(gm)

    def run(weights: Sequence[Tensor], axes: Any, x_BTND: Tensor, condition_BTD: Tensor) -> Tensor:
        of_space, of_time = (_axis(tensors, axis) for tensors, axis in zip(axes, (space, time), strict=True))
        output: Any = torch.func.functional_call(
            block, dict(zip(names, weights, strict=True)), (x_BTND, condition_BTD, of_space, of_time)
        )
        return output[0]

    compiled = aot_function(
        run,
        fw_compiler=forward,
        bw_compiler=lambda gm, example_inputs: make_boxed_func(gm),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    compiled(list(weights), axes, x_BTND, condition_BTD)
    once = {tensor.untyped_storage()._cdata: tensor for tensor in saved}
    shapes = {tuple(sorted(weight.shape)) for weight in weights if weight.ndim > 1}
    return _sorted_out(list(once.values()), shapes)


def _tensors(axis: Axis) -> list[Tensor]:
    mask = [axis.mask] if isinstance(axis.mask, Tensor) else []
    return [*axis.query, *axis.key, *mask]


def _axis(tensors: Sequence[Tensor], like: Axis) -> Axis:
    mask = tensors[4] if isinstance(like.mask, Tensor) else like.mask
    return Axis(Rotation(*tensors[:2]), Rotation(*tensors[2:4]), mask, like.backend)
