"""One rank of distributed toy runs: torchrun worker.py STRATEGY OUT SCENARIO..."""

import dataclasses
import errno
import hashlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vidworld.errors import PreemptedError, VidworldError
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.heartbeat import Heartbeat
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Loop
from vidworld.trainer.loop_config import LoopConfig
from vidworld.trainer.optim import OptimConfig
from vidworld.types import Batch

# Micro-batches of a step over all ranks: the same clips and noise on 1, 2 and 4 of them.
PARTS = 4
STOP_STEP = 3
FAULTS = ("kill", "freeze", "preempt", "disk")
SILENT_S = 8.0
POISONED_STEP = 4


def toys() -> ModuleType:
    """The tests' conftest, which is no package."""
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loop_of(strategy: str, run: Path, scenario: str, accumulation: int, **settings: Any) -> Loop:
    """A toy run of ten steps, standing at its newest checkpoint."""
    torch.manual_seed(0)
    task = toys().ToyTask()
    optim = OptimConfig(name="adamw", lr=1e-2, warmup_steps=3)
    ema = EMA(task, 0.99)
    config = EngineConfig(strategy=strategy, accumulation=accumulation)
    engine = build_engine(task, config, optim, micro_batch_size=4)
    feed = toys().toy_feed(rank=engine.rank, world_size=engine.world_size, accumulation=accumulation)

    def batches(start: int) -> Iterator[Batch]:
        for index, batch in enumerate(feed.open(start), accumulation * start):
            # The signal, and the bad clip, come to the last rank alone.
            if engine.rank == engine.world_size - 1:
                if scenario == "stop" and index == accumulation * STOP_STEP:
                    os.kill(os.getpid(), signal.SIGTERM)
                if scenario == "poison" and index == accumulation * POISONED_STEP:
                    batch.actions_BTA[0, 0, 0] = float("nan")
            with (run / f"read-{engine.rank}.txt").open("a") as file:
                file.write(f"{index // accumulation} {' '.join(batch.ids)}\n")
            yield batch

    run.mkdir(exist_ok=True, parents=True)
    loop = Loop(
        task,
        ema,
        dataclasses.replace(feed, open=batches),
        engine,
        optim,
        LoopConfig(**{"steps": 10, "log_every": 1, "keep": 20, **settings}),
        run=run,
        seed=0,
        accumulation=accumulation,
        log=RunLog(run, active=engine.rank == 0, progress_bar=False),
    )
    if (saved := loop.store.newest()) is not None:
        loop.resume(saved)
    return loop


def digest(loop: Loop) -> str:
    """Of this rank's weights and moments."""
    found = hashlib.sha256()
    moments, _ = loop.engine.optimizer_state()
    for tensor in (*(values for _, values in loop.engine.weights()), *moments.values()):
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def watch_digests(loop: Loop, run: Path) -> None:
    """Note what weights and moments are before and after each step."""
    plain = loop.step

    def watched(micro_batches: Any) -> None:
        step, before = loop.clock.step, digest(loop)
        plain(micro_batches)
        with (run / f"digests-{loop.engine.rank}.txt").open("a") as file:
            file.write(f"{step} {before} {digest(loop)}\n")

    loop.step = watched  # type: ignore[method-assign]


def fault(strategy: str, run: Path, scenario: str) -> None:
    """A run in which something happens to the last rank; every rank leaves with the exit code it should."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_last = rank == world_size - 1
    run.mkdir(exist_ok=True, parents=True)
    try:
        with Heartbeat(run, rank=rank, world_size=world_size, silent_s=SILENT_S) as heart:
            settings = {"steps": 10_000, "save_every": 2, "save_in_background": scenario == "disk"}
            loop = loop_of(strategy, run, scenario, PARTS // world_size, **settings)
            loop.heart = heart
            plain = loop.step

            def step(micro_batches: Any) -> None:
                if is_last and loop.clock.step == STOP_STEP:
                    match scenario:
                        case "kill":
                            os.kill(os.getpid(), signal.SIGKILL)
                        case "freeze":
                            heart.beat()  # so that the others have heard of it, however slow the machine
                            time.sleep(2 * SILENT_S / 8)
                            os.kill(os.getpid(), signal.SIGSTOP)
                        case "preempt":
                            os.kill(os.getpid(), signal.SIGTERM)
                plain(micro_batches)

            def full_disk(point: str) -> None:
                if is_last and scenario == "disk" and point == "optimizer" and loop.store.names():
                    raise OSError(errno.ENOSPC, "No space left on device")

            loop.step = step  # type: ignore[method-assign]
            loop.saving.writer.reached = full_disk
            loop.fit()
    except VidworldError as error:
        print(f"vidworld: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def train(strategy: str, run: Path, scenario: str) -> None:
    """Ten steps, or what is left of them after the run's checkpoint."""
    accumulation = PARTS // int(os.environ["WORLD_SIZE"])
    until = None
    if scenario.startswith("until"):
        # Saves as it stands before it trains, so that what was loaded can be compared with what was saved.
        until = int(scenario.removeprefix("until"))
    loop = loop_of(strategy, run, scenario, accumulation)
    if scenario == "poison":
        watch_digests(loop, run)
    with loop.log:
        if until is not None:
            loop.saving.saved_step = -1
            loop.save()
            loop.saving.finish()
            plain = loop.step

            def stopped(micro_batches: Any) -> None:
                if loop.clock.step == until - 1 and until < 10:
                    os.kill(os.getpid(), signal.SIGTERM)
                plain(micro_batches)

            loop.step = stopped  # type: ignore[method-assign]
        try:
            loop.fit()
        except PreemptedError as error:
            print(error, file=sys.stderr)


def main() -> None:
    strategy, out, *scenarios = sys.argv[1:]
    if scenarios[0] in FAULTS:
        fault(strategy, Path(out), scenarios[0])
        return
    for scenario in scenarios:
        run = {"stop": "parts", "resume": "parts"}.get(scenario, scenario)
        train(strategy, Path(out) / ("elastic" if scenario.startswith("until") else run), scenario)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
