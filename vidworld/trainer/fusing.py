"""Train with the fused kernels where that is known to pay, after a check against the plain code."""

import contextlib
import copy
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from vidworld.errors import ConfigError
from vidworld.model.compile import compile_blocks, fuse
from vidworld.trainer.engine import EngineConfig, uses_compile
from vidworld.trainer.tasks import Moment, WorldTask
from vidworld.trainer.warm_up import ClipShape, moments, synthetic_batch
from vidworld.types import Batch

Autocast = Callable[[], contextlib.AbstractContextManager[object]]

# A gradient may be this many times as far from float32's as the plain code's is, or as LEAST_DEVIATION.
MARGIN, LEAST_DEVIATION = 3.0, 0.01


def choose_fused(
    task: WorldTask,
    config: EngineConfig,
    shape: ClipShape,
    device: torch.device,
    autocast: Autocast,
    *,
    world_size: int,
) -> str | None:
    """Let the task's blocks run the fused kernels from now on, if that is wanted and works: a line about it.

    Gives None where there is nothing to say: no GPU, and nothing asked for. With `auto` a reason against them
    leaves the plain code; raises ConfigError when they are `on` and cannot run, or are wrong here.
    """
    if config.fused == "off":
        return "fused kernels: off (as configured)" if device.type == "cuda" else None
    require_fusable(config, device)
    fault = reason_against(device)
    if fault is None and config.fused == "auto":
        fault = reason_to_wait(config, world_size)
        if fault is not None:
            return f"fused kernels: off ({fault})"
    if fault is None:
        fault = check_fused(task, shape, device, autocast, compiled=uses_compile(config))
        torch.cuda.empty_cache()  # the check's memory is cut otherwise than training's
        if fault is None:
            fuse(task.net)
            return "fused kernels: on (gradients of some blocks checked against the plain code)"
        fault = f"they failed their check on this machine: {fault}"
    if config.fused == "on":
        raise _refusal(fault)
    if device.type != "cuda":
        return None
    return f"WARNING: fused kernels are off, the plain code trains instead, more slowly; {fault}"


def require_fusable(config: EngineConfig, device: torch.device) -> None:
    """Raises ConfigError when the kernels are `on` and cannot run on `device`: before any long work."""
    if config.fused == "on" and (fault := reason_against(device)) is not None:
        raise _refusal(fault)


def _refusal(fault: str) -> ConfigError:
    return ConfigError("engine.fused", got="on", expected="auto or off here", fix=fault)


def reason_against(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, if so."""
    if device.type != "cuda":
        return f"they are for CUDA, this is {device.type}"
    return "they need Triton, which is not installed" if find_spec("triton") is None else None


def reason_to_wait(config: EngineConfig, world_size: int) -> str | None:
    """Why `auto` leaves them off though they can run: where their gain has not been measured."""
    if world_size > 1:
        return "measured on one GPU only so far; engine.fused: on turns them on"
    if config.strategy != "ddp" or config.sequence_parallel > 1:
        return "for strategy ddp, and whole clips on each GPU"
    if not uses_compile(config):
        return "for compiled blocks"
    return None


def check_fused(
    task: WorldTask, shape: ClipShape, device: torch.device, autocast: Autocast, *, compiled: bool
) -> str | None:
    """Differentiate some copied blocks in float32, plainly and fused: None, or what is wrong with the last.

    The blocks see clips of `shape`, as in training, and are compiled if `compiled`, so that what is checked
    are the graphs that train; those of half steps and imagined histories must be made, too. Weights that are
    zero, as all gates are at first, are drawn instead.
    """
    try:
        probe = _probe(task)
        batch = synthetic_batch(task, shape, device)
        first, *others = moments(task, shape)
        probe.net.checkpoint_blocks = True  # an eager pass in float32 keeps far more than training does
        exact = _gradients(probe, batch, first, device, contextlib.nullcontext)
        plain = _gradients(probe, batch, first, device, autocast)
        probe.net.checkpoint_blocks = task.net.checkpoint_blocks
        fuse(probe.net)
        if compiled:
            compile_blocks(probe.net)
        fused = _gradients(probe, batch, first, device, autocast)
        for moment in others:
            _gradients(probe, batch, moment, device, autocast)
    except Exception as error:  # a compiler raises whatever it likes
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return disagreement(fused, plain, exact)


def disagreement(
    fused: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> str | None:
    """The gradient that is further off than rounding explains, if one is; deviations are relative norms."""
    if fused.keys() != exact.keys():
        return f"no gradient of {', '.join(sorted(exact.keys() ^ fused.keys()))}"
    for name, want in exact.items():
        off, usual = (float((got[name] - want).norm() / want.norm()) for got in (fused, plain))
        if want.any() and not off <= MARGIN * max(usual, LEAST_DEVIATION):
            return f"the gradient of {name} is off by {off:.2g}, the plain code's by {usual:.2g}"
    return None


def _probe(task: WorldTask) -> WorldTask:
    """A copy with two blocks and one that attends over time, and no weight that is zero everywhere."""
    blocks = task.net.blocks
    timed = next((i for i, block in enumerate(blocks) if i and block.time is not None), len(blocks) - 1)
    task.net.blocks = nn.ModuleList(blocks[i] for i in sorted({0, min(1, timed), timed}))
    try:
        probe = copy.deepcopy(task)
    finally:
        task.net.blocks = blocks
    device = next(probe.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in probe.net.named_parameters():
            if "modulation" in name or not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    return probe


def _gradients(
    probe: WorldTask, batch: Batch, moment: Moment, device: torch.device, autocast: Autocast
) -> dict[str, Tensor]:
    named = [(name, p) for name, p in probe.net.named_parameters() if p.requires_grad]
    generator = torch.Generator(device).manual_seed(0)
    with autocast():
        loss = probe(batch, generator, moment)["loss"]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: grad for (name, _), grad in zip(named, found, strict=True) if grad is not None}
