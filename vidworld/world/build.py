"""Put a world together from its spec, and fill it with weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vidworld.errors import CheckpointError
from vidworld.model.dit import CausalDiT
from vidworld.model.embodiments import carry_over
from vidworld.model.merge import merge_member
from vidworld.model.normalizer import Normalizer
from vidworld.quantize import restore
from vidworld.tokenizers.base import Tokenizer
from vidworld.world.ensemble import Ensemble
from vidworld.world.spec import WorldSpec
from vidworld.world.world import WorldModel

KEYS_SHOWN = 3
Weights = dict[str, Tensor]


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


def narrow(world: WorldModel, names: Sequence[str]) -> WorldModel:
    """The world of some of its embodiments, in their own views and size: nothing is padded any more.

    It predicts what the whole world would, shares all weights but the small tables with it, and is what is
    reset, stepped and evaluated. Raises ContractError for an unknown name, ConfigError where they do not see
    alike.
    """
    if isinstance(world, Ensemble):
        return Ensemble([narrow(member, names) for member in world.members])
    spec = world.spec.only(names)
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away, and must not move the stream
        model = CausalDiT(spec.model, spec.shape)
    weights = carry_over(world.model.state_dict(), world.spec.robots, spec.robots)
    model.load_state_dict(weights, assign=True)
    learns = next(world.model.parameters()).requires_grad
    model.requires_grad_(learns).train(world.model.training).to(world.device)
    normalizer = Normalizer(spec.contracts).to(world.device)
    narrowed = WorldModel(spec, model, normalizer, world.tokenizer, autocast=world.autocast)
    narrowed.calibration = world.calibration
    return narrowed.train(world.training)


def merged(world: WorldModel, member: int) -> WorldModel:
    """One member of a world whose members share a network, as a world of its own."""
    spec = replace(world.spec, model=replace(world.spec.model, members=0))
    model = merge_member(world.model, member)
    alone = WorldModel(spec, model, world.normalizer, world.tokenizer, autocast=world.autocast)
    alone.calibration = world.calibration
    return alone.train(world.training)


def load_weights(model: nn.Module, path: Path, *, adapt: Callable[[Weights], Weights] | None = None) -> None:
    """Fill a module from a safetensors file of exactly its parameters, whatever the precision of the file.

    `adapt` sees the file's weights first, such as to carry them over to other embodiments.

    Raises CheckpointError when the file is missing or damaged, or of another architecture: then it names what
    is missing, what is left over and what has another shape, and the module is left as it was.
    """
    try:
        weights = restore(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError("cannot read the weights", where=path, got=error) from None
    if adapt is not None:
        weights = adapt(weights)
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
