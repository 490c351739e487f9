"""One optimizer step, the same to the loop whether alone, under DDP or under DeepSpeed ZeRO."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from vidworld.errors import CheckpointError, ConfigError, VidworldError, require
from vidworld.trainer.optim import OptimConfig, build_optimizers, set_rates
from vidworld.trainer.pieces import Held, Piece, StoredPieces, stored_name

# Ranks wait this long for the first one, which encodes, validates and draws samples.
PATIENCE = timedelta(hours=2)

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class EngineConfig:
    """How the work is spread and in which arithmetic."""

    strategy: Strategy = "ddp"
    """`ddp` on any number of processes; DeepSpeed's `zero1` shards the optimizer, `zero2` gradients too and
    `zero3` weights too; torch's `fsdp2` shards all three."""
    precision: Precision = "auto"
    """`auto`: bfloat16 autocast over float32 weights on a GPU, float32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks: `auto` on a GPU only."""
    fused: Literal["auto", "on", "off"] = "auto"
    """Run the Triton kernels for what surrounds a block's products, under `ddp`: `auto` in compiled blocks on
    one GPU, if their gradients there agree with the plain code's; `on` refuses to start where they cannot."""
    accumulation: int = 1
    """Micro-batches of one optimizer step."""
    checkpoint_activations: bool = False
    """Of each block keep only its input and compute it again in the backward pass: a third more work for a
    fraction of the memory, and the same gradients. `vidworld plan` says when memory needs it."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Under `ddp`, the type in which gradients travel between ranks: `bf16` halves the bytes, and changes the
    gradient by less than 0.6 % of its norm."""
    sequence_parallel: int = 1
    """Ranks that share each clip, every one computing some of its frames: for clips too long for one GPU."""

    def __post_init__(self) -> None:
        for name in ("accumulation", "sequence_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name}", got=getattr(self, name), expected="at least 1")
        if self.fused == "on" and (self.strategy != "ddp" or self.sequence_parallel > 1):
            raise ConfigError(
                f"engine.fused under {self.strategy!r}, sequence_parallel {self.sequence_parallel}",
                got="on",
                expected="auto or off; or strategy ddp and whole clips",
            )
        if self.reduce == "bf16" and self.strategy != "ddp":
            raise ConfigError(
                f"engine.reduce under strategy {self.strategy!r}", got=self.reduce, expected="fp32"
            )


