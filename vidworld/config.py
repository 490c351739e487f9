"""One way in for every setting: frozen dataclasses, a YAML of differences, dotted overrides.

Defaults live in the dataclasses only. A misspelt key or flag is refused with a suggestion.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from vidworld.errors import ConfigError, UserError
from vidworld.files import url_of

T = TypeVar("T")


def from_mapping(cls: type[T], differences: Mapping[str, Any], *, where: object = "the configuration") -> T:
    """Build `cls` from its defaults and a nested mapping of differences, refusing what it does not know.

    Raises ConfigError naming the dotted key, the value got, what was expected and the nearest known key.
    """
    if not isinstance(differences, Mapping):
        raise ConfigError("settings", where=where, got=repr(differences)[:80], expected="a mapping")
    _refuse_unknown(cls, differences, where)
    try:
        # Strict through JSON, where a list may stand for a tuple and a string for a Path.
        return TypeAdapter(cls).validate_json(json.dumps(differences, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        own = first.get("ctx", {}).get("error")
        if isinstance(own, UserError):  # a check of the dataclass
            facts = {"got": own.got, "expected": own.expected, "fix": own.fix}
            raise ConfigError(own.what, where=own.where or where, **facts) from None
        if first["type"] == "missing":
            raise ConfigError(f"setting {path!r} is missing", where=where) from None
        raise ConfigError(
            f"setting {path!r}" if path else "setting",
            where=where,
            got=repr(first.get("input")),
            expected=first["msg"].removeprefix("Input should be ").removeprefix("Value error, "),
        ) from None


def from_yaml(cls: type[T], path: Path) -> T:
    """Read a YAML of differences into `cls`."""
    return from_mapping(cls, read_yaml(path), where=path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError("cannot read the configuration", where=path, got=error.strerror) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("not valid YAML", where=path, got=str(error)) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            "top level of the YAML", where=path, got=type(loaded).__name__, expected="a mapping"
        )
    return loaded


def to_mapping(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain JSON values, every field included.

    A field with `metadata={"omit_default": True}` is left out while it has its default: so a new one does not
    change the digest of what was written before it existed.
    """
    return json.loads(json.dumps(_fields_of(config), default=_plain))


def to_yaml(config: Any) -> str:
    """Turn a config dataclass into the YAML that repeats it."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def digest(config: Any) -> str:
    """Short sha256 of a config dataclass or JSON value, equal for equal content."""
    content = to_mapping(config) if dataclasses.is_dataclass(config) else config
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def parse(cls: type[T], arguments: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Parse command-line arguments into `cls`, starting from `default`, with errors of one line.

    Help goes to standard output and raises SystemExit(0) as usual.
    """
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            options: dict[str, Any] = {"config": (tyro.conf.AvoidSubcommands,)}
            if default is not None:
                options["default"] = default
            return tyro.cli(cls, args=list(arguments), prog=prog, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        cause = stop.__context__
        while cause is not None:
            if isinstance(cause, UserError):  # a check of ours: tyro would put it into a box
                raise cause from None
            cause = cause.__context__
        raise ConfigError(_one_line(captured.getvalue(), arguments), fix=f"see {prog} --help") from None


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """What tyro says in a box with a heading, such as `--lr: got 'x', expected FLOAT`."""
    plain = re.sub(r"[╭╮╰╯│─]+|\x1b\[[0-9;]*m", " ", box)
    lines = [line.strip() for line in plain.partition("For full helptext")[0].splitlines()[1:]]
    text = " ".join(line for line in lines if line)
    if wrong := re.match(r"Error parsing (--\S+):.* Argument helptext: ", text):
        flag = wrong[1]
        names = [given.partition("=")[0].replace("_", "-") for given in arguments]
        place = names.index(flag.replace("_", "-")) if flag.replace("_", "-") in names else None
        if place is not None and (kind := _after(lines, "Argument helptext:").removeprefix(flag).strip()):
            values = itertools.takewhile(lambda given: not given.startswith("--"), arguments[place + 1 :])
            given = arguments[place].partition("=")[2] or " ".join(values)
            return f"{flag}: got {given!r}, expected {kind.replace('{None}|', '')}"
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*?),?\)\.", text):
        value, flag, choices = choice.groups()
        return f"{flag}: got {value!r}, expected {choices}"
    return text or "the arguments could not be parsed"


def _after(lines: Sequence[str], heading: str) -> str:
    """The line that follows a heading."""
    return lines[lines.index(heading) + 1] if heading in lines[:-1] else ""


def _fields_of(value: Any) -> Any:
    """Dataclasses as mappings, however deep they lie."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _fields_of(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (field.metadata.get("omit_default") and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        return {key: _fields_of(inner) for key, inner in value.items()}
    return [_fields_of(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return url_of(value) or str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a config")


def _refuse_unknown(cls: type, given: Mapping[str, Any], where: object, prefix: str = "") -> None:
    """Name the nearest known key for each unknown one; unions are left to pydantic."""
    for key, value, known, inner in _walk(cls, given):
        if known is not None:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"unknown setting {prefix + key!r}",
                where=where,
                fix=f"did you mean {prefix + near[0]!r}?" if near else f"known settings: {', '.join(known)}",
            )
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(inner, value, where, f"{prefix}{key}.")


def _walk(cls: type, given: Mapping[str, Any]) -> Iterator[tuple[str, Any, list[str] | None, type | None]]:
    """Yield (key, value, known keys if the key is unknown, nested dataclass if there is one)."""
    hints = get_type_hints(cls)
    names = (
        [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(hints)
    )
    for key, value in given.items():
        if key not in names:
            yield str(key), value, names, None
        else:
            hint = hints[key]
            yield (
                key,
                value,
                None,
                hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None,
            )
