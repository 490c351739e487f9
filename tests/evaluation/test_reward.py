"""Rewards as expressions and as functions, and risks among futures."""

import numpy as np
import pytest
import torch

from vidworld.errors import ConfigError
from vidworld.evaluation.reward import Expression, Function, parse_reward
from vidworld.evaluation.risk import Risk, judged

CURVES = {
    "tool_z": torch.tensor([[1.0, 2.0, 6.0], [0.0, -3.0, 0.0]]),
    "arm/joint-1": torch.tensor([[0.5, 0.5, 0.5], [1.0, 2.0, 3.0]]),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tool_z", [3, -1]),
        ("last(tool_z)", [6, 0]),
        ("max(tool_z) - 2 * min(tool_z)", [4, 6]),
        ("mean(abs(tool_z))", [3, 1]),
        ("sum(tool_z) / 3 + 'arm/joint-1'", [3.5, 1]),
        ("-(tool_z - last(tool_z)) ** 2", [-(25 + 16) / 3, -3]),
        ("tool_z > 1.5", [2 / 3, 0]),
        ("last(tool_z) <= 0", [0, 1]),
        ("sqrt(4) + exp(0) - log(1)", [3, 3]),
        ("7", [7, 7]),
    ],
)
def test_expressions_are_what_they_say(text, expected):
    assert Expression(text)(CURVES).tolist() == pytest.approx(expected)


def test_an_expression_has_a_gradient():
    curve = torch.tensor([[1.0, 2.0]], requires_grad=True)
    Expression("last(x) ** 2")({"x": curve}).sum().backward()
    assert curve.grad.tolist() == [[0.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tool_y", "did you mean 'tool_z'"),
        ("tool_z +", "an expression"),
        ("__import__('os').system('true')", "got __import__"),
        ("tool_z.mean()", r"got tool_z\.mean\(\)"),
        ("[tool_z]", "got"),
        ("tool_z if 1 else 2", "got"),
        ("mean(tool_z, 2)", "got mean"),
        ("9.0 ** 9 ** 9", "expected a number"),
        ("1 / 0", "expected a number"),
        ("True and tool_z", "got"),
        ("'a' * 3", "name 'a'"),
    ],
)
def test_what_is_no_reward_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Expression(text)(CURVES)


def test_functions_are_called_with_a_future(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def height(future):\n    return future['observation/state'][:, 0]\n"
        "def broken(future):\n    return 'high'\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = parse_reward("my_rewards:height")
    assert isinstance(reward, Function)
    assert reward({"observation/state": np.array([[1.0], [2.0]])}) == 1.5
    with pytest.raises(ConfigError, match="answer of the reward in my_rewards:broken: got 'high'"):
        Function("my_rewards:broken")({})
    with pytest.raises(ConfigError, match="--reward"):
        parse_reward("my_rewards:none")


def test_risks_choose_what_they_say():
    rewards = np.array([3.0, -1.0, 2.0, 5.0, 0.0])
    assert Risk.parse("worst").choose(rewards) == (-1.0, [1])
    assert Risk.parse("best").choose(rewards) == (5.0, [3])
    value, chosen = Risk.parse("cvar:0.3").choose(rewards)
    assert value == pytest.approx((-1.0 + 0.5 * 0.0) / 1.5)
    assert chosen == [1, 4]
    for wrong in ("middle", "cvar", "cvar:0", "cvar:2", "worst:1"):
        with pytest.raises(ConfigError, match="--risk"):
            Risk.parse(wrong)


def test_a_judgement_parts_the_spread_of_the_reward():
    """Members that differ by 2 and do not vary: all of it is unknown, nothing open."""
    facts = judged(Risk.parse("worst"), np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 1, 1]))
    assert facts["aleatoric_sd"] == 0
    assert facts["epistemic_sd"] == pytest.approx(np.sqrt(2))
    alone = judged(Risk.parse("worst"), np.array([1.0, 3.0]), np.array([0, 0]))
    assert alone["aleatoric_sd"] == pytest.approx(np.sqrt(2))
    assert "epistemic_sd" not in alone
