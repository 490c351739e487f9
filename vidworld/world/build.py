"""Put a world together from its spec, and fill it with weights."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vidworld.errors import CheckpointError
from vidworld.model.dit import CausalDiT
from vidworld.model.normalizer import Normalizer
from vidworld.tokenizers.base import Tokenizer
from vidworld.world.spec import WorldSpec
from vidworld.world.world import WorldModel

KEYS_SHOWN = 3


def build(spec: WorldSpec, tokenizer: Tokenizer, *, autocast: bool = True) -> WorldModel:
    """A world with fresh weights, on the CPU in float32.

    Raises CheckpointError where the tokenizer is not the one that the spec describes.
    """
    shape, stride = spec.shape, tokenizer.spatial_stride
    facts: dict[str, tuple[int | str, int | str]] = {
        "latent channels": (tokenizer.latent_channels, shape.channels),
        "latent height": (spec.height // stride, shape.height),
        "latent width": (spec.width // stride, shape.width),
        "time stride": (tokenizer.time_stride, shape.actions_per_frame),
    }
    if spec.tokenizer_digest:
        facts["digest"] = (tokenizer.digest, spec.tokenizer_digest)
    for name, (got, expected) in facts.items():
        if got != expected:
            raise CheckpointError(
                f"{name} of the tokenizer",
                got=got,
                expected=f"{expected}, as in the world's spec",
                fix="use the tokenizer that the world was trained with",
            )
    return WorldModel(
        spec, CausalDiT(spec.model, shape), Normalizer(spec.contracts), tokenizer, autocast=autocast
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file of exactly its parameters, whatever the precision of the file.

    Raises CheckpointError when the file is missing or damaged, or of another architecture: then it names what
    is missing, what is left over and what has another shape, and the module is left as it was.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError("cannot read the weights", where=path, got=error) from None
    own = model.state_dict()
    reshaped = [
        f"{key} {list(weights[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    differences = {
        "missing": sorted(own.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - own.keys()),
        "of another shape": reshaped,
    }
    if any(differences.values()):
        listed = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:KEYS_SHOWN])}{', ...' if len(keys) > KEYS_SHOWN else ''})"
            for kind, keys in differences.items()
            if keys
        )
        raise CheckpointError("weights of another architecture", where=path, got=listed)
    damaged = [key for key, weight in weights.items() if not _finite(weight)]
    if damaged:
        raise CheckpointError("weights that are not finite", where=path, got=", ".join(damaged[:KEYS_SHOWN]))
    model.load_state_dict(weights)


def _finite(weight: Tensor) -> bool:
    return not weight.is_floating_point() or bool(torch.isfinite(weight).all())
