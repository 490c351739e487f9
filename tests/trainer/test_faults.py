"""What happens to a run when something happens to it: every fault, and the exit code of every rank."""

import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vidworld.errors import ConfigError, DataError, DivergedError
from vidworld.trainer import heartbeat
from vidworld.trainer import loop as loop_module
from vidworld.trainer.checkpoint import CheckpointStore
from vidworld.trainer.loop import Loop
from vidworld.trainer.loop_config import LoopConfig
from vidworld.trainer.optim import OptimConfig
from vidworld.trainer.spike import MOST_REWINDS, SpikeWatch
from vidworld.trainer.train import train

GENEROUS_S = 200
SIGKILL = -9


def newest_step(run: Path) -> int:
    saved = CheckpointStore(run / "checkpoints").newest()
    assert saved is not None
    return saved.step


def test_a_killed_rank_ends_the_others(tmp_path: Path, start_ranks: Any) -> None:
    ranks = start_ranks(2, tmp_path / "output", "ddp", str(tmp_path / "run"), "kill")
    assert ranks.codes(GENEROUS_S) == [1, SIGKILL]
    assert "rank 0 lost another in step 3" in ranks.said(0)
    assert "The last checkpoint is whole: --resume" in ranks.said(0)
    first, _ = heartbeat.read_all(tmp_path / "run")
    assert (first.state, first.exit_code) == ("failed", 1)
    assert newest_step(tmp_path / "run") == 2


def test_a_frozen_rank_ends_the_others_who_name_it(tmp_path: Path, start_ranks: Any) -> None:
    ranks = start_ranks(2, tmp_path / "output", "ddp", str(tmp_path / "run"), "freeze")
    assert ranks.processes[0].wait(GENEROUS_S) == 1
    frozen = ranks.processes[1]
    assert frozen.poll() is None, "it is still there: whoever started it ends it"
    frozen.kill()
    assert ranks.codes() == [1, SIGKILL]
    said = ranks.said(0)
    assert f"process {frozen.pid}) has not been heard of for" in said
    assert "its last sign was in step 3 (training)" in said
    assert "all_reduce" in said or "backward" in said, "where this rank stood"
    stacks = (tmp_path / "run" / "heartbeats" / "stacks-0.txt").read_text()
    assert "loop.py" in stacks
    first, second = heartbeat.read_all(tmp_path / "run")
    assert (first.state, first.exit_code) == ("hung", 1)
    assert (second.state, second.exit_code) == ("training", None)
    assert newest_step(tmp_path / "run") == 2


def test_a_full_disk_of_one_rank_ends_all_at_one_step(tmp_path: Path, start_ranks: Any) -> None:
    ranks = start_ranks(2, tmp_path / "output", "fsdp2", str(tmp_path / "run"), "disk")
    assert ranks.codes(GENEROUS_S) == [1, 1]
    assert "No space left on device" in ranks.said(1)
    # From the writer ("its part") or from the step's exchange ("a checkpoint"), whichever hears of it first.
    assert "another rank could not write" in ranks.said(0)
    assert len(CheckpointStore(tmp_path / "run" / "checkpoints").names()) == 1, "the one before it is whole"
    newest_step(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".staging*"))


def test_a_signal_to_one_rank_saves_and_ends_all_with_three(tmp_path: Path, start_ranks: Any) -> None:
    ranks = start_ranks(2, tmp_path / "output", "ddp", str(tmp_path / "run"), "preempt")
    assert ranks.codes(GENEROUS_S) == [3, 3]
    assert "SIGTERM at step 5, checkpoint saved" in ranks.said(1)
    assert "another rank at step 5, checkpoint saved" in ranks.said(0)
    assert newest_step(tmp_path / "run") == 5
    assert [beat.state for beat in heartbeat.read_all(tmp_path / "run")] == ["preempted"] * 2
    assert heartbeat.exit_code(tmp_path / "run", 1) == 3


