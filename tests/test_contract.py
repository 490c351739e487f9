import dataclasses

import numpy as np
import pytest

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.errors import ContractError


def make_contract(values: np.ndarray | None = None) -> ActionContract:
    rng = np.random.default_rng(0)
    if values is None:
        values = np.stack([rng.normal(0, 0.3, 500), np.full(500, 0.7), rng.integers(0, 2, 500)], 1)
    statistics = Statistics.of(values)
    return ActionContract(
        embodiment="arm",
        rate_hz=10,
        action=(
            Dimension("shoulder", "rad/s", "velocity"),
            Dimension("lift", "m", "position"),
            Dimension("gripper", "1", "binary"),
        ),
        proprio=(Dimension("a"), Dimension("b"), Dimension("c")),
        action_statistics=statistics,
        proprio_statistics=statistics,
    )


def test_quantiles_go_to_one_binary_too_and_constants_keep_scale_one():
    contract = make_contract()
    offset, scale = contract.action_scaling
    statistics = contract.action_statistics
    assert (statistics.q99[0] - offset[0]) / scale[0] == pytest.approx(1, abs=1e-6)
    assert (statistics.q01[0] - offset[0]) / scale[0] == pytest.approx(-1, abs=1e-6)
    assert scale[1] == 1
    assert offset[1] == pytest.approx(0.7)
    assert ((np.array([0, 1]) - offset[2]) / scale[2]).tolist() == [-1, 1]
    assert contract.constant_actions() == ["lift"]


def test_a_dimension_that_hardly_moves_is_not_blown_up():
    values = np.zeros((1000, 3))
    values[:, 0] = np.linspace(-1e-3, 1e-3, 1000)
    values[5, 0], values[6, 0] = 4.0, -4.0
    offset, scale = make_contract(values).action_scaling
    assert scale[0] == pytest.approx(0.2 * 4.0)
    assert np.abs((values[:, 0] - offset[0]) / scale[0]).max() <= 10
    spread = np.linspace(-1, 1, 1000)[:, None] * np.ones(3)
    assert make_contract(spread).action_scaling[1][0] == pytest.approx(0.98, abs=1e-3)


def test_mapping_round_trip_keeps_the_digest():
    contract = make_contract()
    again = ActionContract.from_mapping(contract.to_mapping())
    assert again == contract
    assert again.digest == contract.digest
    renamed = dataclasses.replace(contract, control_frame="base")
    assert renamed.digest != contract.digest
    with pytest.raises(ContractError, match="control_frame of embodiment 'arm' in run: got base"):
        contract.require_equal(renamed, where="run")


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        (np.zeros((4, 2)), r"got shape \(4, 2\), expected 3 .*shoulder, lift, gripper"),
        (np.array([[0, 0.7, 0], [0, 0.7, np.nan]]), "'gripper' not finite at step 1"),
        (np.array([["a", "b", "c"]]), "dtype"),
        (np.array([[57.3, 0.7, 0]]), "'shoulder' out of range at step 0.*rad/s"),
        (np.array([[0, 0.7, 255.0]]), "'gripper' out of range"),
    ],
)
def test_wrong_actions_are_refused_by_name(actions, says):
    with pytest.raises(ContractError, match=says):
        make_contract().check_actions(actions, where="acts.npy")


def test_right_actions_pass_and_range_can_be_waived():
    contract = make_contract()
    contract.check_actions(np.array([[0.1, 0.7, 1.0]], dtype=np.float32), rate_hz=10)
    contract.check_actions(np.array([[9.0, 0.7, 1.0]]), allow_out_of_range=True)
    with pytest.raises(ContractError, match="got 20 Hz, expected 10 Hz"):
        contract.check_actions(np.zeros((1, 3)), rate_hz=20)


def test_statistics_refuse_what_is_not_finite():
    with pytest.raises(ContractError, match="finite rows"):
        Statistics.of(np.array([[np.inf]]))


def test_contract_refuses_statistics_of_another_width():
    with pytest.raises(ContractError, match="proprio statistics"):
        dataclasses.replace(make_contract(), proprio=(Dimension("a"),))


def test_pooled_statistics_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(300, 3)), rng.normal(2.0, 3.0, size=(70, 3))
    pooled, both = Statistics.of(one).pooled(Statistics.of(two)), Statistics.of(np.concatenate([one, two]))
    for name in ("minimum", "maximum", "mean", "std", "count"):
        np.testing.assert_allclose(getattr(pooled, name), getattr(both, name), rtol=1e-12, err_msg=name)
    assert (np.array(pooled.q01) <= np.array(both.q01)).all()
    assert (np.array(pooled.q99) >= np.array(both.q99)).all()
