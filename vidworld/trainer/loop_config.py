"""The settings of the training loop."""

from dataclasses import dataclass

from vidworld.errors import ConfigError


@dataclass(frozen=True)
class LoopConfig:
    """How long, and how often to look and to save."""

    steps: int | None = None
    """Optimizer steps; with `minutes` too, whichever limit comes first ends the run."""
    minutes: float | None = None
    """Minutes in the loop, everything included; schedules follow the time."""
    log_every: int = 20
    save_every: int = 1000
    keep: int = 2
    """Whole checkpoints kept."""
    save_in_background: bool = True
    """Write checkpoints from a copy while the training goes on. One that is due while another is still being
    written waits for it, and the training does not."""
    ema_decay: float = 0.999
    max_skips: int = 20
    """Steps in a row with a gradient that is not finite, before the run gives up (exit code 4)."""
    upload: str = ""
    """Where each checkpoint is copied to in the background: a folder, or a URL that fsspec knows such as
    s3://bucket/runs/cr5. With --resume a run goes on from there when it has nothing newer."""
    spike_factor: float = 0.0
    """Go back to the newest whole checkpoint, and past the batches since, when the mean loss of a log line is
    more than so many times the median of the 20 lines before it; 0 never."""
    hang_s: float = 900.0
    """A step that takes longer ends the process, with the stacks of all threads; 0 never. The first step of
    a process, and looks, may take four times as long."""
    silent_s: float = 120.0
    """A rank that gives no sign of life for longer ends the others; 0 never."""

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep", "max_skips"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name}", got=getattr(self, name), expected="at least 1")
        if 0 < self.spike_factor <= 1 or self.spike_factor < 0:
            raise ConfigError("loop.spike_factor", got=self.spike_factor, expected="above 1, or 0")
        for name in ("hang_s", "silent_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.{name}", got=getattr(self, name), expected="0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError("loop.ema_decay", got=self.ema_decay, expected="0 to below 1")
