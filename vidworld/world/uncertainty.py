"""What the future leaves open and what the model does not know: the spread of samples and of members, parted.

Shapes: B rows, S scenes, J members, M samples of each, X any axes of a quantity.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vidworld.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """Variances of one quantity, in its squared units; one row a scene."""

    mean_SX: Tensor
    """Over all samples of all members."""
    aleatoric_SX: Tensor
    """A: what the world leaves open, the mean over members of the variance of their samples."""
    epistemic_SX: Tensor | None
    """E: what the model does not know, the disagreement of members beyond what so few samples cause.
    Unbiased, so where there is none it is as often a little below zero as above; None for one member."""

    @property
    def total_SX(self) -> Tensor:
        """A + E, with an E below zero taken for none: the variance of one more sample of one more member."""
        if self.epistemic_SX is None:
            return self.aleatoric_SX
        return self.aleatoric_SX + self.epistemic_SX.clamp(min=0)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Split":
        """Apply a function, such as a mean over pixels, to each part. Means of variances stay unbiased."""
        epistemic = None if self.epistemic_SX is None else function(self.epistemic_SX)
        return Split(function(self.mean_SX), function(self.aleatoric_SX), epistemic)


def split(samples_SJMX: Tensor) -> Split:
    """Part the spread of J members with M samples each, which are independent of each other.

    A = mean_j s_j^2,  E = Var_j(xbar_j) - mean_j(s_j^2) / M: the analysis of variance of a random-effects
    model (Searle et al. 1992, section 3.5). Both are unbiased: E[A] is the mean of the members' variances,
    E[E] the variance of their means. Differentiable. Raises ConfigError for fewer than two samples.
    """
    members, samples = samples_SJMX.shape[1:3]
    if samples < 2:
        raise ConfigError(
            "samples of each member",
            got=samples,
            expected="2 or more to have a spread",
            fix="take more samples",
        )
    means_SJX = samples_SJMX.mean(2)
    aleatoric_SX = samples_SJMX.var(2).mean(1)
    epistemic_SX = None if members == 1 else means_SJX.var(1) - aleatoric_SX / samples
    return Split(means_SJX.mean(1), aleatoric_SX, epistemic_SX)


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch are futures of one scene, and which member imagined each; B int64 each."""

    scene_B: Tensor
    """Number of the prompt that a row began from."""
    member_B: Tensor

    def arrange(self, values_BX: Tensor) -> Tensor:
        """Values [B, ...] as [S, J, M, ...], scenes and members in ascending order.

        Raises DataError where scenes or members do not all have as many rows: then there is no comparing.
        """
        scenes, members = self.scene_B.tolist(), self.member_B.tolist()
        places: dict[tuple[int, int], list[int]] = {}
        for row, cell in enumerate(zip(scenes, members, strict=True)):
            places.setdefault(cell, []).append(row)
        counts = {len(rows) for rows in places.values()}
        known_scenes, known_members = sorted(set(scenes)), sorted(set(members))
        if len(counts) != 1 or len(places) != len(known_scenes) * len(known_members):
            listed = ", ".join(
                f"scene {s} member {j}: {len(rows)}" for (s, j), rows in list(places.items())[:4]
            )
            raise DataError(
                "rows of the scenes and members", got=listed, expected="as many of each", fix="select others"
            )
        order = torch.tensor(
            [row for s in known_scenes for j in known_members for row in places[s, j]],
            device=values_BX.device,
        )
        size = (len(known_scenes), len(known_members), counts.pop())
        return values_BX[order].unflatten(0, size)

    def split(self, values_BX: Tensor) -> Split:
        """Part the spread of any values of the rows."""
        return split(self.arrange(values_BX))


@dataclass(frozen=True)
class Uncertainty:
    """How sure a world is of what it shows. Each part is computed when it is asked for; nothing is kept.

    Rows of one scene are compared, so they must have been given the same actions.
    """

    rows: Rows
    latents_BX: Tensor
    proprio_BX: Tensor
    video_BX: Tensor | None

    @property
    def latents(self) -> Split:
        """Of the normalised latents [S, (T,) V, C, h, w]."""
        return self.rows.split(self.latents_BX)

    @property
    def proprio(self) -> Split:
        """Of each dimension of proprioception [S, (T,) D], in the squares of its units."""
        return self.rows.split(self.proprio_BX)

    @property
    def pixels(self) -> Split:
        """Of the pixels [S, (T,) V, H, W, 3] from 0 to 1. Raises ConfigError where none were decoded."""
        if self.video_BX is None:
            raise ConfigError("uncertainty of pixels", got="decode=False", expected="decoded pictures")
        return self.rows.split(self.video_BX.float() / 255)

    def of(self, values_BX: Tensor) -> Split:
        """Of anything else that was read off the rows, such as a readout or a reward."""
        if len(values_BX) != len(self.rows.scene_B):
            raise DataError("rows to compare", got=len(values_BX), expected=len(self.rows.scene_B))
        return self.rows.split(values_BX)


def pessimistic(reward: Tensor, epistemic: Tensor, weight: float) -> Tensor:
    """A reward that does not trust what the model does not know: r - weight sqrt(E); an E below zero is none.

    The penalty of MOPO (Yu et al. 2020, eq. 7) with the ensemble's own disagreement as the error estimate.
    """
    if not weight >= 0:
        raise ConfigError("weight of the pessimism", got=weight, expected="0 or more")
    return reward - weight * epistemic.clamp(min=0).sqrt()


def cvar(values_N: Tensor, share: float, *, worst: str = "low") -> Tensor:
    """Conditional value at risk: the mean of the worst `share` of values (Rockafellar and Uryasev 2000).

    Over the last axis; a value at the edge counts in part, so that this is exact for the empirical
    distribution and continuous in `share`. worst: "low" for rewards, "high" for costs. Differentiable.
    """
    if not 0 < share <= 1:
        raise ConfigError("share of CVaR", got=share, expected="above 0, at most 1")
    if worst not in ("low", "high"):
        raise ConfigError("worst end of CVaR", got=worst, expected="low or high")
    ordered = values_N.sort(-1, descending=worst == "high").values
    count = ordered.shape[-1]
    weights = (share * count - torch.arange(count, device=ordered.device)).clamp(0, 1)
    weights = weights.to(ordered.dtype)
    return (ordered * weights).sum(-1) / weights.sum()
