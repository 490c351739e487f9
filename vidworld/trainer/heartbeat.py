"""Signs of life: a small file of each rank, and a watch that ends a process when the run hangs.

    RUN/heartbeats/rank-0.json    what the rank does now; written every few seconds by a thread of its own
    RUN/heartbeats/stacks-0.txt   where every thread of the rank stood when it gave up

Nothing compares wall clocks, which may jump: a rank is alive when its `beat` changes while the reader looks,
by the reader's own monotonic clock. `time` is there for people.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vidworld.errors import ConfigError, DivergedError, PreemptedError, UserError

FOLDER = "heartbeats"
INTERVAL_S = 5.0
# In place and of one size: a full disk must not make a living rank look dead.
BYTES = 512
NEIGHBOURS = 8

State = Literal[
    "starting", "training", "looking", "saving", "done", "preempted", "diverged", "refused", "failed", "hung"
]
ENDED: dict[State, int] = {"done": 0, "preempted": 3, "diverged": 4, "refused": 2}
"""States that a rank leaves with on purpose, and their exit codes; it falls silent then by right."""


@dataclass(frozen=True)
class Beat:
    """What a heartbeat file says."""

    rank: int
    world_size: int
    host: str
    pid: int
    beat: int
    """Counts up with every write."""
    step: int
    """Optimizer steps done; -1 before the loop."""
    state: State
    idle_s: float
    """Seconds since the rank last came to a new step or state, by its own monotonic clock."""
    exit_code: int | None
    """None while it runs."""
    time: float
    """Unix seconds, for people only."""

    @property
    def name(self) -> str:
        """The rank for a message."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def path_of(run: Path, rank: int) -> Path:
    """Where a rank's heartbeat lies."""
    return run / FOLDER / f"rank-{rank}.json"


