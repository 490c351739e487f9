"""The network of the readout: one convolutional trunk for all kinds, masks and numbers for each.

The trunk is a U-Net that starts at a quarter of the resolution (pixel unshuffle). From its finest map come
the masks (pixel shuffle back to full resolution) and soft keypoints, the means of spatial softmaxes (Finn et
al. 2016, "Deep Spatial Autoencoders"). Numbers are read by a small MLP from keypoints, pooled features and
the moments of the masks: area, centre, spread, and the features under each.

Shapes: N pictures, C channels, M masks of a kind, I items, K keypoints, P pooled channels, Q outputs, H W
pixels, h w cells of the finest map.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidworld.errors import ConfigError
from vidworld.evaluation.quantities import Subject

PATCH = 4
GROUPS = 8
MOMENTS = 7
PRIOR_LOGIT = -2.0


@dataclass(frozen=True)
class ReadoutConfig:
    """Size of the network; cells are a quarter, an eighth and a sixteenth of the resolution."""

    widths: tuple[int, int, int] = (64, 96, 104)
    blocks: int = 1
    """Residual blocks at each resolution on the way down; one on the way up."""
    keypoints: int = 8
    pooled: int = 8
    """Channels that are averaged under keypoints and masks."""
    hidden: int = 128
    """Width of the MLPs that give numbers."""
    reference: bool = False
    """Show the episode's first frame beside each frame."""

    def __post_init__(self) -> None:
        for name in ("blocks", "keypoints", "pooled", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"net.{name}", got=getattr(self, name), expected="at least 1")
        if any(width < 1 or width % GROUPS for width in self.widths):
            raise ConfigError("net.widths", got=self.widths, expected=f"multiples of {GROUPS}")


