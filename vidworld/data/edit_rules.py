"""Rules that choose episodes: `frames >= 20 and text ~ banana and outcome.success == true`.

    rule       = either ("or" either)*
    either     = both ("and" both)*
    both       = "not" both | "(" rule ")" | "has" FIELD | FIELD compare VALUE | FIELD "in" "(" VALUE, ... ")"
    compare    = "==" | "!=" | "<" | "<=" | ">" | ">=" | "~" | "!~"

`~` means: contains, in any case. A value is a number, true, false, null, a word, or text in quotes. A rule is
parsed into comparisons and nothing else; no part of it is ever evaluated as code.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vidworld.errors import ConfigError

MAX_LENGTH, MAX_DEPTH = 4000, 50
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>"[^"]*"|'[^']*')
      | (?P<compare>==|!=|<=|>=|!~|<|>|~)
      | (?P<mark>[(),])
      | (?P<word>[\w.\-+:/@%*]+)
    )""",
    re.VERBOSE,
)
_ORDER: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_RESERVED = ("and", "or", "not", "in", "has")

Facts = Mapping[str, Any]
"""What is known of an episode: field -> value; fields of `meta.json` may be nested."""


class _Absent:
    """The value of a field that an episode does not have: no comparison with it holds."""


ABSENT = _Absent()


@dataclass(frozen=True)
class Value:
    """What a rule compares with; whether it is a number is decided by what it meets."""

    text: str
    quoted: bool = False

    @property
    def number(self) -> float | None:
        """As a finite number, if it is one."""
        try:
            number = float(self.text)
        except ValueError:
            return None
        return None if self.quoted or not math.isfinite(number) else number

    def equals(self, found: Any) -> bool:
        """Whether a field has this value."""
        if found is None or isinstance(found, bool):
            return not self.quoted and self.text == _written(found)
        if isinstance(found, int | float):
            return self.number == found
        return self.text == _written(found)


@dataclass(frozen=True)
class Comparison:
    """A field against one value, or several."""

    field: str
    compare: str
    values: tuple[Value, ...] = ()

    def holds(self, facts: Facts) -> bool:
        """Whether it is true of an episode; false where the field is absent.

        Raises ConfigError for an order between things that have none.
        """
        found = lookup(facts, self.field)
        if isinstance(found, _Absent):
            return False
        match self.compare:
            case "has":
                return True
            case "==" | "in":
                return any(value.equals(found) for value in self.values)
            case "!=":
                return not self.values[0].equals(found)
            case "~" | "!~":
                contained = self.values[0].text.lower() in _written(found).lower()
                return contained == (self.compare == "~")
            case "<" | "<=" | ">" | ">=":
                number = self.values[0].number
                if number is None or isinstance(found, bool) or not isinstance(found, int | float):
                    raise ConfigError(
                        f"rule {self.field} {self.compare} {self.values[0].text}",
                        got=repr(self.values[0].text if number is None else found),
                        expected="numbers on both sides",
                    )
                return _ORDER[self.compare](found, number)
            case _:
                raise AssertionError(self.compare)

    def fields(self) -> set[str]:
        """The fields that it asks for."""
        return {self.field}


@dataclass(frozen=True)
class Combination:
    """Rules joined by `and` or `or`, or one after `not`."""

    join: str
    parts: "tuple[Rule, ...]"

    def holds(self, facts: Facts) -> bool:
        """Whether it is true of an episode."""
        match self.join:
            case "and":
                return all(part.holds(facts) for part in self.parts)
            case "or":
                return any(part.holds(facts) for part in self.parts)
            case "not":
                return not self.parts[0].holds(facts)
            case _:
                raise AssertionError(self.join)

    def fields(self) -> set[str]:
        """The fields that it asks for."""
        return set().union(*(part.fields() for part in self.parts))


Rule = Comparison | Combination


def parse_rule(text: str) -> Rule:
    """Parse a rule. Raises ConfigError that names the column and what was expected there."""
    if len(text) > MAX_LENGTH:
        raise ConfigError("rule", got=f"{len(text)} characters", expected=f"at most {MAX_LENGTH}")
    parser = _Parser(text)
    rule = parser.either(0)
    if parser.token is not None:
        raise parser.wrong("'and', 'or' or the end")
    return rule


