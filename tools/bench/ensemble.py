"""Measure an ensemble: frames per second of J members with M samples each, in four ways, in one process.

    python tools/bench/ensemble.py --run runs/lab --device cuda --budget-s 300    # the target: M = 32 x J = 4
    python tools/bench/ensemble.py --size 8x256 --samples 4 --frames 4 --repeats 2 --window 8    # toy size

Without --run weights are random: speed does not depend on them. A frame is one moment of all M x J futures,
denoised, committed and decoded. Ways: `engine` (a `RolloutEngine`: each member's rows in turn, on a GPU all
in one graph), `plain` (the differentiable world), `vmap` (the plain world with the members' weights stacked
and `torch.func.vmap` over them), and `alone`, what as many rows cost an engine of one member. `training` is
the time of a training step with members of low rank that share a network, over that without. Every row is
written as soon as it is measured. Before it is timed, `vmap` is held to what `plain` computes.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rollout_cases import SIZES, full_prompt, make_world
from table import add_rows, cpu_name
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from vidworld.config import parse
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import ConfigError, UserError
from vidworld.model.cache import KeyValue, KVCache
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, Streams
from vidworld.trainer.tasks import Moment, WorldTask
from vidworld.types import Batch, Frames, SignalLevel
from vidworld.world.engine import RolloutEngine
from vidworld.world.ensemble import Ensemble
from vidworld.world.load import find, load
from vidworld.world.spec import WorldSpec
from vidworld.world.state import WorldState
from vidworld.world.world import WorldModel

Way = Literal["engine", "compiled", "plain", "vmap", "alone", "training"]
CLOSE = 2e-2
"""Difference of latents between `vmap` and `plain` over their size at most: rounding, bfloat16 on a GPU."""


@dataclass(frozen=True)
class Options:
    """Time rollouts of an ensemble: of a run, or of worlds with random weights."""

    run: Path | None = None
    """A run or export, or `lab`: its members, or --members noisy copies where it has none."""
    size: str = "12x384"
    """Layers x width, of the sizes in tools/bench/rollout_cases.py; not with --run."""
    samples: int = 32
    members: int = 4
    steps: int = 1
    """Denoising steps a frame."""
    ways: tuple[Way, ...] = ()
    """Default: engine, alone, plain, vmap, training; on a GPU also compiled."""
    window: int = 16
    frames: int = 16
    """Frames of each measured rollout."""
    repeats: int = 3
    batch: int = 8
    """Clips of a training step, of `frames` frames."""
    rank: int = 8
    """Of members that share a network."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    budget_s: float = 540.0
    """Nothing new begins after so many seconds."""
    out: Path | None = Path("benchmarks/uncertainty.json")
    """Rows are added here; `None`: only print."""


