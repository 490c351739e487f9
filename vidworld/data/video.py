"""The video member of a shard: encode frames to bytes and decode any window of them, exactly.

Short-GOP H.264 in mp4, without B frames: opens in every player, and a window decodes from the key frame
before it. `tools/bench/video_member.py` measured the choice, `benchmarks/video_member.json` holds the rows.
"""

import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer

from vidworld.errors import DataError

VIDEO_SUFFIX = "mp4"
KEYFRAME_INTERVAL = 8
QUALITY_CRF = 18
MAX_PIXELS = 4096 * 4096
MAX_FRAMES = 1_000_000


def encode_video(
    frames: Iterable[np.ndarray],
    fps: float,
    *,
    keyframe_interval: int = KEYFRAME_INTERVAL,
    crf: int = QUALITY_CRF,
) -> bytes:
    """Encode RGB frames [H, W, 3] uint8 to an mp4, equal frames to equal bytes.

    H and W must be even. Raises DataError when there are no frames or one has another size or dtype.
    """
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(65535)
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as mp4:
        stream = None
        for index, frame in enumerate(frames):
            if stream is None:
                _check_frame(frame, index, frame.shape)
                stream = mp4.add_stream("libx264", rate=rate)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.thread_type = "NONE"
                stream.codec_context.thread_count = 1
                stream.codec_context.time_base = 1 / rate
                stream.options = {
                    "crf": str(crf),
                    "g": str(keyframe_interval),
                    "keyint_min": str(keyframe_interval),
                    "sc_threshold": "0",
                    "bf": "0",
                    "preset": "medium",
                    "flags": "+bitexact",
                }
            _check_frame(frame, index, (stream.height, stream.width, 3))
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = index, 1 / rate
            mp4.mux(stream.encode(picture))
        if stream is None:
            raise DataError("video to encode", got="no frames", expected="at least one")
        mp4.mux(stream.encode(None))
    return buffer.getvalue()


def decode_video(data: bytes, start: int = 0, length: int | None = None) -> np.ndarray:
    """Decode frames `start` to `start + length` (or to the end) of an mp4 as RGB [T, H, W, 3] uint8.

    Raises DataError when the bytes are no such video or hold fewer frames than asked for.
    """
    assert start >= 0
    assert length is None or length > 0
    try:
        # Naming the demuxer keeps playlists out, which could open other files.
        with av.open(io.BytesIO(data), "r", format="mp4") as mp4:
            if not mp4.streams.video:
                raise DataError("video", got="no video stream", expected="one")
            return _decode(mp4, start, length)
    except av.FFmpegError as error:
        raise DataError("video does not decode", got=str(error)) from None


def _decode(mp4: InputContainer, start: int, length: int | None) -> np.ndarray:
    stream = mp4.streams.video[0]
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS or stream.frames > MAX_FRAMES:
        raise DataError(
            "video size",
            got=f"{context.width}x{context.height}, {stream.frames} frames",
            expected=f"at most {MAX_PIXELS} pixels and {MAX_FRAMES} frames",
        )
    context.thread_type = "NONE"
    context.thread_count = 1
    end = stream.frames if length is None else start + length
    if not start < end <= stream.frames:
        raise DataError("frames of the video", got=stream.frames, expected=f"{start} to {end}")
    assert stream.average_rate is not None
    assert stream.time_base is not None
    ticks = 1 / (stream.average_rate * stream.time_base)
    if start:
        mp4.seek(round(start * ticks), stream=stream, backward=True)
    frames = np.empty((end - start, context.height, context.width, 3), np.uint8)
    found = 0
    for frame in mp4.decode(stream):
        index = round(frame.pts / ticks) if frame.pts is not None else -1
        if index < start:
            continue
        if index != start + found or (frame.height, frame.width) != frames.shape[1:3]:
            raise DataError("video frame", got=f"frame {index}", expected=f"frame {start + found}")
        frames[found] = frame.to_ndarray(format="rgb24")
        found += 1
        if found == len(frames):
            return frames
    raise DataError("frames of the video", got=f"{found} from {start}", expected=len(frames))


def _check_frame(frame: np.ndarray, index: int, shape: tuple[int, ...]) -> None:
    if frame.dtype != np.uint8 or frame.shape != shape or frame.ndim != 3 or shape[2] != 3:
        raise DataError(
            f"frame {index}", got=f"{frame.dtype} {frame.shape}", expected=f"uint8 {shape} (height, width, 3)"
        )
    if shape[0] % 2 or shape[1] % 2:
        raise DataError(f"frame {index}", got=f"{shape[1]}x{shape[0]}", expected="even width and height")
