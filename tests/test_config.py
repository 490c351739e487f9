from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from vidworld import config
from vidworld.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    depth: int = 12
    rate: float = 1e-3
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError("rate", got=self.rate, expected="0 or more")


@dataclass(frozen=True)
class Required:
    """Has a setting without a default."""

    name: str


@dataclass(frozen=True)
class Outer:
    """A thing."""

    inner: Inner = Inner()
    out: Path | None = None
    size: tuple[int, int] = (1, 2)


def test_defaults_yaml_and_flags_stack(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("inner: {depth: 3, rate: 1}\nout: here\n")
    loaded = config.from_yaml(Outer, path)
    assert loaded == Outer(Inner(3, 1.0), Path("here"))
    flagged = config.parse(Outer, ["--inner.rate", "0.5", "--size", "3", "4"], prog="p", default=loaded)
    assert flagged == Outer(Inner(3, 0.5), Path("here"), (3, 4))


def test_yaml_round_trip_and_digest(tmp_path):
    value = Outer(Inner(5), Path("x"), (7, 8))
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(value))
    assert config.from_yaml(Outer, path) == value
    assert config.digest(value) == config.digest(config.from_yaml(Outer, path))
    assert config.digest(value) != config.digest(Outer())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"inner": {"depht": 3}}, "unknown setting 'inner.depht' in c.yaml; did you mean 'inner.depth'?"),
        ({"inner": {"depth": "3"}}, "setting 'inner.depth' in c.yaml: got '3', expected a valid integer"),
        ({"inner": {"kind": "c"}}, "got 'c', expected 'a' or 'b'"),
        ({"zzz": 1}, "known settings: inner, out, size"),
        ({"inner": {"rate": True}}, "'inner.rate'"),
    ],
)
def test_bad_settings_are_named(given, says):
    with pytest.raises(ConfigError) as caught:
        config.from_mapping(Outer, given, where="c.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--inner.depht", "5"], "--inner.depth"),
        (["--inner.depth", "x"], "--inner.depth"),
        (["--inner.kind", "c"], "--inner.kind: got 'c', expected 'a', 'b'; see vidworld x --help"),
        (["--inner.depth", "x"], "--inner.depth: got 'x', expected INT; see vidworld x --help"),
        (["--inner.depth=x"], "--inner.depth: got 'x', expected INT; see vidworld x --help"),
    ],
)
def test_bad_flags_are_one_line(arguments, says):
    with pytest.raises(ConfigError) as caught:
        config.parse(Outer, arguments, prog="vidworld x")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "╭" not in str(caught.value)


def test_own_checks_and_missing_settings_keep_their_words():
    with pytest.raises(ConfigError, match=r"^rate in c\.yaml: got -1\.0, expected 0 or more$"):
        config.from_mapping(Outer, {"inner": {"rate": -1.0}}, where="c.yaml")
    with pytest.raises(ConfigError, match=r"^rate: got -1\.0, expected 0 or more$"):
        config.parse(Outer, ["--inner.rate", "-1"], prog="vidworld x")
    with pytest.raises(ConfigError, match=r"^setting 'name' is missing in c\.yaml$"):
        config.from_mapping(Required, {}, where="c.yaml")


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "!!python/object/apply:os.system ['true']"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.read_yaml(path)
