"""Ways to run one training step that `train.py` times against each other: ours, DeepSpeed's, bare, naive."""

import contextlib
import gc
import os
import socket
import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from baselines.naive import make_naive
from torch import nn
from train_data import contract_of, frame_shape

from vidworld.data.loader import LoaderConfig
from vidworld.data.shards import ShardDataset
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.model.compile import KERNELS, fuse
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Streams
from vidworld.model.normalizer import Normalizer
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.feed import clip_feed
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Loop, LoopConfig, noise_generator
from vidworld.trainer.optim import OptimConfig
from vidworld.trainer.tasks import Moment, WorldTask
from vidworld.trainer.transfer import Transfer

Ours = Literal["ours", "muon", "half_residual", "bare", "zero1", "zero2", "zero3", "fsdp2"]
Fused = Literal["fused", "fused_half", "fused_sdpa", "fused_heads", "fused_mlp", "fused_residual"]
Variant = Ours | Fused | Literal["naive", "naive_compiled", "naive_full"]
EMA_DECAY = 0.999
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Case:
    """One size, its data and its batch."""

    name: str
    model: DiTConfig
    channels: int
    side: int
    frames: int
    rows: int
    device: torch.device
    data: ShardDataset
    compiled: bool
    """Compile where the variant says so."""
    scratch: Path
    accumulate: int = 1
    """Micro-batches of `rows` clips in a step."""

    @property
    def label(self) -> str:
        """What its rows are named by."""
        return self.name if self.accumulate == 1 else f"{self.name}.accumulate{self.accumulate}"

    @property
    def streams(self) -> Streams:
        """Context and one target."""
        return Streams(self.frames, targets=1)

    @property
    def bf16(self) -> bool:
        """Arithmetic of the products."""
        return self.device.type == "cuda"


class Marks:
    """Time stamps inside a step: events on a GPU, where nothing waits for them, else the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.stamps = device.type == "cuda", []

    def __call__(self, name: str) -> None:
        """The part `name` ends here."""
        stamp: Any = time.perf_counter()
        if self.cuda:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self.stamps.append((name, stamp))

    def seconds(self) -> list[tuple[str, float]]:
        """Parts in order, each since the mark before it."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.stamps, self.stamps[1:], strict=False)
        if self.cuda:
            return [(name, before.elapsed_time(after) / 1e3) for (_, before), (name, after) in pairs]
        return [(name, after - before) for (_, before), (name, after) in pairs]


class Stepper(Protocol):
    """A training that can be stepped."""

    def step(self, mark: Callable[[str], None]) -> None:
        """One optimizer step; calls mark("data"), "forward", "backward", "optimizer", "ema" as they end."""
        ...

    def close(self) -> None:
        """Let go of the GPU."""
        ...


def make_task(case: Case, *, residual: Literal["float32", "autocast"] = "float32") -> WorldTask:
    """The same weights for every variant."""
    torch.manual_seed(0)
    model = CausalDiT(replace(case.model, residual=residual), frame_shape(case.channels, case.side))
    for block in model.blocks:  # gates that are zero would leave half of the gradients zero
        for weight in (p for p in block.modulation.parameters() if p.ndim == 2):  # type: ignore[union-attr]
            nn.init.normal_(weight, std=0.02)
    return WorldTask(model, Normalizer([contract_of()]), ObjectiveConfig())


def build(case: Case, variant: Variant) -> Stepper:
    """Make a variant ready to step."""
    match variant:
        case "ours":
            return LoopStepper(case, "ddp")
        case "muon":
            return LoopStepper(case, "ddp", muon=True)
        case "half_residual":
            return LoopStepper(case, "ddp", residual="autocast")
        case "fused" | "fused_half":
            return LoopStepper(
                case, "ddp", residual="autocast" if variant == "fused_half" else "float32", kernels=KERNELS
            )
        case "fused_sdpa":
            return LoopStepper(case, "ddp", kernels=[name for name in KERNELS if name != "attention"])
        case "fused_heads" | "fused_mlp" | "fused_residual":
            return LoopStepper(case, "ddp", kernels=(variant.removeprefix("fused_"),))
        case "zero1" | "zero2" | "zero3" | "fsdp2":
            return LoopStepper(case, variant)
        case "bare":
            return BareStepper(case)
        case "naive" | "naive_compiled" | "naive_full":
            return NaiveStepper(case, variant)


