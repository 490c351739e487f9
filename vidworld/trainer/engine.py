"""One optimizer step, the same to the loop whether alone, under DDP or under DeepSpeed ZeRO."""

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vidworld.errors import CheckpointError, ConfigError, require
from vidworld.trainer.optim import OptimConfig, build_optimizers, set_rates

# Ranks wait this long for the first one, which encodes, validates and draws samples.
PATIENCE = timedelta(hours=2)

Strategy = Literal["ddp", "zero1", "zero2"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class EngineConfig:
    """How the work is spread and in which arithmetic."""

    strategy: Strategy = "ddp"
    """`ddp` on any number of processes; DeepSpeed's `zero1` shards the optimizer, `zero2` gradients too."""
    precision: Precision = "auto"
    """`auto`: bfloat16 autocast over float32 weights on a GPU, float32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks: `auto` on a GPU only."""
    accumulation: int = 1
    """Micro-batches of one optimizer step."""
    checkpoint_activations: bool = False
    """Of each block keep only its input and compute it again in the backward pass: a third more work for a
    fraction of the memory, and the same gradients. `vidworld plan` says when memory needs it."""
    sequence_parallel: int = 1
    """Ranks that share each clip, every one computing some of its frames: for clips too long for one GPU."""

    def __post_init__(self) -> None:
        for name in ("accumulation", "sequence_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name}", got=getattr(self, name), expected="at least 1")


class Engine(Protocol):
    """What the loop needs. `backward` is called once a micro-batch, then `update` once."""

    device: torch.device
    rank: int
    world_size: int
    num_optimizer_shards: int

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

    def load_optimizer_state(self, tensors: dict[str, Tensor], *, where: object) -> None:
        """Take back what `optimizer_state` gave."""
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
) -> "PlainEngine | ZeroEngine":
    """Place `task` on its device and wrap it. Compile its blocks before this.

    Raises ConfigError for a strategy or precision that cannot work here.
    """
    if config.precision == "bf16" and config.strategy != "ddp" and not _has_accelerator():
        raise ConfigError("engine.precision", got="bf16", expected="auto or fp32 under ZeRO on a CPU")
    match config.strategy:
        case "ddp":
            return PlainEngine(task, config, optim, matrices)
        case "zero1" | "zero2":
            if optim.name == "muon":
                raise ConfigError(
                    f"optim.name under strategy {config.strategy!r}",
                    got="muon",
                    expected="adamw",
                    fix="ZeRO cuts matrices across ranks, which Muon cannot have: set optim.name to adamw, "
                    "or engine.strategy to ddp",
                )
            return ZeroEngine(task, config, optim, micro_batch_size)
        case _:
            raise ConfigError("engine.strategy", got=config.strategy, expected="ddp, zero1 or zero2")


class PlainEngine:
    """One process, or DDP over several: each holds all weights, gradients are averaged.

    The finite check stays on the device: the gradient norm, which DDP makes equal on all ranks, sets the
    optimizers' `found_inf`. Nothing here waits for the accelerator.
    """

    num_optimizer_shards = 1

    def __init__(
        self, task: nn.Module, config: EngineConfig, optim: OptimConfig, matrices: Sequence[nn.Parameter]
    ) -> None:
        accelerate = require("accelerate", "train")
        ddp = accelerate.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.accelerator = accelerate.Accelerator(
            cpu=not _has_accelerator(), kwargs_handlers=[ddp, *_process_group(accelerate)]
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.optim = optim
        self.names = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in self.names]
        with warnings.catch_warnings():
            # broadcast_buffers has a successor in new releases of torch only.
            warnings.simplefilter("ignore", FutureWarning)
            self.module: nn.Module = self.accelerator.prepare(task)
        # After the move: the optimizers must hold the parameters that are trained.
        self.optimizers = build_optimizers(self.names, optim, matrices)
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
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        found_inf = (~torch.isfinite(norm)).float()
        scale = (norm / self.optim.clip).clamp(min=1.0) if self.optim.clip else torch.ones_like(norm)
        for optimizer in self.optimizers.values():
            optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": found_inf}

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Moments by `<optimizer>/<parameter>/<moment>`."""
        names = {id(parameter): name for name, parameter in self.names}
        tensors: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        for kind, optimizer in self.optimizers.items():
            groups[kind] = [
                {**group, "params": [names[id(p)] for p in group["params"]]}
                for group in optimizer.param_groups
            ]
            for parameter, state in optimizer.state.items():
                for moment, value in state.items():
                    tensors[f"{kind}/{names[id(parameter)]}/{moment}"] = value
        return tensors, groups

    def load_optimizer_state(self, tensors: dict[str, Tensor], *, where: object) -> None:
        """Restore the moments; rates and decay stay those of the config."""
        left = dict(tensors)
        names = {id(parameter): name for name, parameter in self.names}
        for kind, optimizer in self.optimizers.items():
            ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for index, parameter in enumerate(ordered):
                prefix = f"{kind}/{names[id(parameter)]}/"
                moments = {name.removeprefix(prefix): name for name in left if name.startswith(prefix)}
                state[index] = {
                    moment: _laid_out_like(parameter, left.pop(name)) for moment, name in moments.items()
                }
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        if left:
            raise CheckpointError(
                "optimizer state of other parameters or of another optimizer",
                where=where,
                got=", ".join(sorted(left)[:4]),
                fix="resume with the optimizer and the strategy that the run began with",
            )

    def barrier(self) -> None:
        """Wait for every rank."""
        self.accelerator.wait_for_everyone()


class ZeroEngine:
    """DeepSpeed ZeRO-1 or ZeRO-2 through accelerate: AdamW's moments (and gradients) are cut across ranks.

    Weights stay float32 and whole on every rank, with bfloat16 autocast as in `PlainEngine`, so that weights,
    EMA and checkpoints are the same files. DeepSpeed itself clips, and skips steps that are not finite.
    """

    def __init__(
        self, task: nn.Module, config: EngineConfig, optim: OptimConfig, micro_batch_size: int
    ) -> None:
        accelerate = require("accelerate", "train")
        if "LOCAL_RANK" not in os.environ:
            raise ConfigError(
                f"engine.strategy {config.strategy!r}",
                got="a process without a launcher",
                fix="start it with: torchrun --nproc-per-node N training/train.py CONFIG",
            )
        require("deepspeed", "train")
        require("transformers", "train")  # accelerate's DeepSpeed path imports it
        bf16 = _uses_bf16(config)
        plugin = accelerate.DeepSpeedPlugin(
            hf_ds_config=deepspeed_config(config, optim, micro_batch_size=micro_batch_size, bf16=bf16)
        )
        # Not cpu=True: with it accelerate quietly leaves DeepSpeed out.
        self.accelerator = accelerate.Accelerator(
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=config.accumulation,
            kwargs_handlers=_process_group(accelerate),
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.num_optimizer_shards = self.world_size
        self.optim = optim
        optimizer = build_optimizers(list(task.named_parameters()), optim)["adamw"]
        self.module, _ = self.accelerator.prepare(task.to(self.device), optimizer)

    def backward(self, inputs: tuple[Any, ...], share: float | Tensor, *, last: bool) -> dict[str, Tensor]:
        """Accumulate `share` of this micro-batch's gradient; ranks are joined at the last one."""
        losses = self.module(*inputs)
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(losses["loss"] * share, scale_wrt_gas=False)
        return losses

    def update(self, factor: float) -> dict[str, Tensor]:
        """Let DeepSpeed clip and step; it skips a step whose global gradient norm is not finite."""
        for group in self.module.optimizer.param_groups:
            group["lr"] = self.optim.lr * factor
        self.module.step()
        norm = self.module.get_global_grad_norm()
        skipped = bool(self.module.optimizer.overflow)
        return {
            "grad_norm": torch.as_tensor(float("nan") if skipped else norm, device=self.device),
            "skipped": torch.tensor(float(skipped), device=self.device),
        }

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's slices: flat float32 weights and moments by `zero/<group>/<name>`."""
        zero = self.module.optimizer
        tensors: dict[str, Tensor] = {}
        for index, weights in enumerate(zero.single_partition_of_fp32_groups):
            tensors[f"zero/{index}/weights"] = weights
            for moment, value in zero.optimizer.state[weights].items():
                tensors[f"zero/{index}/{moment}"] = torch.as_tensor(value)
        return tensors, {"rank": self.rank, "world_size": self.world_size}

    @torch.no_grad()
    def load_optimizer_state(self, tensors: dict[str, Tensor], *, where: object) -> None:
        """Restore this rank's slices."""
        zero = self.module.optimizer
        slices = zero.single_partition_of_fp32_groups
        expected = {f"zero/{index}/weights": weights.shape for index, weights in enumerate(slices)}
        if expected != {k: v.shape for k, v in tensors.items() if k.endswith("/weights")}:
            raise CheckpointError(
                "optimizer state of another sharding",
                where=where,
                fix="resume with the number of ranks and the strategy that saved it",
            )
        for index, weights in enumerate(slices):
            prefix = f"zero/{index}/"
            mine = {k.removeprefix(prefix): v.to(weights) for k, v in tensors.items() if k.startswith(prefix)}
            weights.copy_(mine.pop("weights"))
            zero.optimizer.state[weights] = mine

    def barrier(self) -> None:
        """Wait for every rank."""
        self.accelerator.wait_for_everyone()


def deepspeed_config(
    config: EngineConfig, optim: OptimConfig, *, micro_batch_size: int, bf16: bool
) -> dict[str, Any]:
    """What DeepSpeed is told; `training/deepspeed_zero*.json` show it for two stages."""
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if bf16 else {}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": optim.clip,
        "zero_optimization": {
            "stage": 1 if config.strategy == "zero1" else 2,
            "overlap_comm": False,
            "contiguous_gradients": True,
        },
        **autocast,
    }


def _process_group(accelerate: Any) -> list[Any]:
    """Settings of the process group, if this process is one of several.

    The backend is named because accelerate otherwise takes the ranks of a CPU machine under DeepSpeed for one
    process each: all of them would be rank 0, and barriers would not wait.
    """
    if "LOCAL_RANK" not in os.environ:
        return []
    backend = "nccl" if _has_accelerator() else "gloo"
    return [accelerate.InitProcessGroupKwargs(backend=backend, timeout=PATIENCE)]


def _laid_out_like(parameter: Tensor, moment: Tensor) -> Tensor:
    """A moment in its parameter's memory format: fused kernels walk both in memory order."""
    if moment.shape != parameter.shape:
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)


def _has_accelerator() -> bool:
    return torch.cuda.is_available()


def uses_compile(config: EngineConfig) -> bool:
    """Whether the task's parts are compiled here."""
    return config.compile == "on" or (config.compile == "auto" and _has_accelerator())


def _uses_bf16(config: EngineConfig) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and _has_accelerator())


def autocast_of(config: EngineConfig, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the context in which the task runs; one that does nothing in float32."""
    enabled = _uses_bf16(config)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)