def read(path: Path) -> Beat | None:
    """The beat in a file; None when there is none, or half of one."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def read_all(run: Path) -> list[Beat]:
    """The beats of a run by rank, those of ranks that have ended included."""
    beats = [read(path) for path in (run / FOLDER).glob("rank-*.json")]
    return sorted((beat for beat in beats if beat is not None), key=lambda beat: beat.rank)


def clear(run: Path) -> None:
    """Forget the ranks of an earlier start; call it before new ones are started."""
    for path in (run / FOLDER).glob("*"):
        path.unlink(missing_ok=True)


def exit_code(run: Path, code: int) -> int:
    """What a run's own processes ended with, where their launcher knows `code` alone.

    torchrun leaves with 1 whatever its workers left with: 2 (refused), 3 (preempted) and 4 (diverged) are in
    their heartbeats.
    """
    if code == 0:
        return 0
    codes = [beat.exit_code for beat in read_all(run) if beat.exit_code in (2, 3, 4)]
    return min((found for found in codes if found is not None), default=code)


class Silence:
    """Which of some ranks have not been heard of for too long, as seen by this reader's clock.

    A rank counts from the first change that is seen of its beat, so that files of an earlier start mean
    nothing, and one that left on purpose is never silent.
    """

    def __init__(self, run: Path, ranks: list[int], limit_s: float) -> None:
        self.run, self.ranks, self.limit_s = run, ranks, limit_s
        self._seen: dict[int, tuple[Beat, float, bool]] = {}

    def look(self, now_s: float) -> list[tuple[Beat, float]]:
        """Last beat of each silent rank, and for how many seconds it has been silent."""
        silent = []
        for rank in self.ranks:
            beat, known = read(path_of(self.run, rank)), self._seen.get(rank)
            if known is None:
                if beat is not None:
                    self._seen[rank] = (beat, now_s, False)
                continue
            last, since_s, alive = known
            if beat is not None and (beat.pid, beat.beat) != (last.pid, last.beat):
                self._seen[rank] = (beat, now_s, True)
            elif alive and last.state not in ENDED and now_s - since_s > self.limit_s:
                silent.append((last, now_s - since_s))
        return silent

    def forgive(self, gap_s: float) -> None:
        """Count `gap_s` seconds, in which this reader itself did not run, against nobody."""
        self._seen = {
            rank: (beat, since_s + gap_s, alive) for rank, (beat, since_s, alive) in self._seen.items()
        }


class Heartbeat:
    """This rank's heartbeat, and its watch over itself and its neighbours.

    The process ends with exit code 1, after a message and the stacks of all threads, when a neighbour has
    been silent for `silent_s`, or when a step takes longer than `hang_s`; the first step of a process, which
    compiles, and looks may take four times as long. 0 switches either off.
    """

    def __init__(
        self,
        run: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        hang_s: float = 0.0,
        silent_s: float = 0.0,
        now: Callable[[], float] = time.monotonic,
        give_up: Callable[[], object] = lambda: os._exit(1),
    ) -> None:
        self.run, self.rank, self.world_size = run, rank, world_size
        self.hang_s, self.give_up, self._now = hang_s, give_up, now
        self.interval_s = min(INTERVAL_S, silent_s / 8) if silent_s else INTERVAL_S
        others = [(rank + n) % world_size for n in range(1, min(world_size, NEIGHBOURS + 1))]
        self._silence = Silence(run, others if silent_s else [], silent_s)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._state: State = "starting"
        self._step, self._steps_here, self._beats = -1, 0, 0
        self._marked_s, self._file = now(), -1
        # Nobody else is left to stop a rank whose torchrun was killed; of a shell that ends that is no sign.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def mark(self, state: State, step: int) -> None:
        """Say what the rank does now. Cheap: the thread writes it."""
        self._steps_here += step > self._step >= 0
        self._state, self._step, self._marked_s = state, step, self._now()

    def trouble(self) -> str | None:
        """Why this process should give up now, in one line; None when all is well."""
        now = self._now()
        for beat, silent_s in self._silence.look(now):
            return (
                f"{beat.name} has not been heard of for {silent_s:.0f} s; its last sign was in step "
                f"{beat.step} ({beat.state})"
            )
        idle_s, limit_s = now - self._marked_s, self.hang_s
        if self._state == "looking" or self._steps_here == 0:
            limit_s *= 4
        if self._state in ("training", "looking", "saving") and 0 < limit_s < idle_s:
            return f"rank {self.rank} hangs: {idle_s:.0f} s in step {self._step} ({self._state})"
        return None

    def beat(self, exit_code: int | None = None) -> None:
        """Write the file now."""
        self._beats += 1
        beat = Beat(
            self.rank,
            self.world_size,
            socket.gethostname()[:100],
            os.getpid(),
            self._beats,
            self._step,
            self._state,
            round(self._now() - self._marked_s, 1),
            exit_code,
            round(time.time(), 1),
        )
        content = json.dumps(asdict(beat)).encode().ljust(BYTES - 1) + b"\n"
        with self._lock:
            if self._file >= 0:
                try:
                    os.pwrite(self._file, content, 0)
                except OSError as error:
                    print(f"vidworld: warning: no heartbeat: {error}", file=sys.stderr)

    def __enter__(self) -> "Heartbeat":
        path = path_of(self.run, self.rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            for rank in (beat.rank for beat in read_all(self.run)) if self.rank == 0 else ():
                if rank >= self.world_size:
                    path_of(self.run, rank).unlink()  # of an earlier start on more ranks
        except OSError as error:
            raise ConfigError("cannot write to the run directory", where=path, got=error.strerror) from None
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leave the last word: how this rank ended."""
        self._stopped.set()
        self._thread.join()
        self._state = _ending(error)
        self.beat(ENDED.get(self._state, 1))
        with self._lock:
            os.close(self._file)
            self._file = -1

    def overslept(self, late_s: float) -> None:
        """Tell that this watch ran `late_s` seconds late: a machine that stands still makes nobody silent."""
        if late_s > self.interval_s:
            self._silence.forgive(late_s)
            self._marked_s += late_s

    def stop_if_orphaned(self) -> None:
        """Once torchrun is gone, ask this process to stop as a scheduler would: it saves, and leaves."""
        if self._launcher is None or os.getppid() == self._launcher:
            return
        self._launcher = None
        print(f"vidworld: rank {self.rank}: its launcher was killed; it stops", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def _beat_on(self) -> None:
        woke_s = self._now()
        while not self._stopped.wait(self.interval_s):
            now_s = self._now()
            self.overslept(now_s - woke_s - self.interval_s)
            woke_s = now_s
            self.beat()
            self.stop_if_orphaned()
            if trouble := self.trouble():
                self._end(trouble)
                return

    def _end(self, trouble: str) -> None:
        self._state = "hung"
        self.beat(1)
        stacks = self.run / FOLDER / f"stacks-{self.rank}.txt"
        print(f"vidworld: error: {trouble}; this is rank {self.rank}, and it stands at:", file=sys.stderr)
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        try:
            with stacks.open("w") as file:
                file.write(f"{trouble}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as failed:
            print(f"vidworld: warning: no {stacks}: {failed}", file=sys.stderr)
        print(f"vidworld: rank {self.rank} gives up; the last checkpoint is whole: --resume", file=sys.stderr)
        sys.stderr.flush()
        self.give_up()


def _ending(error: BaseException | None) -> State:
    match error:
        case None:
            return "done"
        case PreemptedError():
            return "preempted"
        case DivergedError():
            return "diverged"
        case UserError():
            return "refused"
        case _:
            return "failed"