class Block(nn.Module):
    """x + conv(silu(norm(conv(x)))), the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x_NChw: Tensor) -> Tensor:
        return x_NChw + self.conv_out(F.silu(self.norm(self.conv_in(x_NChw))))


@dataclass(frozen=True)
class Features:
    """What the trunk makes of pictures."""

    fine_NChw: Tensor
    deep_NC: Tensor

    def __getitem__(self, rows: slice) -> "Features":
        return Features(self.fine_NChw[rows], self.deep_NC[rows])


class ReadoutNet(nn.Module):
    """Pictures in [-1, 1] to mask logits and normalised numbers, for each of some kinds."""

    def __init__(self, config: ReadoutConfig, subjects: Mapping[str, Subject]) -> None:
        super().__init__()
        self.config, self.subjects = config, dict(subjects)
        fine, middle, coarse = config.widths
        channels = 3 * PATCH**2 * (2 if config.reference else 1)
        self.stem = nn.Conv2d(channels, fine, 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(config.blocks))) for width in config.widths
        )
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 2, stride=2) for before, after in ((fine, middle), (middle, coarse))
        )
        self.up = nn.ModuleList(
            nn.Conv2d(after, before, 1) for before, after in ((fine, middle), (middle, coarse))
        )
        self.decoder = nn.ModuleList(Block(width) for width in (fine, middle))
        self.norm = nn.GroupNorm(GROUPS, fine)
        self.keypoints = nn.Conv2d(fine, config.keypoints, 1)
        self.pooled = nn.Conv2d(fine, config.pooled, 1)
        self.deep = nn.Linear(coarse, 4 * config.pooled)
        self.masks = nn.ModuleDict(
            {kind: nn.Conv2d(fine, len(subject.masks) * PATCH**2, 1) for kind, subject in subjects.items()}
        )
        for head in self.masks.values():
            # Most pixels are in no mask: begin by saying so (Lin et al. 2017, "Focal Loss", section 3.3).
            assert isinstance(head, nn.Conv2d)
            assert head.bias is not None
            nn.init.constant_(head.bias, PRIOR_LOGIT)
        self.numbers = nn.ModuleDict({kind: self._mlp(subject) for kind, subject in subjects.items()})

    def _mlp(self, subject: Subject) -> nn.Sequential:
        config = self.config
        own = 1 if subject.items else len(subject.masks)
        inputs = config.keypoints * (2 + config.pooled) + 4 * config.pooled + own * (MOMENTS + config.pooled)
        outputs = sum(2 if quantity.period else 1 for quantity in subject.quantities)
        return nn.Sequential(
            nn.Linear(inputs, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, outputs),
        )

    def trunk(self, pictures_NCHW: Tensor) -> Features:
        """Features of pictures [N, 3, H, W], or [N, 6, H, W] with their references; H W multiples of 16."""
        x_NChw = self.stem(F.pixel_unshuffle(pictures_NCHW, PATCH))
        kept = []
        for level, blocks in enumerate(self.encoder):
            x_NChw = blocks(x_NChw)
            kept.append(x_NChw)
            if level < len(self.down):
                x_NChw = self.down[level](x_NChw)
        deep_NC = F.silu(x_NChw).mean((2, 3))
        for level in reversed(range(len(self.decoder))):
            risen_NChw = F.interpolate(self.up[level](x_NChw), scale_factor=2)
            x_NChw = self.decoder[level](risen_NChw + kept[level])
        return Features(F.silu(self.norm(x_NChw)), deep_NC)

    def read(self, features: Features, kind: str) -> tuple[Tensor, Tensor]:
        """Mask logits [N, M, H, W] and numbers [N, I, Q] of one kind, float32; I is 1 without items."""
        subject = self.subjects[kind]
        fine_NChw = features.fine_NChw
        logits_NMHW = F.pixel_shuffle(self.masks[kind](fine_NChw), PATCH).float()
        heat_NKhw, pooled_NPhw = self.keypoints(fine_NChw).float(), self.pooled(fine_NChw).float()
        deep_NC = self.deep(features.deep_NC).float()
        with torch.autocast(logits_NMHW.device.type, enabled=False):
            heat_NKhw = heat_NKhw.flatten(2).softmax(2).view_as(heat_NKhw)
            moments_NKF = _moments(heat_NKhw, pooled_NPhw)
            # Centres and pooled features; area and spread of a softmax tell nothing.
            points_NF = torch.cat([moments_NKF[..., :2], moments_NKF[..., MOMENTS:]], 2).flatten(1)
            shown_NMhw = F.avg_pool2d(logits_NMHW.sigmoid(), PATCH)
            masks_NMF = _moments(shown_NMhw, pooled_NPhw)
            common_NF = torch.cat([points_NF, deep_NC], 1)
            if subject.items:
                own_NIF = masks_NMF[:, [subject.masks.index(item) for item in subject.items]]
                common_NIF = common_NF[:, None].expand(-1, len(subject.items), -1)
                return logits_NMHW, self.numbers[kind](torch.cat([common_NIF, own_NIF], 2))
            numbers_NQ = self.numbers[kind](torch.cat([common_NF, masks_NMF.flatten(1)], 1))
            return logits_NMHW, numbers_NQ[:, None]


def _moments(weight_NMhw: Tensor, pooled_NPhw: Tensor) -> Tensor:
    """Centre (x, y), area, log area, spread (xx, yy, xy) and mean features of weights [N, M, 7 + P].

    Coordinates run from -1 to 1 over the picture.
    """
    height, width = weight_NMhw.shape[-2:]
    y_h = (torch.arange(height, device=weight_NMhw.device) + 0.5) * (2 / height) - 1
    x_w = (torch.arange(width, device=weight_NMhw.device) + 0.5) * (2 / width) - 1
    area_NM = weight_NMhw.mean((2, 3))
    share_NMhw = weight_NMhw / (weight_NMhw.sum((2, 3), keepdim=True) + 1e-3)
    row_NMh, column_NMw = share_NMhw.sum(3), share_NMhw.sum(2)
    y_NM, x_NM = row_NMh @ y_h, column_NMw @ x_w
    xy_NM = torch.einsum("nmhw,h,w->nm", share_NMhw, y_h, x_w) - x_NM * y_NM
    yy_NM, xx_NM = row_NMh @ y_h.square() - y_NM**2, column_NMw @ x_w.square() - x_NM**2
    under_NMP = torch.einsum("nmhw,nphw->nmp", share_NMhw, pooled_NPhw)
    numbers = (x_NM, y_NM, 4 * area_NM, 0.2 * (area_NM + 1e-4).log() + 1, 4 * xx_NM, 4 * yy_NM, 4 * xy_NM)
    return torch.cat([torch.stack(numbers, 2), under_NMP], 2)
