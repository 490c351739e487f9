"""States on disk: what is damaged is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vidworld.errors import CheckpointError
from vidworld.world.state import WorldState


@pytest.fixture
def saved(world, prompt, tmp_path):
    path = tmp_path / "state.safetensors"
    world.reset(prompt(world)).save(path)
    return path


def test_moving_keeps_all(saved):
    state = WorldState.load(saved)
    moved = state.to("cpu").detach()
    assert all(torch.equal(tensor, moved._tensors()[name]) for name, tensor in state._tensors().items())
    assert len(state) == 1


def test_damaged_files_are_refused(saved):
    content = saved.read_bytes()
    for wrong in (content[: len(content) // 2], b"", b"\x00" * 100):
        saved.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="cannot read the world state"):
            WorldState.load(saved)
    with pytest.raises(CheckpointError):
        WorldState.load(saved.with_name("none.safetensors"))


def test_other_safetensors_are_refused(saved):
    save_file({"weight": torch.zeros(2)}, saved)
    with pytest.raises(CheckpointError, match="not a saved world state"):
        WorldState.load(saved)
    header = {"schema_version": 1, "layers": 1, "frame": 0, "seed": 0, "world": ""}
    save_file({"weight": torch.zeros(2)}, saved, metadata={"vidworld_state": json.dumps(header)})
    with pytest.raises(CheckpointError, match="cannot read the world state"):
        WorldState.load(saved)
