"""Which rank failed first, what it said last, and the exit code of the whole."""

import re
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidworld.trainer.launch.rank import Record
from vidworld.trainer.supervise import FINAL

TAIL_BYTES = 64 << 10
SHOWN_LINES = 60
# What ranks say whose neighbour has died.
NEIGHBOUR = re.compile(
    r"connection (was )?(closed|reset|refused|likely)|broken pipe|NCCL|gloo|TCPStore|recvValue|"
    r"DistNetworkError|DistBackendError|DistStoreError|has not been heard of",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The end of the rank, or of the host, that failed first."""

    name: str
    how: str
    exit_code: int
    log: Path
    last_words: str

    def __str__(self) -> str:
        words = "\n".join(f"  {line}" for line in self.last_words.splitlines()) or "  (it said nothing)"
        return f"{self.name} failed first: {self.how}; its last words in {self.log}:\n{words}"


def exit_code(records: Sequence[Record], ranks: Collection[int], failure: Failure | None) -> int:
    """0 when all of `ranks` left with it; 2, 3 or 4 when the first failure did; otherwise 1.

    torchrun leaves with 1 whatever its workers left with: their records know better.
    """
    if {record.rank for record in records if record.exit_code == 0}.issuperset(ranks):
        return 0
    return failure.exit_code if failure is not None and failure.exit_code in FINAL[1:] else 1


def first_failure(
    logs: Path,
    records: Sequence[Record],
    ranks: Collection[int],
    nodes: Mapping[str, tuple[int | None, Collection[int]]],
) -> Failure | None:
    """The failure that brought the others down; None when all ranks ended well.

    ranks: those that were to be started from here; the records may be of others too.
    nodes: by host label, the exit code of the process that started its ranks, and these ranks.

    Ranks that were told to stop, or that only miss a neighbour, come last. Among the others the first record
    counts by the time of the file server, since clocks of hosts differ.
    """
    failed = [record for record in records if record.exit_code not in (None, 0)]
    causes = [record for record in failed if not _is_consequence(record, logs)]
    if not causes:
        known = {record.rank for record in records}
        for label, (code, started) in nodes.items():
            if code not in (None, 0) and not known.intersection(started):
                log = logs / f"{label}.log"
                return Failure(
                    f"host {label}", f"no rank was started (exit code {code})", 1, log, last_words(log)
                )
    if failed:
        record = min(causes or failed, key=lambda each: _ended_ns(each, logs))
        log = record.file(logs, "log")
        assert record.exit_code is not None
        return Failure(record.name, _how(record.exit_code), record.exit_code, log, last_words(log))
    lost = [record for record in records if record.exit_code is None and record.rank in ranks]
    if lost:
        log = lost[0].file(logs, "log")
        return Failure(lost[0].name, "its host went silent", 1, log, last_words(log))
    if missing := sorted(set(ranks) - {record.rank for record in records}):
        label = next(name for name, (_, started) in nodes.items() if missing[0] in started)
        log = logs / f"{label}.log"
        return Failure(f"rank {missing[0]} on {label}", "it never started", 1, log, last_words(log))
    return None


def last_words(log: Path) -> str:
    """The last traceback of a log, or its last lines."""
    lines = tail(log).splitlines()
    starts = [
        number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")
    ]
    if not starts:
        return "\n".join(lines[-12:])
    # A chain of exceptions counts as one: its first traceback is the cause.
    first = starts[-1]
    while (before := [number for number in starts if number < first]) and _chained(lines[before[-1] : first]):
        first = before[-1]
    shown = lines[first:]
    if len(shown) > SHOWN_LINES:
        half = SHOWN_LINES // 2
        shown = [*shown[:half], f"... {len(shown) - SHOWN_LINES} lines ...", *shown[-half:]]
    return "\n".join(shown)


def tail(path: Path) -> str:
    """The end of a file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _chained(lines: Sequence[str]) -> bool:
    return any(
        "direct cause of the following" in line or "another exception occurred" in line for line in lines
    )


def _is_consequence(record: Record, logs: Path) -> bool:
    if record.asked is not None and record.exit_code not in FINAL:
        return True
    if record.exit_code in FINAL or (record.exit_code or 0) < 0:
        return False
    final = next(
        (line for line in reversed(last_words(record.file(logs, "log")).splitlines()) if line.strip()), ""
    )
    return bool(NEIGHBOUR.search(final))


def _ended_ns(record: Record, logs: Path) -> int:
    try:
        return record.file(logs, "json").stat().st_mtime_ns
    except OSError:
        return 0


def _how(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    meaning = {2: ", a mistake in the input", 3: ", preempted", 4: ", diverged"}.get(code, "")
    return f"exit code {code}{meaning}"
