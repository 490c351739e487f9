"""The `vidworld` command: a table of subcommands, each parsed into its own dataclass, imported when used."""

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vidworld.errors import ConfigError, PreemptedError, VidworldError


@dataclass(frozen=True)
class Command:
    """A subcommand: `module:function`, called with (arguments, prog); it parses them with `config.parse`."""

    target: str
    summary: str


COMMANDS = {
    "shard": Command("vidworld.data.convert:main", "turn robot logs into WebDataset shards"),
    "edit": Command("vidworld.data.edit:main", "merge, split, filter or re-encode datasets"),
    "inspect": Command("vidworld.data.inspect:main", "say what a dataset holds and what looks wrong in it"),
    "export-dataset": Command(
        "vidworld.data.export_lerobot:main", "write a dataset as LeRobot v3.0, for other tools"
    ),
    "lab": Command("vidworld.lab_command:main", "make episodes with a ground-truth simulator"),
    "encode": Command("vidworld.trainer.encode:main", "turn video shards into latent shards"),
    "train": Command("vidworld.trainer.train:main", "train a tokenizer or a world model from a YAML"),
    "plan": Command("vidworld.trainer.plan.command:main", "predict memory, time and cost of a training run"),
    "launch": Command("vidworld.trainer.launch.command:main", "train on many processes and hosts"),
    "watch": Command("vidworld.trainer.launch.watch:main", "show how a run is doing"),
    "rollout": Command("vidworld.evaluation.rollout:main", "imagine what the robot would see"),
    "eval": Command("vidworld.evaluation.evaluate:main", "measure a world model on held-out episodes"),
    "calibrate": Command(
        "vidworld.evaluation.calibrate:main", "fit a world's spread to its errors, on episodes set apart"
    ),
    "readout": Command(
        "vidworld.evaluation.readout_command:main", "read paint, liquid, smoke and poses off lab pictures"
    ),
    "export": Command("vidworld.evaluation.export:main", "pack a run into a small folder to share"),
    "demo": Command("vidworld.demo:main", "logs to shards to model to rollouts, in minutes on a CPU"),
}


def usage() -> str:
    """The text of `vidworld --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: vidworld COMMAND [arguments]\n\nRobot logs in, simulator out.\n\n"
        f"{rows}\n\nvidworld COMMAND --help says more. "
        "Exit codes: 0 done, 2 your input, 3 preempted, 4 diverged, 1 anything else."
    )


def run_command(arguments: Sequence[str]) -> None:
    """Run one command; errors are raised."""
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise ConfigError(
            f"unknown command {name!r}",
            fix=f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}",
        )
    module, _, function = COMMANDS[name].target.partition(":")
    getattr(importlib.import_module(module), function)(rest, f"vidworld {name}")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors of the user print one line and no traceback."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from vidworld import __version__

        print(f"vidworld {__version__}")
        return 0
    try:
        run_command(arguments)
    except VidworldError as error:
        label = "stopped" if isinstance(error, PreemptedError) else "error"
        print(f"vidworld: {label}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("vidworld: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def main() -> None:
    """Entry point of the console script."""
    raise SystemExit(run(sys.argv[1:]))
