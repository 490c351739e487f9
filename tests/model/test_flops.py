import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.flops import forward_flops, training_flops, visible_pairs
from vidworld.model.inputs import FrameShape, Streams
from vidworld.model.two_stream import target_predictor


def counted(function):
    # The plain implementation, because torch does not count its fused attention on CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise_dims": 3},
        {"noise_dims": 3, "modulation_rank": 8},
        {"previous_frame": True, "copy_gate": True},
    ],
)
def test_one_frame_counts_what_torch_counts(make_model, make_clip, settings):
    model = make_model(**settings)
    clip = make_clip(time=1, batch=2, noise_dims=model.config.noise_dims)
    torch_count = counted(lambda: model(*clip.parts(), streams=Streams(1)))
    assert torch_count == 2 * forward_flops(model, Streams(1))


def test_clips_count_visible_pairs_only(make_model, make_clip):
    model, context, targets = make_model(), make_clip(time=5, batch=1), make_clip(time=10, batch=1)
    predict = target_predictor(model, context.frames, context.level, context.conditioning, num_targets=2)
    torch_count = counted(lambda: predict(targets.frames, targets.level, targets.step_BT))
    streams = Streams(5, targets=2)
    hidden = 15 * 15 - visible_pairs(streams)
    layers = 2
    assert torch_count == forward_flops(model, streams) + 4 * 64 * model.tokens_per_frame * layers * hidden


def test_training_tends_to_the_textbook_count():
    """72 L d^2 + 12 L d S a token (without grouped queries and with attention along one axis a block)."""
    config = DiTConfig(width=1024, depth=12, num_heads=16, num_kv_heads=16, mlp_ratio=8 / 3, time_every=12)
    with torch.device("meta"):
        model = CausalDiT(config, FrameShape(1, 16, 32, 32, 7, 7))
    tokens, width = model.tokens_per_frame, config.width
    per_token = training_flops(model, Streams(1)) / tokens
    textbook = 72 * 12 * width**2 + 12 * 12 * width * tokens
    assert 1 < per_token / textbook < 1.1
