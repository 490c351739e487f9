"""Read an autoencoder from a local folder in diffusers' layout: config.json and safetensors, nothing else.

Nothing is fetched, no pickle is opened, and the class is looked up in our own table.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidworld.errors import CheckpointError, require
from vidworld.tokenizers.pretrained import FAMILIES, DType, PretrainedTokenizer, wrap
from vidworld.tokenizers.weights import check_architecture

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def find_folder(directory: Path) -> Path | None:
    """The folder of an autoencoder: this one, or `vae/` of a pipeline; None where there is neither."""
    for folder in (directory, directory / "vae"):
        if (folder / CONFIG).is_file():
            return folder
    return None


def load_folder(folder: Path, dtype: DType = "float32") -> PretrainedTokenizer:
    """Open an autoencoder on the CPU.

    Raises CheckpointError for what is missing, damaged, of another architecture, pickled or not causal.
    """
    config = _read_json(folder / CONFIG)
    name = str(config.get("_class_name"))
    if name not in FAMILIES:
        raise CheckpointError(
            "class of the autoencoder",
            where=folder / CONFIG,
            got=repr(name),
            expected=" or ".join(FAMILIES),
            fix="world models need a causal autoencoder: take one of these",
        )
    files = weight_files(folder)
    cls = getattr(require("diffusers", "train"), name)
    try:
        vae = cls.from_config(dict(config))
    except (TypeError, ValueError, KeyError, IndexError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"config of {name}", where=folder / CONFIG, got=error) from None
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "cannot read the autoencoder's weights", where=path, got=error, fix="copy the folder again"
            ) from None
    check_architecture(weights, vae.state_dict(), folder, same_dtype=False)
    vae.load_state_dict(weights)
    # What the config leaves out has the class's default, which matters as much.
    try:
        tokenizer = wrap(vae, name, dict(vae.config), dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    tokenizer.source = folder.resolve()
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, those of a sharded index in order; raises CheckpointError."""
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        listed = sorted(set(names.values())) if isinstance(names, dict) else []
        if not listed or any(not isinstance(name, str) or Path(name).name != name for name in listed):
            raise CheckpointError("weight_map", where=folder / INDEX, expected="file names of this folder")
        found = [folder / name for name in listed]
    elif (folder / WEIGHTS).is_file():
        found = [folder / WEIGHTS]
    else:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) > 1:
            raise CheckpointError(
                "weights of the autoencoder",
                where=folder,
                got=", ".join(path.name for path in found),
                expected=f"{WEIGHTS} or {INDEX}",
            )
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise CheckpointError("files of the index are missing", where=folder, got=", ".join(missing))
    if any(path.suffix != ".safetensors" for path in found):
        raise CheckpointError("weight_map", where=folder / INDEX, expected="safetensors files only")
    if not found:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        raise CheckpointError(
            "weights of the autoencoder",
            where=folder,
            got=f"{', '.join(pickles)} (pickle, which can run code and is never opened)"
            if pickles
            else "none",
            expected=f"{WEIGHTS} or {INDEX}",
            fix="convert them: model.save_pretrained(folder, safe_serialization=True)" if pickles else None,
        )
    return found


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("cannot read", where=path, got=error) from None
    if not isinstance(content, dict):
        raise CheckpointError("cannot read", where=path, got=type(content).__name__, expected="an object")
    return content
