"""Kill a training again and again, and compare its end with that of one that nobody disturbed.

    python tools/bench/soak.py [--steps 2000] [--kill-every 100] [--ranks 2] [--strategy ddp]

Trains a tiny world model on the planar arm with `vidworld train` on several CPU ranks. Every `kill_every`
steps or so one rank, drawn at random, gets SIGKILL at whatever it does then; `vidworld.trainer.supervise`
starts the run again from its newest checkpoint. In the end every tensor of the last checkpoint (weights,
averages, moments) must be the same, bit by bit.
"""

import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from table import add_rows, cpu_name

from vidworld.config import from_mapping, parse, to_yaml
from vidworld.data.convert import ConvertOptions, convert
from vidworld.errors import UserError, VidworldError
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.trainer import heartbeat
from vidworld.trainer.checkpoint import CheckpointStore, newest_step
from vidworld.trainer.config import TokenizerTraining, WorldTraining, read_training
from vidworld.trainer.supervise import supervise
from vidworld.trainer.train import train

GRACE_S = 60.0


@dataclass(frozen=True)
class Options:
    """Kill a training again and again, and compare."""

    steps: int = 2000
    kill_every: int = 100
    """Steps between two kills, on average."""
    ranks: int = 2
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    save_every: int = 20
    seed: int = 0
    name: str = "reliability.soak"
    """First part of the figures' names."""
    work: Path | None = None
    """Where the runs go and stay; default: a temporary folder."""
    out: Path | None = Path("benchmarks/reliability.json")
    """Rows are added here; `None`: only print."""


