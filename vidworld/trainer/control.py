"""What stops a run and what paces it: signals, time, and agreement between ranks."""

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from torch.distributed import ReduceOp, Work

from vidworld.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Catcher:
    """Catches SIGTERM, SIGINT and SIGUSR1 within a `with`; subclasses say what follows from one.

    Outside the main thread no handler can be set, and nothing is caught.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)


class StopRequest(Catcher):
    """Turns the first signal into a flag that the loop reads between steps.

    A second SIGINT interrupts at once, as usual.
    """

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        super()._catch(number, frame)


class Clock:
    """How far a run is, in steps and in seconds; progress is the larger share of the two limits."""

    def __init__(
        self,
        steps: int | None,
        minutes: float | None,
        *,
        step: int = 0,
        elapsed_s: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if steps is None and minutes is None:
            raise ConfigError(
                "length of the run", got="neither steps nor minutes", fix="set steps or minutes"
            )
        if (steps is not None and steps < 1) or (minutes is not None and minutes <= 0):
            raise ConfigError(
                "length of the run", got=f"{steps} steps, {minutes} minutes", expected="above 0"
            )
        self.steps, self.seconds = steps, None if minutes is None else minutes * 60
        self.step, self.elapsed_s = step, elapsed_s
        self._now, self._start = now, now() - elapsed_s

    def start(self) -> None:
        """Count from now on: what came before the loop is no training time."""
        self._start = self._now() - self.elapsed_s

    def read(self) -> float:
        """Seconds of training so far on this process, those before a resume included."""
        return self._now() - self._start

    def advance(self, elapsed_s: float) -> None:
        """One step more; `elapsed_s` is what all ranks agreed on."""
        self.step += 1
        self.elapsed_s = elapsed_s

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed_s / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    @property
    def finished(self) -> bool:
        """Whether either limit is reached."""
        return self.progress >= 1.0


class Signals(NamedTuple):
    """What ranks tell each other at every step."""

    stop: bool
    """Whether any was asked to stop."""
    elapsed_s: float
    """The longest time of any in training."""
    failed: bool
    """Whether any could not write a checkpoint."""
    saves: int
    """Checkpoints that all have finished writing."""


class Agreement:
    """Makes all ranks see the same signals, one step late and without waiting.

    Ranks that decided alone would leave the others waiting in a collective for ever.
    """

    def __init__(self, world_size: int) -> None:
        self._group = torch.distributed.new_group(backend="gloo") if world_size > 1 else None
        self._pending: tuple[torch.Tensor, Work] | None = None

    def exchange(self, mine: Signals) -> Signals:
        """The signals of all ranks, as of the previous call."""
        if self._group is None:
            return mine
        sent = torch.tensor(
            [float(mine.stop), mine.elapsed_s, float(mine.failed), -mine.saves], dtype=torch.float64
        )
        work = torch.distributed.all_reduce(sent, ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        agreed, previous = self._pending or (sent, work)
        self._pending = (sent, work)
        previous.wait()
        stop, elapsed_s, failed, saves = agreed.tolist()
        return Signals(bool(stop), elapsed_s, bool(failed), -int(saves))

    def close(self) -> None:
        """Wait for the exchange that is still under way."""
        if self._pending is not None:
            self._pending[1].wait()


class Consent:
    """Asks all ranks whether something went well, on a group of its own: from any one thread."""

    def __init__(self, world_size: int) -> None:
        self._group = torch.distributed.new_group(backend="gloo") if world_size > 1 else None

    def __call__(self, well: bool) -> bool:
        """True when it went well on every rank; waits for them."""
        if self._group is None:
            return well
        answer = torch.tensor(int(well))
        torch.distributed.all_reduce(answer, ReduceOp.MIN, group=self._group)
        return bool(answer)


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """Python's cyclic collector off: on one rank of many it makes all of them wait."""
    gc.collect()
    gc.freeze()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.unfreeze()
