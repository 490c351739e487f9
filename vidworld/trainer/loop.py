"""The training loop: one short loop for every task, alone, under DDP or under ZeRO.

Training noise is a pure function of (seed, step, micro-batch, rank): each micro-step gets a fresh generator,
so that a checkpoint holds no random state and a resumed run draws what the first would have drawn.
"""

import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidworld.errors import CheckpointError, ConfigError, DivergedError, PreemptedError, VidworldError
from vidworld.trainer.checkpoint import CheckpointStore, Saved, SaveError, Snapshot
from vidworld.trainer.control import Agreement, Clock, Consent, Signals, StopRequest, frozen_gc
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import Engine
from vidworld.trainer.heartbeat import Heartbeat, State
from vidworld.trainer.logging import Accumulator, RunLog
from vidworld.trainer.optim import OptimConfig, rate_factor
from vidworld.trainer.spike import SpikeWatch
from vidworld.trainer.state import TrainingState
from vidworld.trainer.tasks import Moment, Task
from vidworld.trainer.writer import Writer
from vidworld.types import Batch

SLOW_S = 30.0
"""A step that waits longer for its data says so."""


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


@dataclass(frozen=True)
class Feed:
    """Where micro-batches come from, and in which order."""

    open: Callable[[int], Iterator[Batch]]
    """Micro-batches of this rank from a step on, `accumulation` per step."""
    order: Callable[[int], Mapping[str, Any]]
    """The sample order, standing before a step, as a checkpoint stores it."""
    require_same_order: Callable[[Mapping[str, Any], object], None]
    """Refuses to go on from a stored order that is not this one: called with it and where it was found."""


@dataclass(frozen=True)
class Look:
    """Something done with the averaged weights: validation, samples, the alarm.

    It runs on the first rank alone while the others wait, and gives values for the log.
    """

    every: int
    """Steps between two; the end of a run is looked at in any case, and 0 leaves it at that."""
    call: Callable[[int, Any], Mapping[str, Any]]
    """(step, the task with EMA weights) -> values."""


