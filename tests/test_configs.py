"""Every shipped YAML is read, and the demo's are too."""

from pathlib import Path

import pytest

from vidworld.config import from_yaml
from vidworld.demo import DemoOptions, _write_configs
from vidworld.evaluation.readout_training import ReadoutTraining
from vidworld.trainer.config import TokenizerTraining, WorldTraining, read_training

ROOT = Path(__file__).resolve().parents[1]


READOUTS = sorted((ROOT / "configs").glob("readout*.yaml"))
OTHERS = sorted(set((ROOT / "configs").glob("*.yaml")) - set(READOUTS))


@pytest.mark.parametrize("path", READOUTS, ids=lambda path: path.name)
def test_shipped_configs_of_readouts_are_valid(path):
    assert from_yaml(ReadoutTraining, path) != ReadoutTraining()


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    assert isinstance(read_training(path), TokenizerTraining | WorldTraining)


def test_the_demo_writes_valid_configs(tmp_path):
    _write_configs(DemoOptions(out=tmp_path, world_minutes=3.0), tmp_path / "data")
    world = read_training(tmp_path / "world.yaml")
    assert isinstance(world, WorldTraining)
    assert world.loop.minutes == 3.0
    assert isinstance(read_training(tmp_path / "tokenizer.yaml"), TokenizerTraining)