class Stacked(nn.Module):
    """Networks of one shape as one, for rows that go by member: `torch.func.vmap` over stacked weights.

    Shapes: J members, B rows of each.
    """

    def __init__(self, models: Sequence[CausalDiT]) -> None:
        super().__init__()
        self.config, self.shape, self.count = models[0].config, models[0].shape, len(models)
        self.first = models[0]
        self._weights, self._buffers_of = stack_module_state(list(models))

    def forward(
        self,
        frames: Frames,
        level: SignalLevel,
        step_BT: Tensor,
        conditioning: Conditioning,
        *,
        streams: Streams,
        cache: KVCache | None = None,
        commit: bool = False,
    ) -> tuple[Frames, KVCache | None]:
        """As `CausalDiT.forward`, of J * B rows."""
        layers = () if cache is None else tuple(one for layer in cache.layers for one in layer)
        noise = () if conditioning.noise_BTX is None else (conditioning.noise_BTX,)
        given = (
            frames.latents_BTVChw,
            frames.proprio_BTS,
            level.signal,
            step_BT,
            conditioning.actions_BTkA,
            conditioning.keep_BT,
            conditioning.embodiment_B,
        )

        def one(weights: Any, buffers: Any, given: Any, noise: Any, layers: Any) -> tuple[Tensor, ...]:
            latents, proprio, signal, step, actions, keep, embodiment = given
            pairs = [KeyValue(*layers[i : i + 2]) for i in range(0, len(layers), 2)]
            found, new = functional_call(
                self.first,
                (weights, buffers),
                (
                    Frames(latents, proprio),
                    SignalLevel.from_signal(signal),
                    step,
                    Conditioning(actions, keep, embodiment, noise[0] if noise else None),
                ),
                {"streams": streams, "cache": KVCache(tuple(pairs)) if pairs else None, "commit": commit},
            )
            kept = () if new is None else tuple(one for layer in new.layers for one in layer)
            return (found.latents_BTVChw, found.proprio_BTS, *kept)

        def parted(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.unflatten(0, (self.count, -1)) for tensor in tensors)

        latents, proprio, *kept = vmap(one)(
            self._weights, self._buffers_of, parted(given), parted(noise), parted(layers)
        )
        whole = [tensor.flatten(0, 1) for tensor in kept]
        new = KVCache(tuple(KeyValue(*whole[i : i + 2]) for i in range(0, len(whole), 2))) if whole else None
        return Frames(latents.flatten(0, 1), proprio.flatten(0, 1)), new


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure, print and write the rows."""
    options = parse(Options, arguments, prog=prog)
    if options.size not in SIZES:
        raise ConfigError("--size", got=options.size, expected=" or ".join(SIZES))
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    gpu = options.device == "cuda"
    ensemble = make_ensemble(options) if options.run is None else open_ensemble(options)
    sampler = replace(ensemble.spec.sampler, steps=options.steps)
    prompt = full_prompt(ensemble.spec, sampler)
    state = ensemble.reset(prompt, num_samples=options.samples, sampler=sampler)
    actions = np.zeros((options.frames, len(ensemble.spec.contracts[0].action)), np.float32)
    rows = options.samples * options.members
    name = f"uncertainty.{'' if gpu else 'cpu_'}fps.m{options.samples}.j{options.members}"
    target = options.run is not None
    config = ensemble.spec.model
    what = f"{config.depth}x{config.width}"
    device = torch.cuda.get_device_name() if gpu else cpu_name()
    command = " ".join(["python", "tools/bench/ensemble.py", *arguments])
    unit = (
        f"frames/s, each of {rows} futures, decoded; {what}, {ensemble.spec.width} px, "
        f"{options.steps} step(s), window {sampler.window} full"
    )
    unit += "" if gpu else f", CPU seconds, {options.threads} thread(s)"

    def add(row: str, value: float, what: str) -> None:
        print(f"{row:<46} {value:12,.3f} {what}", flush=True)
        if options.out is not None:
            found = {row: (round(value, 4), what)}
            add_rows(options.out, found, device=device, command=command, packages=("torch",))

    default: tuple[Way, ...] = ("engine", "alone", "plain", "vmap", "training")
    best = 0.0
    for way in options.ways or ((*default, "compiled") if gpu else default):
        if time.monotonic() - began > options.budget_s:
            print(f"left out for want of time: {way}", flush=True)
            continue
        if way == "training" and options.run is not None:
            continue
        if way == "training":
            train_cost(options, add)
            continue
        run = runner(way, ensemble, sampler, state, actions)
        per_s = options.frames / seconds(run, options)
        label = name if target else f"{name}.{options.size}"
        add(f"{label}.{way}", per_s, unit)
        if way in ("engine", "compiled") and per_s > best:
            best = per_s
            add(label, best, unit)


@torch.no_grad()
def runner(
    way: Way, ensemble: Ensemble, sampler: Any, state: WorldState, actions: np.ndarray
) -> Callable[[], object]:
    """A rollout in the way asked for."""
    match way:
        case "engine" | "compiled":
            engine = RolloutEngine(ensemble, sampler=sampler, compile=way == "compiled")
            return lambda: engine.rollout(state, actions, check=False)
        case "plain":
            return lambda: ensemble.rollout(state, actions, sampler=sampler, check=False)
        case "alone":
            member = ensemble.members[0]
            own = replace(state, world=member.digest, member_B=torch.zeros_like(state.member_B))
            single = RolloutEngine(member, sampler=sampler)
            return lambda: single.rollout(own, actions, check=False)
        case "vmap":
            stacked: Any = Stacked(ensemble.networks)
            world = WorldModel(ensemble.spec, stacked, ensemble.normalizer, ensemble.tokenizer)
            own = replace(state, world=world.digest)
            got = world.rollout(own, actions[:2], sampler=sampler, decode=False).latents_BTVChw
            expected = ensemble.rollout(state, actions[:2], sampler=sampler, decode=False).latents_BTVChw
            apart = float((got - expected).abs().max())
            if not apart < CLOSE * float(expected.abs().max()):
                raise ConfigError("vmap", got=f"latents {apart:.3g} apart from the plain ensemble's")
            return lambda: world.rollout(own, actions, sampler=sampler, check=False)
    raise ConfigError("--ways", got=way)


def train_cost(options: Options, add: Callable[[str, float, str], None]) -> None:
    """Seconds of a training step (forward and backward) with members that share a network, and without."""
    config, pixels = SIZES[options.size]
    taken = []
    for members in (0, options.members):
        shared = replace(config, members=members, member_rank=options.rank)
        world = make_world(shared, pixels, options.window, options.device)
        task = WorldTask(world.model.requires_grad_(True), world.normalizer, ObjectiveConfig())
        shape, device = world.spec.shape, world.device
        size = (options.batch, options.frames)
        batch = Batch(
            ids=tuple(map(str, range(options.batch))),
            actions_BTA=torch.zeros(*size, shape.action_dims, device=device),
            proprio_BTS=torch.zeros(*size, shape.proprio_dims, device=device),
            embodiment_B=torch.zeros(options.batch, dtype=torch.int64, device=device),
            latents_BTVChw=torch.randn(
                *size, shape.views, shape.channels, shape.height, shape.width, device=device
            ),
        )
        generator = torch.Generator(device).manual_seed(0)

        def step(task: WorldTask = task, batch: Batch = batch, generator: Any = generator) -> None:
            with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
                loss = task(batch, generator, Moment(progress=0.0))["loss"]
            loss.backward()
            task.zero_grad()

        taken.append(seconds(step, options))
    kind = "" if options.device == "cuda" else "cpu_"
    name = f"uncertainty.{kind}train_cost.j{options.members}.r{options.rank}.{options.size}"
    add(
        name,
        taken[1] / taken[0],
        f"time of a step over that without members; {options.batch} clips, not compiled",
    )


def seconds(run: Callable[[], object], options: Options) -> float:
    """Of a rollout, after one to warm up: median on a GPU; on a CPU the least CPU seconds a thread."""
    gpu = options.device == "cuda"

    def timed() -> float:
        before = time.perf_counter() if gpu else time.process_time()
        run()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - before if gpu else (time.process_time() - before) / options.threads

    timed()
    taken = [timed() for _ in range(options.repeats)]
    return statistics.median(taken) if gpu else min(taken)


def make_ensemble(options: Options) -> Ensemble:
    """Members of one shape with random weights of their own."""
    return _apart(
        [make_world(*SIZES[options.size], options.window, options.device) for _ in range(options.members)]
    )


def open_ensemble(options: Options) -> Ensemble:
    """Members of a run; a run without members is opened again and again."""
    assert options.run is not None
    shared = WorldSpec.read(find(options.run).directory).model.members
    if shared:
        found = load(options.run, options.device, members=options.members)
        assert isinstance(found, Ensemble)
        return found
    return _apart([load(options.run, options.device) for _ in range(options.members)])


def _apart(members: Sequence[WorldModel]) -> Ensemble:
    for index, member in enumerate(members):
        generator = torch.Generator().manual_seed(index)
        for parameter in member.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(0.02 * noise * parameter.std(unbiased=False))
    return Ensemble(members)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/ensemble.py")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