class Loop:
    """Trains `task` on the micro-batches of `feed` until the clock runs out."""

    def __init__(
        self,
        task: Task[Any],
        ema: EMA[Task[Any]],
        feed: Feed,
        engine: Engine,
        optim: OptimConfig,
        config: LoopConfig,
        *,
        run: Path,
        seed: int,
        accumulation: int = 1,
        sequence_parallel: int = 1,
        log: RunLog,
        looks: Sequence[Look] = (),
        identity: Mapping[str, Any] | None = None,
        heart: Heartbeat | None = None,
    ) -> None:
        self.task, self.feed, self.engine, self.optim, self.config = task, feed, engine, optim, config
        self.seed, self.accumulation, self.log, self.looks = seed, accumulation, log, list(looks)
        self.identity = dict(identity or {})
        self.heart = heart
        # Ranks that share clips draw the same noise, and count their frames once.
        self._clip_rank, self._clip_ranks = (
            engine.rank // sequence_parallel,
            engine.world_size // sequence_parallel,
        )
        self.ema = ema
        self.state = TrainingState(task, ema, engine)
        self.clock = Clock(config.steps, config.minutes)
        self.store = CheckpointStore(
            run / "checkpoints",
            keep=config.keep,
            rank=engine.rank,
            num_writers=engine.num_optimizer_shards,
            agree=Consent(engine.world_size),
        )
        self.writer = Writer(self.store, engine.device)
        self.spikes = SpikeWatch(config.spike_factor)
        self.skipped_batches = 0
        """Batches of steps that were left out after loss spikes: step s reads those of s + skipped."""
        self.metrics = Accumulator()
        self.saved_step = -1
        self._save_due_step = -1
        self._saves = 0  # that all ranks have finished
        self._held_up_s = 0.0
        self._streak = self._longest_streak = torch.zeros((), device=engine.device)
        self._recent: deque[tuple[str, ...]] = deque(maxlen=4)
        self._wait_s, self._since = 0.0, time.perf_counter()
        self._frames, self._steps_logged = 0, 0
        self._batches: Iterator[Batch] = iter(())

    def fit(self) -> None:
        """Train to the end, and leave a checkpoint there.

        Raises PreemptedError after a signal (a checkpoint was saved) and DivergedError.
        """
        agreement = Agreement(self.engine.world_size)
        self._batches = self._open()
        limit, done, unit = self._bar()
        self.log.start(limit, done, unit)
        self.clock.start()
        self._since = time.perf_counter()
        try:
            with frozen_gc(), StopRequest() as stop:
                while not self.clock.finished:
                    self._mark("training")
                    self.step(self._fetch())
                    told = agreement.exchange(self._signals(stop))
                    self.clock.advance(told.elapsed_s)
                    if told.failed:
                        raise self.writer.failure or SaveError("another rank could not write a checkpoint")
                    self._saves = told.saves
                    self.look_and_save()
                    if told.stop and not self.clock.finished:
                        self.save()
                        self.writer.wait()
                        raise PreemptedError(self._farewell(stop))
            looked_at = self.saved_step == self.clock.step  # a run that was at its end already
            self.save()
            self.writer.wait()
            if self.looks and not looked_at:
                self._look(self.looks)
            self.state.gather()
        except RuntimeError as error:
            if self.engine.world_size > 1 and _of_the_network(error):
                raise LostRankError(
                    f"rank {self.engine.rank} lost the others in step {self.clock.step} ({_first_line(error)}): "
                    "one of them died, see its output and RUN/heartbeats. The last checkpoint is whole: --resume"
                ) from error
            raise
        finally:
            self.log.stop()
        agreement.close()

    def step(self, micro_batches: Sequence[Batch]) -> None:
        """One optimizer step on all micro-batches, skipped on every rank if its gradient is not finite."""
        progress, number = self.clock.progress, self.clock.step
        shares = self._shares(micro_batches)
        losses: dict[str, Tensor] = {}
        for micro, (batch, share) in enumerate(zip(micro_batches, shares, strict=True)):
            part = micro * self._clip_ranks + self._clip_rank
            generator = noise_generator(self.seed, number, part, self.engine.device)
            moment = Moment(progress, number * self.accumulation + micro)
            last = micro == len(micro_batches) - 1
            parts = self.engine.backward((batch, generator, moment), share, last=last)
            for name, value in parts.items():
                value = value.detach() * share
                losses[name] = losses[name] + value if name in losses else value
        self.writer.fence()
        outcome = self.engine.update(rate_factor(self.optim, number, progress))
        self.ema.update(self.task)
        self._streak = (self._streak + 1) * outcome["skipped"]
        self._longest_streak = torch.maximum(self._longest_streak, self._streak)
        self.metrics.add({**losses, **outcome})

    def look_and_save(self) -> None:
        """Whatever is due after this step: the log line, a checkpoint, and then a look, which may fail."""
        step = self.clock.step
        if step % self.config.log_every == 0 or self.clock.finished:
            loss = self._log_line()
            if (median := self.spikes.jumped(step, loss)) is not None:
                self._rewind(loss, median)
                return
        if self._due(self.config.save_every):
            self._save_due_step = step
        if self._save_due_step >= 0 and self._saves == self.writer.submitted:
            if step > self._save_due_step:
                self.log.say(
                    f"step {step}: the checkpoint due at {self._save_due_step} had to wait until the one "
                    "before it was written: storage is slower than loop.save_every asks for"
                )
            self.save()
        if due := [look for look in self.looks if self._due(look.every)]:
            self._look(due)

    def save(self) -> None:
        """Start to write a checkpoint of this step, unless it has one; waits only if one is being written."""
        self._save_due_step = -1
        if self.saved_step == self.clock.step:
            return
        self._mark("saving")
        begin = time.perf_counter()
        tensors, groups = self.engine.optimizer_state()
        state = {
            "elapsed_s": self.clock.elapsed_s,
            "ema": self.ema.state(),
            "order": self.feed.order(self.clock.step + self.skipped_batches),
            "skipped_batches": self.skipped_batches,
            "world_size": self.engine.world_size,
            "micro_batches": self.engine.world_size * self.accumulation,
            "identity": self.identity,
        }
        self.writer.submit(
            Snapshot(
                step=self.clock.step,
                model=self.state.model(),
                ema=self.state.averages(),
                optimizer=tensors,
                optimizer_groups=groups,
                state=state,
            )
        )
        if not self.config.save_in_background:
            self.writer.wait()
            self._saves = self.writer.finished
        self._held_up_s += time.perf_counter() - begin
        self.saved_step = self.clock.step

    def resume(self, saved: Saved) -> None:
        """Take over weights, averages, moments and counters; refuses another order or architecture."""
        where = saved.directory
        identity = saved.state.get("identity", {})
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise CheckpointError(
                    f"{name} of the run to resume", where=where, got=value, expected=identity.get(name)
                )
        self.feed.require_same_order(saved.state["order"], where)
        parts, before = self.engine.world_size * self.accumulation, saved.state.get("micro_batches")
        if before not in (None, parts):
            self.log.say(
                f"a step was {before} micro-batches over all ranks and is {parts} now: the same clips in the "
                "same order, but other noise. For the same noise keep ranks x engine.accumulation"
            )
        self._go_back(saved, float(saved.state["elapsed_s"]))
        self.skipped_batches = int(saved.state.get("skipped_batches", 0))

    def _go_back(self, saved: Saved, elapsed_s: float) -> None:
        self.state.restore(saved)
        self.clock = Clock(self.config.steps, self.config.minutes, step=saved.step, elapsed_s=elapsed_s)
        self.saved_step, self._save_due_step = saved.step, -1

    def _rewind(self, loss: float, median: float) -> None:
        """Go back to before a loss spike, and past all batches since; collective.

        The time stays what it is. Raises DivergedError when that was in vain several times.
        """
        spiked, before = self.clock.step, self.spikes.good_step
        self.writer.wait()
        saved = self.store.newest(up_to=before)
        what = f"the loss jumped to {loss:.4g} at step {spiked}, from a median of {median:.4g}"
        if saved is None:
            self.log.say(f"{what}; no checkpoint from before it (by step {before}) to go back to")
            return
        self.spikes.rewound(saved.step)
        self.engine.barrier()
        if self.engine.rank == 0:
            self.store.drop_after(saved.step)
        self.engine.barrier()
        self._go_back(saved, self.clock.elapsed_s)
        self.skipped_batches += spiked - saved.step
        self._streak = self._longest_streak = torch.zeros_like(self._streak)
        self._recent.clear()
        self._steps_logged = saved.step
        self._batches = self._open()
        self.log.write(
            {
                "step": saved.step,
                "event": "rewound",
                "from_step": spiked,
                "loss": loss,
                "median_loss": median,
                "skipped_batches": self.skipped_batches,
            }
        )
        self.log.say(f"{what}: goes on from step {saved.step}, past the {spiked - saved.step} batches since")

    def _signals(self, stop: StopRequest) -> Signals:
        failed = self.writer.failure is not None
        return Signals(stop.received is not None, self.clock.read(), failed, self.writer.finished)

    def _open(self) -> Iterator[Batch]:
        return self.feed.open(self.clock.step + self.skipped_batches)

    def _fetch(self) -> list[Batch]:
        """The micro-batches of a step, on the device."""
        begin = time.perf_counter()
        fetched = list(itertools.islice(self._batches, self.accumulation))
        waited_s = time.perf_counter() - begin
        self._wait_s += waited_s
        if waited_s > SLOW_S:
            self.log.say(f"step {self.clock.step} waited {waited_s:.0f} s for its data: slow storage?")
        assert len(fetched) == self.accumulation, "the feed is endless"
        self._recent.append(tuple(name for batch in fetched for name in batch.ids))
        self._frames += sum(batch.proprio_BTS.shape[:2].numel() for batch in fetched)
        return [batch.to(self.engine.device, non_blocking=True) for batch in fetched]

    def _shares(self, micro_batches: Sequence[Batch]) -> list[float | Tensor]:
        """What each micro-batch's mean counts for, so that together they are the mean of one large batch.

        Gradients are averaged over ranks afterwards, hence the factor of their number.
        """
        weights = [self.task.weight(batch) for batch in micro_batches]
        if all(weight is None for weight in weights):
            return [1 / self.accumulation] * self.accumulation
        device = self.engine.device
        stacked = torch.stack([torch.as_tensor(weight, device=device).float() for weight in weights])
        total = stacked.sum()
        if self.engine.world_size > 1:
            torch.distributed.all_reduce(total)
        return list((stacked * self.engine.world_size / total.clamp(min=1e-12)).unbind())

    def _mark(self, state: State) -> None:
        if self.heart is not None:
            self.heart.mark(state, self.clock.step)

    def _mean_over_ranks(self, row: Tensor) -> Tensor:
        if self.engine.world_size > 1:
            torch.distributed.all_reduce(row)
        return row / self.engine.world_size

    def _due(self, every: int) -> bool:
        return every > 0 and self.clock.step % every == 0 and not self.clock.finished

    def _log_line(self) -> float:
        """Fetch the metrics and write them; gives the mean loss.

        Raises DivergedError when too many steps in a row were skipped.
        """
        means, skips = self.metrics.fetch(self._mean_over_ranks), int(self._longest_streak)
        self._longest_streak = self._streak
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        frames = self._frames * self._clip_ranks
        steps = max(1, self.clock.step - self._steps_logged)
        self._steps_logged = self.clock.step
        row = {
            "step": self.clock.step,
            **means,
            "lr": self.optim.lr * rate_factor(self.optim, self.clock.step - 1, self.clock.progress),
            "step_s": seconds / steps,
            "frames_per_s": frames / seconds,
            "tokens_per_s": frames * self.task.tokens_per_frame / seconds,
            "wait_share": min(1.0, self._wait_s / seconds),
            "save_share": min(1.0, self._held_up_s / seconds),
            "memory_gb": _memory_gb(self.engine.device),
            "elapsed_s": self.clock.elapsed_s,
        }
        self._wait_s, self._held_up_s, self._frames = 0.0, 0.0, 0
        self.log.advance(self._bar()[1])
        self.log.write(row, shown=("step", "loss", "grad_norm", "step_s"))
        if skips >= self.config.max_skips:
            ids = [list(batch) for batch in self._recent]
            self.log.write({"step": self.clock.step, "event": "diverged", "batches": ids})
            raise DivergedError(
                f"{skips} steps in a row had a gradient that is not finite, up to step {self.clock.step}; "
                f"the last batch was {', '.join(ids[-1][:4])}{', ...' if len(ids[-1]) > 4 else ''} "
                "(all in metrics.jsonl). Weights were not touched: lower optim.lr, or look at these clips"
            )
        return means["loss"]

    def _look(self, looks: Sequence[Look]) -> None:
        """Log what the looks give; the time they take is not the steps'."""
        self._mark("looking")
        with self.state.averaged() as task:
            if self.engine.rank == 0:
                row: dict[str, Any] = {"step": self.clock.step}
                for look in looks:
                    row |= look.call(self.clock.step, task)
                self.log.write(row)
        self.engine.barrier()
        self._since = time.perf_counter()
        self._frames, self._wait_s, self._steps_logged = 0, 0.0, self.clock.step

    def _bar(self) -> tuple[float, float, str]:
        """Total, done and unit of the progress bar: the limit that is nearer."""
        clock = self.clock
        if clock.seconds is not None and (clock.steps is None or clock.step / clock.steps < clock.progress):
            return round(clock.seconds), clock.elapsed_s, "s"
        return clock.steps or 0, clock.step, "step"

    def _farewell(self, stop: StopRequest) -> str:
        cause = stop.received.name if stop.received is not None else "another rank"
        run = self.store.directory.parent
        return f"{cause} at step {self.clock.step}, checkpoint saved; go on: vidworld train {run} --resume"


def noise_generator(seed: int, step: int, part: int, device: torch.device | str) -> torch.Generator:
    """The random stream of one micro-step; `part` counts micro-batches of a step over all ranks."""
    digest = hashlib.blake2b(json.dumps([seed, step, part]).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


class LostRankError(VidworldError):
    """Another process of the run is gone."""


def _of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo has no exception class of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][-160:]


def _memory_gb(device: torch.device) -> float:
    """Peak memory: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