def test_a_rendezvous_port_that_is_taken(tmp_path: Path, start_ranks: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ranks = start_ranks(2, tmp_path / "output", "ddp", str(tmp_path / "run"), "kill", port=port)
        assert ranks.processes[0].wait(GENEROUS_S) == 1
        ranks.processes[1].kill()
        assert ranks.codes() == [1, SIGKILL]
    line = next(line for line in ranks.said(0).splitlines() if line.startswith("vidworld: "))
    assert f"rank 0 cannot meet the others at 127.0.0.1:{port}" in line
    assert "start with another MASTER_PORT" in line


def test_a_wall_clock_that_jumps_changes_nothing(
    make_loop: Callable[..., Loop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_loop(tmp_path / "whole", save_every=3)
    whole.fit()
    jumps = iter(1.7e9 + (-1) ** n * 1e7 * n for n in range(10_000))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    skewed = make_loop(tmp_path / "skewed", save_every=3)
    skewed.fit()
    for name, tensor in whole.task.net.state_dict().items():
        assert torch.equal(tensor, skewed.task.net.state_dict()[name])
    rows = [json.loads(line) for line in skewed.log.path.read_text().splitlines()]
    elapsed = [row["elapsed_s"] for row in rows]
    assert elapsed == sorted(elapsed)
    assert 0 <= elapsed[0] <= elapsed[-1] < 1e5
    assert skewed.store.names()[0] == "step-00000010"


def test_slow_storage_is_reported(
    make_loop: Callable[..., Loop],
    toy: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: now[0])
    feed = toy.feed()

    def slow(start: int) -> Iterator[Any]:
        for step, batch in enumerate(feed.open(start), start):
            now[0] += 40.0 if step == 2 else 0.25
            yield batch

    loop = make_loop(feed=dataclasses.replace(feed, open=slow), steps=4)
    plain = loop.step

    def step(micro_batches: Any) -> None:
        plain(micro_batches)
        now[0] += 0.75

    loop.step = step  # type: ignore[method-assign]
    loop.fit()
    assert "step 2 waited 40 s for its data" in capsys.readouterr().out
    rows = [json.loads(line) for line in loop.log.path.read_text().splitlines()]
    assert [row["wait_share"] for row in rows] == [0.25, 0.25, pytest.approx(40 / 40.75, abs=1e-5), 0.25]


def test_a_corrupt_shard_is_named_and_nothing_is_trained(
    latents: Path, tokenizer_run: Path, tmp_path: Path, settings: Any
) -> None:
    data = tmp_path / "latents"
    shutil.copytree(latents, data)
    shard = sorted(data.glob("shards/train-*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=shard.name) as error:
        train(settings.world(data, tokenizer_run), tmp_path / "run", progress_bar=False)
    assert error.value.exit_code == 2
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def spiking(toy: Any, bad: set[int]) -> Any:
    """A feed whose batches of some steps are far from all others."""
    feed = toy.feed()

    def batches(start: int) -> Iterator[Any]:
        for step, batch in enumerate(feed.open(start), start):
            if step in bad:
                batch.proprio_BTS.mul_(100)
            yield batch

    return dataclasses.replace(feed, open=batches)


SPIKES = {"steps": 30, "save_every": 4, "keep": 9, "save_in_background": False}
ADAMW = OptimConfig(name="adamw", lr=1e-2, warmup_steps=3)


def test_a_loss_spike_is_gone_around(make_loop: Callable[..., Loop], toy: Any, tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "spiked", feed=spiking(toy, {17}), optim=ADAMW, spike_factor=10.0, **SPIKES)
    loop.fit()
    rows = [json.loads(line) for line in loop.log.path.read_text().splitlines()]
    (event,) = (row for row in rows if row.get("event") == "rewound")
    # Seen at step 18, whose checkpoint before is of step 16: two batches are left out.
    assert (event["step"], event["from_step"], event["skipped_batches"]) == (16, 18, 2)
    assert event["loss"] > 10 * event["median_loss"]

    # The same as a run that never had those two batches.
    feed = toy.feed()

    def without(start: int) -> Iterator[Any]:
        for step in range(start, 1000):
            yield next(feed.open(step if step < 16 else step + 2))

    plain = make_loop(tmp_path / "plain", feed=dataclasses.replace(feed, open=without), optim=ADAMW, **SPIKES)
    plain.fit()
    for ours, theirs in ((loop.task, plain.task), (loop.ema.module, plain.ema.module)):
        for name, tensor in theirs.net.state_dict().items():
            assert torch.equal(ours.net.state_dict()[name], tensor)
    # Resumed later, it still stands past them.
    again = make_loop(tmp_path / "spiked", feed=spiking(toy, {17}), optim=ADAMW, **SPIKES)
    assert again.skipped_batches == 2


def test_without_the_watch_the_spike_reaches_the_weights(
    make_loop: Callable[..., Loop], toy: Any, tmp_path: Path
) -> None:
    """The negative control, and the default."""
    loops = []
    for name, bad in (("bad", {17}), ("good", set())):
        loop = make_loop(tmp_path / name, feed=spiking(toy, bad), optim=ADAMW, **SPIKES)
        loop.fit()
        loops.append(loop)
    assert not any("rewound" in line for line in loops[0].log.path.read_text().splitlines())
    states = [loop.task.net.state_dict() for loop in loops]
    assert not all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_spikes_that_do_not_go_away_end_the_run(make_loop: Callable[..., Loop], toy: Any) -> None:
    loop = make_loop(feed=spiking(toy, set(range(17, 999))), optim=ADAMW, spike_factor=10.0, **SPIKES)
    with pytest.raises(DivergedError, match=f"{MOST_REWINDS} rewinds to step 16") as error:
        loop.fit()
    assert error.value.exit_code == 4


def test_what_is_a_spike() -> None:
    watch = SpikeWatch(3.0)
    for step, loss in enumerate([9.0, 5.0, 2.0, 1.0, 1.1]):
        assert watch.jumped(step, loss) is None, "too few to judge by"
    assert watch.jumped(5, 4.0) is None
    assert watch.jumped(6, float("nan")) is None, "a matter of skipped steps"
    assert watch.jumped(7, 9.1) == 3.0, "the median of what was good"
    assert watch.good_step == 5
    below_zero = SpikeWatch(3.0)
    for step in range(5):
        assert below_zero.jumped(step, -1.0) is None
    assert below_zero.jumped(5, 0.5) is None
    assert below_zero.jumped(6, 1.5) == -1.0, "two medians above it"
    assert SpikeWatch(0.0).jumped(9, 1e9) is None
    with pytest.raises(ConfigError, match=r"loop\.spike_factor"):
        LoopConfig(steps=1, spike_factor=0.5)