def lookup(facts: Facts, field: str) -> Any:
    """The value of a dotted field, or ABSENT.

    >>> lookup({"outcome": {"success": True}}, "outcome.success")
    True
    """
    found: Any = facts
    for name in field.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return ABSENT
        found = found[name]
    return found


def known_fields(facts: Facts, prefix: str = "") -> list[str]:
    """All dotted fields of an episode."""
    names = []
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            names += known_fields(value, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int


class _Parser:
    """Recursive descent over the tokens of one rule."""

    def __init__(self, text: str) -> None:
        self.text, self._end = text, 0
        self.token: _Token | None = None
        self.step()

    def step(self) -> "_Token | None":
        """Move to the next token; returns the one left behind."""
        before = self.token
        rest = self.text[self._end :]
        if not rest.strip():
            self.token = None
            return before
        found = _TOKEN.match(self.text, self._end)
        column = self._end + len(rest) - len(rest.lstrip()) + 1
        if not found or not found.lastgroup:
            what = "text without an end" if rest.lstrip()[0] in "\"'" else repr(rest.lstrip()[0])
            raise ConfigError(
                "rule", where=f"column {column}", got=what, expected="a field, a value or a sign"
            )
        self.token = _Token(found.lastgroup, found[found.lastgroup], column)
        self._end = found.end()
        return before

    def wrong(self, expected: str) -> ConfigError:
        """The error of finding something else here."""
        here = self.token
        return ConfigError(
            f"rule {self.text!r}",
            where=f"column {here.column if here else len(self.text) + 1}",
            got=repr(here.text) if here else "the end",
            expected=expected,
        )

    def either(self, depth: int) -> Rule:
        if depth > MAX_DEPTH:
            raise ConfigError("rule", got="too deeply nested", expected=f"at most {MAX_DEPTH} levels")
        return self._joined("or", lambda: self._joined("and", lambda: self._both(depth)))

    def _joined(self, word: str, part: Callable[[], Rule]) -> Rule:
        parts = [part()]
        while self._takes("word", word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else Combination(word, tuple(parts))

    def _both(self, depth: int) -> Rule:
        negations = 0
        while self._takes("word", "not"):
            negations += 1
        rule = self._comparison(depth)
        return Combination("not", (rule,)) if negations % 2 else rule

    def _comparison(self, depth: int) -> Rule:
        if self._takes("mark", "("):
            rule = self.either(depth + 1)
            if not self._takes("mark", ")"):
                raise self.wrong("')'")
            return rule
        if self._takes("word", "has"):
            return Comparison(self._field(), "has")
        field = self._field()
        if self._takes("word", "in"):
            return Comparison(field, "in", self._values())
        if self.token is None or self.token.kind != "compare":
            raise self.wrong(f"one of == != < <= > >= ~ !~ in, after {field!r}")
        compare = self.token.text
        self.step()
        return Comparison(field, compare, (self._value(),))

    def _field(self) -> str:
        here = self.token
        if (
            here is None
            or here.kind != "word"
            or here.text in _RESERVED
            or not re.match(r"[A-Za-z_]", here.text)
        ):
            raise self.wrong("a field such as frames, text or outcome.success")
        self.step()
        return here.text

    def _values(self) -> tuple[Value, ...]:
        if not self._takes("mark", "("):
            raise self.wrong("'(' after 'in'")
        values = [self._value()]
        while self._takes("mark", ","):
            values.append(self._value())
        if not self._takes("mark", ")"):
            raise self.wrong("',' or ')'")
        return tuple(values)

    def _value(self) -> Value:
        here = self.token
        if here is None or here.kind not in ("word", "text") or here.text in _RESERVED:
            raise self.wrong("a value")
        self.step()
        return Value(here.text[1:-1], True) if here.kind == "text" else Value(here.text)

    def _takes(self, kind: str, text: str) -> bool:
        if self.token is None or (self.token.kind, self.token.text) != (kind, text):
            return False
        self.step()
        return True


def _written(value: Any) -> str:
    """A value as it would be written in a rule."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
