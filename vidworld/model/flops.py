"""Floating-point operations of the model, counted by what it must compute, for model FLOPs utilisation.

Only visible query-key pairs count, recomputation does not, and modulation counts once a frame rather than
once a token (6 x parameters x tokens over-counts a DiT by up to 1.5x). A multiply-add is two operations.
"""

from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Streams
from vidworld.model.parameters import muon_parameters


def visible_pairs(streams: Streams) -> int:
    """Query-key pairs along time that `streams` lets through, all streams together."""
    in_one_stream = streams.context * (streams.context + 1) // 2 + streams.past * streams.context
    return (1 + streams.targets) * in_one_stream


def forward_flops(model: CausalDiT, streams: Streams) -> int:
    """Operations of one forward pass over one row (one clip in all its streams)."""
    config, tokens, frames = model.config, model.tokens_per_frame, streams.num_queries
    per_token = sum(parameter.numel() for parameter in muon_parameters(model))
    per_patch = model.token_embedding.patch.weight.numel() + model.patch_head.weight.numel()
    if model.token_embedding.previous_patch is not None:
        per_patch += model.token_embedding.previous_patch.weight.numel()
    if model.copy_head is not None:
        per_patch += model.copy_head.weight.numel()
    linear = 2 * frames * (tokens * per_token + model.num_patches * per_patch + _weights_per_frame(model))

    space_pairs = config.depth * frames * tokens**2
    time_pairs = sum(map(config.attends_time, range(config.depth))) * tokens * visible_pairs(streams)
    return linear + 4 * config.width * (space_pairs + time_pairs)


def training_flops(model: CausalDiT, streams: Streams) -> int:
    """Operations of one forward and backward pass over one row."""
    return 3 * forward_flops(model, streams)


def _weights_per_frame(model: CausalDiT) -> int:
    """Weights used once a frame: modulation, condition embedding, and one embodiment's linear maps."""
    dense = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if (".modulation." in f".{name}" and parameter.ndim == 2)
        or name == "head_modulation.weight"
        or (name.startswith("condition_embedding.") and parameter.ndim == 2 and "embodiment" not in name)
    )
    actions = model.action_embedding.linear.weight_EIO[0].numel() * model.shape.actions_per_frame
    proprio = model.token_embedding.proprio.weight_EIO[0].numel() + model.proprio_head.weight_EIO[0].numel()
    if model.token_embedding.previous_proprio is not None:
        proprio += model.token_embedding.previous_proprio.weight_EIO[0].numel()
    return dense + actions + proprio
