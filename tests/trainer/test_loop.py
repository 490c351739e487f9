"""The loop: exact resume, skips, accumulation, signals, time limits."""

import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidworld.errors import CheckpointError, ConfigError, DataError, DivergedError, PreemptedError
from vidworld.trainer.control import Clock
from vidworld.trainer.engine import EngineConfig
from vidworld.trainer.loop import Look, Loop, noise_generator
from vidworld.trainer.optim import OptimConfig
from vidworld.types import Batch

MakeLoop = Callable[..., Loop]


def weights(loop: Loop) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by name."""
    optimizer, _ = loop.engine.optimizer_state()
    return {
        **{f"model/{name}": tensor.clone() for name, tensor in loop.task.net.state_dict().items()},
        **{f"ema/{name}": tensor.clone() for name, tensor in loop.ema.module.net.state_dict().items()},
        **{f"optimizer/{name}": tensor.clone() for name, tensor in optimizer.items()},
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise equality of every tensor."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def stop_after(loop: Loop, step: int, number: int = signal.SIGTERM) -> Loop:
    """Make the loop receive a signal in the middle of its `step`-th step."""
    plain = loop.step

    def interrupted(micro_batches: Any) -> None:
        if loop.clock.step == step - 1:
            os.kill(os.getpid(), number)
        plain(micro_batches)

    loop.step = interrupted  # type: ignore[method-assign]
    return loop


def rows(loop: Loop) -> list[dict[str, Any]]:
    return [json.loads(line) for line in loop.log.path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ten_steps_equal_five_and_five(
    make_loop: MakeLoop, tmp_path: Path, name: str, accumulation: int
) -> None:
    settings = {
        "optim": OptimConfig(name=name, lr=1e-2, warmup_steps=3),  # type: ignore[arg-type]
        "engine": EngineConfig(accumulation=accumulation),
    }
    whole = make_loop(tmp_path / "whole", **settings)
    whole.fit()
    with pytest.raises(PreemptedError, match="SIGTERM at step 5"):
        stop_after(make_loop(tmp_path / "parts", **settings), 5).fit()
    resumed = make_loop(tmp_path / "parts", **settings)
    assert resumed.clock.step == 5
    resumed.fit()
    assert same(weights(whole), weights(resumed))


def test_resumes_twice_and_from_the_end(make_loop: MakeLoop, tmp_path: Path) -> None:
    whole = make_loop(tmp_path / "whole")
    whole.fit()
    for stop in (3, 4, 8):
        with pytest.raises(PreemptedError):
            stop_after(make_loop(tmp_path / "parts"), stop).fit()
    last = make_loop(tmp_path / "parts")
    last.fit()
    assert same(weights(whole), weights(last))
    again = make_loop(tmp_path / "parts")
    assert again.clock.finished
    again.fit()
    assert same(weights(whole), weights(again))
    assert again.store.names() == last.store.names(), "a finished run saves nothing more"


def no_optimizer(loop: Loop) -> None:
    for optimizer in loop.engine.optimizers.values():
        optimizer.state.clear()


def no_counter(loop: Loop) -> None:
    loop.ema.updates = 0


def noise_from_zero(loop: Loop) -> None:
    """As if the noise were a stream that starts anew with the process."""
    plain = loop.step

    def shifted(micro_batches: Any) -> None:
        real = loop.clock
        loop.clock = dataclasses.replace(real) if dataclasses.is_dataclass(real) else Rewound(real)
        try:
            plain(micro_batches)
        finally:
            loop.clock = real

    loop.step = shifted  # type: ignore[method-assign]


class Rewound:
    """A clock that counts steps from the resume but shows the true progress."""

    def __init__(self, clock: Clock) -> None:
        self.step, self.progress = clock.step - 5, clock.progress


@pytest.mark.parametrize("forget", [no_optimizer, no_counter, noise_from_zero])
def test_the_resume_test_notices_what_is_left_out(
    make_loop: MakeLoop, tmp_path: Path, forget: Callable[[Loop], None]
) -> None:
    optim = OptimConfig(name="muon", lr=1e-2, warmup_steps=0)
    whole = make_loop(tmp_path / "whole", optim=optim)
    whole.fit()
    with pytest.raises(PreemptedError):
        stop_after(make_loop(tmp_path / "parts", optim=optim), 5).fit()
    resumed = make_loop(tmp_path / "parts", optim=optim)
    forget(resumed)
    resumed.fit()
    assert not same(weights(whole), weights(resumed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_say_so(make_loop: MakeLoop, number: int) -> None:
    before = signal.getsignal(number)
    loop = stop_after(make_loop(), 2, number)
    with pytest.raises(PreemptedError, match="--resume") as error:
        loop.fit()
    assert error.value.exit_code == 3
    assert loop.store.names() == ["step-00000002"]
    assert signal.getsignal(number) == before


def test_a_signal_in_the_last_step_is_no_preemption(make_loop: MakeLoop) -> None:
    loop = stop_after(make_loop(), 10)
    loop.fit()
    assert loop.store.names()[0] == "step-00000010"


class Poisoned:
    """A feed whose micro-batches of some steps hold a NaN."""

    def __init__(self, feed: Any, steps: set[int]) -> None:
        self.feed, self.steps = feed, steps

    def __call__(self, start: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.feed.open(start), start):
            if step in self.steps:
                batch.actions_BTA[0, 0, 0] = float("nan")
            yield batch


def poisoned(toy: Any, *steps: int) -> Any:
    feed = toy.feed()
    return dataclasses.replace(feed, open=Poisoned(feed, set(steps)))


def test_a_bad_step_is_skipped_and_counted(make_loop: MakeLoop, toy: Any) -> None:
    loop = make_loop(feed=poisoned(toy, 4), steps=5)
    plain, seen = loop.step, []

    def watched(micro_batches: Any) -> None:
        plain(micro_batches)
        seen.append(weights(loop))

    loop.step = watched  # type: ignore[method-assign]
    loop.fit()
    for name in seen[3]:
        assert torch.equal(seen[3][name], seen[4][name]) != name.startswith("ema/"), name
    assert all(torch.isfinite(tensor).all() for tensor in seen[4].values())
    last = rows(loop)[-1]
    assert (last["step"], last["skipped"], last["loss"]) == (5, 1.0, None)
    assert [row["skipped"] for row in rows(loop)[:4]] == [0.0] * 4


def test_too_many_bad_steps_end_the_run(make_loop: MakeLoop, toy: Any) -> None:
    loop = make_loop(feed=poisoned(toy, *range(3, 9)), max_skips=4, steps=20)
    with pytest.raises(DivergedError, match="clip6-0@0") as error:
        loop.fit()
    assert error.value.exit_code == 4
    event = rows(loop)[-1]
    assert event["event"] == "diverged"
    assert event["batches"][-1] == [f"clip6-{row}@0" for row in range(4)]


def test_a_streak_between_two_log_lines_is_noticed(make_loop: MakeLoop, toy: Any) -> None:
    loop = make_loop(feed=poisoned(toy, *range(3, 7)), max_skips=4, log_every=10, steps=20)
    with pytest.raises(DivergedError, match="up to step 10"):
        loop.fit()
    make_loop(loop.store.directory.parent.parent / "few", feed=poisoned(toy, 3, 4, 5), max_skips=4).fit()


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_equals_one_large_batch(
    make_loop: MakeLoop, toy: Any, tmp_path: Path, masked: bool
) -> None:
    """Micro-batches of unequal masks, too: one is masked altogether."""

    def noiseless(self: Any, batch: Batch, generator: Any, moment: Any) -> dict[str, Tensor]:
        return {"loss": (self.net(batch.actions_BTA) - batch.proprio_BTS).square().mean()}

    plain = type("Noiseless", (toy.Task,), {"forward": noiseless})
    task = toy.Masked if masked else plain

    def joined(step: int) -> Iterator[Batch]:
        source = toy.feed(accumulation=4).open(step)
        while True:
            parts = [next(source) for _ in range(4)]
            parts[1].actions_BTA[..., 0] = -1
            parts[2].actions_BTA[:2, :, 0] = -1
            yield Batch(
                ids=sum((part.ids for part in parts), ()),
                actions_BTA=torch.cat([part.actions_BTA for part in parts]),
                proprio_BTS=torch.cat([part.proprio_BTS for part in parts]),
                embodiment_B=torch.cat([part.embodiment_B for part in parts]),
            )

    def cut(step: int) -> Iterator[Batch]:
        for whole in joined(step):
            for part in range(4):
                rows = slice(4 * part, 4 * part + 4)
                yield Batch(
                    whole.ids[rows],
                    whole.actions_BTA[rows],
                    whole.proprio_BTS[rows],
                    whole.embodiment_B[rows],
                )

    optim = OptimConfig(lr=1e-2, warmup_steps=0)
    results = []
    for name, source, accumulation in (("one", joined, 1), ("four", cut, 4)):
        feed = dataclasses.replace(toy.feed(), open=source)
        torch.manual_seed(0)
        loop = make_loop(
            tmp_path / name,
            task=task(),
            optim=optim,
            engine=EngineConfig(accumulation=accumulation),
            feed=feed,
            steps=4,
        )
        loop.fit()
        results.append((loop.task.net.state_dict(), rows(loop)))
    for name in results[0][0]:
        torch.testing.assert_close(results[0][0][name], results[1][0][name], atol=1e-6, rtol=1e-4)
    for one, four in zip(results[0][1], results[1][1], strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3)


def test_all_masked_is_a_zero_loss_and_a_zero_gradient(make_loop: MakeLoop, toy: Any) -> None:
    feed = toy.feed()

    def all_masked(step: int) -> Iterator[Batch]:
        for batch in feed.open(step):
            batch.actions_BTA[..., 0] = -1
            yield batch

    loop = make_loop(task=toy.Masked(), feed=dataclasses.replace(feed, open=all_masked), steps=1)
    loop.fit()
    assert (rows(loop)[0]["loss"], rows(loop)[0]["grad_norm"], rows(loop)[0]["skipped"]) == (0.0, 0.0, 0.0)


def test_another_seed_or_identity_is_refused(make_loop: MakeLoop, tmp_path: Path) -> None:
    with pytest.raises(PreemptedError):
        stop_after(make_loop(), 3).fit()
    with pytest.raises(DataError, match="seed of the sample order"):
        make_loop(seed=1)
    loop = make_loop()
    loop.identity = {"kind": "world"}
    saved = loop.store.newest()
    assert saved is not None
    with pytest.raises(CheckpointError, match="kind of the run to resume"):
        loop.resume(saved)


def test_another_optimizer_is_refused(make_loop: MakeLoop) -> None:
    with pytest.raises(PreemptedError):
        stop_after(make_loop(optim=OptimConfig(name="muon", lr=1e-3)), 3).fit()
    with pytest.raises(CheckpointError, match="another optimizer"):
        make_loop(optim=OptimConfig(name="adamw", lr=1e-3))


def test_noise_depends_on_seed_step_and_part() -> None:
    def draw(*key: int) -> float:
        return torch.rand((), generator=noise_generator(*key, device="cpu")).item()

    keys = [(seed, step, part) for seed in range(3) for step in range(20) for part in range(4)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, 2, 3) == draw(1, 2, 3)


def test_time_limits_drive_the_schedule() -> None:
    now = [100.0]
    clock = Clock(None, 1.0, now=lambda: now[0])
    clock.start()
    now[0] += 30
    clock.advance(clock.read())
    assert (clock.progress, clock.step, clock.finished) == (0.5, 1, False)
    both = Clock(steps=2, minutes=1.0, now=lambda: now[0])
    both.advance(1.0)
    assert both.progress == 0.5, "the nearer limit counts"
    now[0] += 31
    clock.advance(clock.read())
    assert clock.finished
    resumed = Clock(None, 1.0, step=7, elapsed_s=45.0, now=lambda: now[0])
    resumed.start()
    now[0] += 3
    resumed.advance(resumed.read())
    assert resumed.progress == pytest.approx(0.8)
    with pytest.raises(ConfigError, match="set steps or minutes"):
        Clock(None, None)


def test_a_run_limited_by_minutes_ends_in_time(make_loop: MakeLoop) -> None:
    loop = make_loop(steps=None, minutes=0.0125)
    reading = itertools.count(100, 0.0625)
    loop.clock = Clock(None, 0.0125, now=lambda: next(reading))
    loop.fit()
    first, *_, last = rows(loop)
    assert (last["step"], last["elapsed_s"]) == (12, 0.75), "one reading of a sixteenth of a second a step"
    assert last["lr"] <= 1e-12 < first["lr"], "the rate falls with the time"
    assert loop.store.names()[0] == "step-00000012"


def test_looks_see_the_average_and_reach_the_log(make_loop: MakeLoop) -> None:
    loop = make_loop(steps=6)
    seen = []

    def look(step: int, task: Any) -> dict[str, float]:
        seen.append((step, task is loop.ema.module))
        return {"val_loss": 0.25 * step}

    loop.looks = [Look(2, look)]
    loop.fit()
    assert seen == [(2, True), (4, True), (6, True)]
    logged = [(row["step"], row["val_loss"]) for row in rows(loop) if "val_loss" in row]
    assert logged == [(2, 0.5), (4, 1.0), (6, 1.5)]


@pytest.mark.parametrize(("every", "steps", "saved"), [(0, 6, 6), (4, 6, 4)])
def test_a_look_that_fails_costs_no_step(make_loop: MakeLoop, every: int, steps: int, saved: int) -> None:
    """At the end of a run, and in between: the checkpoint comes first."""
    loop = make_loop(steps=steps, save_every=4)

    def look(step: int, task: Any) -> dict[str, float]:
        raise OSError("no space left on device")

    loop.looks = [Look(every, look)]
    with pytest.raises(OSError, match="no space"):
        loop.fit()
    assert loop.store.names()[0] == f"step-{saved:08d}"


def test_the_last_checkpoint_is_whole_before_the_last_look(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the storage is: a run that is killed while it looks has lost nothing."""
    loop = make_loop(steps=6, save_every=100)
    found: list[list[str]] = []
    loop.looks = [Look(0, lambda step, task: found.append(loop.store.names()) or {})]
    plain = loop.store.save

    def slow(*arguments: Any, **settings: Any) -> Path:
        time.sleep(0.3)
        return plain(*arguments, **settings)

    monkeypatch.setattr(loop.store, "save", slow)
    loop.fit()
    assert found == [["step-00000006"]]


def test_the_log_has_what_a_reader_needs(make_loop: MakeLoop) -> None:
    loop = make_loop(steps=4, log_every=2)
    loop.fit()
    first, second = rows(loop)
    assert (first["step"], second["step"]) == (2, 4)
    names = {"loss", "absolute", "grad_norm", "skipped", "lr", "frames_per_s", "wait_share", "memory_gb"}
    assert names <= first.keys()


def test_checkpoints_come_every_so_often(make_loop: MakeLoop) -> None:
    loop = make_loop(steps=7, save_every=2, keep=3, save_in_background=False)
    loop.fit()
    assert loop.store.names() == ["step-00000007", "step-00000006", "step-00000004"]


def test_training_learns(make_loop: MakeLoop) -> None:
    loop = make_loop(steps=150, log_every=25, optim=OptimConfig(name="muon", lr=1e-2, warmup_steps=10))
    loop.fit()
    losses = [row["loss"] for row in rows(loop)]
    assert losses[-1] < 0.5 * losses[0]
