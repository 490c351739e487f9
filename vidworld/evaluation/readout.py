"""The readout: reads outcome quantities and masks off pictures of the lab; a ruler for imagined frames.

    readout = load_readout("runs/readout")
    readings = readout(frames_BTHWC, "paint")
    readings.quantities["coverage"], readout.errors["paint"]["quantities"]["coverage"]["mae"]

It was trained on true frames only and says how far off it is on held-out ones. On disk it is a folder with
`readout.safetensors` (weights in int8) and `readout.json`, written last, whose digest covers both.

Shapes: B videos, T frames, N pictures, H W pixels, M masks, Q quantities.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vidworld.config import digest, from_mapping, to_mapping
from vidworld.errors import CheckpointError, ConfigError, DataError
from vidworld.evaluation.fidelity import centroid
from vidworld.evaluation.lab_frames import check_size
from vidworld.evaluation.quantities import SUBJECTS, Subject, subject_of
from vidworld.evaluation.readout_net import ReadoutConfig, ReadoutNet
from vidworld.files import write_atomic
from vidworld.quantize import Precision, compress, restore
from vidworld.tokenizers.weights import check_architecture
from vidworld.world.shipped import FOLDER

SCHEMA_VERSION = 1
CARD = "readout.json"
SHIPPED = "lab"
"""Name of the readout that comes with the package: trained on 2,000 true episodes of every kind."""
WEIGHTS = "readout.safetensors"
PRECISION: Precision = "int8"
"""Of the weights on disk."""
PICTURES_AT_ONCE = 128


@dataclass(frozen=True)
class Scale:
    """Mean and spread of each output over the training frames; a periodic quantity has two outputs."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Readings:
    """What was read off videos of one kind."""

    kind: str
    masks: Mapping[str, np.ndarray]
    """Name -> bool [B, T, H, W]."""
    quantities: Mapping[str, np.ndarray]
    """Name -> float32 [B, T] in the units of `quantities.SUBJECTS`."""

    def centroids(self) -> dict[str, np.ndarray]:
        """Centre of each mask in pixels [B, T, 2] (x right, y down), NaN where nothing is seen."""
        return {name: centroid(mask) for name, mask in self.masks.items()}

    def __getitem__(self, index: Any) -> "Readings":
        """Some of the videos, or with a pair of indices some of their frames."""
        return Readings(
            self.kind,
            {name: mask[index] for name, mask in self.masks.items()},
            {name: values[index] for name, values in self.quantities.items()},
        )