class Engine(Protocol):
    """What the loop needs. `backward` is called once a micro-batch, then `update` once."""

    device: torch.device
    rank: int
    world_size: int
    num_optimizer_shards: int
    """Ranks that hold a part of the optimizer's state."""
    shards_weights: bool
    """Whether weights are cut across ranks, too; the task's own parameters are then no whole tensors."""

    def backward(self, inputs: tuple[Any, ...], share: float | Tensor, *, last: bool) -> dict[str, Tensor]:
        """Run the task on one micro-batch's inputs and accumulate `share` of its gradient.

        The share is its part of the step's loss, times the number of ranks; ranks are joined at the last one.
        """
        ...

    def update(self, factor: float) -> dict[str, Tensor]:
        """Clip and step at `factor` times the plateau's rate, or skip; gives "grad_norm" and "skipped"."""
        ...

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's optimizer tensors by name, and the groups they belong to."""
        ...

    def load_optimizer_state(self, stored: StoredPieces, *, where: object) -> None:
        """Take back what the ranks of any strategy and number gave."""
        ...

    def weights(self) -> list[Held]:
        """This rank's pieces of the float32 weights, by the names of the task's parameters."""
        ...

    def refresh(self) -> None:
        """Take over weights that were changed from outside: in the task, or in `weights` where sharded."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...


def build_engine(
    task: nn.Module,
    config: EngineConfig,
    optim: OptimConfig,
    *,
    matrices: Sequence[nn.Parameter] = (),
    micro_batch_size: int = 1,
) -> Engine:
    """Place `task` on its device and wrap it. Compile its blocks before this.

    Raises ConfigError for a strategy or precision that cannot work here.
    """
    if config.precision == "bf16" and config.strategy.startswith("zero") and not has_accelerator():
        raise ConfigError("engine.precision", got="bf16", expected="auto or fp32 under ZeRO on a CPU")
    match config.strategy:
        case "ddp":
            return PlainEngine(task, config, optim, matrices)
        case "zero1" | "zero2" | "zero3":
            _refuse_muon(config, optim)
            from vidworld.trainer.zero import ZeroEngine

            return ZeroEngine(task, config, optim, micro_batch_size)
        case "fsdp2":
            _refuse_muon(config, optim)
            from vidworld.trainer.fsdp import FsdpEngine

            return FsdpEngine(task, config, optim)
        case _:
            raise ConfigError("engine.strategy", got=config.strategy, expected=", ".join(get_args(Strategy)))


def _refuse_muon(config: EngineConfig, optim: OptimConfig) -> None:
    if optim.name == "muon":
        raise ConfigError(
            f"optim.name under strategy {config.strategy!r}",
            got="muon",
            expected="adamw",
            fix="sharding cuts matrices across ranks, which Muon cannot have: set optim.name to adamw, "
            "or engine.strategy to ddp",
        )


class PlainEngine:
    """One process, or DDP over several: each holds all weights, gradients are averaged.

    The finite check stays on the device: the gradient norm, which DDP makes equal on all ranks, sets the
    optimizers' `found_inf`. Nothing here waits for the accelerator.
    """

    num_optimizer_shards = 1
    shards_weights = False

    def __init__(
        self, task: nn.Module, config: EngineConfig, optim: OptimConfig, matrices: Sequence[nn.Parameter]
    ) -> None:
        accelerate = require("accelerate", "train")
        ddp = accelerate.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        handlers = [ddp, *process_group(accelerate)]
        self.accelerator = joined(
            lambda: accelerate.Accelerator(cpu=not has_accelerator(), kwargs_handlers=handlers)
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.optim = optim
        trained = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
        with warnings.catch_warnings():
            # broadcast_buffers has a successor in new releases of torch only.
            warnings.simplefilter("ignore", FutureWarning)
            self.module: nn.Module = self.accelerator.prepare(task)
        if config.reduce == "bf16" and isinstance(self.module, DistributedDataParallel):
            self.module.register_comm_hook(None, _reduce_in_bf16)
        # After the move: the optimizers must hold the parameters that are trained.
        self.parameters = [(Piece(name, tuple(p.shape), 0, p.numel()), p) for name, p in trained]
        self.optimizers = build_optimizers(trained, optim, matrices)
        self.autocast = autocast_of(config, self.device)

    def backward(self, inputs: tuple[Any, ...], share: float | Tensor, *, last: bool) -> dict[str, Tensor]:
        """Accumulate `share` of this micro-batch's gradient; ranks are joined at the last one."""
        joined = contextlib.nullcontext() if last else self.accelerator.no_sync(self.module)
        with joined:
            with self.autocast():
                losses = self.module(*inputs)
            (losses["loss"] * share).backward()
        return losses

    @torch.no_grad()
    def update(self, factor: float) -> dict[str, Tensor]:
        """Step all optimizers, or leave weights and moments untouched when the gradient is not finite."""
        set_rates(self.optimizers, self.optim, factor)
        norm = self.gradient_norm()
        found_inf = clip_or_skip(self.optimizers.values(), norm, self.optim.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": found_inf}

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, equal on all ranks; not finite where any of it is not."""
        return torch.nn.utils.get_total_norm([p.grad for _, p in self.parameters if p.grad is not None])

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Moments by `<optimizer>/<parameter>/<moment>`, as `pieces` names parts of them."""
        pieces = {id(parameter): piece for piece, parameter in self.parameters}
        tensors: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        for kind, optimizer in self.optimizers.items():
            groups[kind] = [
                {**group, "params": [pieces[id(p)].name for p in group["params"]]}
                for group in optimizer.param_groups
            ]
            for parameter, state in optimizer.state.items():
                tensors |= named_moments(kind, pieces[id(parameter)], state)
        return tensors, groups

    def load_optimizer_state(self, stored: StoredPieces, *, where: object) -> None:
        """Restore the moments; rates and decay stay those of the config."""
        pieces = {id(parameter): piece for piece, parameter in self.parameters}
        known: set[str] = set()
        for kind, optimizer in self.optimizers.items():
            ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for index, parameter in enumerate(ordered):
                piece = pieces[id(parameter)]
                known.add(f"{kind}/{piece.name}")
                moments = read_moments(stored, kind, piece)
                state[index] = {name: _laid_out_like(parameter, value) for name, value in moments.items()}
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        refuse_unknown(stored, known | self.elsewhere(), where)

    def elsewhere(self) -> set[str]:
        """`<optimizer>/<parameter>` of parameters of which this rank holds nothing."""
        return set()

    def weights(self) -> list[Held]:
        """All weights."""
        return [Held(piece, parameter.detach().reshape(-1)) for piece, parameter in self.parameters]

    def refresh(self) -> None:
        """Nothing to do: the task's parameters are what is trained."""

    def barrier(self) -> None:
        """Wait for every rank."""
        self.accelerator.wait_for_everyone()


def clip_or_skip(optimizers: Iterable[torch.optim.Optimizer], norm: Tensor, clip: float) -> Tensor:
    """Let the next steps divide gradients so that their `norm` is at most `clip` (0: leave them).

    Where the norm is not finite those steps change nothing; gives 1 then, else 0, still on the device.
    """
    found_inf = (~torch.isfinite(norm)).float()
    scale = (norm / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
    return found_inf


def norm_over_ranks(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The norm of a gradient of which every rank holds these parts, equal on all ranks."""
    squared = torch.zeros((), device=device)
    if gradients:
        squared = torch.nn.utils.get_total_norm(gradients).square()
    torch.distributed.all_reduce(squared)
    return squared.sqrt()


def _reduce_in_bf16(group: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """PyTorch's own hook, which by its own name is refused on anything but NCCL."""
    return bf16_compress_hook(group, bucket)


def named_moments(kind: str, piece: Piece, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments of a piece by the names that a checkpoint gives them; counters are stored once."""
    tensors = {}
    for moment, value in state.items():
        name = f"{kind}/{piece.name}/{moment}"
        if value.ndim and piece.is_whole:
            tensors[name] = value.reshape(piece.shape)
        elif value.ndim:
            tensors[stored_name(name, piece)] = value.reshape(-1)
        elif piece.start == 0:
            tensors[name] = value
    return tensors


def read_moments(stored: StoredPieces, kind: str, piece: Piece) -> dict[str, Tensor]:
    """The moments of a piece, one-dimensional, counters as scalars; none before the first step."""
    prefix = f"{kind}/{piece.name}/"
    return {
        moment: stored.whole(prefix + moment, ())
        if stored.is_scalar(prefix + moment)
        else stored.read(prefix + moment, piece.start, piece.stop)
        for moment in stored.under(prefix)
    }


def refuse_unknown(stored: StoredPieces, known: set[str], where: object) -> None:
    """Raises CheckpointError when moments are stored of something that is not trained here."""
    if left := sorted(name for name in stored.names if name.rpartition("/")[0] not in known):
        raise CheckpointError(
            "optimizer state of other parameters or of another optimizer",
            where=where,
            got=", ".join(left[:4]),
            fix="resume with the optimizer that the run began with",
        )


class RendezvousError(VidworldError):
    """The ranks of a run did not find each other."""


def joined(make: Callable[[], Any]) -> Any:
    """Make an Accelerator, which joins the process group; raises RendezvousError when that fails."""
    try:
        return make()
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RendezvousError(
            f"rank {os.environ.get('RANK')} cannot meet the others at {where}: {str(error).splitlines()[0]} "
            "If another program has the port, start with another MASTER_PORT (torchrun: --master-port)"
        ) from error


def process_group(accelerate: Any) -> list[Any]:
    """Settings of the process group, if this process is one of several.

    The backend is named because accelerate otherwise takes the ranks of a CPU machine under DeepSpeed for one
    process each: all of them would be rank 0, and barriers would not wait.
    """
    if "LOCAL_RANK" not in os.environ:
        return []
    backend = "nccl" if has_accelerator() else "gloo"
    return [accelerate.InitProcessGroupKwargs(backend=backend, timeout=PATIENCE)]


def _laid_out_like(parameter: Tensor, moment: Tensor) -> Tensor:
    """A moment in its parameter's shape and memory format: fused kernels walk both in memory order."""
    if not moment.ndim:
        return moment
    laid_out = torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False)
    return laid_out.copy_(moment.reshape(parameter.shape))


def has_accelerator() -> bool:
    """Whether this machine has a GPU."""
    return torch.cuda.is_available()


def uses_compile(config: EngineConfig) -> bool:
    """Whether the task's parts are compiled here."""
    return config.compile == "on" or (config.compile == "auto" and has_accelerator())


def uses_bf16(config: EngineConfig) -> bool:
    """Whether the task runs in bfloat16 autocast."""
    return config.precision == "bf16" or (config.precision == "auto" and has_accelerator())


def autocast_of(config: EngineConfig, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the context in which the task runs; one that does nothing in float32."""
    enabled = uses_bf16(config)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)
