"""What ranks send each other, and how long it takes over the links of a node and between nodes."""

import math
from dataclasses import dataclass

from vidworld.trainer.plan.hardware import Gpu

# Share of a link's data sheet that collectives of many megabytes reach, and the time of one hop.
LINK_SHARE = 0.75
HOP_S = 15e-6
# Share of computing behind which DDP (backward pass) and FSDP2 (all passes) hide what they send; DeepSpeed's
# ZeRO is told not to.
OVERLAP = 0.9
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Strategy:
    """How weights, gradients and moments lie across ranks, and what is sent in a step."""

    name: str
    shards_optimizer: bool = False
    shards_gradients: bool = False
    shards_weights: bool = False
    deepspeed: bool = False

    def reductions(self) -> float:
        """Passes over all gradients, in reduce-scatters: an all-reduce is two."""
        return 1.0 if self.shards_gradients or self.shards_weights else 2.0

    def gathers(self, passes: float, accumulation: int) -> float:
        """All-gathers of all weights in a step of `passes` forward and backward passes a micro-batch."""
        if self.shards_weights:
            return passes * accumulation
        return 1.0 if self.shards_optimizer else 0.0


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("ddp"),
        Strategy("zero1", shards_optimizer=True, deepspeed=True),
        Strategy("zero2", shards_optimizer=True, shards_gradients=True, deepspeed=True),
        Strategy("zero3", shards_optimizer=True, shards_gradients=True, shards_weights=True, deepspeed=True),
        Strategy("fsdp2", shards_optimizer=True, shards_gradients=True, shards_weights=True),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 1
    network_gb_s: float = 50.0
    """Between nodes, one direction, for each GPU (400 Gbit/s is 50)."""

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def slowest_link_gb_s(self) -> float:
        """The link that a ring through all ranks has to cross."""
        return min(self.gpu.link_gb_s, self.network_gb_s) if self.nodes > 1 else self.gpu.link_gb_s

    def collective_s(self, num_bytes: float, ranks: int | None = None) -> float:
        """One reduce-scatter or all-gather of `num_bytes` over all ranks, in buckets, on a ring or tree."""
        ranks = ranks or self.ranks
        if ranks == 1:
            return 0.0
        link = self.gpu.link_gb_s if ranks <= self.gpus_per_node else self.slowest_link_gb_s
        sent = num_bytes * (ranks - 1) / ranks
        hops = math.ceil(math.log2(ranks)) * math.ceil(num_bytes / BUCKET_BYTES)
        return sent / (1e9 * LINK_SHARE * link) + HOP_S * hops


def communication(
    strategy: Strategy, cluster: Cluster, weight_bytes: int, *, passes: float, accumulation: int
) -> dict[str, float]:
    """Seconds of each kind of exchange in one step, before any of it is hidden; float32 on the wire."""
    return {
        "gradients": strategy.reductions() * cluster.collective_s(weight_bytes),
        "weights": strategy.gathers(passes, accumulation) * cluster.collective_s(weight_bytes),
    }


def exposed(strategy: Strategy, sent: dict[str, float], compute_s: float) -> float:
    """Seconds of communication that computing for `compute_s` at the same time does not hide."""
    if strategy.deepspeed:
        return sum(sent.values())
    return max(0.0, sum(sent.values()) - OVERLAP * compute_s)
