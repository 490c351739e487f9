"""Starts a training again when it dies, from its newest checkpoint, without a person, but not for ever."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from vidworld.errors import ConfigError, DivergedError, PreemptedError, UserError, VidworldError
from vidworld.trainer.checkpoint import newest_step
from vidworld.trainer.control import Catcher
from vidworld.trainer.run import has_begun

PATIENCE = 3
"""Restarts in a row without a newer checkpoint, after which it is given up."""
DELAYS_S = (1.0, 2.0, 5.0, 10.0, 30.0)
FINAL = (0, UserError.exit_code, PreemptedError.exit_code, DivergedError.exit_code)
"""Exit codes that starting again would not change."""


class Process(Protocol):
    """What is needed of a running training; `subprocess.Popen` is one."""

    def wait(self) -> int:
        """Exit code when it has ended, negative for a signal."""
        ...

    def send_signal(self, sig: int, /) -> None:
        """Pass on a signal."""
        ...


class CrashLoopError(VidworldError):
    """A training died again and again."""


def supervise(
    start: Callable[[int], Process],
    progress: Callable[[], int],
    max_restarts: int,
    *,
    explain: Callable[[int], int] = lambda code: code,
    say: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Run `start(attempt)` until it ends for good; its exit code is 0, 2, 3 or 4.

    progress: step of the newest checkpoint, -1 when there is none.
    explain: the exit code of the training from that of the process, where a launcher hides it; see
        `heartbeat.exit_code`.

    SIGTERM, SIGINT and SIGUSR1 are passed on, and nothing is started again after one.
    Raises CrashLoopError after `max_restarts`, or after `PATIENCE` restarts in a row without progress.
    """
    best, fruitless, code = -1, 0, None
    with _Forwarding() as signals:
        for attempt in range(max_restarts + 1):
            process = start(attempt)
            with signals.to(process):
                ended = process.wait()
            code = explain(ended)
            if code in FINAL:
                return code
            if signals.received is not None:
                raise StoppedError(
                    f"{signals.received.name}, and the training {_how(code)} before it saved; it can go on "
                    f"from {_step(progress())}"
                )
            now = progress()
            best, fruitless = (now, 0) if now > best else (best, fruitless + (attempt > 0))
            left = max_restarts - attempt
            if fruitless >= PATIENCE:
                raise CrashLoopError(
                    f"given up after {PATIENCE} restarts without progress from {_step(best)}: the training "
                    f"{_how(code)}; what it said last is above"
                )
            if left:
                delay_s = DELAYS_S[min(fruitless, len(DELAYS_S) - 1)]
                say(
                    f"vidworld: the training {_how(code)}; starts again from {_step(now)} in {delay_s:g} s "
                    f"({left} restart{'s' if left > 1 else ''} left)"
                )
                sleep(delay_s)
                if signals.received is not None:
                    raise StoppedError(f"{signals.received.name} between two starts")
        assert code is not None
        raise CrashLoopError(
            f"given up after {max_restarts} restart{'s' if max_restarts != 1 else ''}: the training "
            f"{_how(code)}; it can go on from {_step(best)}"
        )


def supervise_command(arguments: Sequence[str], run: Path, max_restarts: int) -> None:
    """`vidworld train ARGUMENTS --max-restarts N`: train in a child process; leaves with its exit code."""
    if "RANK" in os.environ:
        raise ConfigError(
            "--max-restarts", got="a process that a launcher started", fix="give it to the launcher instead"
        )

    if max_restarts < 0:
        raise ConfigError("--max-restarts", got=max_restarts, expected="0 or more")

    def start(attempt: int) -> subprocess.Popen[bytes]:
        left_out = ["--max-restarts", "--max_restarts"]
        # What was to be overwritten is still there if the start died before its training began.
        go_on = attempt > 0 and ("--overwrite" not in arguments or has_begun(run))
        if go_on:
            left_out += ["--overwrite", "--no-overwrite", "--resume", "--no-resume"]
        command = [sys.executable, "-m", "vidworld", "train", *without(arguments, left_out)]
        # A session of its own: Ctrl-C in a terminal must reach it once, through this process.
        return subprocess.Popen(command + ["--resume"] * go_on, start_new_session=True)

    code = supervise(start, lambda: newest_step(run / "checkpoints"), max_restarts)
    if code:
        raise SystemExit(code)


def without(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments less some flags, and the number that may follow one.

    >>> without(["a.yaml", "--max-restarts", "3", "--resume"], ["--max-restarts"])
    ['a.yaml', '--resume']
    >>> without(["--max-restarts=3", "--overwrite", "a.yaml"], ["--max-restarts", "--overwrite"])
    ['a.yaml']
    """
    kept: list[str] = []
    dropped = False
    for argument in arguments:
        was_dropped, dropped = dropped, argument.partition("=")[0] in flags
        if not dropped and not (was_dropped and argument.isdecimal()):
            kept.append(argument)
    return kept


class StoppedError(VidworldError):
    """Asked to stop, and nothing new was saved: exit code 1, though the run can go on from what it has."""


class _Forwarding(Catcher):
    """Passes the signals that end a training on to the one that runs now."""

    def __init__(self) -> None:
        super().__init__()
        self._process: Process | None = None

    @contextlib.contextmanager
    def to(self, process: Process) -> Iterator[None]:
        """Signals go to `process` inside; one that came while it was started goes to it now."""
        self._process = process
        if self.received is not None:
            process.send_signal(self.received)
        try:
            yield
        finally:
            self._process = None

    def _catch(self, number: int, frame: FrameType | None) -> None:
        super()._catch(number, frame)
        if self._process is not None:
            self._process.send_signal(number)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _step(step: int) -> str:
    return f"step {step}" if step >= 0 else "the beginning"
