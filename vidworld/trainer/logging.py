"""Where the numbers of a run go: metrics.jsonl always, a progress bar, and wandb if it works."""

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

WandbMode = Literal["off", "offline", "online"]


class Accumulator:
    """Means of device tensors between two log lines, fetched in one transfer when asked for."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars; the names must stay the same until `fetch`."""
        row = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if self._sum is None:
            self._names, self._sum = list(values), row
        else:
            assert self._names == list(values), "the same metrics at every step"
            self._sum = self._sum + row
        self._count += 1

    def fetch(self, reduce: Callable[[Tensor], Tensor] = lambda row: row) -> dict[str, float]:
        """Means since the last call, averaged over ranks by `reduce`; waits for the device."""
        if self._sum is None:
            return {}
        means = reduce(self._sum / self._count).tolist()
        names, self._sum, self._count = self._names, None, 0
        return dict(zip(names, means, strict=True))


class RunLog:
    """Writes rows to `metrics.jsonl`, draws the progress bar, and passes scalars on to wandb.

    Only the first process of a run writes; the others get a log that does nothing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        wandb: WandbMode = "off",
        config: Mapping[str, Any] | None = None,
        active: bool = True,
        progress_bar: bool = True,
    ) -> None:
        self.path = directory / "metrics.jsonl"
        self.active, self.progress_bar = active, progress_bar
        self._file = self.path.open("a", encoding="utf-8") if active else None
        self._bar: tqdm[Any] | None = None
        self._wandb = _start_wandb(wandb, directory, config or {}) if active and wandb != "off" else None

    def start(self, total: float, done: float, unit: str) -> None:
        """Show a bar from `done` to `total` steps, or seconds for a run limited by time."""
        if self.active:
            disable = None if self.progress_bar else True
            self._bar = tqdm(
                total=total,
                initial=done,
                unit=unit,
                disable=disable,
                dynamic_ncols=True,
                mininterval=0.5,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            )

    def advance(self, done: float) -> None:
        """Move the bar to `done`."""
        if self._bar is not None and not self._bar.disable:
            self._bar.update(max(0, min(done, self._bar.total) - self._bar.n))

    def write(self, row: Mapping[str, Any], *, shown: Sequence[str] = ()) -> None:
        """Append one JSON row, at once on disk; the values named in `shown` go to the bar too."""
        if self._file is None:
            return
        row = {name: _plain(value) for name, value in row.items()}
        self._file.write(json.dumps({**row, "time": round(time.time(), 3)}) + "\n")
        self._file.flush()
        if self._bar is not None and shown:
            self._bar.set_postfix({name: _brief(row[name]) for name in shown if name in row}, refresh=False)
        self._to_wandb(row)

    def drop_after(self, step: int) -> None:
        """Forget rows of steps that a resumed run will do again, and a line that a killed one left torn."""
        if self._file is None:
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        self._file.close()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self.active:
            tqdm.write(message)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        """Finish the bar, the file and wandb."""
        self.stop()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            run, self._wandb = self._wandb, None
            _never_fatal(run.finish, "finish")

    def _to_wandb(self, row: Mapping[str, Any]) -> None:
        if (run := self._wandb) is None:
            return
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if not _never_fatal(lambda: run.log(scalars, step=scalars.get("step")), "log"):
            self._wandb = None


def _step_of(line: str) -> float:
    """The step of a row; infinite for a line that is no row."""
    try:
        return json.loads(line).get("step", 0)
    except (json.JSONDecodeError, AttributeError):
        return math.inf


def _start_wandb(mode: WandbMode, directory: Path, config: Mapping[str, Any]) -> Any:
    """A wandb run, or None with a warning: a logger that is down must not stop a training."""
    started: list[Any] = []

    def start() -> None:
        from vidworld.errors import require

        wandb = require("wandb", "train")
        started.append(
            wandb.init(
                project="vidworld",
                name=directory.name,
                dir=str(directory),
                mode=mode,
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        )

    return started[0] if _never_fatal(start, "start") else None


def _never_fatal(call: Any, what: str) -> bool:
    try:
        call()
    except Exception as error:  # whatever an outside service raises, the local log is complete
        warnings.warn(f"wandb could not {what} ({error}); metrics.jsonl goes on without it", stacklevel=3)
        return False
    return True


def _plain(value: Any) -> Any:
    """JSON has no NaN: a value that is not finite becomes null, a float keeps six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
