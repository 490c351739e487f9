"""The engine over DeepSpeed ZeRO, stages 1 to 3, with checkpoints that any strategy can read."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vidworld.errors import ConfigError, require
from vidworld.model.compile import compile_without_hooks
from vidworld.trainer.engine import (
    EngineConfig,
    clip_or_skip,
    joined,
    named_moments,
    norm_over_ranks,
    process_group,
    read_moments,
    refuse_unknown,
    uses_bf16,
)
from vidworld.trainer.optim import OptimConfig, build_optimizers
from vidworld.trainer.pieces import Held, Piece, StoredPieces, pieces_of_flat


class ZeroEngine:
    """DeepSpeed ZeRO through accelerate: AdamW's moments, gradients (2) and weights (3) are cut across ranks.

    Weights are float32, with bfloat16 autocast as in `PlainEngine`, so that weights, EMA and checkpoints are
    the same files. Clipping and skipping are those of `PlainEngine`, on the device: DeepSpeed's own wait for
    it several times a step, with nothing queued meanwhile.
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
        bf16 = uses_bf16(config)
        plugin = accelerate.DeepSpeedPlugin(
            hf_ds_config=deepspeed_config(config, micro_batch_size=micro_batch_size, bf16=bf16)
        )
        # Not cpu=True: with it accelerate quietly leaves DeepSpeed out.
        self.accelerator = joined(
            lambda: accelerate.Accelerator(
                deepspeed_plugin=plugin,
                gradient_accumulation_steps=config.accumulation,
                kwargs_handlers=process_group(accelerate),
            )
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.num_optimizer_shards = self.world_size
        self.shards_weights = config.strategy == "zero3"
        self.optim = optim
        self._names = {id(p): name for name, p in task.named_parameters() if p.requires_grad}
        if self.shards_weights:
            _gather_by_block(task)
        optimizer = build_optimizers(list(task.named_parameters()), optim)["adamw"]
        self.module, _ = self.accelerator.prepare(task.to(self.device), optimizer)
        self._take_norm_over()

    def backward(self, inputs: tuple[Any, ...], share: float | Tensor, *, last: bool) -> dict[str, Tensor]:
        """Accumulate `share` of this micro-batch's gradient; ranks are joined at the last one."""
        losses = self.module(*inputs)
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(losses["loss"] * share, scale_wrt_gas=False)
        return losses

    def update(self, factor: float) -> dict[str, Tensor]:
        """Let DeepSpeed step, clipped; where the global gradient norm is not finite nothing changes."""
        zero = self.module.optimizer
        for group in zero.param_groups:
            group["lr"] = self.optim.lr * factor
        parts = [part.float() for group in zero.averaged_gradients.values() for part in group]
        norm = norm_over_ranks(parts, self.device)
        skipped = clip_or_skip([zero.optimizer], norm, self.optim.clip)
        self.module.step()
        return {"grad_norm": norm, "skipped": skipped}

    def _take_norm_over(self) -> None:
        """Tell DeepSpeed a norm that is on no device, instead of letting it wait for its own."""
        zero, known = self.module.optimizer, torch.zeros(())
        if self.shards_weights:
            zero._get_norm_groups = lambda: [known]
        else:
            zero.scaled_global_norm = lambda: known

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's moments by `adamw/<parameter>/<moment>`, as `pieces` names parts of them."""
        tensors: dict[str, Tensor] = {}
        for flat, pieces in self._partitions():
            state = self.module.optimizer.optimizer.state[flat]
            for piece, where in pieces:
                cut = {k: v[where] if v.ndim else v for k, v in _tensors(state).items()}
                tensors |= named_moments("adamw", piece, cut)
        return tensors, {"rank": self.rank, "world_size": self.world_size}

    @torch.no_grad()
    def load_optimizer_state(self, stored: StoredPieces, *, where: object) -> None:
        """Restore this rank's slices from what any ranks of any strategy saved."""
        for flat, pieces in self._partitions():
            state: dict[str, Tensor] = {}
            for piece, place in pieces:
                for moment, value in read_moments(stored, "adamw", piece).items():
                    if value.ndim:
                        state.setdefault(moment, torch.zeros_like(flat))[place] = value.to(flat)
                    else:
                        state[moment] = value.to(flat.device, copy=True)
            if state:
                self.module.optimizer.optimizer.state[flat] = state
        refuse_unknown(stored, {f"adamw/{name}" for name in self._names.values()}, where)

    def weights(self) -> list[Held]:
        """This rank's pieces of the float32 weights."""
        return [
            Held(piece, flat.detach()[where])
            for flat, pieces in self._partitions()
            for piece, where in pieces
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the task's weights under ZeRO-1 and 2; spread this rank's pieces under ZeRO-3."""
        zero = self.module.optimizer
        if self.shards_weights:
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        else:
            for flat, parts in zip(
                zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
            ):
                flat.copy_(parts[self.rank])

    def _partitions(self) -> list[tuple[Tensor, list[tuple[Piece, slice]]]]:
        """Each flat float32 partition that this rank's optimizer steps, and the pieces that lie in it."""
        zero, found = self.module.optimizer, []
        if not self.shards_weights:
            for index, flat in enumerate(zero.single_partition_of_fp32_groups):
                begin = self.rank * flat.numel()
                pieces = pieces_of_flat(
                    self._names,
                    zero.round_robin_bit16_groups[index],
                    zero.round_robin_bit16_offsets[index],
                    begin,
                    begin + flat.numel(),
                )
                found.append((flat, pieces))
            return found
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            offset, pieces = 0, []
            for parameter in parameters:
                share = parameter.partition_numel()
                start, stop = self.rank * share, min((self.rank + 1) * share, parameter.ds_numel)
                if start < stop:
                    piece = Piece(self._names[id(parameter)], tuple(parameter.ds_shape), start, stop)
                    pieces.append((piece, slice(offset, offset + piece.numel)))
                offset += share
            found.append((flat, pieces))
        return found

    def barrier(self) -> None:
        """Wait for every rank."""
        self.accelerator.wait_for_everyone()


def _gather_by_block(task: nn.Module) -> None:
    """Let ZeRO-3 gather the weights of a block at once, before its graph runs, and not layer by layer.

    Its hooks do not compile: inside a block they would break its graph at every layer. On the block they
    stand around it, once `forward` alone is compiled in place of the whole call.
    """
    from deepspeed.utils import set_z3_leaf_module

    for stack in [module for module in task.modules() if isinstance(module, nn.ModuleList)]:
        for block in stack:
            set_z3_leaf_module(block, True)
            compile_without_hooks(block)


def deepspeed_config(config: EngineConfig, *, micro_batch_size: int, bf16: bool) -> dict[str, Any]:
    """What DeepSpeed is told; `training/deepspeed_zero*.json` show it for each stage."""
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if bf16 else {}
    # Stages 1 and 2 all-reduce either way; without this they also copy each bucket out and in for it.
    whole_buckets = {} if config.strategy == "zero3" else {"reduce_scatter": False}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": 0.0,  # the engine's matter
        "zero_optimization": {
            "stage": int(config.strategy[-1]),
            "overlap_comm": False,
            "contiguous_gradients": True,
            **whole_buckets,
        },
        "timers": {"throughput": {"enabled": False}},  # would wait for the device twice a step
        **autocast,
    }


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state of one flat partition; DeepSpeed may keep the counter as a number."""
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in state.items()}
