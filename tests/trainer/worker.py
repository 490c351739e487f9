"""One rank of distributed toy runs: torchrun worker.py STRATEGY OUT SCENARIO..."""

import dataclasses
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import torch

from vidworld.errors import PreemptedError
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Loop, LoopConfig
from vidworld.trainer.optim import OptimConfig

STOP_STEP = 3
POISONED_STEP = 4


def toys() -> ModuleType:
    """The tests' conftest, which is no package."""
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(strategy: str, run: Path, scenario: str) -> None:
    """Ten steps, or what is left of them after the run's checkpoint."""
    torch.manual_seed(0)
    task = toys().ToyTask()
    optim = OptimConfig(name="adamw", lr=1e-2, warmup_steps=3)
    ema = EMA(task, 0.99)
    engine = build_engine(task, EngineConfig(strategy=strategy, accumulation=2), optim, micro_batch_size=4)
    feed = toys().toy_feed(rank=engine.rank, world_size=engine.world_size, accumulation=2)

    def batches(start):
        for index, batch in enumerate(feed.open(start), 2 * start):
            # The signal, and the bad clip, come to the last rank alone.
            if engine.rank == engine.world_size - 1:
                if scenario == "stop" and index == 2 * STOP_STEP:
                    os.kill(os.getpid(), signal.SIGTERM)
                if scenario == "poison" and index == 2 * POISONED_STEP:
                    batch.actions_BTA[0, 0, 0] = float("nan")
            yield batch

    run.mkdir(exist_ok=True, parents=True)
    with RunLog(run, active=engine.rank == 0, progress_bar=False) as log:
        loop = Loop(
            task,
            ema,
            dataclasses.replace(feed, open=batches),
            engine,
            optim,
            LoopConfig(steps=10, log_every=1),
            run=run,
            seed=0,
            accumulation=2,
            log=log,
        )
        if (saved := loop.store.newest()) is not None:
            loop.resume(saved)
        try:
            loop.fit()
        except PreemptedError as error:
            print(error, file=sys.stderr)


def main() -> None:
    strategy, out, *scenarios = sys.argv[1:]
    for scenario in scenarios:
        run = {"stop": "parts", "resume": "parts"}.get(scenario, scenario)
        train(strategy, Path(out) / run, scenario)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
