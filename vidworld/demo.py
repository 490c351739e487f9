"""`vidworld demo`: logs to shards to tokenizer to world model to rollouts to a report, on a laptop's CPU.

`vidworld lab planar` writes the demo's simulated robot logs as shards. Both only call what the other commands
call, with settings that fit two cores and a few minutes.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from vidworld.config import parse
from vidworld.errors import ConfigError

KINDS = ("planar",)


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Make episodes with a ground-truth simulator and write them as shards."""

    kind: tyro.conf.Positional[str]
    """`planar`: an arm that pushes a disc and paints a streak."""
    out: Path
    """Directory of the dataset."""
    episodes: int = 240
    frames: int = 48
    """Frames of an episode, at 10 Hz."""
    size: int = 64
    """Pixels of a side, divisible by 16."""
    seed: int = 0
    """Seed of the first episode; the next ones count up from it."""
    workers: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Robot logs in, simulator out, with one command and no GPU."""

    out: Path = Path("outputs/demo")
    """Directory of everything that is made."""
    data: Path | None = None
    """Your own logs (a LeRobot dataset) or shards; default: a small simulated robot."""
    size: str = "64x64"
    """WIDTHxHEIGHT that your logs are converted to."""
    episodes: int = 240
    """Simulated episodes, or the most that are taken from your logs."""
    tokenizer_minutes: float = 1.6
    world_minutes: float = 5.0
    frames: int = 24
    """Frames that are imagined after a context of 4."""
    seed: int = 0
    overwrite: bool = False
    """Replace what an earlier demo left in `out`."""


def lab_main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld lab`."""
    from vidworld.data.convert import ConvertOptions, convert
    from vidworld.lab.planar import PlanarConfig, PlanarSource

    options = parse(LabOptions, arguments, prog=prog)
    if options.kind not in KINDS:
        raise ConfigError("simulated world", got=options.kind, expected=" or ".join(KINDS))
    for name in ("episodes", "frames"):
        if getattr(options, name) < 2:
            raise ConfigError(f"--{name}", got=getattr(options, name), expected="at least 2")
    source = PlanarSource(options.episodes, options.seed, PlanarConfig(options.frames, options.size))
    size = f"{options.size}x{options.size}"
    settings = ConvertOptions(
        out=options.out, size=size, workers=options.workers, overwrite=options.overwrite
    )
    manifest = convert(source, settings)
    print(f"{options.out}: {len(manifest.samples())} episodes; next: vidworld inspect {options.out}")


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld demo`."""
    run_demo(parse(DemoOptions, arguments, prog=prog))
