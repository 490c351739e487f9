"""What a world leaves open of the container, held to what the true simulator does: a part of uncertainty.py.

Shapes: W windows, M samples, N draws, L leads that are compared, K contexts, Q quantities, X latent values.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from uncertainty_truth import QUANTITIES, Truth, TruthConfig
from uncertainty_worlds import Imaginer, Ruler, Window, encode, outcome_of, shown

from vidworld.evaluation.distributions import KernelRidge, outside, wasserstein
from vidworld.evaluation.metrics import crps
from vidworld.evaluation.verification import energy_test, rank_test, ranks

SPACING = 4
"""Leads between the frames that a probe sees."""
FEW = 5
"""Effective draws below which a truth after contact is not told."""
MARGIN = 0.05
"""Of the width of a support: as far beyond the range of the draws that tell it is not yet outside."""
Late = Callable[[], bool]
"""Whether time is up."""


@dataclass
class Futures:
    """What the world's futures of the container are, beside the true ones; one entry an episode."""

    world: list[float] = field(default_factory=list)
    """Wasserstein distance of world and truth, mean over leads and quantities in units of their spread."""
    truth: list[float] = field(default_factory=list)
    """Of two true ensembles of the same size."""
    uniform: list[float] = field(default_factory=list)
    """Of uniform domain randomization and truth."""
    p_world: list[float] = field(default_factory=list)
    p_truth: list[float] = field(default_factory=list)
    crps_world: list[float] = field(default_factory=list)
    crps_truth: list[float] = field(default_factory=list)
    outside_world: list[float] = field(default_factory=list)
    outside_truth: list[float] = field(default_factory=list)
    noise_Q: list[np.ndarray] = field(default_factory=list)
    """Residuals of the ruler on true pictures, [N, Q]."""
    shown: dict[str, Any] = field(default_factory=dict)
    """The episode of the widest true ensemble, for a picture."""

    def rows(self) -> dict[str, tuple[float, str]]:
        """Rows, the true ensembles' own beside the world's."""
        count = len(self.world)
        said = f"1, {count} episodes before contact"
        rows = {
            "uncertainty.wasserstein_ratio": (_ratio(self.world, self.truth), said),
            "uncertainty.wasserstein_ratio.uniform": (_ratio(self.uniform, self.truth), said),
            "uncertainty.energy_test.rejected": (float(np.mean(np.array(self.p_world) < 0.05)), "at 5 %"),
            "uncertainty.energy_test.rejected.truth": (
                float(np.mean(np.array(self.p_truth) < 0.05)),
                "two true ensembles",
            ),
            "uncertainty.crps_ratio_oracle.container": (_ratio(self.crps_world, self.crps_truth), said),
            "uncertainty.outside_support": (float(np.mean(self.outside_world)), "share of samples"),
            "uncertainty.outside_support.truth": (
                float(np.mean(self.outside_truth)),
                "share of other true draws",
            ),
        }
        return {name: row for name, row in rows.items() if np.isfinite(row[0])}


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of sums; not a number where all true futures are one."""
    return sum(above) / sum(below) if sum(below) else float("nan")


def compare_futures(
    pairs: Sequence[tuple[Window, Truth]],
    imaginer: Imaginer,
    ruler: Ruler,
    config: TruthConfig,
    late: Late,
) -> Futures:
    """Hold futures before contact to true ones: by the same ruler, through the same tokenizer."""
    found = Futures()
    at = [lead - 1 for lead in config.leads]
    windows = [cut(window, config.context, max(config.leads)) for window, _ in pairs]
    read: list[tuple[np.ndarray, ...]] = []
    for imagined, (window, truth) in zip(imaginer(windows, at), pairs, strict=True):
        reference_HWC = window.frames_THWC[0]

        def values(videos_NTHWC: np.ndarray, reference_HWC: np.ndarray = reference_HWC) -> np.ndarray:
            return ruler.values(ruler.read(videos_NTHWC, "container", reference_HWC), QUANTITIES)

        frames = truth.frames_2MLHWC
        pictures = shown(imaginer.world, frames.reshape(-1, *frames.shape[3:])).reshape(frames.shape)
        of_truth = np.stack([values(one_MLHWC) for one_MLHWC in pictures])
        happened = window.frames_THWC[config.context :][at]
        came_LQ = values(shown(imaginer.world, happened)[None])[0]
        read.append((values(imagined.video_MTHWC), of_truth, came_LQ))
        found.noise_Q.append((of_truth - truth.support_NLQ[truth.indices_2M]).reshape(-1, len(QUANTITIES)))
        if late() and len(read) > 1:
            break
    scale_Q = np.sqrt(np.mean([of_truth.var((0, 1, 2)) for _, of_truth, _ in read], 0)) + 1e-9
    residuals_NQ = np.concatenate(found.noise_Q)
    bias_Q = np.median(residuals_NQ, 0)
    tolerance_Q = np.quantile(np.abs(residuals_NQ - bias_Q), 0.99, axis=0)
    widest = -1.0
    for (world_MLQ, (first_MLQ, second_MLQ), came_LQ), (window, truth) in zip(read, pairs, strict=False):

        def apart(one_MLQ: np.ndarray, other_MLQ: np.ndarray) -> float:
            return float(
                np.mean(
                    [
                        wasserstein(one_MLQ[:, lead, q], other_MLQ[:, lead, q]) / scale_Q[q]
                        for lead in range(one_MLQ.shape[1])
                        for q in range(one_MLQ.shape[2])
                    ]
                )
            )

        def flat(one_MLQ: np.ndarray) -> np.ndarray:
            return (one_MLQ / scale_Q).reshape(len(one_MLQ), -1)

        count = len(first_MLQ)
        found.world.append((apart(world_MLQ, first_MLQ) + apart(world_MLQ, second_MLQ)) / 2)
        found.truth.append(apart(first_MLQ, second_MLQ))
        # Uniform randomization and truth both as the simulator has them: no ruler is between.
        true_MLQ = truth.support_NLQ[truth.indices_2M[0]]
        bare = apart(true_MLQ, truth.support_NLQ[truth.indices_2M[1]])
        ratio = apart(truth.uniform_MLQ[:count], true_MLQ) / max(bare, 1e-9)
        found.uniform.append(ratio * found.truth[-1])
        found.p_world.append(energy_test(flat(world_MLQ), flat(first_MLQ), draws=199))
        found.p_truth.append(energy_test(flat(second_MLQ), flat(first_MLQ), draws=199))
        found.crps_world.append(float((crps(world_MLQ, came_LQ) / scale_Q).mean()))
        found.crps_truth.append(float((crps(first_MLQ, came_LQ) / scale_Q).mean()))
        for lead in range(len(config.leads)):
            support_NQ = truth.support_NLQ[:, lead] + bias_Q
            margin_Q = tolerance_Q + MARGIN * np.ptp(support_NQ, axis=0)
            found.outside_world.append(outside(world_MLQ[:, lead], support_NQ, margin_Q))
            others = np.ones(len(truth.support_NLQ), bool)
            others[truth.indices_2M[1]] = False
            found.outside_truth.append(outside(second_MLQ[:, lead], support_NQ[others], margin_Q))
        wide = float((first_MLQ[:, -1] / scale_Q).std(0).sum())
        if wide > widest:
            widest = wide
            found.shown = {
                "key": window.key,
                "world": world_MLQ,
                "truth": np.concatenate([first_MLQ, second_MLQ]),
                "uniform": truth.uniform_MLQ,
                "scale": scale_Q,
            }
    return found


def cut(window: Window, context: int, frames: int) -> Window:
    """The same episode with another number of known frames and another horizon."""
    episode = window.episode
    assert episode is not None
    assert episode.video is not None
    (video_THWC,) = episode.video.values()
    length = context + frames
    return dataclasses.replace(
        window,
        frames_THWC=video_THWC[:length],
        actions_TA=episode.actions_TA[: length - 1],
        proprio_TS=episode.proprio_TS[:length],
        context=context,
    )


@dataclass
class Narrowing:
    """Root mean square spread of the container at one frame, given more and more frames; [K, Q]."""

    contexts: tuple[int, ...]
    world_KQ: np.ndarray
    truth_KQ: np.ndarray
    uniform_Q: np.ndarray
    ruler_Q: np.ndarray
    outside: dict[str, float]
    """Share outside of what the most frames leave open, of `world` and `uniform`."""
    episodes: int

    def rows(self) -> dict[str, tuple[float, str]]:
        """Spread of the box's place in metres, given each number of frames."""
        place = [QUANTITIES.index(name) for name in ("box_x", "box_y")]
        rows = {}
        for number, context in enumerate(self.contexts):
            for name, spread_KQ in (("world", self.world_KQ), ("truth", self.truth_KQ)):
                rows[f"uncertainty.spread.k{context}.{name}"] = (
                    float(np.linalg.norm(spread_KQ[number, place])),
                    f"m, box at one frame, {self.episodes} episodes",
                )
        rows["uncertainty.spread.uniform"] = (float(np.linalg.norm(self.uniform_Q[place])), "m")
        rows["uncertainty.spread.ruler"] = (float(np.linalg.norm(self.ruler_Q[place])), "m, its own noise")
        for name, share in self.outside.items():
            rows[f"uncertainty.outside_support.k{self.contexts[-1]}.{name}"] = (share, "share of samples")
        return rows


