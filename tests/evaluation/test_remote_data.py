"""Rollouts and evaluations of data at a URL are those of the same data in a folder."""

import json

import numpy as np
import pytest

from vidworld import cli
from vidworld.data.manifest import Manifest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDWORLD_CACHE", str(tmp_path / "cache"))


def test_rollout(untrained_run, planar_data, tmp_path, capsys):
    prompt = ["--prompt", Manifest.read(planar_data).samples("val")[0].key, "--frames", "3"]
    for name, data in (("near", str(planar_data)), ("far", f"file://{planar_data}")):
        out = str(tmp_path / name)
        code = cli.run(["rollout", str(untrained_run), "--data", data, "--out", out, *prompt])
        assert code == 0, capsys.readouterr().err
    near, far = (np.load(tmp_path / name / "proprio.npz", allow_pickle=False) for name in ("near", "far"))
    assert np.array_equal(near["predicted_NTS"], far["predicted_NTS"])
    assert f"file://{planar_data}" in (tmp_path / "far/rollout.json").read_text()


def test_eval(untrained_run, planar_data, tmp_path, capsys):
    short = ["--frames", "2", "--context", "2", "--samples", "1", "--windows-per-episode", "1"]
    for name, data in (("near", str(planar_data)), ("far", f"file://{planar_data}")):
        code = cli.run(["eval", str(untrained_run), data, "--out", str(tmp_path / name), *short])
        assert code == 0, capsys.readouterr().err
    near, far = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("near", "far"))
    assert near["summary"] == far["summary"]
    assert near["data"]["digest"] == far["data"]["digest"]