class Ranks:
    """The processes of one start; it has ended when all have.

    They are forked from this one, which has imported everything and done nothing with it: so a start costs no
    imports, and a soak of many starts minutes.
    """

    def __init__(self, count: int, config: Path, run: Path, output: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.codes: list[int | None] = [None] * count
        self.children = [
            forked(
                lambda: train(read_training(config), run, resume=True, progress_bar=False),
                output,
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
            )
            for rank in range(count)
        ]

    def ended(self, rank: int) -> bool:
        """Whether a rank has ended."""
        if self.codes[rank] is None:
            child, status = os.waitpid(self.children[rank], os.WNOHANG)
            if child:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return self.codes[rank] is not None

    def wait(self) -> int:
        """Exit code of the first that failed, or 0; the others get a grace period to end by themselves."""
        ranks = range(len(self.children))
        while not sum(self.ended(rank) for rank in ranks):
            time.sleep(0.05)
        deadline = time.monotonic() + GRACE_S
        while sum(self.ended(rank) for rank in ranks) < len(ranks):
            time.sleep(0.05)
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
        return next((code for code in self.codes if code), 0)

    def send_signal(self, sig: int, /) -> None:
        """To every rank that runs."""
        for rank in range(len(self.children)):
            self.kill(rank, sig)

    def kill(self, rank: int, sig: int) -> None:
        """Send a signal to one rank, if it runs."""
        if self.codes[rank] is None:
            os.kill(self.children[rank], sig)


def forked(work: Callable[[], object], output: Path, environment: Mapping[str, str]) -> int:
    """Run `work` in a forked process that writes to `output`; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        work()
        code = 0
    except VidworldError as error:
        print(f"vidworld: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Killer:
    """Sends SIGKILL to a rank when the run has come some way since its last start."""

    def __init__(self, options: Options, run: Path) -> None:
        self.options, self.run = options, run
        self.random = random.Random(options.seed)
        self.kills = 0

    def watch(self, ranks: Ranks) -> None:
        """Kill one of these, unless they end before; in a thread of its own."""
        begin = max(0, newest_step(self.run / "checkpoints"))
        fatal = begin + round(self.options.kill_every * self.random.uniform(0.4, 1.6))
        rank, delay_s = self.random.randrange(len(ranks.children)), self.random.uniform(0, 1)

        def kill() -> None:
            while ranks.codes[rank] is None:
                if newest_step(self.run / "checkpoints") >= fatal:
                    time.sleep(delay_s)  # some way into the steps after, or the next save
                    self.kills += ranks.codes[rank] is None
                    ranks.kill(rank, signal.SIGKILL)
                    return
                time.sleep(0.02)

        threading.Thread(target=kill, daemon=True).start()


def last_step(run: Path) -> int:
    """The last step that any rank said it was in; who outlives another says it at the end."""
    return max((beat.step for beat in heartbeat.read_all(run)), default=-1)


def main(arguments: Sequence[str], prog: str) -> None:
    """Train twice, compare, print and write the rows."""
    options = parse(Options, arguments, prog=prog)
    torch.set_num_threads(1)
    if options.work is None:
        with tempfile.TemporaryDirectory() as folder:
            rows = soak(options, Path(folder))
    else:
        rows = soak(options, options.work)
    for name, (value, unit) in rows.items():
        print(f"{name:<40} {value:10.2f} {unit}")
    if options.out is not None:
        add_rows(
            options.out,
            rows,
            device=cpu_name(),
            command=" ".join(["python", "tools/bench/soak.py", *arguments]),
            packages=("torch",),
        )


def soak(options: Options, work: Path) -> dict[str, tuple[float, str]]:
    """The figures; raises SystemExit when a tensor differs."""
    # In a process of its own: this one must stay as it is, to be forked.
    work.mkdir(parents=True, exist_ok=True)
    config = work / "soak.yaml"
    if os.waitpid(forked(lambda: prepare(options, work, config), work / "prepare.txt", {}), 0)[1]:
        raise SystemExit(f"no data to train on: see {work / 'prepare.txt'}")
    calm, disturbed = work / "calm", work / "disturbed"
    begin = time.monotonic()
    plain = Ranks(options.ranks, config, calm, work / "calm.txt")
    if plain.wait():
        raise SystemExit(f"the undisturbed run failed: see {work / 'calm.txt'}")
    calm_s = time.monotonic() - begin

    killer = Killer(options, disturbed)
    starts: list[int] = []
    repeated: list[int] = []

    def start(attempt: int) -> Ranks:
        starts.append(attempt)
        if attempt:
            saved = max(0, newest_step(disturbed / "checkpoints"))
            repeated.append(max(0, last_step(disturbed) - saved))
        heartbeat.clear(disturbed)
        ranks = Ranks(options.ranks, config, disturbed, work / "disturbed.txt")
        killer.watch(ranks)
        return ranks

    begin = time.monotonic()
    code = supervise(
        start,
        lambda: newest_step(disturbed / "checkpoints"),
        max_restarts=10 * options.steps // options.kill_every + 10,
        explain=lambda code: heartbeat.exit_code(disturbed, code),
        sleep=lambda seconds: None,
    )
    if code:
        raise SystemExit(f"the disturbed run ended with exit code {code}: see {work / 'disturbed.txt'}")
    disturbed_s = time.monotonic() - begin
    same, total = compare(calm, disturbed)
    name = options.name
    if same < total or not total:
        raise SystemExit(f"only {same} of {total} tensors are the same")
    return {
        f"{name}.steps": (options.steps, "steps"),
        f"{name}.kills": (killer.kills, "kills"),
        f"{name}.restarts": (len(starts) - 1, "restarts"),
        f"{name}.identical_tensors": (100.0 * same / total, "%"),
        f"{name}.repeated_steps": (sum(repeated), "steps"),
        f"{name}.time_ratio": (disturbed_s / calm_s, "x the undisturbed run"),
    }


def prepare(options: Options, work: Path, config: Path) -> None:
    """Data, a tokenizer and the YAML of the run."""
    source = PlanarSource(10, 0, PlanarConfig(frames=20, size=32))
    convert(source, ConvertOptions(out=work / "data", size="32x32", workers=1))
    blocks = {"widths": [16, 16, 16], "encoder_blocks": [0, 0, 1], "decoder_blocks": [0, 0, 1]}
    common = {"data": str(work / "data"), "wandb": "off"}
    look = {"validate_every": 0, "sample_every": 0, "validate_clips": 2, "validate_batches": 1, "horizon": 2}
    tokenizer = from_mapping(
        TokenizerTraining,
        common
        | {
            "kind": "tokenizer",
            "tokenizer": blocks,
            "loader": {"batch_size": 4, "workers": 0},
            "loop": {"steps": 4},
            "look": look,
        },
    )
    train(tokenizer, work / "tokenizer", progress_bar=False)
    world = from_mapping(
        WorldTraining,
        common
        | {
            "kind": "world",
            "tokenizer": str(work / "tokenizer"),
            "latents": str(work / "latents"),
            "model": {"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2},
            "loader": {"clip_frames": 6, "batch_size": 4, "workers": 0},
            "optim": {"name": "adamw", "warmup_steps": 20},
            "engine": {"strategy": options.strategy},
            "loop": {
                "steps": options.steps,
                "log_every": 20,
                "save_every": options.save_every,
                "silent_s": 20,  # and so a heartbeat every 2.5 s
            },
            "look": look,
        },
    )
    config.write_text(to_yaml(world))


def compare(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors of the last checkpoints are the same, of how many."""
    found = []
    for run in (one, other):
        saved = CheckpointStore(run / "checkpoints").newest()
        assert saved is not None
        names = sorted(path.stem for path in saved.directory.glob("*.safetensors"))
        found.append({f"{kind}/{n}": t for kind in names for n, t in saved.tensors(kind).items()})
    if found[0].keys() != found[1].keys():
        raise SystemExit("the checkpoints hold other tensors")
    return sum(torch.equal(found[0][name], found[1][name]) for name in found[0]), len(found[0])


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "soak.py")
    except UserError as error:
        print(f"soak.py: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
