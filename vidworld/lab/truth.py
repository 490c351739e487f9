"""What only a simulator knows of an episode, as JSON values that travel in a sample's `outcome`.

For evaluation: readouts of every frame, masks and hidden values. Never fed to a model.
"""

import base64
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vidworld.errors import DataError

if TYPE_CHECKING:
    from vidworld.lab.episode import LabEpisode


def truth_of(episode: "LabEpisode") -> dict[str, Any]:
    """Hidden values, readouts (rounded to 1e-5) and packed masks, where it has any, of an episode."""
    truth: dict[str, Any] = {
        "hidden": dict(episode.hidden),
        "readouts": {
            name: [round(float(value), 5) for value in column_T]
            for name, column_T in episode.outcomes_T.items()
        },
    }
    if episode.config.masks:
        truth["masks"] = {name: pack_mask(mask_THW) for name, mask_THW in episode.masks_THW.items()}
    return truth


def pack_mask(mask_THW: np.ndarray) -> dict[str, Any]:
    """A bool mask [T, H, W] as its shape and its bits, deflated and in base64: a few kB."""
    bits = zlib.compress(np.packbits(mask_THW).tobytes(), 9)
    return {"shape": list(mask_THW.shape), "bits": base64.b64encode(bits).decode("ascii")}


def unpack_mask(packed: Mapping[str, Any]) -> np.ndarray:
    """The bool mask [T, H, W] that `pack_mask` packed. Raises DataError when it is damaged."""
    try:
        shape = tuple(int(side) for side in packed["shape"])
        count = int(np.prod(shape))
        inflater = zlib.decompressobj()
        content = inflater.decompress(base64.b64decode(packed["bits"], validate=True), (count + 7) // 8)
        bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count)
        if len(bits) != count or len(content) != (count + 7) // 8:
            raise ValueError(f"{len(content)} bytes for {shape}")
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise DataError("packed mask", got=error, expected="what pack_mask wrote") from None
    return bits.reshape(shape).astype(bool)
