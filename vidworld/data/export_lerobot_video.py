"""Episodes in shared mp4 files: each encoded by itself, then put behind the last without encoding again.

Every episode begins with a key frame and frame i of a file is shown at exactly i / fps: there are no frames
out of order and no edit lists, so any reader finds a frame by its time or by counting.
"""

import io
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream

from vidworld.errors import ConfigError, DataError

Codec = Literal["h264", "av1"]

_ENCODERS = {"h264": "libx264", "av1": "libsvtav1"}
# A key frame every other frame, as LeRobot has it: training reads frames in any order.
_OPTIONS = {
    "h264": {
        "crf": "16",
        "g": "2",
        "bf": "0",
        "preset": "fast",
        # Lookahead that depends on timing off, so that bytes repeat.
        "x264-params": "mbtree=0:rc-lookahead=0:weightp=0:scenecut=0",
    },
    "av1": {"crf": "18", "g": "2", "preset": "8", "svtav1-params": "lp=1:pred-struct=1:scd=0"},
}


@dataclass(frozen=True)
class EncodedVideo:
    """One view of one episode as an mp4 of its own, in memory."""

    content: bytes
    num_frames: int


def require_encoder(codec: Codec) -> None:
    """Refuse a codec that this build of FFmpeg cannot write."""
    if _ENCODERS[codec] not in av.codecs_available:
        raise ConfigError("--codec", got=codec, fix="take h264: this build of PyAV has no encoder for it")


class EpisodeEncoder:
    """Encode frames as they come; equal frames give equal bytes."""

    def __init__(self, width: int, height: int, fps: float, codec: Codec) -> None:
        os.environ.setdefault("SVT_LOG", "1")  # else the AV1 encoder tells its settings for every episode
        self._rate = frame_rate(fps)
        self._shape = (height, width, 3)
        self._count = 0
        self._buffer = io.BytesIO()
        self._mp4 = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        stream = self._mp4.add_stream(_ENCODERS[codec], rate=self._rate)
        assert isinstance(stream, VideoStream)
        self._stream = stream
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.time_base = 1 / self._rate
        self._stream.options = {**_OPTIONS[codec], "flags": "+bitexact"}

    def add(self, frames_THWC: np.ndarray) -> None:
        """Encode the next frames, uint8 RGB of the size announced."""
        for frame in frames_THWC:
            if frame.dtype != np.uint8 or frame.shape != self._shape:
                raise DataError(
                    f"frame {self._count}", got=f"{frame.dtype} {frame.shape}", expected=self._shape
                )
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = self._count, 1 / self._rate
            self._mp4.mux(self._stream.encode(picture))
            self._count += 1

    def finish(self) -> EncodedVideo:
        """The video of all frames given."""
        self._mp4.mux(self._stream.encode(None))
        self._mp4.close()
        return EncodedVideo(self._buffer.getvalue(), self._count)

    def close(self) -> None:
        """Give up what was not finished."""
        self._mp4.close()


class VideoFile:
    """An mp4 that grows by whole episodes of one size, rate and codec."""

    def __init__(self, path: Path, fps: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._rate = path, frame_rate(fps)
        self._mp4: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._extradata: bytes | None = None
        self.num_frames, self.bytes = 0, 0

    def append(self, video: EncodedVideo) -> None:
        """Put an episode behind the last one."""
        with av.open(io.BytesIO(video.content), "r", format="mp4") as episode:
            source = episode.streams.video[0]
            extradata = bytes(source.codec_context.extradata or b"")
            if self._mp4 is None:
                self._mp4 = av.open(str(self._path), "w", format="mp4", options={"fflags": "+bitexact"})
                self._stream = self._mp4.add_stream_from_template(source, opaque=True)
                self._stream.time_base = source.time_base
                self._extradata = extradata
            # The decoder is set up once a file, from the first episode in it.
            assert extradata == self._extradata
            assert self._stream is not None
            assert source.time_base is not None
            ticks = 1 / (self._rate * source.time_base)
            assert ticks.denominator == 1
            offset, packets = self.num_frames * ticks.numerator, 0
            for packet in episode.demux(source):
                if packet.pts is None or packet.dts is None or not packet.size:
                    continue
                packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                packet.duration = ticks.numerator
                packet.stream = self._stream
                self._mp4.mux(packet)
                packets += 1
            assert packets == video.num_frames, f"{packets} packets of {video.num_frames} frames"
        self.num_frames += video.num_frames
        self.bytes += len(video.content)

    def close(self) -> None:
        """Write the index at the end."""
        if self._mp4 is not None:
            self._mp4.close()
            self._mp4 = None


def frame_rate(fps: float) -> Fraction:
    """The rate as mp4 can hold it."""
    return Fraction(fps).limit_denominator(65535)