class LoopStepper:
    """vidworld's own loop, loader, engine and average; nothing is left out but logs and checkpoints."""

    def __init__(
        self,
        case: Case,
        strategy: Any,
        *,
        muon: bool = False,
        residual: Any = "float32",
        kernels: Collection[str] = (),
    ) -> None:
        self.case = case
        task = make_task(case, residual=residual)
        ema: EMA[Any] = EMA(task, EMA_DECAY)
        if kernels:
            fuse(task.net, kernels)
        if case.compiled:
            task.compile_parts()
        optim = OptimConfig(name="muon" if muon else "adamw", warmup_steps=1)
        engine_config = EngineConfig(
            strategy=strategy, compile="on" if case.compiled else "off", accumulation=case.accumulate
        )
        self.launch = contextlib.ExitStack()
        if strategy != "ddp":
            self.launch.enter_context(launched())
        engine = build_engine(
            task, engine_config, optim, matrices=task.matrices() if muon else (), micro_batch_size=case.rows
        )
        feed = clip_feed(case.data, loader_config(case), seed=0, accumulation=case.accumulate)
        run = case.scratch / f"run-{time.monotonic_ns()}"
        run.mkdir(parents=True)
        # Far from its end, so that the bootstrap has not begun and the rate is on its plateau.
        config = LoopConfig(steps=10**6, ema_decay=EMA_DECAY)
        log = RunLog(run, active=False, progress_bar=False)
        self.loop = Loop(
            task, ema, feed, engine, optim, config, run=run, seed=0, accumulation=case.accumulate, log=log
        )
        self.loop._batches = self.loop._open()
        self.mark: Callable[[str], None] = lambda name: None
        task.register_forward_hook(lambda *_: self.mark("forward"))
        for owner, name, part in ((engine, "backward", "backward"), (engine, "update", "optimizer")):
            self._marked(owner, name, part)
        self._marked(ema, "update", "ema")

    def _marked(self, owner: Any, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def marked(*arguments: Any, **settings: Any) -> Any:
            result = plain(*arguments, **settings)
            self.mark(part)
            return result

        setattr(owner, name, marked)

    def step(self, mark: Callable[[str], None]) -> None:
        """One step of the loop."""
        self.mark = mark
        batches = self.loop._fetch()
        mark("data")
        self.loop.step(batches)
        self.loop.clock.advance(0.0)

    @property
    def wait_s(self) -> float:
        """Seconds waited for the loader so far."""
        return self.loop._wait_s

    def close(self) -> None:
        """Stop the loader's workers and leave the process group."""
        close: Any = getattr(self.loop._batches, "close", None)
        if close is not None:
            close()
        del self.loop
        self.launch.close()
        release()


class BareStepper:
    """The least that trains: the compiled task, autocast, clipping, fused AdamW. No average, no checks."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.task = make_task(case).to(case.device)
        if case.compiled:
            self.task.compile_parts()
        self.batches = device_batches(case)
        self.parameters = [p for p in self.task.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, betas=(0.9, 0.95), fused=True)
        self.number = 0

    def step(self, mark: Callable[[str], None]) -> None:
        """Forward, backward, clip, step."""
        for _ in range(self.case.accumulate):
            batch = next(self.batches)
            mark("data")
            generator = noise_generator(0, self.number, 0, self.case.device)
            self.number += 1
            with torch.autocast(self.case.device.type, torch.bfloat16, enabled=self.case.bf16):
                loss = self.task(batch, generator, Moment())["loss"] / self.case.accumulate
            mark("forward")
            loss.backward()
            mark("backward")
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimizer")

    def close(self) -> None:
        """Let go."""
        self.batches.close()
        del self.task, self.optimizer, self.parameters
        release()


class NaiveStepper:
    """Naive blocks under DeepSpeed's ZeRO-2 with little more than its stage and precision in the config."""

    def __init__(self, case: Case, variant: str) -> None:
        import deepspeed

        self.case = case
        task = make_task(case)
        make_naive(task.net, case.streams if variant == "naive_full" else None, case.device)
        self.ema = [p.detach().to(case.device, torch.float32).clone() for p in task.net.parameters()]
        if variant == "naive_compiled" and case.compiled:
            for block in task.net.blocks:
                block.compile()
        self.launch = contextlib.ExitStack()
        self.launch.enter_context(launched())
        deepspeed.init_distributed(dist_backend="nccl" if case.bf16 else "gloo")
        optimizer = torch.optim.AdamW(task.parameters(), lr=3e-4, betas=(0.9, 0.95))
        config = {
            "train_micro_batch_size_per_gpu": case.rows,
            "gradient_accumulation_steps": case.accumulate,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            **({"bf16": {"enabled": True}} if case.bf16 else {}),
        }
        self.engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=config)
        self.net = task.net
        self.batches, self.number = device_batches(case), 0

    def step(self, mark: Callable[[str], None]) -> None:
        """What DeepSpeed's own examples do, and an average parameter by parameter."""
        for _ in range(self.case.accumulate):
            batch = next(self.batches)
            mark("data")
            generator = noise_generator(0, self.number, 0, self.case.device)
            self.number += 1
            loss = self.engine(batch, generator, Moment())["loss"]
            mark("forward")
            self.engine.backward(loss)
            mark("backward")
            self.engine.step()  # which DeepSpeed makes a step of only after the last
            mark("optimizer")
        with torch.no_grad():
            for mean, parameter in zip(self.ema, self.net.parameters(), strict=True):
                mean.mul_(EMA_DECAY).add_(parameter.data.float(), alpha=1 - EMA_DECAY)
        mark("ema")

    def close(self) -> None:
        """Let go."""
        self.batches.close()
        self.engine.destroy()
        del self.engine, self.net, self.ema
        self.launch.close()
        release()


def loader_config(case: Case) -> LoaderConfig:
    """Clips of the case's length from the cache of two workers."""
    workers = 2 if case.device.type == "cuda" else 0
    clips = case.rows * case.accumulate
    return LoaderConfig(clip_frames=case.frames, batch_size=clips, workers=workers, cache_gb=1.0)


def device_batches(case: Case) -> Generator[Any, None, None]:
    """The same batches as in our loop, on the device."""
    transfer = Transfer(case.device)
    for batch in clip_feed(case.data, loader_config(case), seed=0, accumulation=case.accumulate).open(0):
        yield from transfer([batch])


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """This process as the only rank of a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    forget_accelerate()
    os.environ.update(zip(LAUNCHER, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))
    try:
        yield
    finally:
        leave_launch()


def leave_launch() -> None:
    """Be a process without a launcher again.

    The process group of one rank stays: DeepSpeed keeps what it made of it, and could not use another.
    """
    for name in LAUNCHER:
        os.environ.pop(name, None)
    forget_accelerate()


def forget_accelerate() -> None:
    """accelerate keeps one state a process, and one process here is a single one and a rank in turn."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def release() -> None:
    """Give memory and graphs back, so that the next variant begins where this one did."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
