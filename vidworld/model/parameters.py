"""Which parameter is of which kind, for optimisers that treat them differently."""

from dataclasses import dataclass

from torch import nn

from vidworld.model.dit import CausalDiT


@dataclass(frozen=True)
class ParameterGroups:
    """Every parameter of a model once."""

    matrices: tuple[nn.Parameter, ...]
    """The 2D weights of attention and MLP in the blocks, which Muon may orthogonalise."""
    weights: tuple[nn.Parameter, ...]
    """Embeddings, modulation and heads: AdamW, weight decay does no harm."""
    vectors: tuple[nn.Parameter, ...]
    """Biases, norm scales and learned tokens: AdamW without weight decay."""


def parameter_groups(model: CausalDiT) -> ParameterGroups:
    """Split the parameters of `model`, in the order of `named_parameters`."""
    matrices, weights, vectors = [], [], []
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if name.startswith("blocks.") and parameter.ndim == 2 and ".modulation." not in name:
            matrices.append(parameter)
        elif leaf in ("weight", "weight_EIO"):
            weights.append(parameter)
        else:
            vectors.append(parameter)
    return ParameterGroups(tuple(matrices), tuple(weights), tuple(vectors))


def muon_parameters(model: CausalDiT) -> tuple[nn.Parameter, ...]:
    """The parameters for Muon; all others are for AdamW."""
    return parameter_groups(model).matrices