class Readout:
    """A trained readout.

    size: pixels of a side of the pictures it reads. errors: kind -> what `measure` found on held-out true
    frames. training: datasets with their digests, settings, versions, device.
    """

    def __init__(
        self,
        net: ReadoutNet,
        size: int,
        scales: Mapping[str, Scale],
        errors: Mapping[str, Any],
        training: Mapping[str, Any],
    ) -> None:
        self.net, self.size, self.scales = net.eval().requires_grad_(False), size, dict(scales)
        self.errors, self.training = errors, training

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of episode that it reads."""
        return tuple(self.net.subjects)

    def to(self, device: torch.device | str) -> "Readout":
        """The same readout on another device."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, frames_BTHWC: np.ndarray | Tensor, kind: str, reference_BHWC: np.ndarray | Tensor | None = None
    ) -> Readings:
        """Read uint8 videos of one kind.

        `reference_BHWC` matters only to a readout that was trained with one: the first frame of each episode,
        by default that of the video. Raises ConfigError for a kind, DataError for a size or type that it was
        not trained on.
        """
        subject = subject_of(kind, self.net.subjects, where="this readout")
        frames_BTHWC = self._checked(frames_BTHWC, 5, "[B, T, H, W, 3]")
        references = frames_BTHWC[:, 0]
        if reference_BHWC is not None:
            references = self._checked(reference_BHWC, 4, "[B, H, W, 3]")
            if len(references) != len(frames_BTHWC):
                raise DataError("references", got=len(references), expected=len(frames_BTHWC))
        batch, time = frames_BTHWC.shape[:2]
        frames_NHWC = frames_BTHWC.reshape(-1, *frames_BTHWC.shape[2:])
        video_N = torch.arange(batch).repeat_interleave(time)
        masks, values = [], []
        for rows in torch.arange(batch * time).split(PICTURES_AT_ONCE):
            masks_NMHW, values_NQ = self.pictures(
                frames_NHWC[rows], kind, references[video_N[rows]] if self.net.config.reference else None
            )
            masks.append(masks_NMHW.cpu())
            values.append(values_NQ.cpu())
        masks_NMHW, values_NQ = torch.cat(masks).numpy(), torch.cat(values).numpy()
        return Readings(
            kind,
            {
                name: masks_NMHW[:, place].reshape(batch, time, self.size, self.size)
                for place, name in enumerate(subject.masks)
            },
            {name: values_NQ[:, place].reshape(batch, time) for place, name in enumerate(subject.named)},
        )

    def pictures(
        self, frames_NHWC: Tensor, kind: str, references_NHWC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks [N, M, H, W] bool and quantities [N, Q] of uint8 pictures."""
        device = next(self.net.parameters()).device
        pictures_NCHW = to_pictures(frames_NHWC.to(device), references_NHWC)
        logits_NMHW, numbers_NIQ = self.net.read(self.net.trunk(pictures_NCHW), kind)
        return logits_NMHW > 0, decode_numbers(numbers_NIQ, self.net.subjects[kind], self.scales[kind])

    def _checked(self, frames: np.ndarray | Tensor, axes: int, shape: str) -> Tensor:
        frames = torch.from_numpy(np.ascontiguousarray(frames)) if isinstance(frames, np.ndarray) else frames
        if frames.dtype != torch.uint8 or frames.ndim != axes or frames.shape[-1] != 3 or not frames.numel():
            raise DataError(
                "pictures to read",
                got=f"{str(frames.dtype).removeprefix('torch.')} {tuple(frames.shape)}",
                expected=f"uint8 {shape}, not empty",
            )
        check_size(*frames.shape[-3:-1], where="what is to be read", expected=self.size)
        return frames


def to_pictures(frames_NHWC: Tensor, references_NHWC: Tensor | None = None) -> Tensor:
    """uint8 pictures, with their references behind them if there are, as the network takes them."""
    if references_NHWC is not None:
        frames_NHWC = torch.cat([frames_NHWC, references_NHWC.to(frames_NHWC.device)], -1)
    pictures_NCHW = frames_NHWC.movedim(-1, 1).float() / 127.5 - 1
    return pictures_NCHW.contiguous(memory_format=torch.channels_last)


def encode_values(values_NQ: Tensor, subject: Subject) -> Tensor:
    """Quantities [N, I * Q] as network outputs before scaling [N, I, outputs]: angles as cos and sin."""
    columns = []
    values_NIQ = values_NQ.unflatten(1, (max(1, len(subject.items)), len(subject.quantities)))
    for place, quantity in enumerate(subject.quantities):
        value_NI = values_NIQ[..., place]
        if quantity.period is None:
            columns.append(value_NI)
        else:
            turn_NI = value_NI * (2 * torch.pi / quantity.period)
            columns += [turn_NI.cos(), turn_NI.sin()]
    return torch.stack(columns, -1)


def decode_numbers(numbers_NIQ: Tensor, subject: Subject, scale: Scale) -> Tensor:
    """Network outputs as quantities [N, I * Q], in the order of `subject.named`."""
    mean_Q, std_Q = (numbers_NIQ.new_tensor(column) for column in (scale.mean, scale.std))
    numbers_NIQ = numbers_NIQ * std_Q + mean_Q
    columns, place = [], 0
    for quantity in subject.quantities:
        if quantity.period is None:
            columns.append(numbers_NIQ[..., place])
            place += 1
        else:
            turn_NI = torch.atan2(numbers_NIQ[..., place + 1], numbers_NIQ[..., place])
            columns.append(turn_NI * (quantity.period / (2 * torch.pi)))
            place += 2
    return torch.stack(columns, -1).flatten(1)


def save_readout(readout: Readout, directory: Path | str) -> str:
    """Write a readout into a folder, making it, and return its digest; equal readouts give equal bytes.

    Raises CheckpointError when it cannot be written.
    """
    directory = Path(directory)
    content = save(compress(readout.net.state_dict(), PRECISION))
    card = {
        "schema_version": SCHEMA_VERSION,
        "size": readout.size,
        "net": to_mapping(readout.net.config),
        "kinds": {
            kind: {"subject": to_mapping(subject), "scale": to_mapping(readout.scales[kind])}
            for kind, subject in readout.net.subjects.items()
        },
        "held_out_errors": readout.errors,
        "training": readout.training,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    card["digest"] = digest(card)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / WEIGHTS, content)
        write_atomic(directory / CARD, (json.dumps(card, indent=1) + "\n").encode())
    except OSError as error:
        raise CheckpointError("cannot write the readout", where=directory, got=error.strerror) from None
    return card["digest"]


def readout_folder(directory: Path | str) -> Path:
    """The folder of a readout: the package's for its name, unless there is one of that name here."""
    here = Path(directory)
    return FOLDER / f"{SHIPPED}_readout" if str(here) == SHIPPED and not (here / CARD).exists() else here


def load_readout(directory: Path | str, device: torch.device | str = "cpu") -> Readout:
    """Open a readout's folder, or `lab`, the one that comes with the package.

    Raises CheckpointError when it is missing, damaged, or of other quantities.
    """
    directory = readout_folder(directory)
    path = directory / CARD
    try:
        card = json.loads(path.read_bytes())
        content = (directory / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "cannot read the readout",
            where=directory,
            got=error,
            fix="give what vidworld readout train wrote",
        ) from None
    if not isinstance(card, dict) or card.get("schema_version") != SCHEMA_VERSION:
        version = card.get("schema_version") if isinstance(card, dict) else None
        raise CheckpointError("schema version", where=path, got=version, expected=SCHEMA_VERSION)
    stored = card.pop("digest", None)
    if stored != digest(card) or card.get("weights_sha256") != hashlib.sha256(content).hexdigest():
        raise CheckpointError(
            "the readout does not match its digest: it is damaged or was edited",
            where=directory,
            fix="copy it again, or train it again",
        )
    try:
        kinds = {
            kind: from_mapping(Subject, known["subject"], where=path) for kind, known in card["kinds"].items()
        }
        scales = {
            kind: from_mapping(Scale, known["scale"], where=path) for kind, known in card["kinds"].items()
        }
        net = ReadoutNet(from_mapping(ReadoutConfig, card["net"], where=path), kinds)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("card of the readout", where=path, got=error) from None
    for kind, subject in kinds.items():
        if SUBJECTS.get(kind) != subject:
            raise CheckpointError(
                f"what is read of {kind!r} differs from this vidworld's",
                where=path,
                fix="train the readout again, or install the vidworld that wrote it",
            )
    try:
        weights = {name: tensor.float() for name, tensor in restore(load_file(directory / WEIGHTS)).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError("cannot read the readout's weights", where=directory, got=error) from None
    check_architecture(weights, net.state_dict(), directory / WEIGHTS)
    net.load_state_dict(weights)
    return Readout(net, int(card["size"]), scales, card["held_out_errors"], card["training"]).to(device)
