"""Training a readout on true lab frames, and measuring it on held-out ones.

A step takes as many frames of every kind. Pictures are dimmed, tinted, blurred and grained at random, so that
the readout does not lean on what a decoder or a codec changes; their geometry is left alone, since positions
are read in the world frame of a camera that does not move.

Shapes: N pictures, M masks, I items, Q quantities (outputs, where they are scaled), H W pixels.
"""

import copy
import datetime
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidworld import __version__
from vidworld.config import to_mapping
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError, DivergedError
from vidworld.evaluation.lab_frames import LabFrames, load_frames
from vidworld.evaluation.quantities import SUBJECTS, Subject
from vidworld.evaluation.readout import PRECISION, Readout, Scale, encode_values, to_pictures
from vidworld.evaluation.readout_errors import measure
from vidworld.evaluation.readout_net import ReadoutConfig, ReadoutNet
from vidworld.quantize import rounded

LEAST_STD = 1e-4
"""Floor of the spread that outputs are scaled by: what never varies in training teaches nothing."""


@dataclass(frozen=True)
class ReadoutTraining:
    """How a readout is trained."""

    net: ReadoutConfig = field(default_factory=ReadoutConfig)
    steps: int = 6000
    minutes: float | None = None
    """Stop after this long if the steps take longer; the learning rate falls along."""
    rows: int = 16
    """Frames of each kind in a step."""
    lr: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02
    ema_decay: float = 0.998
    number_weight: float = 1.0
    """Weight of the numbers' loss beside the masks'."""
    augment: float = 1.0
    """Strength of the changes to colours and sharpness; 0 none."""
    stride: int = 2
    """Every how many frames of an episode one is taken: neighbours are alike."""
    memory_gb: float = 24.0
    """Most that the frames may take, each split by itself."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """`auto` is bf16 on a GPU and float32 on a CPU."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting {name!r}", got=getattr(self, name), expected="at least 1")
        for name in ("lr", "memory_gb", "minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"setting {name!r}", got=getattr(self, name), expected="above 0")
        for name in ("warmup_steps", "weight_decay", "number_weight", "augment"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"setting {name!r}", got=getattr(self, name), expected="0 or more")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError("setting 'ema_decay'", got=self.ema_decay, expected="from 0 to below 1")


def train_readout(
    datasets: Sequence[ShardDataset],
    training: ReadoutTraining,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> Readout:
    """Train on the train split of lab datasets, measure on their val split; `progress(loss)` after each step.

    The same data, settings and device give the same weights. Raises DataError for data that is not of the lab
    or lacks its truth, or for a kind without held-out episodes; DivergedError when the loss is not finite.
    """
    if not datasets:
        raise DataError("data to train a readout on", got="no dataset", expected="at least one")
    load = {"stride": training.stride, "memory_gb": training.memory_gb}
    known, unseen = load_frames(datasets, "train", **load), load_frames(datasets, "val", **load)
    for kind in known:
        if kind not in unseen:
            raise DataError(
                f"held-out episodes of {kind!r}",
                where=", ".join(str(dataset.directory) for dataset in datasets),
                got="none",
                expected="some: a ruler says how far off it is",
            )
    began = time.perf_counter()
    torch.manual_seed(training.seed)
    net = ReadoutNet(training.net, {kind: SUBJECTS[kind] for kind in known})
    net = net.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    scales = {kind: _scale(frames) for kind, frames in known.items()}
    averaged, steps = _fit(net, known, scales, training, torch.device(device), progress)
    # As it is stored, so that what is measured now is what is loaded later.
    averaged.load_state_dict(rounded(averaged.state_dict(), PRECISION))
    facts = {
        "datasets": [_facts(dataset) for dataset in datasets],
        "episodes": {kind: len(np.unique(frames.first_N)) for kind, frames in known.items()},
        "held_out_episodes": {kind: len(np.unique(frames.first_N)) for kind, frames in unseen.items()},
        "frames": {kind: len(frames) for kind, frames in known.items()},
        "settings": to_mapping(training),
        "steps": steps,
        "seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "vidworld": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    size = datasets[0].manifest.height
    readout = Readout(averaged, size, scales, {}, facts)
    readout.errors = {kind: measure(readout, frames) for kind, frames in unseen.items()}
    return readout


def _fit(
    net: ReadoutNet,
    known: Mapping[str, LabFrames],
    scales: Mapping[str, Scale],
    training: ReadoutTraining,
    device: torch.device,
    progress: Callable[[float], object] | None,
) -> tuple[ReadoutNet, int]:
    """Train a network in place; returns the average of its weights, and the steps that were taken."""
    averaged = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        net.parameters(), training.lr, weight_decay=training.weight_decay, fused=True
    )
    order = np.random.default_rng([training.seed, 1])
    generator = torch.Generator(device).manual_seed(training.seed)
    bf16 = training.precision == "bf16" or (training.precision == "auto" and device.type == "cuda")
    feeds = {kind: _endless(order, len(frames), training.rows) for kind, frames in known.items()}
    began, minutes = time.perf_counter(), training.minutes or math.inf
    step = 0
    while step < training.steps:
        done = max(step / training.steps, (time.perf_counter() - began) / 60 / minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = training.lr * _rate(step, done, training)
        batches = {kind: _batch(known[kind], next(feed), training, device) for kind, feed in feeds.items()}
        pictures_NCHW = augment(
            torch.cat([batch[0] for batch in batches.values()]), training.augment, generator
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = net.trunk(pictures_NCHW)
            read = {
                kind: net.read(features[place * training.rows : (place + 1) * training.rows], kind)
                for place, kind in enumerate(batches)
            }
        losses = [
            loss_of(*read[kind], masks, values, SUBJECTS[kind], scales[kind], training.number_weight)
            for kind, (_, masks, values) in batches.items()
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(training.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), net.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        step += 1
        if step % 50 == 0 and not torch.isfinite(loss):
            raise DivergedError(f"the loss of the readout is not finite at step {step}: lower --lr")
        if progress is not None:
            progress(float(loss.detach()) if step % 10 == 0 else math.nan)
    if not all(parameter.isfinite().all() for parameter in averaged.parameters()):
        raise DivergedError("the readout's weights are not finite: lower --lr")
    return averaged, step


def loss_of(
    logits_NMHW: Tensor,
    numbers_NIQ: Tensor,
    masks_NMHW: Tensor,
    values_NQ: Tensor,
    subject: Subject,
    scale: Scale,
    number_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy and soft Dice of masks, Huber of scaled numbers where they count (NaN: they do not)."""
    true_NMHW = masks_NMHW.float()
    entropy = F.binary_cross_entropy_with_logits(logits_NMHW, true_NMHW)
    shown_NMHW = logits_NMHW.sigmoid()
    overlap_M = (shown_NMHW * true_NMHW).sum((0, 2, 3))
    dice_M = 1 - (2 * overlap_M + 1) / (shown_NMHW.sum((0, 2, 3)) + true_NMHW.sum((0, 2, 3)) + 1)
    mean_Q, std_Q = (numbers_NIQ.new_tensor(column) for column in (scale.mean, scale.std))
    target_NIQ = (encode_values(values_NQ, subject) - mean_Q) / std_Q
    counts_NIQ = target_NIQ.isfinite()
    apart_NIQ = F.smooth_l1_loss(
        numbers_NIQ, target_NIQ.where(counts_NIQ, numbers_NIQ.detach()), reduction="none", beta=0.25
    )
    numbers = apart_NIQ.sum() / counts_NIQ.sum().clamp(min=1)
    return 4 * entropy + 0.5 * dice_M.mean() + number_weight * numbers


def augment(pictures_NCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Dim, tint, blur and grain pictures in [-1, 1], each in its own way; geometry stays."""
    if not strength:
        return pictures_NCHW
    device, count = pictures_NCHW.device, len(pictures_NCHW)

    def uniform(*shape: int) -> Tensor:
        return torch.rand((count, *shape), generator=generator, device=device)

    gain_N3 = 1 + strength * (0.16 * (uniform(1, 1, 1) - 0.5) + 0.06 * (uniform(3, 1, 1) - 0.5))
    offset_N = strength * 0.12 * (uniform(1, 1, 1) - 0.5)
    copies = pictures_NCHW.shape[1] // 3
    pictures_NCHW = pictures_NCHW * gain_N3.repeat(1, copies, 1, 1) + offset_N
    blurred_NCHW = F.avg_pool2d(F.pad(pictures_NCHW, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share_N = (strength * (1.5 * uniform(1, 1, 1) - 0.6)).clamp(0, 1)
    pictures_NCHW = torch.lerp(pictures_NCHW, blurred_NCHW, share_N)
    grain = torch.randn(pictures_NCHW.shape, generator=generator, device=device)
    pictures_NCHW = pictures_NCHW + strength * 0.05 * uniform(1, 1, 1) * grain
    return pictures_NCHW.contiguous(memory_format=torch.channels_last)


def _batch(
    frames: LabFrames, rows: np.ndarray, training: ReadoutTraining, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, masks and quantities of some rows."""
    shown = torch.from_numpy(frames.frames_NHWC[rows]).to(device, non_blocking=True)
    references = None
    if training.net.reference:
        references = torch.from_numpy(frames.frames_NHWC[frames.first_N[rows]]).to(device)
    masks = torch.from_numpy(frames.masks(rows)).to(device, non_blocking=True)
    values = torch.from_numpy(frames.values_NQ[rows]).to(device, non_blocking=True)
    return to_pictures(shown, references), masks, values


def _endless(order: np.random.Generator, count: int, rows: int) -> Any:
    """Rows for one step after another: a new permutation whenever all have been taken."""
    left = np.zeros(0, np.int64)
    while True:
        while len(left) < rows:
            left = np.concatenate([left, order.permutation(count)])
        yield left[:rows]
        left = left[rows:]


def _rate(step: int, done: float, training: ReadoutTraining) -> float:
    """Share of the learning rate: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, training.warmup_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * done))


def _scale(frames: LabFrames) -> Scale:
    """Mean and spread of the outputs over all frames and items that count."""
    targets = encode_values(torch.from_numpy(frames.values_NQ).double(), SUBJECTS[frames.kind]).flatten(0, 1)
    columns = [column[column.isfinite()] for column in targets.T]
    return Scale(
        tuple(float(column.mean()) if len(column) else 0.0 for column in columns),
        tuple(max(float(column.std(correction=0)), LEAST_STD) if len(column) else 1.0 for column in columns),
    )


def _facts(dataset: ShardDataset) -> dict[str, Any]:
    manifest = dataset.manifest
    first = dataset.meta(manifest.samples()[0].key).get("source") or {}
    return {
        "name": manifest.name,
        "digest": manifest.digest,
        "episodes": len(manifest.samples()),
        "made_by": manifest.created_by,
        "versions": first.get("versions", {}),
    }