def narrow_spread(
    pairs: Sequence[tuple[Window, Truth]],
    imaginer: Imaginer,
    ruler: Ruler,
    config: TruthConfig,
    residuals_NQ: np.ndarray,
    late: Late,
) -> Narrowing:
    """Show more and more frames of the same episodes and measure the spread at the same later frame."""
    bias_Q, ruler_Q = np.median(residuals_NQ, 0), residuals_NQ.std(0)
    tolerance_Q = np.quantile(np.abs(residuals_NQ - bias_Q), 0.99, axis=0)
    variance: list[np.ndarray] = []
    strange: list[float] = []
    for context in config.contexts:
        horizon = config.target + 1 - context
        windows = [cut(window, context, horizon) for window, _ in pairs]
        of_context = []
        for imagined, (window, truth) in zip(imaginer(windows, [horizon - 1]), pairs, strict=True):
            readings = ruler.read(imagined.video_MTHWC, "container", window.frames_THWC[0])
            values_MQ = ruler.values(readings, QUANTITIES)[:, 0]
            of_context.append(values_MQ.var(0, ddof=1))
            if context == config.contexts[-1] and truth.effective_K[-1] >= FEW:
                edges = np.stack([truth.target_low_Q, truth.target_high_Q]) + bias_Q
                strange.append(outside(values_MQ, edges, tolerance_Q + MARGIN * np.ptp(edges, axis=0)))
        variance.append(np.array(of_context))
        if late() and len(variance) > 1:
            break
    kept = config.contexts[: len(variance)]
    # Spreads that few effective draws tell are left out, of the same episodes in both.
    usable = np.array([truth.effective_K[: len(kept)] >= FEW for _, truth in pairs])
    truth_WKQ = np.array([truth.spread_KQ[: len(kept)] for _, truth in pairs])

    def rms(square_WQ: np.ndarray, number: int) -> np.ndarray:
        told_WQ = square_WQ[usable[:, number]]
        return np.sqrt(told_WQ.mean(0)) if len(told_WQ) else np.full(square_WQ.shape[1], np.nan)

    uniform_outside = [
        outside(
            truth.uniform_target_NQ,
            np.stack([truth.target_low_Q, truth.target_high_Q]),
            tolerance_Q + MARGIN * (truth.target_high_Q - truth.target_low_Q),
        )
        for _, truth in pairs
        if truth.effective_K[-1] >= FEW
    ]
    shares = {
        name: float(np.mean(found))
        for name, found in (("uniform", uniform_outside), ("world", strange))
        if found
    }
    return Narrowing(
        kept,
        np.stack([rms(row, number) for number, row in enumerate(variance)]),
        np.stack([rms(np.square(truth_WKQ[:, number]), number) for number in range(len(kept))]),
        np.sqrt(np.mean([truth.uniform_target_NQ.var(0, ddof=1) for _, truth in pairs], 0)),
        ruler_Q,
        shares,
        len(pairs),
    )


