"""Captions from a grammar: the same task said in many ways, never more than what is planned or seen."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

Rules = Mapping[str, Sequence[str]]
"""Symbol -> what may stand for it; `<symbol>` in a phrase is replaced in turn, `{slot}` by a given word."""

COMMON: Rules = {
    "arm": ("the robot arm", "the arm", "the robot", "a white robot arm", "the gripper"),
    "slowly": ("", "", "", " slowly", " carefully", " steadily"),
    "explore": (
        "<arm> <wanders>",
        "<arm> <wanders> over the table",
        "<arm> <wanders><slowly>",
        "random motion of the arm",
        "move around over the table",
    ),
    "wanders": ("moves around", "wanders about", "explores", "moves at random", "waves through the scene"),
}


def describe(
    rng: np.random.Generator, symbol: str, rules: Rules | None = None, slots: Mapping[str, str] | None = None
) -> str:
    """Draw one phrase of a symbol; `rules` add to and override the common ones.

    Raises ValueError for a symbol or slot that nothing defines.
    """
    known = {**COMMON, **(rules or {})}

    def expand(name: str) -> str:
        if name not in known:
            raise ValueError(f"no rule for <{name}> in the grammar")
        phrase = known[name][int(rng.integers(len(known[name])))]
        return re.sub(r"<(\w+)>", lambda match: expand(match[1]), phrase)

    phrase = expand(symbol)
    try:
        phrase = phrase.format(**(slots or {}))
    except KeyError as error:
        raise ValueError(f"nothing fills the slot {error} of {phrase!r}") from None
    return " ".join(phrase.split())
