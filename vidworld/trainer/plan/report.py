"""A plan in words and tables."""

from typing import TYPE_CHECKING

from vidworld.trainer.plan import cluster as links
from vidworld.trainer.plan import estimate as sizes
from vidworld.trainer.plan import work as counts
from vidworld.trainer.plan.cluster import Cluster
from vidworld.trainer.plan.estimate import Estimate
from vidworld.trainer.plan.hardware import (
    LAUNCH_S,
    MEASURED_COPY_TB_S,
    MEASURED_ON,
    PRODUCT_SHARE,
    TRAFFIC_SHARE,
)

if TYPE_CHECKING:
    from vidworld.trainer.plan.command import Plan


def as_text(plan: "Plan") -> str:
    """Everything, one screen and a list of assumptions."""
    subject, cluster = plan.subject, plan.cluster
    config, streams = subject.config, subject.streams
    lines = [
        f"model        {config.depth}x{config.width}, {subject.num_parameters / 1e6:,.1f}M parameters, "
        f"{subject.model.tokens_per_frame} tokens a frame, {streams.num_queries} frames a clip in "
        f"{1 + streams.targets} streams ({subject.tokens_per_row:,} tokens a clip)",
        f"GPUs         {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}, "
        f"{cluster.gpu.memory_gib:g} GiB, {cluster.gpu.peak_tflops:g} TFLOP/s, "
        f"{cluster.gpu.link_gb_s:g} GB/s in a node"
        + (f", {cluster.network_gb_s:g} GB/s a GPU between nodes" if cluster.nodes > 1 else ""),
        "",
    ]
    if plan.asked is not None:
        lines += ["your config", *_estimate(plan, plan.asked)]
    else:
        lines += [f"your config cannot run on {cluster.ranks} GPUs: {plan.asked_fault}", ""]
    lines += _suggestion(plan)
    if budget := plan.budget:
        cost = f", cost {budget['cost']:,.0f}" if "cost" in budget else ""
        of_what = "your config" if plan.chosen is plan.asked else "what is suggested"
        lines += [
            f"budget       {budget['steps']:,.0f} steps, {budget['tokens']:.3g} tokens with {of_what}: "
            f"{budget['days']:,.2f} days, {budget['gpu_hours']:,.0f} GPU hours{cost}",
            "",
        ]
    return "\n".join([*lines, "assumptions", *(f"  - {text}" for text in assumptions(cluster))])


def _suggestion(plan: "Plan") -> list[str]:
    if plan.suggested is None and plan.larger is None:
        return [
            "suggestion   nothing fits: take a smaller model, shorter clips, engine.sequence_parallel, or "
            "optim.name adamw with a strategy that shards",
            "",
        ]
    lines = []
    if plan.suggested is not None and plan.asked is not None:
        if plan.suggested.layout == plan.asked.layout:
            lines += ["suggestion   as it is", ""]
        else:
            why = "can be faster" if plan.asked.fits else "does not fit"
            lines += [f"suggestion (your config {why})", *_settings(plan, plan.suggested)]
    if plan.larger is not None:
        lines += ["with any batch", *_settings(plan, plan.larger)]
    return lines


def _settings(plan: "Plan", one: Estimate) -> list[str]:
    layout = one.layout
    batch = layout.rows * layout.accumulation * plan.cluster.ranks // layout.sequence_parallel
    settings = [
        f"--engine.strategy {layout.strategy}",
        f"--loader.batch-size {batch}",
        f"--engine.accumulation {layout.accumulation}",
        "--engine.checkpoint-activations" if layout.checkpointed else "--engine.no-checkpoint-activations",
    ]
    return [f"  {' '.join(settings)}", *_estimate(plan, one)]


def _estimate(plan: "Plan", one: Estimate) -> list[str]:
    layout, ranks = one.layout, plan.cluster.ranks
    shared = f", {layout.sequence_parallel} GPUs a clip" if layout.sequence_parallel > 1 else ""
    mfu = one.model_flops / one.seconds / (1e12 * plan.cluster.gpu.peak_tflops)
    verdict = "fits" if one.fits else "DOES NOT FIT"
    return [
        f"  {layout.strategy}, {layout.rows} clips a micro-batch, accumulation {layout.accumulation}, "
        f"activations {'checkpointed' if layout.checkpointed else 'kept'}{shared}",
        f"  memory     {one.total_gib:8.1f} of {one.capacity_gib:.1f} GiB a GPU: {verdict}",
        *_table(one.memory_gib, "GiB"),
        f"  step       {1e3 * one.seconds:8.1f} ms",
        *_table({name: 1e3 * seconds for name, seconds in one.step_s.items()}, "ms"),
        *(f"    of which {kind} {1e3 * s:.1f} ms before hiding" for kind, s in one.sent_s.items() if s > 0),
        f"  speed      {one.tokens_per_s:,.0f} tokens/s, {one.tokens_per_s / ranks:,.0f} a GPU, "
        f"MFU {100 * mfu:.1f} %",
        "",
    ]


def _table(parts: dict[str, float], unit: str) -> list[str]:
    return [f"    {name:<20} {value:9.2f} {unit}" for name, value in parts.items() if value >= 0.005]


def assumptions(cluster: Cluster) -> list[str]:
    """All numbers that are not counted off the model."""
    here = "" if cluster.gpu.name == "h100" else f"; {cluster.gpu.name} is scaled by its data sheet"
    share, hop, hidden = 100 * links.LINK_SHARE, 1e6 * links.HOP_S, 100 * links.OVERLAP
    return [
        f"measured on {MEASURED_ON}: products of 5 sizes, attention of 2, 3 whole steps, copies at "
        f"{MEASURED_COPY_TB_S} TB/s{here}",
        f"a product takes operations / ({PRODUCT_SHARE:.2f} of peak) + {TRAFFIC_SHARE} x bytes / bandwidth + "
        f"{1e6 * LAUNCH_S:.1f} us: within 11 % of the five",
        "elementwise work moves {float32} x width bytes a token and residual branch, {autocast} with a "
        "bfloat16 residual stream, {fused} with fused kernels: fitted to the whole steps (within 15 %) and "
        "to seven of vidworld's own (within 11 %)".format(
            **counts.BRANCH_BYTES, fused=counts.FUSED_BRANCH_BYTES
        ),
        f"attention works on tiles of {counts.TILE} queries, or as fast as 12 tensors can be moved",
        "what is kept for the backward pass is traced from the model's own code; compiled blocks keep what "
        "min-cut rematerialisation keeps",
        f"the backward pass works on {sizes.WORKING_BLOCKS:g} more block",
        f"CUDA takes {sizes.CONTEXT_GIB} GiB, NCCL {sizes.NCCL_GIB:g} GiB, fragmentation "
        f"{100 * sizes.FRAGMENTATION:.0f} % of all else",
        f"collectives reach {share:.0f} % of the slowest link that they cross, and take {hop:.0f} us a hop; "
        "gradients and weights travel as float32",
        f"ddp hides what it sends behind {hidden:.0f} % of the backward pass, fsdp2 behind that of all "
        "passes, DeepSpeed nothing",
        f"AdamW moves {counts.ADAMW_BYTES} bytes a weight; Muon {counts.MUON_BYTES}, and does Newton-Schulz",
        "forward passes of the bootstrap and of imagined histories are in every step, as late in training",
        "no time for data, logs, validation, checkpoints, compilation, stragglers and faults",
    ]