@dataclass
class Mass:
    """Ranks of the mass that a probe reads off what came among those that it reads off samples."""

    counts_R: np.ndarray
    probe_r2: float
    """Leave-one-out on the true futures that it was fitted on."""
    held_out_r2: float
    shown: dict[str, Any]

    def rows(self) -> dict[str, tuple[float, str]]:
        """The test, and what the probe is worth."""
        count = int(self.counts_R.sum())
        test = rank_test(self.counts_R)
        return {
            "uncertainty.sbc_mass_p": (test.p_flat, f"chance of so uneven ranks, {count} episodes"),
            "uncertainty.sbc_mass_p.dispersion": (test.p_dispersion, "of their valley or dome alone"),
            "uncertainty.mass_probe_r2": (self.held_out_r2, "log mass, true held-out futures"),
        }


def probe_mass(
    train: Sequence[Window],
    held: Sequence[Window],
    imaginer: Imaginer,
    ruler: Ruler | None,
    late: Late,
) -> Mass | None:
    """Fit a probe of the log mass on true futures, and rank what came among the samples.

    If futures are drawn from the truth's distribution, so is any function of them: the ranks are uniform
    (simulation-based calibration, Talts et al. 2018), however good the probe is.
    """
    horizon = len(held[0].frames_THWC) - held[0].context
    at = list(range(SPACING - 1, horizon, SPACING))
    features, targets = [], []
    for window in train:
        features.append(_true_features(window, imaginer, ruler, at))
        targets.append(np.log(outcome_of(window)["hidden"]["mass_kg"]))
        if late() and len(targets) > 20:
            break
    if len(targets) < 10:
        return None
    probe = KernelRidge(np.stack(features), np.array(targets))
    counts_R = np.zeros(imaginer.samples + 1, np.int64)
    rng = np.random.default_rng(0)
    truths, read = [], []
    kept: dict[str, Any] = {"truth": [], "came": [], "samples": []}
    for imagined in imaginer(held, at):
        window = imagined.window
        of_samples = _features(
            imagined.video_MTHWC, imagined.latents_MTX[:, at], imagined.proprio_MTS[:, at], window, ruler, at
        )
        said_M, came = probe(of_samples), float(probe(_true_features(window, imaginer, ruler, at)[None])[0])
        counts_R[int(ranks(said_M[:, None], np.array([came]), rng)[0])] += 1
        truths.append(np.log(outcome_of(window)["hidden"]["mass_kg"]))
        read.append(came)
        kept["truth"].append(truths[-1])
        kept["came"].append(came)
        kept["samples"].append(said_M)
        if late() and len(read) > 1:
            break
    error = float(np.square(np.array(read) - truths).mean())
    return Mass(counts_R, probe.r2, 1 - error / max(float(np.var(truths)), 1e-12), kept)


