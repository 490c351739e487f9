"""Encode shards in several processes: whole shards are shared out, so that no byte depends on it."""

import multiprocessing
import os
import pickle
import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vidworld.data.manifest import Shard
from vidworld.data.shards import ShardDataset
from vidworld.data.staging import Staging
from vidworld.errors import DataError, UserError
from vidworld.tokenizers.base import Tokenizer
from vidworld.trainer.encode_shards import write_shards

POLL_S = 1.0
Task = tuple[int, Shard]


def encode_shards(
    dataset: Path,
    tokenizer: Tokenizer,
    staging: Staging,
    todo: Sequence[Task],
    batch_frames: int,
    processes: int,
    progress: Callable[[int], object],
) -> dict[str, Shard]:
    """Encode shards as `write_shards` does, in processes that take the next one as they get free.

    Each has its share of the threads of a CPU, or one of the GPUs in turn. The first error stops all; shards
    that are finished stay so. Raises DataError when a process dies.
    """
    assert isinstance(tokenizer, nn.Module)
    device = next(tokenizer.parameters()).device
    count = min(processes, len(todo))
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for task in [*todo, *[None] * count]:
        tasks.put(task)
    # By value: a tensor shared between processes would hold a file handle each.
    content = pickle.dumps(tokenizer.to("cpu"))
    tokenizer.to(device)
    threads = max(1, torch.get_num_threads() // count)
    workers = [
        context.Process(
            target=_work,
            args=(dataset, content, _device(device, rank), threads, staging, batch_frames, tasks, results),
            daemon=True,
        )
        for rank in range(count)
    ]
    done: dict[str, Shard] = {}
    try:
        for worker in workers:
            worker.start()
        while len(done) < len(todo):
            match _next(results, workers):
                case int(frames):
                    progress(frames)
                case UserError() as error:
                    raise error
                case dict(shards):
                    done |= shards
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
        for channel in (tasks, results):
            channel.cancel_join_thread()
            channel.close()
    return done


def _next(results: Any, workers: Sequence[Any]) -> int | UserError | dict[str, Shard]:
    """The next message, or DataError when a process is dead and has nothing more to say."""
    while True:
        dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
        try:
            return results.get(timeout=POLL_S)
        except queue.Empty:
            if dead:
                raise DataError(
                    "an encoding process died",
                    got=", ".join(f"process {worker.pid} with code {worker.exitcode}" for worker in dead),
                    fix="if the system killed it for memory, lower --processes or --batch-frames, then run "
                    "again: it continues",
                ) from None


def _work(
    dataset: Path,
    content: bytes,
    device: torch.device,
    threads: int,
    staging: Staging,
    batch_frames: int,
    tasks: Any,
    results: Any,
) -> None:
    """Take shards until there are none; runs in a process of its own."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    try:
        tokenizer = cast(nn.Module, pickle.loads(content)).to(device)
        opened = ShardDataset.open(dataset)

        def report(frames: int) -> None:
            if parent is not None and not parent.is_alive():
                os._exit(1)  # an orphan must not go on writing beside the next run
            results.put(frames)

        while (task := tasks.get()) is not None:
            results.put(
                write_shards(opened, cast(Tokenizer, tokenizer), staging, [task], batch_frames, report)
            )
    except UserError as error:
        results.put(error)


def _device(device: torch.device, rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    return torch.device("cuda", rank % torch.cuda.device_count())
