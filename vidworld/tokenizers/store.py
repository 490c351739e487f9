"""Tokenizers on disk: a folder with `tokenizer.json` (what it is) and `tokenizer.safetensors` (its weights).

The description is written last and carries a digest over config and weights, so that a half-written, mixed up
or damaged folder is refused and never loaded. Of a pretrained autoencoder the folder holds the description
only, with the path of the weights, which stay where they are; `copy_tokenizer` brings them along.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vidworld.config import from_mapping, to_mapping
from vidworld.errors import CheckpointError, ConfigError
from vidworld.files import write_atomic
from vidworld.quantize import Precision, compress, restore, rounded
from vidworld.tokenizers.base import Tokenizer
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.tokenizers.diffusers_folder import CONFIG, INDEX, find_folder, load_folder, weight_files
from vidworld.tokenizers.pretrained import DType, PretrainedTokenizer
from vidworld.tokenizers.weights import check_architecture

SCHEMA_VERSION = 1
DESCRIPTION = "tokenizer.json"
WEIGHTS = "tokenizer.safetensors"
FOLDER = "tokenizer"
"""Where a run keeps its tokenizer."""
COPY = "vae"
"""Where a copy of a pretrained autoencoder lies within a tokenizer's folder."""
KINDS = (ConvTokenizer.kind, PretrainedTokenizer.kind)
C = TypeVar("C")


def save_tokenizer(tokenizer: Tokenizer, directory: Path | str, *, precision: Precision = "fp32") -> str:
    """Write a tokenizer into a folder, making it, and return the digest; equal tokenizers give equal bytes.

    Of a pretrained one the description only, with the path that it was loaded from. In another `precision`
    our own is written rounded, which is another tokenizer with another digest. Raises CheckpointError when it
    cannot be written.
    """
    directory = Path(directory)
    match tokenizer:
        case ConvTokenizer():
            content = save(compress(tokenizer.state_dict(), precision))
            if precision != "fp32":
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.load_state_dict(rounded(tokenizer.state_dict(), precision))
            description = _describe(tokenizer)
        case PretrainedTokenizer():
            assert tokenizer.source is not None, "a pretrained tokenizer is saved as where it is"
            content, description = None, _describe(tokenizer) | {"path": str(tokenizer.source)}
        case _:
            raise CheckpointError("kind of tokenizer to save", got=type(tokenizer).__name__)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if content is not None:
            write_atomic(directory / WEIGHTS, content)
        _write_description(directory, description)
    except OSError as error:
        raise CheckpointError("cannot write the tokenizer", where=directory, got=error.strerror) from None
    return description["digest"]


def load_tokenizer(directory: Path | str, *, dtype: DType = "float32") -> Tokenizer:
    """Open a tokenizer: its folder, a run or latents that hold one in `tokenizer/`, or a diffusers VAE.

    The last is a folder with config.json and safetensors, or a pipeline that holds one in `vae/`; `dtype`
    is that of its weights, and everything else has its own. It comes on the CPU, in eval mode, its parameters
    not requiring grad (gradients still flow through it). Raises CheckpointError when it is missing, damaged,
    mixed up, has changed since, or is of an unknown kind.
    """
    folder = _find(Path(directory))
    if folder is None:
        vae = find_folder(Path(directory))
        assert vae is not None
        return load_folder(vae, dtype)
    description = _read_description(folder)
    kind = description.get("kind")
    match kind:
        case "conv":
            tokenizer = ConvTokenizer(_config(ConvTokenizerConfig, description, folder))
            weights = _read_weights(folder)
            check_architecture(weights, tokenizer.state_dict(), folder / WEIGHTS)
            tokenizer.load_state_dict(weights)
            fix = "copy it again, or train it again"
        case "pretrained":
            tokenizer = _load_pretrained(folder, description)
            fix = "bring back the weights that it was used with, or make the latents and the world anew"
        case _:
            raise CheckpointError(
                "tokenizer kind",
                where=folder / DESCRIPTION,
                got=repr(kind),
                expected=" or ".join(repr(known) for known in KINDS),
                fix="install the vidworld that wrote it",
            )
    for name, expected in _describe(tokenizer).items():
        if description.get(name) != expected:
            raise CheckpointError(
                f"{name} of the tokenizer does not match its weights: the folder is damaged or was edited",
                where=folder if kind == "conv" else _weights_folder(folder, description),
                got=_brief(description.get(name)) if kind == "conv" else _brief(expected),
                expected=_brief(expected) if kind == "conv" else _brief(description.get(name)),
                fix=fix,
            )
    return tokenizer.eval().requires_grad_(False)


def has_weights(folder: Path) -> bool:
    """Whether a tokenizer's folder holds its weights, rather than the path of a pretrained one's."""
    description = _read_description(folder)
    return description.get("kind") != "pretrained" or not Path(str(description.get("path"))).is_absolute()


