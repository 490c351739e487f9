"""What a detector says when something looks wrong."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One suspicious thing. A suspicion, not an error: the data are read all the same."""

    detector: str
    """Name of the detector, which is its heading in docs/inspect.md."""
    what: str
    where: str
    got: str
    expected: str
    fix: str

    def to_mapping(self) -> dict[str, str]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.what} in {self.where}: got {self.got}, expected {self.expected}; {self.fix}"


def plain(text: str) -> str:
    """Text that any font and encoding can draw: spaces for line breaks, controls and lone surrogates.

    >>> plain("a\\nb")
    'a b'
    """
    return "".join(character if character.isprintable() else " " for character in text)


def named(names: list[str], most: int = 5) -> str:
    """A list of names for people, cut to `most`.

    >>> named(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
