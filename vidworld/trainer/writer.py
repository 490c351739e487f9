"""Checkpoints written behind the training's back: a copy in host memory, and a thread that writes it."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidworld.errors import VidworldError
from vidworld.trainer.checkpoint import CheckpointStore, SaveError, Snapshot


class HostMemory:
    """Copies of tensors on the host, in buffers that are used again.

    From a GPU they are copied on a stream of their own into pinned memory, while the next step computes;
    `fence` makes the GPU, not the process, wait with whatever changes the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Any = None  # the event when they are there
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Start copying; the values may be read after `wait`."""
        copies = {}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for name, tensor in tensors.items():
            buffer = self._buffer(f"{prefix}/{name}", tensor)
            if tensor.is_cuda:
                with torch.cuda.stream(self._stream):
                    buffer.copy_(tensor.detach(), non_blocking=True)
                tensor.record_stream(self._stream)  # type: ignore[arg-type]
            else:
                buffer.copy_(tensor.detach())
            copies[name] = buffer
        if self._stream is not None:
            self._copied = self._stream.record_event()
        return copies

    def fence(self) -> None:
        """What the current stream does from here on comes after the copies."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        known = self._buffers.get(name)
        if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
            self._buffers[name] = known = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return known


class Writer:
    """Writes snapshots one after the other in a thread; all ranks submit the same ones.

    written: called in the thread with each directory that is complete.
    reached: see `CheckpointStore.save`.
    """

    def __init__(
        self,
        store: CheckpointStore,
        device: torch.device,
        *,
        written: Callable[[Path], object] = lambda directory: None,
        reached: Callable[[str], None] = lambda point: None,
    ) -> None:
        self.store, self.written, self.reached = store, written, reached
        self.submitted = self.finished = 0
        self.failure: VidworldError | None = None
        self._memory = HostMemory(device)
        self._thread: threading.Thread | None = None

    def submit(self, snapshot: Snapshot) -> float:
        """Copy a snapshot and start writing it; seconds that the caller was held up.

        Waits for the one before. Raises SaveError when that failed.
        """
        begin = time.perf_counter()
        self.wait()
        first = self.store.rank == 0
        writes = self.store.rank < self.store.num_writers
        copied = replace(
            snapshot,
            model=self._memory.copy(snapshot.model, "model") if first else {},
            ema=self._memory.copy(snapshot.ema, "ema") if first else {},
            optimizer=self._memory.copy(snapshot.optimizer, "optimizer") if writes else {},
        )
        self.submitted += 1
        self._thread = threading.Thread(target=self._write, args=(copied,), name="checkpoint", daemon=True)
        self._thread.start()
        return time.perf_counter() - begin

    def fence(self) -> None:
        """Call before weights or moments change: on a GPU the copies may still be under way."""
        self._memory.fence()

    def settle(self, timeout_s: float = 60.0) -> None:
        """Wait for the thread for a while, whatever comes of it."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self.failure is not None:
            raise self.failure

    def wait(self) -> None:
        """Wait until everything submitted is on disk; raises SaveError if it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._memory.wait()
            directory = self.store.save(snapshot, reached=self.reached)
            if self.store.rank == 0:
                self.written(directory)
        except VidworldError as error:
            self.failure = error
        except Exception as error:  # whatever it is, the training must hear of it
            self.failure = SaveError(f"checkpoint of step {snapshot.step} could not be written: {error}")
            self.failure.__cause__ = error
        finally:
            self.finished += 1
