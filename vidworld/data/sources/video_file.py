"""Video files of robot logs: count their frames without decoding, and decode a run of them in order.

Files are damaged in practice, and may come from strangers. So: only plain files of a known container are
opened (no playlist, no network), sizes are capped before decoding, and a file that is missing, truncated,
corrupt or of another rate than declared raises DataError with the reason.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vidworld.errors import DataError
from vidworld.types import Video

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_PIXELS = 2**25
MAX_FRAMES = 2**22
FPS_TOLERANCE = 0.02
"""A stream's measured rate may differ from the declared one by this share."""

_DEMUXERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mp4",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
}


@dataclass(frozen=True)
class FrameIndex:
    """When each frame of a file is shown: seconds [N], ascending, and the same in the stream's own ticks."""

    times_s: np.ndarray
    ticks: np.ndarray


def frame_index(path: Path) -> FrameIndex:
    """Read the packets of a video file, without decoding; a few files are remembered.

    Raises DataError when the file is missing, not a video, truncated, or over the caps.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError("cannot read the video", where=path, got=error.strerror) from None
    return _frame_index(path, stat.st_size, stat.st_mtime_ns)


def measured_fps(path: Path) -> float | None:
    """Frames per second by the times of a file's frames, as its header has them; None with fewer than two."""
    times = frame_index(path).times_s
    span_s = float(times[-1] - times[0])
    return round((len(times) - 1) / span_s, 3) if span_s > 0 else None


def whole_video(path: Path, *, declared_fps: float) -> Video:
    """All frames of a file that holds one episode."""
    return part_of_video(path, declared_fps=declared_fps, start_s=None, end_s=None)


def part_of_video(path: Path, *, declared_fps: float, start_s: float | None, end_s: float | None) -> Video:
    """The frames shown from `start_s` (included) to `end_s` (excluded) of a file that several episodes share.

    Frames are found by counting in the file's own order; a bound may be half a frame off.
    Raises DataError when the stream runs at another rate than declared.
    """
    index = frame_index(path)
    half = 0.5 / declared_fps
    first = 0 if start_s is None else int(np.searchsorted(index.times_s, start_s - half))
    last = len(index.times_s) if end_s is None else int(np.searchsorted(index.times_s, end_s - half))
    times = index.times_s[first:last]
    if start_s is not None and (not len(times) or abs(times[0] - start_s) > half):
        raise DataError(f"no frame at {start_s:g} s", where=path, got=f"{len(index.times_s)} frames in all")
    if len(times) > 1:
        fps = (len(times) - 1) / max(float(times[-1] - times[0]), 1e-9)
        if abs(fps - declared_fps) > FPS_TOLERANCE * declared_fps:
            raise DataError(
                "frame rate of the video",
                where=path,
                got=f"{fps:g} fps",
                expected=f"the declared {declared_fps:g} fps",
            )
    return Video(num_frames=len(times), frames=functools.partial(_decode, path, first, len(times)))


@functools.lru_cache(maxsize=8)
def _frame_index(path: Path, size: int, mtime_ns: int) -> FrameIndex:
    """Index of one version of a file: the size and time are only there to make it one version."""
    ticks: list[int] = []
    packets = 0
    with _open(path) as (container, stream):
        declared, time_base = stream.frames, float(stream.time_base or 0)
        for packet in container.demux(stream):
            if packet.pts is None or packet.size == 0:
                continue
            if packet.is_corrupt:
                raise DataError(f"truncated video: frame {packets} is cut short", where=path)
            packets += 1
            # An edit list hides frames: they are in the file and never shown.
            if not packet.is_discard:
                ticks.append(packet.pts)
            if packets > MAX_FRAMES:
                raise DataError("number of video frames", where=path, got=f"over {MAX_FRAMES}")
    if not packets or packets < declared:
        raise DataError(
            "truncated video",
            where=path,
            got=f"{packets} frames",
            expected=f"{declared} as its header says" if declared else "at least one",
        )
    ordered = np.sort(np.array(ticks, dtype=np.int64))
    return FrameIndex(times_s=ordered * time_base, ticks=ordered)


def _decode(path: Path, first: int, count: int) -> Iterator[np.ndarray]:
    """Yield `count` frames from frame `first` as RGB [H, W, 3] uint8, decoding from the keyframe before."""
    if not count:
        return
    start_tick = int(frame_index(path).ticks[first])
    given = 0
    with _open(path) as (container, stream):
        if first:
            container.seek(start_tick, stream=stream, backward=True, any_frame=False)
        size = (stream.codec_context.width, stream.codec_context.height)
        convert = VideoReformatter()
        try:
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts < start_tick:
                    continue
                if frame.is_corrupt or (frame.width, frame.height) != size:
                    raise DataError(f"corrupt video: frame {first + given} is damaged", where=path)
                yield convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
                given += 1
                if given == count:
                    return
        except av.FFmpegError as error:
            raise DataError(
                f"corrupt video: decoding stops at frame {first + given} of {first + count}",
                where=path,
                got=error.strerror,
            ) from None
    raise DataError(
        "corrupt video: frames that decode", where=path, got=given, expected=f"{count} from frame {first} on"
    )


@contextlib.contextmanager
def _open(path: Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """Open the one video stream of a plain file, turning FFmpeg's errors into DataError."""
    demuxer = _DEMUXERS.get(path.suffix.lower())
    if demuxer is None:
        raise DataError("video container", where=path, got=path.suffix, expected=", ".join(_DEMUXERS))
    try:
        # `file:` keeps a colon in the path from naming a protocol; the fixed demuxer refuses playlists.
        with av.open(f"file:{path}", format=demuxer, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise DataError("damaged video: no video stream", where=path)
            stream = container.streams.video[0]
            context = stream.codec_context
            if not 0 < context.width * context.height <= MAX_PIXELS:
                raise DataError(
                    "picture size",
                    where=path,
                    got=f"{context.width}x{context.height}",
                    expected=f"1 to {MAX_PIXELS} pixels",
                )
            # One thread, here and in the conversion to RGB: the worker processes are the parallelism. On two
            # cores two workers decode 640x480 AV1 at 1275 frames/s so, and at 1032 with FFmpeg's own choice
            # (H.264 320x192: 4705 and 3690); only a lone process would gain, by a fifth, from threads.
            context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise DataError("damaged video", where=path, got=error.strerror or error) from None
    except OSError as error:
        raise DataError("cannot read the video", where=path, got=error.strerror or error) from None
