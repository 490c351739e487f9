import torch
from einops import rearrange

from vidworld.model.embed import EmbodimentLinear, patch_positions, patchify, unpatchify, waves
from vidworld.model.inputs import FrameShape

SHAPE = FrameShape(2, 3, 4, 6, 5, 4)


def test_patchify_round_trip_and_order():
    latents = torch.randn(2, 3, 2, 3, 4, 6)
    patches = patchify(latents, 2)
    assert patches.shape == (2, 3, 2, 6, 12)
    assert torch.equal(unpatchify(patches, SHAPE, 2), latents)
    assert torch.equal(patches[1, 2, 1, 4], latents[1, 2, 1, :, 2:4, 2:4].flatten())


def test_positions_name_the_patches():
    """A picture that holds its own coordinates, patched, reads like the positions."""
    positions = patch_positions(SHAPE, 2, num_special=3)
    picture = torch.stack(torch.meshgrid(torch.arange(4) // 2, torch.arange(6) // 2, indexing="ij"))
    patches = patchify(picture.expand(1, 1, 2, 2, 4, 6), 2)
    named = rearrange(patches, "1 1 v n (c p) -> (v n) c p", c=2)
    assert torch.equal(positions[:-3], named[..., 0])
    assert not positions[-3:].any()


def test_embodiment_linear_equals_a_linear_each():
    linear = EmbodimentLinear(3, 4, 5).double()
    torch.nn.init.normal_(linear.bias_EO)
    x, embodiment = torch.randn(6, 7, 4, dtype=torch.float64), torch.tensor([2, 0, 1, 1, 0, 2])
    expected = [x[b] @ linear.weight_EIO[e] + linear.bias_EO[e] for b, e in enumerate(embodiment)]
    torch.testing.assert_close(linear(x, embodiment), torch.stack(expected))


def test_embodiment_linear_keeps_full_precision_under_autocast():
    linear, x = EmbodimentLinear(1, 4, 5), torch.randn(2, 3, 4)
    embodiment = torch.zeros(2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, embodiment), linear(x, embodiment).float())
        mixed = linear(x, embodiment)
    assert torch.equal(mixed, linear(x, embodiment))
    assert linear.bfloat16()(x, embodiment).dtype == torch.float32


def test_waves_tell_neighbouring_levels_apart():
    """At full precision even for half-precision models: 1/64 of noise is a distinct code."""
    codes = waves(torch.linspace(0, 1, 65)[None], 64)[0]
    distance = torch.cdist(codes, codes).fill_diagonal_(9)
    assert distance.min() > 1
    assert waves(torch.zeros(1, 1, dtype=torch.bfloat16), 4).dtype == torch.float32
