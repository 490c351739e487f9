"""Every shipped YAML is read, and the demo's are too."""

from pathlib import Path

import pytest

from vidworld.demo import DemoOptions, _write_configs
from vidworld.trainer.config import TokenizerTraining, WorldTraining, read_training

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    assert isinstance(read_training(path), TokenizerTraining | WorldTraining)


def test_the_demo_writes_valid_configs(tmp_path):
    _write_configs(DemoOptions(out=tmp_path, world_minutes=3.0), tmp_path / "data")
    world = read_training(tmp_path / "world.yaml")
    assert isinstance(world, WorldTraining)
    assert world.loop.minutes == 3.0
    assert isinstance(read_training(tmp_path / "tokenizer.yaml"), TokenizerTraining)