def copy_tokenizer(folder: Path, out: Path, *, with_weights: bool) -> None:
    """Copy a tokenizer's folder into an empty one.

    Weights of our own always come along. Those of a pretrained one do `with_weights`, or where they lie in
    the folder.
    """
    description = _read_description(folder)
    out.mkdir(parents=True, exist_ok=True)
    if description.get("kind") != "pretrained":
        for name in (WEIGHTS, DESCRIPTION):
            shutil.copyfile(folder / name, out / name)
        return
    source = _weights_folder(folder, description)
    if with_weights or has_weights(folder):
        (out / COPY).mkdir()
        for path in [source / CONFIG, *weight_files(source), *source.glob(INDEX)]:
            shutil.copyfile(path, out / COPY / path.name)
        description["path"] = COPY
    _write_description(out, description)


def _load_pretrained(folder: Path, description: Mapping[str, Any]) -> PretrainedTokenizer:
    source, dtype = _weights_folder(folder, description), description.get("dtype")
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError("dtype of the tokenizer", where=folder / DESCRIPTION, got=_brief(dtype))
    if not (source / CONFIG).is_file():
        raise CheckpointError(
            "the pretrained autoencoder is gone",
            where=source,
            expected=f"the folder with its {CONFIG} and weights",
            fix=f"put it back, or set its new `path` in {folder / DESCRIPTION}: the digest is checked",
        )
    tokenizer = load_folder(source, dtype)
    mean_C, std_C = _statistics(statistics := description.get("statistics") or {}, folder)
    if mean_C.shape == std_C.shape == (tokenizer.latent_channels,):
        tokenizer.set_statistics(mean_C, std_C)
        tokenizer.statistics_from = str(statistics.get("from"))
    return tokenizer


def _weights_folder(folder: Path, description: Mapping[str, Any]) -> Path:
    """Where the weights of a pretrained tokenizer are; a relative path starts at its description."""
    return (folder / str(description.get("path"))).resolve()


def restore_statistics(tokenizer: PretrainedTokenizer, folder: Path) -> bool:
    """Give a pretrained tokenizer the statistics that it once had in a folder; False if they are not its."""
    if not (folder / DESCRIPTION).is_file():
        return False
    statistics = _read_description(folder).get("statistics") or {}
    before = tokenizer.mean_C.clone(), tokenizer.std_C.clone(), tokenizer.statistics_from
    tokenizer.set_statistics(*_statistics(statistics, folder))
    tokenizer.statistics_from = str(statistics.get("from"))
    if _read_description(folder).get("digest") == tokenizer.digest:
        return True
    tokenizer.set_statistics(*before[:2])
    tokenizer.statistics_from = before[2]
    return False


def _statistics(statistics: Mapping[str, Any], folder: Path) -> tuple[Tensor, Tensor]:
    try:
        if not isinstance(statistics, dict):
            raise TypeError("no mapping")
        mean_C, std_C = (torch.tensor(statistics[name], dtype=torch.float32) for name in ("mean", "std"))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError("statistics of the tokenizer", where=folder / DESCRIPTION, got=error) from None
    return mean_C, std_C


def _describe(tokenizer: ConvTokenizer | PretrainedTokenizer) -> dict[str, Any]:
    statistics: dict[str, Any] = {"mean": tokenizer.mean_C.tolist(), "std": tokenizer.std_C.tolist()}
    if isinstance(tokenizer, ConvTokenizer):
        what = {"config": to_mapping(tokenizer.config)}
    else:
        what = {"class": tokenizer.class_name, "dtype": tokenizer.dtype_name}
        statistics["from"] = tokenizer.statistics_from
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": tokenizer.kind,
        **what,
        "latent_channels": tokenizer.latent_channels,
        "spatial_stride": tokenizer.spatial_stride,
        "time_stride": tokenizer.time_stride,
        "statistics": statistics,
        "digest": tokenizer.digest,
    }


def _find(directory: Path) -> Path | None:
    """The folder with our description; None where there is a diffusers folder instead."""
    for folder in (directory, directory / FOLDER):
        if (folder / DESCRIPTION).is_file():
            return folder
    if find_folder(directory) is not None:
        return None
    raise CheckpointError(
        f"no {DESCRIPTION}",
        where=directory,
        got="a folder" if directory.is_dir() else "no such folder",
        expected="a tokenizer's folder, a run that has trained one, or a diffusers VAE with its config.json",
        fix="give the directory that `vidworld train` wrote for a tokenizer",
    )


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
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
        weights = restore(load_file(path))
        halves = {name: tensor.float() for name, tensor in weights.items() if tensor.dtype == torch.bfloat16}
        return weights | halves
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            "cannot read the tokenizer's weights", where=path, got=error, fix="copy the folder again"
        ) from None


def _write_description(directory: Path, description: Mapping[str, Any]) -> None:
    write_atomic(directory / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
