"""Encoded pictures inside robot logs: one JPEG or PNG to an RGB frame, capped before decoding."""

from io import BytesIO

import numpy as np
from PIL import Image

from vidworld.data.sources.video_file import MAX_PIXELS
from vidworld.errors import DataError


def decode_picture(content: bytes | memoryview, what: str, where: object) -> np.ndarray:
    """RGB [H, W, 3] uint8 of a JPEG or PNG; zeros after its end, as from padded storage, do not matter.

    Raises DataError that names `what` and `where` when it is damaged, something else, or too large.
    """
    try:
        image = Image.open(BytesIO(content), formats=("JPEG", "PNG"))
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"size of {what}",
                where=where,
                got=f"{image.width}x{image.height}",
                expected=f"at most {MAX_PIXELS} pixels",
            )
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        reason = "not a JPEG or PNG" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"damaged {what}", where=where, got=reason) from None
