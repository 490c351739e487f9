"""Peers are compared on the same clips, windows and device, and a toy comparison runs from end to end."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vidworld import cli
from vidworld.errors import DataError

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tools" / "bench"
SAMPLE = ROOT / "vidworld" / "lab" / "sample"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("peers")
    for name, module in list(sys.modules.items()):
        if str(BENCH) in str(getattr(module, "__file__", None) or getattr(module, "__path__", "")):
            del sys.modules[name]


def test_clips_are_whole_and_commands_lead_from_their_frames(peers):
    data = sys.modules["peers_data"]
    lengths = [5, 9, 3]
    total = sum(lengths)
    frames = torch.arange(total, dtype=torch.uint8)[:, None, None, None].expand(total, 2, 2, 3)
    latents = torch.arange(total, dtype=torch.float16)[:, None, None, None].expand(total, 4, 1, 1)
    corpus = data.Corpus(frames, latents, torch.arange(total)[:, None].float(), lengths)
    random = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        clips, actions = corpus.clips(True, 8, 4, random)
        rows = clips[:, :, 0, 0, 0]
        assert torch.equal(rows[:, 1:] - rows[:, :-1], torch.ones(8, 3))
        assert torch.equal(actions[..., 0], rows)
        seen |= set(rows[:, 0].long().tolist())
    # Starts of every clip of the episodes that hold one, and of no other.
    assert seen == {0, 1, *range(5, 11)}
    pictures, _ = corpus.clips(False, 8, 4, random)
    assert pictures.shape == (8, 4, 3, 2, 2)
    assert pictures.min() >= -1
    with pytest.raises(DataError, match="at most 9 frames"):
        corpus.clips(True, 1, 10, random)


def bench(peers, tmp_path, **changes):
    given = {"data": SAMPLE, "tokenizer": tmp_path, "ours": tmp_path, "work": tmp_path, "device": "cpu"}
    return peers.Bench(peers.Options(**given, out=tmp_path / "rows.json", batch=4, **changes), ["--toy"])


def test_speed_is_compared_at_equal_quality_only(peers, tmp_path, capsys):
    def rows(decibels, fps):
        facts = {"psnr.h8": decibels + 1, "psnr.h24": decibels, "fps.b1": fps, "fps.b4": 3 * fps}
        return {name: (value, "") for name, value in facts.items()}

    found = {
        "ours.k1": rows(20.0, 90),
        "ours.k4": rows(21.0, 30),
        "plain": rows(20.5, 10),
        "edm": rows(22, 5),
    }
    peers.compare(bench(peers, tmp_path), found)
    kept = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())}
    assert kept["peers.speed_at_equal_quality.plain.b1"] == 3  # four steps, not the faster one
    assert kept["peers.ahead.plain.h24"] == 0.5
    assert kept["peers.ahead.edm.h24"] == -1
    assert not any(name.startswith("peers.speed_at_equal_quality.edm") for name in kept)
    assert "reaches edm" in capsys.readouterr().out


def test_another_device_or_length_is_no_comparison(peers, tmp_path):
    one = bench(peers, tmp_path)
    assert not peers.is_trained(one, "edm", 4)
    peers.note_trained(one, "edm", 4, {})
    assert peers.is_trained(one, "edm", 4)
    with pytest.raises(DataError, match="minutes of edm"):
        peers.is_trained(one, "edm", 2)
    one.device_name = "another"
    with pytest.raises(DataError, match="device of edm"):
        peers.is_trained(one, "edm", 4)


def test_the_last_batch_is_filled_and_cut(peers):
    peers_measure = sys.modules["peers_measure"]
    sizes = []

    def roll(some, actions):
        sizes.append(len(some))
        return np.array([case * np.ones((2, 1, 1, 3)) for case in some])

    found = peers_measure.rolled(roll, [1, 2, 3, 4, 5], [None] * 5, 2)
    assert sizes == [2, 2, 2]
    assert found[:, 0, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_the_picture_shows_all_that_saw_the_same_windows(peers, tmp_path):
    measure = sys.modules["peers_measure"]
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (7, 24, 32, 32, 3), np.uint8)
    assert measure.picture(tmp_path, tmp_path / "none.png") == []
    for name in ("plain", "ours.k1"):
        measure.keep_shown(tmp_path / f"{name}.shown.npz", 255 - truth, truth)
    measure.keep_shown(tmp_path / "stale.shown.npz", truth, 255 - truth)
    names = measure.picture(tmp_path, tmp_path / "peers.png")
    assert names == ["ours.k1", "plain"]
    with np.load(tmp_path / "plain.shown.npz") as kept:
        assert kept["own"].shape == (5, 6, 32, 32, 3)
        assert kept["times"].tolist() == [0, 5, 9, 14, 18, 23]
        assert np.array_equal(kept["own"][-1, -1], 255 - truth[6, 23])
    assert (tmp_path / "peers.png").stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_toy_comparison_from_end_to_end(peers, tmp_path):
    tokenizer = {
        "kind": "tokenizer", "data": str(SAMPLE), "wandb": "off", "loop": {"steps": 20},
        "tokenizer": {"widths": [16, 16, 32], "encoder_blocks": [0, 0, 1], "decoder_blocks": [0, 0, 1]},
        "loader": {"clip_frames": 1, "batch_size": 4, "workers": 0},
        "look": {"validate_every": 0, "sample_every": 0},
    }  # fmt: skip
    ours = {
        "kind": "world", "data": "nowhere", "tokenizer": "nowhere", "loop": {"minutes": 60},
        "model": {"width": 64, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2},
        "loader": {"clip_frames": 8, "batch_size": 2, "workers": 0},
        "look": {"validate_every": 0, "sample_every": 0},
    }  # fmt: skip
    for name, settings in (("tokenizer", tokenizer), ("ours", ours)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    assert cli.run(["train", str(tmp_path / "tokenizer.yaml"), "--out", str(tmp_path / "tokenizer")]) == 0
    asked = [
        "--data", SAMPLE, "--tokenizer", tmp_path / "tokenizer", "--ours", tmp_path / "ours.yaml",
        "--minutes", 0.1, "--device", "cpu", "--work", tmp_path / "work", "--episodes", 2, "--batch", 2,
        "--plain-batch", 2, "--edm-batch", 2, "--train-episodes", 6, "--our-steps", 1, "--horizons", 4, 8,
        "--out", tmp_path / "rows.json",
    ]  # fmt: skip
    for _ in range(2):  # the second call finds everything
        peers.main(list(map(str, asked)), "peers")
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert sum(row["name"] == "peers.edm.psnr.h8" for row in kept) == 1
    rows = {row["name"]: row["value"] for row in kept}
    for who in ("ours.k1", "plain", "edm"):
        assert 5 < rows[f"peers.{who}.psnr.h8"] < 40
        assert rows[f"peers.{who}.fps.b2"] > 0
    assert {"peers.ahead.plain.h8", "peers.ahead.edm.h4"} <= set(rows)
    assert (tmp_path / "work" / "peers.png").stat().st_size > 5_000
