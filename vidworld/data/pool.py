"""Worker processes that prepare episodes, with results in the order asked for."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType
from typing import Protocol

from vidworld.data.manifest import Quarantined
from vidworld.data.prepare import Prepared, Recipe, prepare
from vidworld.data.sources.base import Source
from vidworld.errors import ConfigError, ContractError, DataError, VidworldError

Result = Prepared | Quarantined


class Work(Protocol):
    """What worker processes do; picklable."""

    def run(self, episode_id: str) -> Result:
        """Make one episode."""
        ...


@dataclass(frozen=True)
class Job:
    """What a worker needs to prepare any episode."""

    source: Source
    recipe: Recipe
    root: str = ""
    """Folder of the logs, cut from paths in reasons so that they do not depend on where it lies."""

    def run(self, episode_id: str) -> Result:
        """Prepare one episode, or say why it is left out. Other errors than of the data are not caught."""
        try:
            episode = self.source.read(episode_id)
            if episode.episode_id != episode_id:
                raise DataError("episode id", got=repr(episode.episode_id), expected=repr(episode_id))
            return prepare(episode, self.recipe)
        except (DataError, ContractError) as error:
            reason = str(error)
            return Quarantined(episode_id, reason.replace(f"{self.root}/", "") if self.root else reason)
        except Exception as error:
            error.add_note(f"while converting episode {episode_id!r}")
            raise


@contextlib.contextmanager
def results(job: Work, episode_ids: Sequence[str], workers: int) -> Iterator[Iterator[Result]]:
    """Results for `episode_ids`, in that order; one worker means this process.

    Raises VidworldError when a worker process dies.
    """
    if workers <= 1:
        with _interruptible(map(job.run, episode_ids)) as made:
            yield made
        return
    try:
        pickle.dumps(job)
    except Exception as error:
        raise ConfigError(
            "the source cannot be sent to worker processes",
            got=error,
            fix="use workers=1, or make it picklable",
        ) from None
    # Spawned, not forked: a fork of a process with threads (torch, OpenMP) may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (job,))
    try:
        resource_tracker.ensure_running()  # starting it later would lift the block below

        def submit(episode_id: str) -> "Future[Result]":
            with _interrupts_later():
                return pool.submit(_work, episode_id)

        in_order = _in_order(submit, episode_ids, ahead=2 * workers + 2)
        with _interruptible(in_order) as made:
            yield made
    except BrokenProcessPool:
        raise VidworldError(
            "a worker process died: out of memory (use fewer workers), or a script without the "
            '`if __name__ == "__main__":` guard; run again to continue'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interruptible(made: Iterable[Result]) -> Iterator[Iterator[Result]]:
    """Results that stop after an interrupt at the keyboard, also after one that Python has lost.

    Python swallows a KeyboardInterrupt that hits while an object is being freed.
    """
    handled = threading.current_thread() is threading.main_thread()
    if not handled or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield iter(made)
        return
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    def watched() -> Iterator[Result]:
        for result in made:
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield result

    signal.signal(signal.SIGINT, note)
    try:
        yield watched()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold interrupts back; processes started meanwhile never get one, not even while they start."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_order(
    submit: Callable[[str], "Future[Result]"], episode_ids: Sequence[str], ahead: int
) -> Iterator[Result]:
    """Keep `ahead` episodes in work, so that memory stays bounded however many there are."""
    waiting: deque[Future[Result]] = deque()
    for episode_id in episode_ids:
        waiting.append(submit(episode_id))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_JOB: ContextVar[Work] = ContextVar("job")


def _start_worker(job: Work) -> None:
    _JOB.set(job)
    # An interrupt at the keyboard reaches every process; the parent alone handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(episode_id: str) -> Result:
    return _JOB.get().run(episode_id)


def _end_with_parent() -> None:
    """A killed parent cannot say goodbye, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
