"""When a checkpoint is written, what goes into it, and from which one a run goes on."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vidworld.trainer.checkpoint import CheckpointStore, Snapshot
from vidworld.trainer.control import Consent
from vidworld.trainer.engine import Engine
from vidworld.trainer.state import TrainingState
from vidworld.trainer.upload import Uploader
from vidworld.trainer.writer import Writer


class Saving:
    """Saves a training now and then, in the background unless told otherwise. All ranks call alike."""

    def __init__(
        self,
        state: TrainingState,
        engine: Engine,
        directory: Path,
        *,
        keep: int,
        in_background: bool,
        uploader: Uploader | None = None,
        say: Callable[[str], object] = print,
    ) -> None:
        self.state, self.engine, self.in_background = state, engine, in_background
        self.uploader, self.say = uploader, say
        self.store = CheckpointStore(
            directory,
            keep=keep,
            rank=engine.rank,
            num_writers=engine.num_optimizer_shards,
            agree=Consent(engine.world_size),
        )
        written = uploader.offer if uploader is not None else lambda directory: None
        self.writer = Writer(self.store, engine.device, written=written)
        self.saved_step = -1
        self.held_up_s = 0.0
        """Time of the training that saving took, until someone sets it back to 0."""
        self._due_step = -1

    def due(self, step: int) -> None:
        """Wish for a checkpoint of this step, or of the first at which none is being written."""
        if self._due_step < 0:
            self._due_step = step

    def save_if_due(self, step: int, finished: int, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Save when it is due and nobody is busy; finished: checkpoints that all ranks have written."""
        if self._due_step < 0 or finished != self.writer.submitted:
            return
        if step > self._due_step:
            self.say(
                f"step {step}: the checkpoint due at step {self._due_step} waited until the one before it "
                "was written; storage is slower than loop.save_every asks for"
            )
        self.save(step, facts())

    def save(self, step: int, facts: Mapping[str, Any]) -> None:
        """Start to write a checkpoint of this step unless it has one, after the one that is being written.

        facts: plain JSON beside the tensors. Raises SaveError when the last one could not be written.
        """
        self._due_step = -1
        if self.saved_step == step:
            return
        begin = time.perf_counter()
        tensors, groups = self.engine.optimizer_state()
        self.writer.submit(
            Snapshot(
                step=step,
                model=self.state.model(),
                ema=self.state.averages(),
                optimizer=tensors,
                optimizer_groups=groups,
                state={"ema": self.state.ema.state(), **facts},
            )
        )
        if not self.in_background:
            self.writer.wait()
        self.held_up_s += time.perf_counter() - begin
        self.saved_step = step

    def at(self, step: int) -> None:
        """The training stands at a step that has a checkpoint."""
        self.saved_step, self._due_step = step, -1

    def finish(self) -> None:
        """Wait until everything is written, and uploaded."""
        self.writer.wait()
        if self.uploader is not None:
            self.uploader.finish()

    def settle(self) -> None:
        """Wait for what is being written, whatever comes of it: the training has failed otherwise."""
        self.writer.settle()
