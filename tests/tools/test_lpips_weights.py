"""Arrays of another framework become the state of our network, and nothing but arrays is read."""

import importlib.util
import io
import os
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vidworld.evaluation.perceptual import LAYERS, Lpips


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "lpips_weights.py"
    spec = importlib.util.spec_from_file_location("lpips_weights", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_are_turned_and_written(tool, tmp_path):
    rng, tree, channels = np.random.default_rng(0), {"AlexNet_0": {}}, 3
    for place, layer in enumerate(LAYERS):
        kernel = rng.normal(size=(layer.size, layer.size, channels, layer.channels)).astype(np.float32)
        bias = rng.normal(size=layer.channels).astype(np.float32)
        tree["AlexNet_0"][f"Conv_{place}"] = {"kernel": kernel, "bias": bias}
        weights = rng.random((1, 1, layer.channels, 1), np.float32)
        tree[f"NetLinLayer_{place}"] = {"Conv_0": {"kernel": weights}}
        channels = layer.channels
    read = tool.Arrays(io.BytesIO(pickle.dumps(tree, protocol=4))).load()
    tool.write(read, tmp_path / "new" / "lpips.safetensors")
    network = Lpips.read(tmp_path / "new" / "lpips.safetensors")
    kernel = tree["AlexNet_0"]["Conv_1"]["kernel"]
    assert torch.equal(network.convolutions[1].weight[5, 7], torch.tensor(kernel[:, :, 7, 5]))
    assert torch.equal(network.weights[2], torch.tensor(tree["NetLinLayer_2"]["Conv_0"]["kernel"]).flatten())


class Harm:
    def __reduce__(self) -> tuple:
        return os.getcwd, ()


def test_anything_else_in_the_file_is_refused(tool):
    with pytest.raises(pickle.UnpicklingError, match="getcwd in a file of arrays"):
        tool.Arrays(io.BytesIO(pickle.dumps({"kernel": Harm()}))).load()


def test_what_is_wrong_is_one_line(tool, capsys, monkeypatch):
    assert tool.main([]) == 2
    monkeypatch.setattr(tool, "PACKAGE", "a-package-that-is-nowhere==9.9")
    assert tool.main(["out.safetensors"]) == 2
    assert "could not fetch a-package" in capsys.readouterr().err
    assert not Path("out.safetensors").exists()
