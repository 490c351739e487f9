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

from vidworld.errors import CheckpointError, DivergedError, PreemptedError
from vidworld.trainer.checkpoint import Saved, SaveError
from vidworld.trainer.control import Agreement, Clock, Signals, StopRequest, frozen_gc
from vidworld.trainer.ema import EMA
from vidworld.trainer.engine import Engine
from vidworld.trainer.heartbeat import Heartbeat, State
from vidworld.trainer.logging import Accumulator, RunLog
from vidworld.trainer.loop_config import LoopConfig
from vidworld.trainer.lost_rank import LostRankError, of_the_network
from vidworld.trainer.optim import OptimConfig, rate_factor
from vidworld.trainer.saving import Saving
from vidworld.trainer.spike import SpikeWatch
from vidworld.trainer.state import TrainingState
from vidworld.trainer.tasks import Moment, Task
from vidworld.trainer.transfer import Transfer
from vidworld.trainer.upload import Uploader
from vidworld.types import Batch

SLOW_S = 30.0
"""A step that waits longer for its data says so."""


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
        self.saving = Saving(
            self.state,
            engine,
            run / "checkpoints",
            keep=config.keep,
            in_background=config.save_in_background,
            uploader=Uploader(config.upload, keep=config.keep, say=log.say) if config.upload else None,
            say=log.say,
        )
        self.store = self.saving.store
        self.spikes = SpikeWatch(config.spike_factor)
        self.skipped_batches = 0
        """Batches of steps that were left out after loss spikes: step s reads those of s + skipped."""
        self.metrics = Accumulator()
        self._saves = 0  # that all ranks have finished
        self._streak = self._longest_streak = torch.zeros((), device=engine.device)
        self._recent: deque[tuple[str, ...]] = deque(maxlen=4)
        self._wait_s, self._since = 0.0, time.perf_counter()
        self._frames, self._steps_logged = 0, 0
        self._batches: Iterator[Batch] = iter(())
        self._transfer = Transfer(engine.device)

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
                        raise self.saving.writer.failure or SaveError(
                            "another rank could not write a checkpoint"
                        )
                    self._saves = told.saves
                    self.look_and_save()
                    if told.stop and not self.clock.finished:
                        self.save()
                        self.saving.finish()
                        raise PreemptedError(self._farewell(stop))
            looked_at = self.saving.saved_step == self.clock.step  # a run that was at its end already
            self.save()
            # A look may take minutes, and the run may be killed in it: the last weights are on disk by then.
            self.saving.finish()
            if self.looks and not looked_at:
                self._look(self.looks)
            self.state.gather()
        except RuntimeError as error:
            if self.engine.world_size > 1 and of_the_network(error):
                raise LostRankError.of(error, self.engine.rank, self.clock.step) from error
            raise
        finally:
            self.saving.settle()
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
        self.saving.writer.fence()
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
            self.saving.due(step)
        self.saving.save_if_due(step, self._saves, self._facts)
        if due := [look for look in self.looks if self._due(look.every)]:
            self._look(due)

    def save(self) -> None:
        """Start to write a checkpoint of this step, unless it has one."""
        self._mark("saving")
        self.saving.save(self.clock.step, self._facts())

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "elapsed_s": self.clock.elapsed_s,
            "order": self.feed.order(self.clock.step + self.skipped_batches),
            "skipped_batches": self.skipped_batches,
            "world_size": self.engine.world_size,
            "micro_batches": self._clip_ranks * self.accumulation,
            "identity": self.identity,
        }

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
        parts, before = self._clip_ranks * self.accumulation, saved.state.get("micro_batches")
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
        self.saving.at(saved.step)

    def _rewind(self, loss: float, median: float) -> None:
        """Go back to before a loss spike, and past all batches since; collective.

        The time stays what it is. Raises DivergedError when that was in vain several times.
        """
        spiked, before = self.clock.step, self.spikes.good_step
        self.saving.writer.wait()
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
        writer = self.saving.writer
        failed = writer.failure is not None
        return Signals(stop.received is not None, self.clock.read(), failed, writer.finished)

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
        return self._transfer(fetched)

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
            "save_share": min(1.0, self.saving.held_up_s / seconds),
            "memory_gb": _memory_gb(self.engine.device),
            "elapsed_s": self.clock.elapsed_s,
        }
        self._wait_s, self.saving.held_up_s, self._frames = 0.0, 0.0, 0
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


def _memory_gb(device: torch.device) -> float:
    """Peak memory: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
