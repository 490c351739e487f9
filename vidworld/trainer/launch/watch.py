"""`vidworld watch RUN`: how a run is doing, from the files that it writes, wherever it runs."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vidworld.config import parse, read_yaml
from vidworld.errors import ConfigError
from vidworld.trainer import heartbeat
from vidworld.trainer.heartbeat import Beat

TAIL_BYTES = 64 << 10
ROWS = 5
SILENT_S = 4 * heartbeat.INTERVAL_S


@dataclass(frozen=True)
class Progress:
    """Where a run stands by its metrics."""

    step: int = 0
    steps: int | None = None
    minutes: float | None = None
    elapsed_s: float = 0.0
    step_s: float | None = None
    tokens_per_s: float | None = None
    loss: float | None = None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the nearer of the two limits, at the speed of the last rows; None when not known."""
        left = []
        if self.steps is not None and self.step_s is not None:
            left.append((self.steps - self.step) * self.step_s)
        if self.minutes is not None:
            left.append(self.minutes * 60 - self.elapsed_s)
        return max(0.0, min(left)) if left else None


def read_progress(run: Path) -> Progress:
    """Read the newest rows of metrics.jsonl and the limits of the config."""
    limits = read_yaml(run / "config.yaml").get("loop", {}) if (run / "config.yaml").is_file() else {}
    rows = [row for row in _rows(run / "metrics.jsonl") if "step_s" in row]
    last = rows[-1] if rows else {}
    return Progress(
        step=int(last.get("step", 0)),
        steps=limits.get("steps"),
        minutes=limits.get("minutes"),
        elapsed_s=float(last.get("elapsed_s", 0.0)),
        step_s=_mean(rows[-ROWS:], "step_s"),
        tokens_per_s=_mean(rows[-ROWS:], "tokens_per_s"),
        loss=last.get("loss"),
    )


class Ranks:
    """The health of all ranks, as seen by this reader's clock: a beat that does not change is silence."""

    def __init__(self, run: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.run, self._now = run, now
        self._seen: dict[int, tuple[tuple[int, int], float]] = {}

    def look(self) -> tuple[list[Beat], list[str]]:
        """All beats, and a remark on each rank that is silent, or that ended other than well."""
        beats, remarks = heartbeat.read_all(self.run), []
        # A run that was smaller before leaves the files of ranks that no longer are.
        beats = [beat for beat in beats if beat.rank < min(other.world_size for other in beats)]
        for beat in beats:
            sign, now = (beat.pid, beat.beat), self._now()
            if self._seen.get(beat.rank, (None,))[0] != sign:
                self._seen[beat.rank] = (sign, now)
            silent_s = now - self._seen[beat.rank][1]
            if beat.exit_code is None and silent_s > SILENT_S:
                remarks.append(f"{beat.name} silent for {silent_s:.0f} s in step {beat.step}")
            elif beat.exit_code not in (None, 0):
                remarks.append(f"{beat.name} {beat.state} in step {beat.step}")
        return beats, remarks


def status_line(progress: Progress, beats: Sequence[Beat], remarks: Sequence[str]) -> str:
    """One line: step, speed, ranks, time left."""
    parts = [f"step {progress.step}" + (f"/{progress.steps}" if progress.steps else "")]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.tokens_per_s is not None:
        parts.append(f"{_large(progress.tokens_per_s)} tok/s")
    if beats:
        running = sum(beat.exit_code is None for beat in beats) - sum(
            "silent" in remark for remark in remarks
        )
        doing = sorted({beat.state for beat in beats if beat.exit_code is None})
        parts.append(
            f"{running} of {beats[0].world_size} ranks alive" + (f" ({', '.join(doing)})" if doing else "")
        )
    if progress.eta_s is not None:
        parts.append(f"{_duration(progress.eta_s)} left")
    shown = [*remarks[:3], *([f"{len(remarks) - 3} more"] if len(remarks) > 3 else [])]
    return " | ".join([*parts, *shown])


class StatusLine:
    """Shows the status every so often: in place on a terminal, as new lines elsewhere when it has changed."""

    def __init__(self, run: Path, every_s: float, out: TextIO | None = None) -> None:
        self.run, self.every_s, self.out = run, every_s, out or sys.stderr
        self.ranks, self._shown_s, self._last = Ranks(run), -every_s, ""

    def __call__(self) -> None:
        """Show it if it is time."""
        if time.monotonic() - self._shown_s < self.every_s:
            return
        self._shown_s = time.monotonic()
        line = status_line(read_progress(self.run), *self.ranks.look())
        if self.out.isatty():
            print(f"\r\x1b[2K{line}", end="", file=self.out, flush=True)
        elif line != self._last:
            print(f"vidworld: {line}", file=self.out, flush=True)
        self._last = line

    def end(self) -> None:
        """Leave the line on a terminal."""
        if self.out.isatty() and self._last:
            print(file=self.out, flush=True)


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Show how a run is doing until it ends."""

    run: Path
    """Run directory."""
    every_s: float = 5.0
    """Seconds between two looks."""
    once: bool = False
    """Look twice, long enough apart to tell a silent rank from a living one, and leave."""


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld watch`."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    options = parse(WatchOptions, arguments, prog=prog)
    if not options.run.is_dir():
        raise ConfigError("run to watch", got=options.run, expected="the directory of a run")
    line = StatusLine(options.run, options.every_s, sys.stdout)
    if options.once:
        line.ranks.look()
        time.sleep(heartbeat.INTERVAL_S * 1.2)
        beats, remarks = line.ranks.look()
        print(status_line(read_progress(options.run), beats, remarks))
        return
    while True:
        line()
        beats = heartbeat.read_all(options.run)
        if beats and all(beat.exit_code is not None for beat in beats):
            line.end()
            return
        time.sleep(min(1.0, options.every_s))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:  # the first may be cut by the seek, the last by its writer
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
    return sum(values) / len(values) if values else None


def _large(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, days = round(seconds / 60), seconds / 86400
    if days >= 2:
        return f"{days:.1f} days"
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )
