"""`vidworld plan CONFIG --gpu h100 --nodes N --gpus-per-node G`: memory, time and cost before a run."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vidworld.config import parse
from vidworld.errors import ConfigError, UserError
from vidworld.model.inputs import FrameShape, Streams
from vidworld.tokenizers.base import num_latent_frames
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import TokenizerTraining, WorldTraining, read_training
from vidworld.trainer.corpus import open_corpus, world_spec
from vidworld.trainer.plan.cluster import Cluster
from vidworld.trainer.plan.estimate import Estimate, Layout, Subject, best, estimate
from vidworld.trainer.plan.hardware import gpu_named
from vidworld.trainer.plan.report import as_text, assumptions
from vidworld.trainer.run import CONFIG

DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Predict memory, step time and cost of training a world; nothing is started and no GPU is needed."""

    config: tyro.conf.Positional[Path]
    """YAML of the run, or the directory of one."""
    gpu: str = "h100"
    """h100, h200, b200, a100, a100-40gb, l40s, a10g, rtx3090, rtx4090 or rtx5090."""
    nodes: int = 1
    gpus_per_node: int = 1
    network_gb_s: float = 50.0
    """Between nodes, for each GPU, one direction: 400 Gbit/s is 50."""
    tokens: float | None = None
    """Budget: tokens that the network reads, such as 1e12."""
    steps: int | None = None
    """Budget: optimizer steps; by default `loop.steps`."""
    price_per_gpu_hour: float | None = None
    """In any currency."""
    latent_shape: str | None = None
    """VIEWSxCHANNELSxHEIGHTxWIDTH of a latent frame; by default what `data` and `tokenizer` say."""
    action_dims: int = 7
    """Read with `latent_shape` only."""
    proprio_dims: int = 7
    """Read with `latent_shape` only."""
    time_stride: int = 1
    """Camera frames that one latent frame stands for; read with `latent_shape` only."""
    json: bool = False
    """Print one JSON object instead of tables."""
    training: Annotated[WorldTraining, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    subject: Subject
    cluster: Cluster
    asked: Estimate | None
    """The settings of the config; None where its batch cannot be cut so."""
    asked_fault: str | None
    suggested: Estimate | None
    """The best way to the same batch."""
    larger: Estimate | None
    """The best way with any batch, where that is at least 5 % faster; or the only one."""
    steps: float | None
    price_per_gpu_hour: float | None

    @property
    def chosen(self) -> Estimate | None:
        """What the budget is counted with: the config if it fits, else the suggestion."""
        return self.asked if self.asked is not None and self.asked.fits else self.suggested or self.larger

    @property
    def budget(self) -> dict[str, float]:
        """Days, GPU hours and cost of the budget; empty without one."""
        chosen = self.chosen
        if chosen is None or self.steps is None:
            return {}
        days = self.steps * chosen.seconds / DAY_S
        found = {
            "steps": self.steps,
            "tokens": self.steps * chosen.tokens_per_step,
            "days": days,
            "gpu_hours": 24 * days * self.cluster.ranks,
        }
        if self.price_per_gpu_hour is not None:
            found["cost"] = found["gpu_hours"] * self.price_per_gpu_hour
        return found


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld plan`. Exit code 0 even when nothing fits: that is an answer."""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            parse(PlanOptions, arguments, prog=f"{prog} CONFIG.yaml")
        raise ConfigError("first argument", fix=f"give a YAML or a run: {prog} CONFIG.yaml --gpu h100 ...")
    path = Path(arguments[0])
    training = read_training(path / CONFIG if (path / CONFIG).is_file() else path)
    if isinstance(training, TokenizerTraining):
        raise ConfigError("kind of training to plan", where=path, got="tokenizer", expected="world")
    options = parse(PlanOptions, arguments, prog=prog, default=PlanOptions(config=path, training=training))
    plan = make_plan(options)
    if options.json:
        json.dump(to_mapping(plan), sys.stdout, indent=1)
        print()
    else:
        print(as_text(plan))


def make_plan(options: PlanOptions) -> Plan:
    """Predict what the options describe. Raises ConfigError for what cannot be."""
    for name in (
        "nodes",
        "gpus_per_node",
        "network_gb_s",
        "tokens",
        "steps",
        "price_per_gpu_hour",
        "time_stride",
    ):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}", got=value, expected="above 0")
    if options.tokens is not None and options.steps is not None:
        raise ConfigError("--tokens and --steps", got="both", expected="one budget")
    training, engine = options.training, options.training.engine
    cluster = Cluster(gpu_named(options.gpu), options.nodes, options.gpus_per_node, options.network_gb_s)
    subject = subject_of(training, frame_shape(options))
    asked = fault = None
    try:
        asked = estimate(subject, cluster, layout_of(training, cluster))
    except ConfigError as error:
        fault = str(error)
    shared = 1 if asked is None else engine.sequence_parallel
    suggested = None
    if asked is not None:
        suggested = best(subject, cluster, batch=training.loader.batch_size, sequence_parallel=shared)
    larger = best(subject, cluster, batch=None, sequence_parallel=shared)
    if larger is not None and suggested is not None and larger.tokens_per_s < 1.05 * suggested.tokens_per_s:
        larger = None
    steps: float | None = options.steps or training.loop.steps
    plan = Plan(subject, cluster, asked, fault, suggested, larger, steps, options.price_per_gpu_hour)
    if options.tokens is not None and plan.chosen is not None:
        plan = dataclasses.replace(plan, steps=math.ceil(options.tokens / plan.chosen.tokens_per_step))
    return plan


def subject_of(training: WorldTraining, shape: FrameShape) -> Subject:
    """What is trained, on GPUs whatever this machine has."""
    targets = training.objective.energy.streams if training.objective.kind == "energy" else 1
    frames = num_latent_frames(training.loader.clip_frames, shape.actions_per_frame)
    return Subject(
        training.model,
        shape,
        Streams(frames, targets=targets),
        muon=training.optim.name == "muon",
        bf16=training.engine.precision != "fp32",
        compiled=training.engine.compile != "off",
        objective=training.objective,
        latent_cache_gib=training.loader.cache_gb / 1.074,
        fused=training.engine.fused,
    )


def layout_of(training: WorldTraining, cluster: Cluster) -> Layout:
    """The config's own way. Raises ConfigError where its batch cannot be cut so."""
    engine, batch = training.engine, training.loader.batch_size
    parts = engine.accumulation * max(1, cluster.ranks // engine.sequence_parallel)
    if batch % parts:
        raise ConfigError(
            "loader.batch_size",
            got=batch,
            expected=f"a multiple of {parts}, the micro-batches of a step over all GPUs",
            fix=f"such as {-(-batch // parts) * parts}",
        )
    return Layout(
        engine.strategy,
        batch // parts,
        engine.accumulation,
        engine.checkpoint_activations,
        engine.sequence_parallel,
    )


def frame_shape(options: PlanOptions) -> FrameShape:
    """What a latent frame is: from --latent-shape, or from the data and the tokenizer of the config."""
    training = options.training
    if options.latent_shape is not None:
        try:
            views, channels, height, width = map(int, options.latent_shape.lower().split("x"))
        except ValueError:
            raise ConfigError(
                "--latent-shape",
                got=options.latent_shape,
                expected="VIEWSxCHANNELSxHEIGHTxWIDTH, such as 1x16x32x32",
            ) from None
        return FrameShape(
            views, channels, height, width, options.proprio_dims, options.action_dims, options.time_stride
        )
    try:
        return world_spec(training, open_corpus(training), load_tokenizer(training.tokenizer)).shape
    except UserError as error:
        raise ConfigError(
            f"what the model will see is not known ({error})",
            where=options.config,
            fix="make the data and the tokenizer, or say it: --latent-shape VIEWSxCHANNELSxHEIGHTxWIDTH "
            "--action-dims A --proprio-dims S",
        ) from None


def to_mapping(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""

    def of(one: Estimate | None) -> dict[str, Any] | None:
        if one is None:
            return None
        return {
            "layout": dataclasses.asdict(one.layout),
            "fits": one.fits,
            "memory_gib": one.memory_gib,
            "memory_total_gib": one.total_gib,
            "memory_allocated_gib": one.allocated_gib,
            "step_s": one.step_s,
            "step_total_s": one.seconds,
            "sent_s": one.sent_s,
            "tokens_per_step": one.tokens_per_step,
            "tokens_per_s": one.tokens_per_s,
            "mfu": one.model_flops / one.seconds / (1e12 * plan.cluster.gpu.peak_tflops),
        }

    return {
        "parameters": plan.subject.num_parameters,
        "tokens_per_clip": plan.subject.tokens_per_row,
        "gpus": plan.cluster.ranks,
        "config": of(plan.asked),
        "config_fault": plan.asked_fault,
        "suggestion": of(plan.suggested),
        "any_batch": of(plan.larger),
        "budget": plan.budget,
        "assumptions": assumptions(plan.cluster),
    }
