"""Compile every shape that a run will meet before its first step, so that no later step waits for it.

Shapes: B batch, T camera frames, V views, C channels, h w latent, A action dims, S proprio dims.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidworld.data.loader import LoaderConfig
from vidworld.diffusion.objective import bootstrap_rows, resample_rows
from vidworld.model.inputs import Streams
from vidworld.model.sequence import frames_of
from vidworld.tokenizers.base import num_latent_frames
from vidworld.trainer.tasks import Moment, Task, TokenizerTask, WorldTask
from vidworld.types import Batch, Layout

# Rows that learn from half steps, or imagine their history, change between micro-batches, with this period at
# most for usual fractions.
MICRO_BATCHES = 64


@dataclass(frozen=True)
class ClipShape:
    """Clips of one micro-batch."""

    rows: int
    frames: int
    """Camera frames."""


def clip_shapes(configs: Sequence[LoaderConfig], parts: int) -> list[ClipShape]:
    """What micro-batches of these loaders look like when each batch is cut into `parts`."""
    return [ClipShape(config.batch_size // parts, config.clip_frames) for config in configs]


def synthetic_batch(task: WorldTask, shape: ClipShape, device: torch.device) -> Batch:
    """Clips of zeros, of the shapes and types that the loader gives."""
    frame, k = task.net.shape, task.net.shape.actions_per_frame
    latent_frames = num_latent_frames(shape.frames, k)

    def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape.rows, *size, dtype=dtype, device=device)

    return Batch(
        ids=("",) * shape.rows,
        actions_BTA=zeros(shape.frames, frame.action_dims),
        proprio_BTS=zeros(shape.frames, frame.proprio_dims),
        embodiment_B=zeros(dtype=torch.int64),
        latents_BTVChw=zeros(
            *(latent_frames, frame.views, frame.channels, frame.height, frame.width), dtype=torch.float16
        ),
    )


def warm_up(task: WorldTask, shapes: Sequence[ClipShape], device: torch.device, autocast: Any) -> float:
    """Run the task forward and backward once on each shape it can meet; returns seconds.

    Weights, their `.grad`, hooks of wrappers on them and torch's random state are left as they are.
    """
    began = time.perf_counter()
    for shape in shapes:
        batch = synthetic_batch(task, shape, device)
        for moment in moments(task, shape):
            _forward_backward(task, batch, moment, device, autocast)
    return _settled(began, device)


def warm_up_tokenizer(
    task: TokenizerTask, shape: ClipShape, layout: Layout, device: torch.device, autocast: Any
) -> float:
    """The same for a tokenizer, on grey pictures of its robot; returns seconds."""
    began = time.perf_counter()
    size = (shape.rows, shape.frames, len(layout.views), 3, layout.height, layout.width)
    batch = Batch(
        ids=("",) * shape.rows,
        actions_BTA=torch.zeros(*size[:2], 1, device=device),
        proprio_BTS=torch.zeros(*size[:2], 1, device=device),
        embodiment_B=torch.zeros(shape.rows, dtype=torch.int64, device=device),
        video_BTVCHW=torch.full(size, 128, dtype=torch.uint8, device=device),
    )
    _forward_backward(task, batch, Moment(), device, autocast)
    return _settled(began, device)


def _forward_backward(
    task: Task[Any], batch: Batch, moment: Moment, device: torch.device, autocast: Any
) -> None:
    parameters = [parameter for parameter in task.net.parameters() if parameter.requires_grad]
    with autocast():
        loss = task(batch, torch.Generator(device), moment)["loss"]
    torch.autograd.grad(loss, parameters, allow_unused=True)


def _settled(began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter() - began


def prepare_kernels(
    task: WorldTask, shapes: Sequence[ClipShape], device: torch.device, autocast: Any, compiled: bool
) -> str:
    """Check that ranks can share the clips, choose attention, and compile if that is asked for: one line."""
    dtype = torch.float32
    with autocast():
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
    said = []
    for shape in shapes:
        latent_frames = num_latent_frames(shape.frames, task.net.shape.actions_per_frame)
        streams = Streams(latent_frames, targets=task.num_targets)
        if task.net.sequence is not None:
            frames_of(task.net.sequence, streams.num_queries)
        backend, reason = task.net.time_attention(streams, device, dtype)
        said.append(f"attention along {streams.num_queries} frames: {backend} ({reason})")
    if compiled:
        said.append(f"compiled in {warm_up(task, shapes, device, autocast):.0f} s")
    return "; ".join(said)


def moments(task: WorldTask, shape: ClipShape) -> list[Moment]:
    """Moments at which every number of rows occurs that may learn from half steps, or imagine a history."""
    objective, rows = task.objective, shape.rows
    latent_frames = num_latent_frames(shape.frames, task.net.shape.actions_per_frame)
    found: dict[tuple[int, int], Moment] = {}
    for progress in sorted({0.0, objective.bootstrap_start, objective.resample_start, 1.0}):
        for micro in range(MICRO_BATCHES):
            bootstrap = bootstrap_rows(objective, rows, progress, micro)
            imagined = resample_rows(objective, rows, latent_frames, progress, micro)
            found.setdefault((bootstrap, imagined), Moment(progress, micro))
    return list(found.values())
