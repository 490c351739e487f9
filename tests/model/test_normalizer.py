import numpy as np
import pytest
import torch

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.errors import ContractError
from vidworld.model.normalizer import Normalizer


def contract(name, action_dims, proprio_dims, seed):
    random = np.random.default_rng(seed)

    def statistics(count):
        return Statistics.of(random.normal(size=(50, count)) * np.arange(1, count + 1) + 5)

    dimensions = [tuple(Dimension(f"d{i}") for i in range(count)) for count in (action_dims, proprio_dims)]
    return ActionContract(
        name, 10.0, dimensions[0], dimensions[1], statistics(action_dims), statistics(proprio_dims)
    )


CONTRACTS = (contract("a", 3, 2, 0), contract("b", 2, 4, 1))
EMBODIMENT_B = torch.tensor([1, 0, 1])


@pytest.mark.parametrize("middle", [(), (5,), (5, 2)])
def test_actions_are_scaled_by_their_contract(middle):
    raw = torch.randn(3, *middle, 3)
    got = Normalizer(CONTRACTS).actions(raw, EMBODIMENT_B)
    assert got.shape == raw.shape
    for row, embodiment in enumerate(EMBODIMENT_B):
        offset, scale = CONTRACTS[embodiment].action_scaling
        used = len(offset)
        np.testing.assert_allclose(got[row, ..., :used], (raw[row, ..., :used] - offset) / scale, rtol=1e-5)


def test_quantiles_go_to_one():
    statistics = CONTRACTS[1].proprio_statistics
    raw = torch.tensor([statistics.q01, statistics.q99])
    got = Normalizer(CONTRACTS).proprio(raw, torch.tensor([1, 1]))
    torch.testing.assert_close(got, torch.tensor([[-1.0], [1.0]]).expand(2, 4), atol=1e-5, rtol=0)


def test_round_trip():
    normalizer = Normalizer(CONTRACTS)
    raw = torch.randn(3, 5, 4, dtype=torch.float64)
    raw[1, :, 2:] = 0
    back = normalizer.denormalize_proprio(normalizer.proprio(raw, EMBODIMENT_B), EMBODIMENT_B)
    torch.testing.assert_close(back, raw)


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_is_exactly_zero_forward_and_backward(garbage):
    normalizer = Normalizer(CONTRACTS)
    raw = torch.randn(3, 5, 3)
    raw[EMBODIMENT_B == 1, :, 2:] = garbage
    raw.requires_grad_()
    got = normalizer.actions(raw, EMBODIMENT_B)
    assert not got[EMBODIMENT_B == 1, :, 2:].any()
    got.sum().backward()
    assert raw.grad is not None
    assert not raw.grad[EMBODIMENT_B == 1, :, 2:].any()
    expected = 1 / torch.from_numpy(CONTRACTS[0].action_scaling[1]).expand(5, 3)
    torch.testing.assert_close(raw.grad[1], expected)


def test_statistics_survive_half_precision_and_stay_out_of_the_state_dict():
    normalizer = Normalizer(CONTRACTS)
    raw = torch.randn(3, 5, 3)
    before = normalizer.actions(raw, EMBODIMENT_B)
    module = torch.nn.ModuleDict({"normalizer": normalizer}).to(torch.bfloat16)
    assert torch.equal(normalizer.actions(raw, EMBODIMENT_B), before)
    assert not module.state_dict()
    assert all(buffer.device.type == "meta" for buffer in module.to("meta").buffers())


def test_wrong_width_is_refused():
    with pytest.raises(ContractError, match="action width: got 2, expected 3"):
        Normalizer(CONTRACTS).actions(torch.zeros(3, 2), EMBODIMENT_B)
