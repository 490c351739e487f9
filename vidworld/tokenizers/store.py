"""Tokenizers on disk: a folder with `tokenizer.json` (what it is) and `tokenizer.safetensors` (its weights).

The description is written last and carries a digest over config and weights, so that a half-written, mixed up
or damaged folder is refused and never loaded.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vidworld.config import from_mapping, to_mapping
from vidworld.errors import CheckpointError, ConfigError
from vidworld.tokenizers.base import Tokenizer
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig

SCHEMA_VERSION = 1
DESCRIPTION = "tokenizer.json"
WEIGHTS = "tokenizer.safetensors"
FOLDER = "tokenizer"
"""Where a run keeps its tokenizer."""
KINDS = (ConvTokenizer.kind,)
NAMES_SHOWN = 3
C = TypeVar("C")


def save_tokenizer(tokenizer: ConvTokenizer, directory: Path | str) -> str:
    """Write a tokenizer into a folder, making it, and return the digest; equal tokenizers give equal bytes.

    Raises CheckpointError when it cannot be written.
    """
    directory = Path(directory)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    description = _describe(tokenizer)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_atomic(directory / WEIGHTS, save(weights))
        _write_atomic(directory / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
    except OSError as error:
        raise CheckpointError("cannot write the tokenizer", where=directory, got=error.strerror) from None
    return description["digest"]


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Open a tokenizer's folder, or a run that holds one in `tokenizer/`.

    It comes on the CPU in float32, in eval mode, its parameters not requiring grad (gradients still flow
    through it). Raises CheckpointError when it is missing, damaged, mixed up, or of an unknown kind.
    """
    folder = _find(Path(directory))
    description = _read_description(folder)
    kind = description.get("kind")
    match kind:
        case "conv":
            tokenizer = ConvTokenizer(_config(ConvTokenizerConfig, description, folder))
        case _:
            raise CheckpointError(
                "tokenizer kind",
                where=folder / DESCRIPTION,
                got=repr(kind),
                expected=" or ".join(repr(known) for known in KINDS),
                fix="install the vidworld that wrote it",
            )
    weights = _read_weights(folder)
    _check_architecture(weights, tokenizer.state_dict(), folder)
    tokenizer.load_state_dict(weights)
    for name, expected in _describe(tokenizer).items():
        if description.get(name) != expected:
            raise CheckpointError(
                f"{name} of the tokenizer does not match its weights: the folder is damaged or was edited",
                where=folder,
                got=_brief(description.get(name)),
                expected=_brief(expected),
                fix="copy it again, or train it again",
            )
    return tokenizer.eval().requires_grad_(False)


def _describe(tokenizer: ConvTokenizer) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": tokenizer.kind,
        "config": to_mapping(tokenizer.config),
        "latent_channels": tokenizer.latent_channels,
        "spatial_stride": tokenizer.spatial_stride,
        "time_stride": tokenizer.time_stride,
        "statistics": {"mean": tokenizer.mean_C.tolist(), "std": tokenizer.std_C.tolist()},
        "digest": tokenizer.digest,
    }


def _find(directory: Path) -> Path:
    for folder in (directory, directory / FOLDER):
        if (folder / DESCRIPTION).is_file():
            return folder
    raise CheckpointError(
        f"no {DESCRIPTION}",
        where=directory,
        got="a folder" if directory.is_dir() else "no such folder",
        expected="a tokenizer's folder, or a run that has trained one",
        fix="give the directory that `vidworld train` wrote for a tokenizer",
    )


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot read the tokenizer's description", where=path, got=error) from None
    version = description.get("schema_version") if isinstance(description, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            "schema version",
            where=path,
            got=version,
            expected=SCHEMA_VERSION,
            fix="install the vidworld that wrote it",
        )
    return description


def _config(cls: type[C], description: Mapping[str, Any], folder: Path) -> C:
    where = folder / DESCRIPTION
    config = description.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(
            "config of the tokenizer", where=where, got=type(config).__name__, expected="a mapping"
        )
    try:
        return from_mapping(cls, config, where=where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "cannot read the tokenizer's weights", where=path, got=error, fix="copy the folder again"
        ) from None


def _check_architecture(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: Path) -> None:
    """Name what is missing, left over, of another shape or dtype, or not finite."""

    def form(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
        return tensor.dtype, tensor.shape

    shared = sorted(own.keys() & weights.keys())
    differences = {
        "missing": sorted(own.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - own.keys()),
        "of another shape or dtype": [name for name in shared if form(weights[name]) != form(own[name])],
        "not finite": [name for name in shared if not torch.isfinite(weights[name]).all()],
    }
    listed = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''})"
        for kind, names in differences.items()
        if names
    )
    if listed:
        raise CheckpointError(
            "weights that do not fit the tokenizer's config", where=folder / WEIGHTS, got=listed
        )


def _write_atomic(path: Path, content: bytes) -> None:
    """Leave the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
