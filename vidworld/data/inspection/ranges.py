"""Values that their unit or kind does not allow, or that the contract would refuse."""

import math
from collections.abc import Iterator

import numpy as np

from vidworld.data.inspection.constant import is_gripper
from vidworld.data.inspection.finding import Finding, named
from vidworld.data.inspection.survey import Survey

LIMITS = {
    ("rad", "position"): 2 * math.pi + 0.1,
    ("rad", "delta"): math.pi,
    ("rad/s", "velocity"): 4 * math.pi,
    ("m", "position"): 20.0,
    ("m", "delta"): 1.0,
    ("m/s", "velocity"): 10.0,
}
"""What 98 % of the values stay within for any arm: joints turn one revolution at most either way and two
revolutions a second; arms reach a few metres. Degrees and millimetres are 57 and 1000 times larger."""
MISTAKEN = {"rad": "degrees", "rad/s": "degrees per second", "m": "millimetres", "m/s": "millimetres/s"}
BINARY_SLACK = 0.01
SATURATED = 0.3
"""Share of frames at exactly one non-zero extreme. Bang-bang driving reaches 0.1, a clipped log more."""
NORMALISED_DIMS = 3


def units(survey: Survey) -> Iterator[Finding]:
    """Values too large for the declared unit."""
    for contract, role, index, dimension, statistics in survey.dimensions():
        limit = LIMITS.get((dimension.unit, dimension.kind))
        reach = max(abs(statistics.q01[index]), abs(statistics.q99[index]))
        if limit is not None and reach > limit:
            yield Finding(
                "units",
                f"{role} {dimension.name!r} is too large for {dimension.unit}",
                f"embodiment {contract.embodiment!r}",
                f"{statistics.q01[index]:.4g} to {statistics.q99[index]:.4g} {dimension.unit}",
                f"within +-{limit:.3g}",
                f"are these {MISTAKEN[dimension.unit]}? say so in a contract file, and to: {dimension.unit}",
            )


def binary(survey: Survey) -> Iterator[Finding]:
    """A binary number beyond 0 and 1."""
    for contract, role, index, dimension, statistics in survey.dimensions():
        low, high = statistics.minimum[index], statistics.maximum[index]
        if dimension.kind == "binary" and (low < -BINARY_SLACK or high > 1 + BINARY_SLACK):
            yield Finding(
                "binary",
                f"binary {role} {dimension.name!r} leaves 0 to 1",
                f"embodiment {contract.embodiment!r}",
                f"{low:.4g} to {high:.4g}",
                "0 or 1 (scaling assumes it)",
                "declare another kind in the contract file, or map it to 0 and 1",
            )


def normalised(survey: Survey) -> Iterator[Finding]:
    """Actions of unknown unit that all end at exactly -1 and 1 were scaled by somebody already."""
    for contract in survey.manifest.contracts:
        statistics = contract.action_statistics
        scaled = [
            dimension.name
            for dimension, low, high in zip(
                contract.action, statistics.minimum, statistics.maximum, strict=True
            )
            if dimension.unit == "unknown"
            and dimension.kind != "binary"
            and abs(low + 1) < 1e-3
            and abs(high - 1) < 1e-3
        ]
        if len(scaled) >= NORMALISED_DIMS:
            yield Finding(
                "normalised",
                "actions that look normalised",
                f"embodiment {contract.embodiment!r}",
                f"{named(scaled)} from exactly -1 to 1, unit unknown",
                "raw units",
                "give raw actions, or say unit 1 in the contract file if the controller takes -1 to 1",
            )


def saturated(survey: Survey) -> Iterator[Finding]:
    """A number that often sits at exactly its largest or smallest value was clipped."""
    for contract in survey.manifest.contracts:
        for role, dimensions, tables in survey.tables(contract):
            if not tables:
                continue
            values_TD = np.concatenate([rows for _, rows in tables])
            low_D, high_D = values_TD.min(0), values_TD.max(0)
            for index, dimension in enumerate(dimensions):
                if dimension.kind == "binary" or low_D[index] == high_D[index]:
                    continue
                for bound in (low_D[index], high_D[index]):
                    share = float((values_TD[:, index] == bound).mean())
                    # A gripper rests at its ends, and a command rests at 0.
                    if share > SATURATED and bound != 0 and not is_gripper(dimension):
                        yield Finding(
                            "saturated",
                            f"{role} {dimension.name!r} sits at its limit",
                            f"embodiment {contract.embodiment!r}",
                            f"{share:.0%} of frames at exactly {bound:.4g} {dimension.unit}",
                            f"at most {SATURATED:.0%}",
                            "was it clipped, or is it binary? correct the log, or the contract file",
                        )


def held_out_range(survey: Survey) -> Iterator[Finding]:
    """Actions of held-out episodes that the contract, measured on the training ones, refuses."""
    for contract in survey.manifest.contracts:
        low_A, high_A = contract.accepted_range
        rows = [look for look in survey.of(contract.embodiment) if look.split == "val"]
        wrong: dict[str, float] = {}
        for look in rows:
            beyond_TA = np.maximum(low_A - look.actions_TA, look.actions_TA - high_A)
            for index in np.flatnonzero((beyond_TA > 0).any(0)):
                row = int(beyond_TA[:, index].argmax())
                wrong.setdefault(
                    f"{contract.action[index].name!r} = {look.actions_TA[row, index]:.4g} at row "
                    f"{look.start + row} of {look.sample.episode_id}",
                    0.0,
                )
        if wrong:
            yield Finding(
                "held-out range",
                "held-out actions outside the accepted range",
                f"embodiment {contract.embodiment!r}",
                named(list(wrong)),
                "within the training range and half of it more",
                "hold out other episodes, or train on more: rollouts of these refuse their own actions",
            )


def not_finite(survey: Survey) -> Iterator[Finding]:
    """NaN or infinity; the converter refuses them, so these shards were made by something else."""
    bad = [look.sample.episode_id for look in survey.looks if not look.finite]
    if bad:
        yield Finding(
            "not finite",
            "numbers that are not finite",
            named(bad),
            "NaN or infinity",
            "finite numbers",
            "leave these episodes out, or convert again with vidworld shard, which refuses them",
        )
