import pytest
import torch

from vidworld.model.rope import axial_rotation, rotate


def scores(query_positions, key_positions, dtype=torch.float64):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, 16, dtype=dtype)
    return rotate(q, axial_rotation(query_positions, 16, dtype)) @ rotate(
        k, axial_rotation(key_positions, 16, dtype)
    ).transpose(-1, -2)


@pytest.mark.parametrize("axes", [1, 2])
def test_scores_depend_on_relative_positions_only(axes):
    torch.manual_seed(1)
    queries, keys = torch.randint(0, 30, (2, 6, axes))
    shift = torch.tensor([17, 5])[:axes]
    torch.testing.assert_close(scores(queries + shift, keys + shift), scores(queries, keys))


def test_each_axis_is_felt():
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    for moved in ([1, 0], [0, 1]):
        change = scores(positions + torch.tensor(moved), positions) - scores(positions, positions)
        assert change.abs().min() > 1e-3


def test_rotation_matches_complex_multiplication():
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    positions = torch.tensor([[0], [1], [2], [9]])
    angles = positions * 100.0 ** -(torch.arange(4) / 4)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    got = rotate(x, axial_rotation(positions, 8, torch.float64))
    torch.testing.assert_close(got, torch.cat([expected.real, expected.imag], -1))


def test_origin_is_not_rotated_and_norms_are_kept():
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    assert torch.equal(rotate(x, axial_rotation(torch.zeros(5, 2, dtype=torch.int64), 16, x.dtype)), x)
    turned = rotate(x, axial_rotation(torch.arange(5)[:, None], 16, x.dtype))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_half_precision_keeps_exact_angles():
    rotation = axial_rotation(torch.arange(64)[:, None], 16, torch.bfloat16)
    assert rotation.cos.dtype == torch.float32
    assert rotate(torch.ones(1, 1, 64, 16, dtype=torch.bfloat16), rotation).dtype == torch.bfloat16
