"""The schema of an RLDS dataset: `features.json`, flattened to the names that records use."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidworld.errors import DataError

MAX_JSON_BYTES = 2**26
MAX_WIDTH = 4096
"""Numbers a step; longer ones are arrays of pixels or points, and no action or state."""
_DEPTH = 32


@dataclass(frozen=True)
class Feature:
    """A field of every step: numbers of a shape, text, a picture, or something that is not read."""

    kind: Literal["numbers", "text", "picture", "other"]
    shape: tuple[int, ...] = ()
    dtype: np.dtype | None = None
    encoding: str = "none"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises DataError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError("size of the metadata", where=path, expected=f"at most {MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_text())
    except OSError as error:
        raise DataError("cannot read the metadata", where=path, got=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise DataError("not valid JSON", where=path, got=error) from None
    if not isinstance(content, dict):
        raise DataError("metadata", where=path, got=type(content).__name__, expected="a JSON object")
    return content


def read_features(path: Path) -> dict[str, Feature]:
    """Fields of a step, sorted by path, such as `observation/image_0`."""
    top = _inside(read_json(path))
    steps = top.get("steps") if top else None
    if not isinstance(steps, dict):
        raise DataError("no `steps`", where=path, fix="is this a dataset of episodes (RLDS)?")
    found: dict[str, Feature] = {}
    try:
        _flatten(steps["sequence"]["feature"], "", found, 0)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise DataError(
            "features", where=path, got=error, expected="as TensorFlow Datasets writes them"
        ) from None
    if not found:
        raise DataError("no fields in `steps`", where=path)
    return dict(sorted(found.items()))


def _inside(feature: dict[str, Any]) -> dict[str, Any] | None:
    """Named parts of a FeaturesDict, or None for another feature."""
    parts = feature.get("featuresDict", {}).get("features") if "featuresDict" in feature else None
    return parts if isinstance(parts, dict) else None


def _flatten(feature: dict[str, Any], path: str, found: dict[str, Feature], depth: int) -> None:
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    parts = _inside(feature)
    if parts is None:
        found[path] = _leaf(feature)
        return
    for name, part in parts.items():
        _flatten(part, f"{path}/{name}" if path else name, found, depth + 1)


def _leaf(feature: dict[str, Any]) -> Feature:
    if "text" in feature:
        return Feature("text")
    if "image" in feature:
        image = feature["image"]
        shape, dtype = _shape(image), np.dtype(image.get("dtype") or "uint8")
        colour = len(shape) == 3 and shape[2] == 3 and dtype == np.uint8
        return Feature("picture" if colour else "other", shape, dtype)
    if "tensor" in feature:
        tensor = feature["tensor"]
        shape, encoding = _shape(tensor), str(tensor.get("encoding") or "none").lower()
        name = str(tensor.get("dtype"))
        if name in ("string", "object"):
            return Feature("text", shape)
        if re.fullmatch(r"u?int(8|16|32|64)|float(16|32|64)|bool", name) and encoding in ("none", "bytes"):
            fits = 0 < math.prod(shape) <= MAX_WIDTH
            return Feature("numbers" if fits else "other", shape, np.dtype(name), encoding)
    return Feature("other")


def _shape(facts: dict[str, Any]) -> tuple[int, ...]:
    """Sizes of the axes; an unknown one is 0."""
    sizes = (facts.get("shape") or {}).get("dimensions") or []
    return tuple(max(int(size), 0) for size in sizes)
