"""Training from a URL: the same weights as from a folder, and a saved config that repeats it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from vidworld.cli import run
from vidworld.config import to_yaml
from vidworld.trainer.config import read_training


def test_a_run_on_a_url(
    planar: Path, settings: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDWORLD_CACHE", str(tmp_path / "cache"))
    url, written = f"file://{planar}", yaml.safe_load(to_yaml(settings.tokenizer(planar)))
    for name, data in (("near", str(planar)), ("far", url)):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(written | {"data": data}))
        out = tmp_path / name
        assert run(["train", str(config), "--out", str(out), "--loop.steps", "1"]) == 0
    assert yaml.safe_load((tmp_path / "far/config.yaml").read_text())["data"] == url
    assert read_training(tmp_path / "far/config.yaml").data == Path(url)
    weights = [next((tmp_path / name).glob("checkpoints/*/model.safetensors")) for name in ("near", "far")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert list((tmp_path / "cache/shards").rglob("*.tar"))