def _true_features(window: Window, imaginer: Imaginer, ruler: Ruler | None, at: Sequence[int]) -> np.ndarray:
    frames = [window.context + place for place in at]
    pictures = window.frames_THWC[frames]
    latents_1TX = encode(imaginer.world, pictures)[None]
    seen = shown(imaginer.world, pictures)[None] if ruler is not None else pictures[None]
    return _features(seen, latents_1TX, window.proprio_TS[frames][None], window, ruler, at)[0]


def _features(
    video_NTHWC: np.ndarray,
    latents_NTX: Tensor,
    proprio_NTS: np.ndarray,
    window: Window,
    ruler: Ruler | None,
    at: Sequence[int],
) -> np.ndarray:
    """What a probe sees of futures [N, F]: outcomes (or coarse latents), proprioception, and the commands."""
    if ruler is not None:
        readings = ruler.read(video_NTHWC, "container", window.frames_THWC[0])
        told = ruler.values(readings, QUANTITIES).reshape(len(video_NTHWC), -1)
    else:
        pooled_NTX = torch.nn.functional.adaptive_avg_pool1d(latents_NTX, 32)
        told = pooled_NTX.flatten(1).double().cpu().numpy()
    commands = window.actions_TA[[window.context - 1 + place for place in at]].ravel()
    felt = proprio_NTS.reshape(len(proprio_NTS), -1)
    return np.concatenate([told, felt, np.tile(commands, (len(felt), 1))], 1)
