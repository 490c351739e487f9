"""The log is complete whatever happens, and one transfer fetches many steps."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidworld.trainer.logging import Accumulator, RunLog


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_means_since_the_last_fetch() -> None:
    accumulator = Accumulator()
    assert accumulator.fetch() == {}
    for value in (1.0, 2.0, 6.0):
        accumulator.add({"loss": torch.tensor(value), "other": torch.tensor(-value, dtype=torch.float64)})
    assert accumulator.fetch() == {"loss": 3.0, "other": -3.0}
    accumulator.add({"loss": torch.tensor(5.0)})
    assert accumulator.fetch(lambda row: row * 2) == {"loss": 10.0}
    accumulator.add({"loss": torch.tensor(1.0)})
    with pytest.raises(AssertionError, match="same metrics"):
        accumulator.add({"loss": torch.tensor(1.0), "extra": torch.tensor(1.0)})


def test_rows_are_json_and_there_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, progress_bar=False) as log:
        log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1234567891})
        assert rows(tmp_path)[0] | {"time": 0} == {
            "step": 1,
            "loss": None,
            "grad_norm": None,
            "lr": 0.123457,
            "time": 0,
        }


def test_a_resumed_log_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 20, "lo')
    with RunLog(tmp_path, progress_bar=False) as log:
        log.drop_after(10)
        log.write({"step": 11})
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 11]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, active=False, wandb="online") as log:
        log.start(10, 0, "step")
        log.write({"step": 1})
        log.say("hello")
        log.advance(5)
        log.drop_after(0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_bar_shows_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with RunLog(tmp_path) as log:
        log.start(100, 40, "step")
        bar = log._bar
        assert bar is not None
        assert (bar.total, bar.n) == (100, 40)
        assert not bar.disable
        log.advance(60)
        assert bar.n == 60
        log.advance(1000)
        assert bar.n == 100


class FakeWandb:
    """Stands in for wandb and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.logged, self.finished = fails, [], False
        self.Settings = SimpleNamespace

    def init(self, **options: Any) -> "FakeWandb":
        self.options = options
        self._maybe_fail("init")
        return self

    def log(self, scalars: dict[str, float], step: int | None = None) -> None:
        self._maybe_fail("log")
        self.logged.append((step, scalars))

    def finish(self) -> None:
        self._maybe_fail("finish")
        self.finished = True

    def _maybe_fail(self, call: str) -> None:
        if call == self.fails:
            raise ConnectionError("the network is down")


def use(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    monkeypatch.setattr("vidworld.errors.require", lambda module, extra: fake)


def test_wandb_gets_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    use(monkeypatch, fake)
    with RunLog(tmp_path, wandb="offline", config={"seed": 3}, progress_bar=False) as log:
        log.write({"step": 2, "loss": 0.5, "event": "x", "bad": float("nan")})
    assert fake.logged == [(2, {"step": 2, "loss": 0.5})]
    assert fake.finished
    assert (fake.options["mode"], fake.options["config"]) == ("offline", {"seed": 3})


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_is_never_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    use(monkeypatch, FakeWandb(fails))

    def run() -> None:
        with RunLog(tmp_path, wandb="online", progress_bar=False) as log:
            for step in range(3):
                log.write({"step": step})

    with pytest.warns(UserWarning, match=r"wandb could not .*metrics\.jsonl goes on"):
        run()
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


def test_wandb_that_is_not_installed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.warns(UserWarning, match="pip install"):
        RunLog(tmp_path, wandb="offline", progress_bar=False)
