"""The rule language: what it means, and where it says a mistake is."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidworld.data.edit_rules import known_fields, parse_rule
from vidworld.errors import ConfigError

FACTS = {
    "key": "000012",
    "frames": 40,
    "duration": 4.0,
    "text": "Pick the Banana's end",
    "embodiment": "cr5",
    "split": "train",
    "outcome": {"success": True, "reward": 0.5, "note": None, "stages": {"grasp": False}},
}


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("frames >= 20", True),
        ("frames > 40", False),
        ("frames == 40.0", True),
        ("frames != 40", False),
        ("duration <= 4 and frames < 41", True),
        ("text ~ banana", True),
        ("text !~ banana", False),
        ('text ~ "Banana\'s end"', True),
        ('text == "pick the banana\'s end"', False),
        ("embodiment == cr5", True),
        ("embodiment in (ur5, cr5)", True),
        ("not embodiment in (ur5, panda)", True),
        ("key == 000012", True),  # ids that look like numbers are text
        ("key == 12", False),
        ("key in ('000012')", True),
        ('frames == "40"', False),
        ("outcome.success == true", True),
        ('outcome.success == "true"', False),
        ("outcome.success != true", False),
        ("outcome.reward > 0.25", True),
        ("outcome.note == null", True),
        ("outcome.stages.grasp == false", True),
        ("has outcome.success and not has outcome.failure", True),
        ("outcome.failure == true", False),  # an absent field compares with nothing ...
        ("outcome.failure != true", False),
        ("not outcome.failure == true", True),  # ... and `not` turns that round
        ("frames > 100 or text ~ banana and embodiment == cr5", True),
        ("(frames > 100 or text ~ banana) and embodiment == ur5", False),
        ("frames > 100 or (text ~ banana and (split == val or split == train))", True),
        ("not not frames == 40", True),
        ("frames>=20 and(text~banana)", True),
    ],
)
def test_meaning(rule, holds):
    assert parse_rule(rule).holds(FACTS) is holds


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("", r"column 1: got the end, expected a field"),
        ("frames", r"column 7: got the end, expected one of == != .* after 'frames'"),
        ("frames = 20", r"column 8: got '=', expected"),
        ("frames >= ", r"column 11: got the end, expected a value"),
        ("frames >= and", r"column 11: got 'and', expected a value"),
        ("frames >= 20 text ~ a", r"column 14: got 'text', expected 'and', 'or' or the end"),
        ("(frames >= 20", r"column 14: got the end, expected '\)'"),
        ("frames >= 20)", r"column 13: got '\)'"),
        ("20 <= frames", r"column 1: got '20', expected a field"),
        ("key in a", r"column 8: got 'a', expected '\(' after 'in'"),
        ("key in (a b)", r"column 11: got 'b', expected ',' or '\)'"),
        ('text ~ "open', r"column 8: got text without an end"),
        ("frames >= 20 && text ~ a", r"column 14: got '&'"),
        ("__import__('os').system('x')", r"column 11: got '\('"),
        ("frames >= 20; text ~ a", r"column 13: got ';'"),
        ("(" * 60 + "a == 1" + ")" * 60, "too deeply nested"),
        ("a == 1 and " * 500 + "a == 1", "at most 4000"),
    ],
)
def test_mistakes_are_placed(rule, says):
    with pytest.raises(ConfigError, match=says):
        parse_rule(rule)


@pytest.mark.parametrize(
    ("rule", "got"), [("text > 3", "Pick"), ("frames > many", "'many'"), ("outcome.success > 0", "True")]
)
def test_order_needs_numbers(rule, got):
    with pytest.raises(ConfigError, match=f"got .*{got}.*expected numbers on both sides"):
        parse_rule(rule).holds(FACTS)


def test_fields():
    rule = parse_rule("frames > 1 and (not text ~ a or has outcome.success) and key in (a, b)")
    assert rule.fields() == {"frames", "text", "outcome.success", "key"}
    assert known_fields(FACTS)[-4:] == [f"outcome.{x}" for x in ("success", "reward", "note", "stages.grasp")]


@given(st.text(max_size=60))
def test_anything_else_is_refused(text):
    with contextlib.suppress(ConfigError):
        parse_rule(text)
