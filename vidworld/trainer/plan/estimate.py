"""Memory and time of one way to run a training, and the best of all ways."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import ConfigError
from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import FrameShape, Streams
from vidworld.trainer.engine import Strategy as StrategyName
from vidworld.trainer.plan.cluster import STRATEGIES, Cluster, communication, exposed
from vidworld.trainer.plan.hardware import Roofline
from vidworld.trainer.plan.memory import GIB, Activations, trace_activations
from vidworld.trainer.plan.work import StepWork, step_seconds, step_work

# The backward pass holds gradients of about what one block kept while it goes through it.
WORKING_BLOCKS = 1.0
# Muon holds stacks of all matrices of one shape: gradients, momenta and what Newton-Schulz makes of them.
MUON_STACK_BYTES = 24
# CUDA's context, cuBLAS's workspace and, with several ranks, NCCL's buffers.
CONTEXT_GIB, NCCL_GIB = 0.7, 1.0
# DeepSpeed's reduction bucket: 5e8 float32 numbers, or all gradients if they are fewer.
DEEPSPEED_BUCKET = 5e8
# What the allocator loses between blocks of different sizes, as a share of what is allocated.
FRAGMENTATION = 0.06
MAX_ROWS = 1024


@dataclass(frozen=True)
class Subject:
    """What is trained, apart from how it is spread."""

    config: DiTConfig
    shape: FrameShape
    streams: Streams
    muon: bool
    bf16: bool
    compiled: bool
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    latent_cache_gib: float = 0.0
    """In the host's memory."""
    fused: Literal["auto", "on", "off"] = "off"
    """As in `engine.fused`."""

    @functools.cached_property
    def model(self) -> CausalDiT:
        """The model without data."""
        with torch.device("meta"):
            return CausalDiT(self.config, self.shape)

    @functools.cached_property
    def num_parameters(self) -> int:
        """All weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def tokens_per_row(self) -> int:
        """Tokens that the network reads for one clip, all streams together."""
        return self.streams.num_queries * self.model.tokens_per_frame

    @property
    def extra_forward(self) -> float:
        """Forward passes that the objective needs beside the trained one, after all of them have begun."""
        objective = self.objective
        two_streams = 2 / (1 + self.streams.targets)
        imagined = objective.resample_fraction * objective.resample_passes * two_streams
        if objective.kind != "shortcut" or objective.finest_steps == 1:
            return imagined
        return 2 * objective.bootstrap_fraction + imagined

    @functools.cached_property
    def activations(self) -> Activations:
        """What a forward pass keeps."""
        return trace_activations(
            self.config, self.shape, self.streams, bf16=self.bf16, compiled=self.compiled
        )

    @functools.cached_property
    def work_of_one_row(self) -> StepWork:
        """One clip."""
        return step_work(self.model, self.streams, 1, muon=self.muon, extra_forward=self.extra_forward)


@dataclass(frozen=True)
class Layout:
    """How a training is spread."""

    strategy: str
    rows: int
    """Clips of a micro-batch of one GPU (of `sequence_parallel` GPUs together)."""
    accumulation: int = 1
    checkpointed: bool = False
    sequence_parallel: int = 1


@dataclass(frozen=True)
class Estimate:
    """One layout on one cluster."""

    layout: Layout
    memory_gib: dict[str, float]
    """On each GPU, by part."""
    step_s: dict[str, float]
    """By part; communication only as far as it is not hidden."""
    sent_s: dict[str, float]
    """Communication by kind, hidden or not."""
    tokens_per_step: int
    model_flops: float
    """Of one step on one GPU."""
    capacity_gib: float

    @property
    def allocated_gib(self) -> float:
        """What torch.cuda.max_memory_allocated will say."""
        parts = {k: v for k, v in self.memory_gib.items() if k not in ("CUDA and NCCL", "fragmentation")}
        return sum(parts.values())

    @property
    def total_gib(self) -> float:
        """All of it."""
        return sum(self.memory_gib.values())

    @property
    def fits(self) -> bool:
        """Whether it goes into the GPU."""
        return self.total_gib <= self.capacity_gib

    @property
    def seconds(self) -> float:
        """One optimizer step."""
        return sum(self.step_s.values())

    @property
    def tokens_per_s(self) -> float:
        """All GPUs together."""
        return self.tokens_per_step / self.seconds


def estimate(subject: Subject, cluster: Cluster, layout: Layout) -> Estimate:
    """Predict memory and step time of `layout`. Raises ConfigError for what training would refuse."""
    if layout.strategy not in STRATEGIES:
        raise ConfigError("engine.strategy", got=layout.strategy, expected=", ".join(STRATEGIES))
    if layout.strategy != "ddp" and subject.muon:
        raise ConfigError(f"optim.name under strategy {layout.strategy!r}", got="muon", expected="adamw")
    if cluster.ranks % layout.sequence_parallel or subject.streams.num_queries % layout.sequence_parallel:
        raise ConfigError(
            "engine.sequence_parallel",
            got=layout.sequence_parallel,
            expected=f"a divisor of {cluster.ranks} GPUs and of the {subject.streams.num_queries} frames of "
            "all streams",
        )
    strategy, roofline = STRATEGIES[layout.strategy], Roofline(cluster.gpu)
    work = step_work(
        subject.model,
        subject.streams,
        layout.rows,
        muon=subject.muon,
        extra_forward=subject.extra_forward,
        checkpointed=layout.checkpointed,
        ranks_per_clip=layout.sequence_parallel,
        fused=_uses_fused(subject, cluster, layout),
    )
    parts = step_seconds(work, roofline, accumulation=layout.accumulation)
    if strategy.shards_optimizer:
        for name in ("optimizer", *(["ema"] if strategy.shards_weights else [])):
            parts[name] /= cluster.ranks
    passes = 2 + work.extra_forward + layout.checkpointed
    sent = communication(
        strategy, cluster, 4 * subject.num_parameters, passes=passes, accumulation=layout.accumulation
    )
    if layout.sequence_parallel > 1:
        sent["frames to tokens"] = _switches(subject, cluster, layout)
    passed = sum(parts[name] for name in ("products", "attention", "elementwise"))
    if strategy.shards_weights:  # weights are gathered ahead in every pass of every micro-batch
        hidden_by = passed + parts["forward again"]
    else:  # gradients are sent in the last micro-batch's backward pass
        hidden_by = 2 / 3 * passed / layout.accumulation
    apart = sent.pop("frames to tokens", 0.0)
    parts["communication"] = exposed(strategy, sent, hidden_by) + apart
    if apart:
        sent["frames to tokens"] = apart
    return Estimate(
        layout,
        _memory(subject, cluster, layout),
        parts,
        sent,
        subject.tokens_per_row
        * layout.rows
        * layout.accumulation
        * cluster.ranks
        // layout.sequence_parallel,
        layout.accumulation * work.model_flops,
        cluster.gpu.memory_gib,
    )


def _uses_fused(subject: Subject, cluster: Cluster, layout: Layout) -> bool:
    """Whether training will run the fused kernels, if they pass their check."""
    if layout.strategy != "ddp" or layout.sequence_parallel > 1:
        return False
    return subject.fused == "on" or (subject.fused == "auto" and subject.compiled and cluster.ranks == 1)


def ways(
    subject: Subject, cluster: Cluster, *, batch: int | None, sequence_parallel: int = 1
) -> Iterator[Layout]:
    """Layouts worth a look: with `batch` clips a step exactly, or with as many as fit."""
    groups = cluster.ranks // sequence_parallel
    names = [name for name in STRATEGIES if name in get_args(StrategyName)]
    if subject.muon or cluster.ranks == 1:
        names = ["ddp"]
    for name in names:
        for checkpointed in (False, True):
            if batch is None:
                for power in range(MAX_ROWS.bit_length()):
                    yield Layout(name, 2**power, 1, checkpointed, sequence_parallel)
            elif batch % groups == 0:
                share = batch // groups
                for accumulation in (a for a in range(1, share + 1) if share % a == 0):
                    yield Layout(name, share // accumulation, accumulation, checkpointed, sequence_parallel)


def best(
    subject: Subject, cluster: Cluster, *, batch: int | None, sequence_parallel: int = 1
) -> Estimate | None:
    """The fastest layout that fits; of those within 2 %, the simplest (the first of `ways`)."""
    found = [
        one
        for layout in ways(subject, cluster, batch=batch, sequence_parallel=sequence_parallel)
        if (one := estimate(subject, cluster, layout)).fits
    ]
    if not found:
        return None
    fastest = max(one.tokens_per_s for one in found)
    return next(one for one in found if one.tokens_per_s >= 0.98 * fastest)


def _memory(subject: Subject, cluster: Cluster, layout: Layout) -> dict[str, float]:
    """GiB on each GPU at the fullest moment of a step."""
    strategy, ranks = STRATEGIES[layout.strategy], cluster.ranks
    count, kept = subject.num_parameters, subject.activations
    rows = layout.rows / layout.sequence_parallel
    matrices = sum(r * c for r, c in subject.work_of_one_row.matrices)
    weights = 4 * count / (ranks if strategy.shards_weights else 1)
    if strategy.shards_weights:  # two blocks at once: one in use and one on its way
        weights += 2 * 4 * max(sum(p.numel() for p in block.parameters()) for block in subject.model.blocks)
    moments = 8 * (count - matrices) + 4 * matrices
    if strategy.deepspeed:
        moments += 4 * count  # its own float32 copy of each rank's share
    activations = rows * kept.per_row(checkpointed=layout.checkpointed)
    working = rows * kept.largest_block * (WORKING_BLOCKS + layout.checkpointed)
    stacks = MUON_STACK_BYTES * max(_stacks(subject.work_of_one_row), default=0)
    during_pass = activations + working + kept.weight_copies
    parts = {
        "weights": weights,
        "gradients": 4 * count / (ranks if strategy.shards_gradients else 1),
        "optimizer": moments / (ranks if strategy.shards_optimizer else 1),
        "average (EMA)": 4 * count / (ranks if strategy.shards_weights else 1),
        "bfloat16 weights": kept.weight_copies,
        "activations": activations,
        "working memory": max(working, stacks - during_pass + working),
    }
    if strategy.deepspeed:
        parts["DeepSpeed buckets"] = 4 * min(DEEPSPEED_BUCKET, count)
    parts["CUDA and NCCL"] = GIB * (CONTEXT_GIB + (NCCL_GIB if ranks > 1 else 0))
    parts["fragmentation"] = FRAGMENTATION * sum(parts.values())
    return {name: size / GIB for name, size in parts.items()}


def _stacks(work: StepWork) -> list[int]:
    """Numbers in the stack of each shape of matrix."""
    shapes = set(work.matrices)
    return [rows * columns * work.matrices.count((rows, columns)) for rows, columns in shapes]


def _switches(subject: Subject, cluster: Cluster, layout: Layout) -> float:
    """All-to-alls around time attention, forward and backward, in bfloat16; nothing hides them."""
    size = 2 * layout.rows * subject.tokens_per_row // layout.sequence_parallel * subject.config.width
    layers = subject.activations.num_time
    passes = 2 + subject.extra_forward + layout.checkpointed
    return layers * 2 * passes * layout.accumulation * cluster.collective_s(size, layout.sequence_parallel)
