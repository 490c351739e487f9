"""The status of a run from its files."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from vidworld.cli import run as command
from vidworld.trainer.heartbeat import Beat
from vidworld.trainer.launch.watch import SILENT_S, Progress, Ranks, StatusLine, read_progress, status_line


def beat(
    run: Path, rank: int, count: int, *, step: int = 5, state: str = "training", exit_code: int | None = None
) -> None:
    (run / "heartbeats").mkdir(exist_ok=True)
    content = Beat(rank, 2, "node", 100 + rank, count, step, state, 0.1, exit_code, 0.0)  # type: ignore[arg-type]
    (run / "heartbeats" / f"rank-{rank}.json").write_text(json.dumps(asdict(content)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("loop: {steps: 1000, minutes: null}\n")
    rows = [
        {"step": step, "loss": 1 / step, "step_s": 2.0, "tokens_per_s": 1e5 + step, "elapsed_s": 2.0 * step}
        for step in range(20, 420, 20)
    ]
    rows.append({"step": 400, "val_loss": 0.1})
    torn = '{"step": 420, "lo'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return tmp_path


def test_progress(run: Path) -> None:
    progress = read_progress(run)
    assert (progress.step, progress.steps, progress.step_s) == (400, 1000, 2.0)
    assert progress.tokens_per_s == pytest.approx(1e5 + 360)
    assert progress.eta_s == 1200
    (run / "config.yaml").write_text("loop: {steps: 1000, minutes: 20}\n")
    assert read_progress(run).eta_s == pytest.approx(20 * 60 - 800), "the nearer of the two limits"


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == Progress()
    assert status_line(Progress(), *Ranks(tmp_path).look()) == "step 0"


def test_a_rank_is_silent_by_the_reader_s_clock(run: Path) -> None:
    now = [0.0]
    ranks = Ranks(run, now=lambda: now[0])
    for count, now[0] in enumerate((0.0, SILENT_S, 2 * SILENT_S)):
        beat(run, 0, count)
        beat(run, 1, 7)
        beats, remarks = ranks.look()
    assert [each.rank for each in beats] == [0, 1]
    assert remarks == ["rank 1 (node, process 101) silent for 40 s in step 5"]
    line = status_line(read_progress(run), beats, remarks)
    assert line == (
        "step 400/1000 | loss 0.0025 | 100k tok/s | 1 of 2 ranks alive (training) | 20 min left | "
        "rank 1 (node, process 101) silent for 40 s in step 5"
    )
    beat(run, 1, 8)
    assert ranks.look()[1] == []


def test_ends_are_remarked_on(run: Path) -> None:
    beat(run, 0, 1, exit_code=0, state="done")
    beat(run, 1, 1, exit_code=4, state="diverged")
    beats, remarks = Ranks(run).look()
    assert remarks == ["rank 1 (node, process 101) diverged in step 5"]
    assert "0 of 2 ranks alive |" in status_line(read_progress(run), beats, remarks)


def test_lines_are_new_ones_only(run: Path) -> None:
    out = io.StringIO()
    line = StatusLine(run, 0.0, out)
    beat(run, 0, 1)
    line()
    line()
    beat(run, 0, 2, step=6, state="saving")
    line()
    assert len(out.getvalue().splitlines()) == 2
    assert "saving" in out.getvalue()


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        beat(run, rank, 1, exit_code=0, state="done")
    assert command(["watch", str(run)]) == 0
    assert "step 400/1000" in capsys.readouterr().out
    assert command(["watch", str(run / "none")]) == 2
    assert "the directory of a run" in capsys.readouterr().err


def test_other_sizes_of_numbers() -> None:
    def left(seconds: float) -> str:
        return status_line(Progress(minutes=seconds / 60), [], []).split("| ")[-1]

    assert [left(s) for s in (20, 95, 7260, 2.5 * 86400)] == [
        "20 s left",
        "2 min left",
        "2 h 01 min left",
        "2.5 days left",
    ]
