"""A toy task, small enough to train in milliseconds, with every part that the loop uses."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vidworld.config import from_mapping
from vidworld.data.convert import ConvertOptions, convert
from vidworld.errors import DataError
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import TokenizerTraining, WorldTraining
from vidworld.trainer.ema import EMA
from vidworld.trainer.encode import encode_dataset
from vidworld.trainer.engine import EngineConfig, build_engine
from vidworld.trainer.logging import RunLog
from vidworld.trainer.loop import Feed, Loop
from vidworld.trainer.loop_config import LoopConfig
from vidworld.trainer.optim import OptimConfig
from vidworld.trainer.tasks import Moment, Task
from vidworld.trainer.train import train
from vidworld.types import Batch

DIMS = 6
WORKER = Path(__file__).with_name("worker.py")


class ToyTask(Task[nn.Sequential]):
    """Regress proprioception on actions through two matrices, with noise from the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(DIMS, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, DIMS))

    def forward(self, batch: Batch, generator: torch.Generator, moment: Moment) -> dict[str, torch.Tensor]:
        noise = torch.randn(batch.actions_BTA.shape, generator=generator)
        error = self.net(batch.actions_BTA + 0.1 * noise) - batch.proprio_BTS
        loss = error.square().mean()
        return {"loss": loss, "absolute": error.abs().mean().detach()}

    def matrices(self) -> list[nn.Parameter]:
        return [self.net[2].weight]


class MaskedTask(ToyTask):
    """Frames whose first action is not above zero are masked; micro-batches weigh by what is left."""

    def forward(self, batch: Batch, generator: torch.Generator, moment: Moment) -> dict[str, torch.Tensor]:
        error = (self.net(batch.actions_BTA) - batch.proprio_BTS).square().mean(-1)
        mask = (batch.actions_BTA[..., 0] > 0).float()
        return {"loss": (error * mask).sum() / mask.sum().clamp(min=1)}

    def weight(self, batch: Batch) -> torch.Tensor:
        return (batch.actions_BTA[..., 0] > 0).sum()


def make_batch(index: int, rows: int = 4, seed: int = 0) -> Batch:
    """Clips that depend on their index only."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    actions = torch.randn(rows, 3, DIMS, generator=generator)
    return Batch(
        ids=tuple(f"clip{index}-{row}@0" for row in range(rows)),
        actions_BTA=actions,
        proprio_BTS=actions.roll(1, -1) * 0.5,
        embodiment_B=torch.zeros(rows, dtype=torch.int64),
    )


def toy_feed(seed: int = 0, *, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> Feed:
    """Endless toy micro-batches laid out as the loader lays out its own."""

    def batches(step: int) -> Iterator[Batch]:
        while True:
            for micro in range(accumulation):
                yield make_batch((step * accumulation + micro) * world_size + rank, seed=seed)
            step += 1

    def require_same(stored: Mapping[str, Any], where: object) -> None:
        if stored["seed"] != seed:
            raise DataError("seed of the sample order", where=where, got=seed, expected=stored["seed"])

    return Feed(batches, lambda step: {"seed": seed, "step": step}, require_same)


@pytest.fixture
def make_loop(tmp_path: Path) -> Callable[..., Loop]:
    """Build a loop on the toy task in a run directory, resumed when it has a checkpoint."""

    def build(
        run: Path | None = None,
        *,
        task: Task | None = None,
        optim: OptimConfig | None = None,
        engine: EngineConfig | None = None,
        feed: Feed | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Loop:
        run = run or tmp_path / "run"
        run.mkdir(exist_ok=True)
        torch.manual_seed(0)
        task = task or ToyTask()
        engine = engine or EngineConfig()
        config = LoopConfig(**{"steps": 10, "log_every": 1, **settings})
        optim = optim or OptimConfig(name="muon", lr=1e-2, warmup_steps=3)
        ema = EMA(task, config.ema_decay)
        built = build_engine(task, engine, optim, matrices=task.matrices())
        loop = Loop(
            task,
            ema,
            feed or toy_feed(seed, accumulation=engine.accumulation),
            built,
            optim,
            config,
            run=run,
            seed=seed,
            accumulation=engine.accumulation,
            log=RunLog(run, progress_bar=False),
        )
        if (saved := loop.store.newest()) is not None:
            loop.resume(saved)
        return loop

    return build


@pytest.fixture
def toy() -> SimpleNamespace:
    """The toy task's classes and feed, for tests that import nothing from here."""
    return SimpleNamespace(Task=ToyTask, Masked=MaskedTask, feed=toy_feed, batch=make_batch)


