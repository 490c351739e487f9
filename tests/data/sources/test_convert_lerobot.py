"""The command `vidworld shard` on LeRobot folders: processes, kills, exit codes, real data."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vidworld.cli import run
from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset

SIZE = ("--size", "64x48")
ALONE = (*SIZE, "--workers", 1)
"""In this process: starting workers takes longer than these conversions."""


def shard(source: Path, out: Path, *flags: object) -> int:
    return run(["shard", str(source), "--out", str(out), *map(str, flags)])


def contents(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def process(source: Path, out: Path, *flags: object, limit: int | None = None) -> subprocess.Popen[str]:
    """The command in a process group of its own, at most `limit` bytes a file."""
    program = "import resource, signal, sys; from vidworld.cli import main\n"
    # A shell's background job starts with interrupts ignored, and so do its children.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    if limit is not None:
        program += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        program += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    arguments = ["shard", str(source), "--out", str(out), *SIZE, *map(str, flags)]
    return subprocess.Popen(
        [sys.executable, "-c", program + "main()", *arguments],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def test_the_command(lerobot, tmp_path, capsys, code, lengths):
    out = tmp_path / "d"
    assert shard(lerobot, out, *ALONE, "--val-episodes", 5) == 0
    printed = capsys.readouterr().out
    assert "3 episodes (2 train, 1 val), 39 frames of top at 64x48, 10 fps, 0 quarantined" in printed
    assert f"next: vidworld inspect {out}" in printed
    dataset = ShardDataset.open(out)
    for index, length in lengths.items():
        read = dataset.read(f"episode_{index:06d}")
        assert read.video is not None
        assert [code(frame) for frame in read.video["top"]] == [(index, frame) for frame in range(length)]
        assert (read.actions_TA[:, 1] == np.arange(length)).all()
        assert read.meta["source"]["index"] == index
    assert shard(lerobot, out, *ALONE, "--val-episodes", 5) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_workers_do_not_change_the_bytes(lerobot_v3, tmp_path):
    for workers in (1, 2):
        assert shard(lerobot_v3, tmp_path / str(workers), *SIZE, "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_corrupted_video_is_quarantined_by_name(lerobot_v2, tmp_path, capsys):
    path = next(lerobot_v2.rglob("episode_000005.mp4"))
    path.write_bytes(path.read_bytes()[:-200])
    assert shard(lerobot_v2, tmp_path / "d", *SIZE, "--workers", 2) == 2
    error = capsys.readouterr().err
    assert "too many bad episodes: 1 of 3, allowed are 0 (episode_000005: " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "d" / "manifest.json").exists()

    assert shard(lerobot_v2, tmp_path / "d", *ALONE, "--max-quarantined", 0.34) == 0
    (bad,) = Manifest.read(tmp_path / "d").quarantined
    assert bad.episode_id == "episode_000005"
    assert "video" in bad.reason
    assert str(tmp_path) not in bad.reason
    assert "quarantined episode_000005: " in capsys.readouterr().err


def test_trim_flag(lerobot_v2, tmp_path, rewrite_video):
    rewrite_video(lerobot_v2, 5, 11)
    assert shard(lerobot_v2, tmp_path / "a", *ALONE) == 2
    assert shard(lerobot_v2, tmp_path / "b", *ALONE, "--trim", "shorter") == 0
    meta = ShardDataset.open(tmp_path / "b").read("episode_000005").meta
    assert meta["source"]["trimmed"] == {"policy": "shorter", "to": 9, "from": {"rows": 9, "top": 11}}


def test_contract_flag_and_decimation(lerobot_v2, tmp_path, capsys):
    assert shard(lerobot_v2, tmp_path / "d", *ALONE, "--fps", 5) == 2
    assert "'gripper' cannot be resampled" in capsys.readouterr().err
    file = tmp_path / "robot.yaml"
    file.write_text('action: {x_vel: {unit: rad/s}, gripper: {unit: "1", kind: binary}}')
    assert shard(lerobot_v2, tmp_path / "d", *ALONE, "--fps", 5, "--contract", file) == 0
    manifest = Manifest.read(tmp_path / "d")
    assert [(d.unit, d.kind) for d in manifest.contracts[0].action] == [
        ("rad/s", "velocity"),
        ("1", "binary"),
    ]
    assert sorted(sample.frames for sample in manifest.samples()) == [5, 7, 9]


def test_typos_and_missing_paths(lerobot_v2, tmp_path, capsys):
    assert shard(lerobot_v2, tmp_path / "d", "--sise", "64x48") == 2
    assert shard(tmp_path / "none", tmp_path / "d") == 2
    assert "no such file or folder" in capsys.readouterr().err


def many(root: Path, count: int) -> Path:
    """Grow a v2.1 folder to `count` episodes by copying one under other indices."""
    import json
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(next(root.rglob("episode_000003.parquet")))
    video = next(root.rglob("episode_000003.mp4"))
    lines = []
    for index in range(20, 20 + count):
        rows = table.set_column(
            table.column_names.index("episode_index"), "episode_index", pa.array([index] * len(table))
        )
        path = root / f"data/chunk-{index // 10:03d}/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path)
        folder = root / f"videos/chunk-{index // 10:03d}" / video.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, folder / f"episode_{index:06d}.mp4")
        lines.append(json.dumps({"episode_index": index, "tasks": [], "length": len(table)}))
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("moments", [(3,), pytest.param((1, 2, 4, 6, 8, 9), marks=pytest.mark.slow)])
def test_killed_and_run_again_gives_the_same_bytes(lerobot_v2, tmp_path, moments):
    """SIGKILL the parent after so many finished shards; then it continues, and no worker is left behind."""
    logs, out = many(lerobot_v2, 24), tmp_path / "killed"
    shards_of_two = ("--episodes-per-shard", 2)
    assert shard(logs, tmp_path / "whole", *ALONE, *shards_of_two) == 0
    for finished in moments:
        running = process(logs, out, "--workers", 2, *shards_of_two)
        while running.poll() is None and len(list(out.glob(".partial/train-*.json"))) < finished:
            time.sleep(0.002)
        assert running.poll() is None, "killed too late to tell"
        running.kill()
        running.communicate()
        assert not (out / "manifest.json").exists()
        assert not (out / "shards").exists()
        gone = time.monotonic() + 120
        while alive(running.pid) and time.monotonic() < gone:
            time.sleep(0.05)
        assert not alive(running.pid), "workers outlive a killed parent"
    assert len(list(out.glob(".partial/train-*.json"))) >= moments[-1]
    assert shard(logs, out, *ALONE, *shards_of_two) == 0
    assert contents(out) == contents(tmp_path / "whole")


def freeze_when_writing(running: subprocess.Popen[str], out: Path) -> None:
    """Stop a process after its first shard, so that what follows happens in the middle of its work."""
    while running.poll() is None and not list(out.glob(".partial/train-*.json")):
        time.sleep(0.002)
    running.send_signal(signal.SIGSTOP)
    assert not (out / "manifest.json").exists(), "frozen too late to tell"


def alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_interrupt_ends_cleanly(lerobot_v2, tmp_path):
    logs, out = many(lerobot_v2, 80), tmp_path / "d"
    running = process(logs, out, "--workers", 2, "--episodes-per-shard", 2)
    freeze_when_writing(running, out)
    os.killpg(running.pid, signal.SIGINT)
    running.send_signal(signal.SIGCONT)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not (out / "manifest.json").exists()


def test_full_disk_is_one_line(lerobot_v2, tmp_path):
    """A real write that the kernel refuses: the file size limit stands in for a full disk."""
    running = process(lerobot_v2, tmp_path / "d", "--workers", 1, limit=8192)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 2, error
    assert error.startswith("vidworld: error: no space left")
    assert not (tmp_path / "d" / "manifest.json").exists()
    assert not list((tmp_path / "d").rglob("*.tar"))


def test_second_converter_is_refused(lerobot_v2, tmp_path, capsys):
    logs, out = many(lerobot_v2, 60), tmp_path / "d"
    running = process(logs, out, "--workers", 1, "--episodes-per-shard", 2)
    freeze_when_writing(running, out)
    assert shard(logs, out, *ALONE, "--episodes-per-shard", 2) == 2
    assert "another conversion is writing here" in capsys.readouterr().err
    running.kill()
    running.communicate()
    assert shard(logs, out, *ALONE, "--episodes-per-shard", 2) == 0


def test_real_v30(real, tmp_path, capsys):
    assert shard(real("cr5_banana_lerobot_v30_derived"), tmp_path / "d", "--workers", 1) == 0
    assert "2 episodes (1 train, 1 val), 364 frames of top at 128x96, 10 fps" in capsys.readouterr().out
    manifest = Manifest.read(tmp_path / "d")
    assert {sample.key: sample.frames for sample in manifest.samples()} == {
        "episode_000000": 183,
        "episode_000001": 181,
    }
    assert {sample.text for sample in manifest.samples()} == {"put the banana on the plate"}


def test_real_v21_few(real, tmp_path):
    flags = ("--episodes", 28, 70, "--val-episodes", 70, "--workers", 1)
    assert shard(real("cr5_banana_lerobot_v21"), tmp_path / "d", *flags) == 0
    dataset = ShardDataset.open(tmp_path / "d")
    assert {s.key: s.frames for s in dataset.manifest.samples()} == {
        "episode_000028": 176,
        "episode_000070": 181,
    }
    read = dataset.read("episode_000028")
    steps = np.diff(read.timestamps_T)
    assert (steps.min() < 0.09, steps.max() > 0.2) == (True, True), "the clock jitters as recorded"
    # Row i belongs to frame i: pictures change when the arm moves, and most so without a shift.
    assert read.video is not None
    moved = np.abs(np.diff(read.video["top"].astype(np.float32), axis=0)).mean((1, 2, 3))
    turned = np.abs(np.diff(read.proprio_TS, axis=0)).sum(1)
    scores = [np.corrcoef(moved[8:-8], turned[8 + lag : len(turned) - 8 + lag])[0, 1] for lag in range(-8, 9)]
    assert abs(int(np.argmax(scores)) - 8) <= 1


@pytest.mark.slow
def test_real_v21_whole(real, tmp_path, capsys):
    assert shard(real("cr5_banana_lerobot_v21"), tmp_path / "d", "--size", "128x96") == 0
    assert "20 episodes (18 train, 2 val), 4029 frames" in capsys.readouterr().out
    ShardDataset.open(tmp_path / "d").verify_all()
