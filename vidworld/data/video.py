"""The video member of a shard: encode frames to bytes, and decode any window of them, exactly.

Motion JPEG in mp4 with full colour (4:4:4): opens in ffmpeg, VLC and PyAV, every picture is a key frame,
and a random window reads faster than from short-GOP H.264 at a better picture. `tools/bench/video_member.py`
measured the choice, `benchmarks/video_member.json` holds the rows. Other mp4s are read, too.
"""

import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from vidworld.errors import DataError

VIDEO_SUFFIX = "mp4"
JPEG_QUANTIZER = 3
"""ffmpeg's scale for JPEG: 1 is best, 31 worst."""
MAX_PIXELS = 4096 * 4096
MAX_DECODED_BYTES = 16 << 30


def encode_video(frames: Iterable[np.ndarray], fps: float, *, quantizer: int = JPEG_QUANTIZER) -> bytes:
    """Encode RGB frames [H, W, 3] uint8 to an mp4; equal frames give equal bytes.

    Raises DataError when there are no frames, or when one has another dtype or size than the first.
    """
    assert 1 <= quantizer <= 31
    buffer, rate = io.BytesIO(), Fraction(fps).limit_denominator(65535)
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as mp4:
        stream = None
        for index, frame in enumerate(frames):
            if stream is None:
                _check_frame(frame, index, frame.shape)
                stream = mp4.add_stream("mjpeg", rate=rate)
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuvj444p"
                stream.codec_context.thread_count = 1
                stream.codec_context.time_base = 1 / rate
                # The plain integer transform is the same on every processor.
                fixed = {"dct": "int", "flags": "+bitexact"}
                stream.options = {"qmin": str(quantizer), "qmax": str(quantizer), **fixed}
            _check_frame(frame, index, (stream.height, stream.width, 3))
            picture = av.VideoFrame.from_ndarray(_ycbcr(frame), format="yuvj444p")
            picture.pts, picture.time_base = index, 1 / rate
            mp4.mux(stream.encode(picture))
        if stream is None:
            raise DataError("video to encode", got="no frames", expected="at least one")
        mp4.mux(stream.encode(None))
    return buffer.getvalue()


def decode_video(
    data: bytes, start: int = 0, length: int | None = None, *, num_frames: int | None = None
) -> np.ndarray:
    """Decode frames `start` to `start + length` (or to the end) of an mp4 as RGB [T, H, W, 3] uint8.

    Raises DataError when the bytes are no such video, are too large to decode, hold fewer frames than asked
    for, or do not hold exactly `num_frames` where that is given.
    """
    assert start >= 0
    assert length is None or length > 0
    try:
        # Naming the demuxer keeps playlists out, which could open other files.
        with av.open(io.BytesIO(data), "r", format="mp4") as mp4:
            if not mp4.streams.video:
                raise DataError("video", got="no video stream", expected="one")
            return _decode(mp4, start, length, num_frames)
    except av.FFmpegError as error:
        raise DataError("video does not decode", got=str(error)) from None


def _decode(mp4: InputContainer, start: int, length: int | None, num_frames: int | None) -> np.ndarray:
    stream = mp4.streams.video[0]
    context = stream.codec_context
    end = stream.frames if length is None else start + length
    if not start < end <= stream.frames or (num_frames is not None and num_frames != stream.frames):
        expected = f"{start} to {end}" if num_frames is None else num_frames
        raise DataError("frames of the video", got=stream.frames, expected=expected)
    pixels = context.width * context.height
    if pixels > MAX_PIXELS or (end - start) * pixels * 3 > MAX_DECODED_BYTES:
        raise DataError(
            "video size",
            got=f"{end - start} frames of {context.width}x{context.height}",
            expected=f"at most {MAX_PIXELS} pixels and {MAX_DECODED_BYTES >> 30} GiB",
        )
    rate, time_base = stream.average_rate, stream.time_base
    if not rate or not time_base or not context.width:
        raise DataError("video", got="no rate, time base or size in its header", expected="all three")
    # Loader workers are the parallelism: threads in here would only fight them.
    context.thread_count = 1
    convert = VideoReformatter()
    ticks = 1 / (rate * time_base)
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
        frames[found] = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
        found += 1
        if found == len(frames):
            return frames
    raise DataError("frames of the video", got=f"{found} from {start}", expected=len(frames))


def _ycbcr(frame: np.ndarray) -> np.ndarray:
    """Planes [3, H, W] by JPEG's equations (JFIF 1.02), rounded: swscale and Pillow cut, which tints."""
    red, green, blue = np.moveaxis(frame, 2, 0).astype(np.int32)
    half, centre = 1 << 15, (128 << 16) + (1 << 15) - 1
    planes = (
        19595 * red + 38470 * green + 7471 * blue + half,
        -11059 * red - 21709 * green + 32768 * blue + centre,
        32768 * red - 27439 * green - 5329 * blue + centre,
    )
    return np.stack([plane >> 16 for plane in planes]).astype(np.uint8)


def _check_frame(frame: np.ndarray, index: int, shape: tuple[int, ...]) -> None:
    if frame.dtype != np.uint8 or frame.shape != shape or len(shape) != 3 or shape[2] != 3:
        raise DataError(
            f"frame {index}", got=f"{frame.dtype} {frame.shape}", expected=f"uint8 {shape} (height, width, 3)"
        )