@pytest.fixture(scope="session")
def planar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video dataset: ten short episodes of the planar arm, one of them held out."""
    out = tmp_path_factory.mktemp("data") / "planar"
    source = PlanarSource(10, 0, PlanarConfig(frames=20, size=32))
    convert(source, ConvertOptions(out=out, size="32x32", workers=1))
    return out


def tiny_tokenizer(data: Path, **settings: Any) -> TokenizerTraining:
    """Settings of a tokenizer run of a second."""
    base = {
        "kind": "tokenizer",
        "data": str(data),
        "tokenizer": {"widths": [16, 16, 16], "encoder_blocks": [0, 0, 1], "decoder_blocks": [0, 0, 1]},
        "loader": {"batch_size": 4, "workers": 0},
        "loop": {"steps": 4, "log_every": 2},
        "look": {"validate_clips": 4, "validate_batches": 1},
        "wandb": "off",
    }
    return from_mapping(TokenizerTraining, base | settings)


def tiny_world(data: Path, tokenizer: Path, **settings: Any) -> WorldTraining:
    """Settings of a world run of seconds."""
    base = {
        "kind": "world",
        "data": str(data),
        "tokenizer": str(tokenizer),
        "model": {"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2},
        "loader": {"clip_frames": 6, "batch_size": 4, "workers": 0},
        "optim": {"warmup_steps": 2},
        "loop": {"steps": 10, "log_every": 5},
        "look": {"validate_clips": 4, "validate_batches": 1, "horizon": 3, "sample_episodes": 1},
        "wandb": "off",
    }
    return from_mapping(WorldTraining, base | settings)


@pytest.fixture(scope="session")
def tokenizer_run(planar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that was trained for four steps."""
    run = tmp_path_factory.mktemp("runs") / "tokenizer"
    train(tiny_tokenizer(planar), run, progress_bar=False)
    return run


@pytest.fixture(scope="session")
def latents(planar: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planar episodes as latents."""
    out = tmp_path_factory.mktemp("data") / "latents"
    encode_dataset(planar, load_tokenizer(tokenizer_run), out, progress=False)
    return out


@pytest.fixture
def settings() -> SimpleNamespace:
    """Makers of small settings."""
    return SimpleNamespace(tokenizer=tiny_tokenizer, world=tiny_world)


class Ranks:
    """Processes of one distributed run, each with its own exit code and output."""

    def __init__(
        self, count: int, folder: Path, *arguments: str, script: Path = WORKER, port: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(count)]
        layout = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        address = {"MASTER_PORT": str(port or free_port())}
        self.processes = []
        for rank, output in enumerate(self.outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), *arguments],
                        env=os.environ | layout | quiet | address | own,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def codes(self, timeout_s: float = 240) -> list[int]:
        """The exit code of every rank; none is left running."""
        deadline = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def said(self, rank: int) -> str:
        """What a rank wrote on its outputs."""
        return self.outputs[rank].read_text()

    def finished(self) -> str:
        """All that was said by ranks that all ended well."""
        codes = self.codes()
        said = "".join(map(self.said, range(len(codes))))
        assert codes == [0] * len(codes), said[-4000:]
        return said


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start_ranks() -> type[Ranks]:
    """Starts ranks of `worker.py`: start_ranks(count, folder for their outputs, arguments...)."""
    return Ranks
