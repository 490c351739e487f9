"""Numbers that never, or hardly ever, move: the model cannot learn what they do."""

from collections.abc import Iterator

from vidworld.contract import Dimension, Statistics
from vidworld.data.inspection.finding import Finding, named
from vidworld.data.inspection.survey import Survey

HARDLY = 0.02
"""98 % of the values within this share of the full range. A Gaussian has 0.65 there, a joint that rests in
four of five episodes about 0.1, one that only twitches (CR5, joint 4) 0.002."""


def constant(survey: Survey) -> Iterator[Finding]:
    """Dimensions with one value in all training episodes; a gripper is named as such."""
    for contract in survey.manifest.contracts:
        for role, dimensions, statistics in (
            ("action", contract.action, contract.action_statistics),
            ("proprio", contract.proprio, contract.proprio_statistics),
        ):
            still = [
                (d, a)
                for d, a, b in zip(dimensions, statistics.minimum, statistics.maximum, strict=True)
                if a == b
            ]
            where = f"embodiment {contract.embodiment!r}"
            for dimension, value in still:
                if is_gripper(dimension):
                    yield Finding(
                        "gripper",
                        f"the gripper ({role} {dimension.name!r}) never moves",
                        where,
                        f"{value:g} in every frame",
                        "it opens and closes",
                        "check that the right field is read, and map the one that holds the gripper",
                    )
            rest = [f"{d.name!r} = {value:g}" for d, value in still if not is_gripper(d)]
            if rest:
                yield Finding(
                    "constant",
                    f"{role} dimensions that never change",
                    where,
                    named(rest),
                    "values that vary",
                    "their effect cannot be learned: record episodes that move them, or drop them",
                )


def hardly(survey: Survey) -> Iterator[Finding]:
    """Dimensions that rest nearly always and move far in a few frames."""
    for contract, role, index, dimension, statistics in survey.dimensions():
        share = _share(statistics, index)
        if dimension.kind != "binary" and share is not None and share < HARDLY:
            low, high = statistics.q01[index], statistics.q99[index]
            ends = f"{statistics.minimum[index]:.3g} to {statistics.maximum[index]:.3g}"
            yield Finding(
                "hardly moves",
                f"{role} {dimension.name!r} hardly ever moves",
                f"embodiment {contract.embodiment!r}",
                f"98 % within {low:.2g} to {high:.2g} {dimension.unit}, extremes {ends}",
                f"at least {HARDLY:.0%} of the range in regular use",
                "expect little control over it; extremes of a few frames may be glitches of the log",
            )


def _share(statistics: Statistics, index: int) -> float | None:
    full = statistics.maximum[index] - statistics.minimum[index]
    return (statistics.q99[index] - statistics.q01[index]) / full if full > 0 else None


def is_gripper(dimension: Dimension) -> bool:
    """Whether a dimension is named like one."""
    return any(word in dimension.name.lower() for word in ("grip", "finger", "claw"))
