"""Measure what a shard should keep its video in: short-GOP H.264, MJPEG, or a JPEG sequence.

    python tools/bench/video_member.py path/to/a/folder/with/mp4s [--sizes 128x96 256x192]

Real episodes are decoded, resized, encoded in every way, and read back: bytes a frame, PSNR to the resized
source, and frames per CPU second of encoding, of reading everything and of reading random 16-frame windows.
The candidates take turns in one process on one thread, and CPU time counts, so that other work disturbs
all alike.
"""

import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import tyro
from av.video.reformatter import VideoReformatter
from PIL import Image
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.data.video import decode_video, encode_video
from vidworld.errors import DataError

FPS = 10.0


@dataclass(frozen=True)
class Options:
    """Compare the possible video members of a shard."""

    source: tyro.conf.Positional[Path]
    """A folder that holds mp4 files somewhere below, such as a LeRobot dataset."""
    sizes: tuple[str, ...] = ("128x96", "256x192")
    max_episodes: int = 4
    clip_frames: int = 16
    rounds: int = 5
    seconds: float = 0.3
    """CPU seconds per candidate, round and figure."""
    out: Path = Path("benchmarks/video_member.json")
    """Rows are added here."""


@dataclass(frozen=True)
class Candidate:
    """A way to keep one episode's frames of one view."""

    name: str
    encode: Callable[[np.ndarray], list[bytes]]
    """Frames [T, H, W, 3] -> the members."""
    decode: Callable[[list[bytes], int, int], np.ndarray]
    """Members, first frame, number of frames -> frames."""


@dataclass
class Found:
    """What was measured of one candidate at one size."""

    bytes_per_frame: float
    psnr_db: float
    encode: list[float] = field(default_factory=list)
    sequential: list[float] = field(default_factory=list)
    window: list[float] = field(default_factory=list)


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure every candidate at every size, print a table and add the rows."""
    options = parse(Options, arguments, prog=prog)
    values: dict[str, tuple[float, str]] = {}
    for size in options.sizes:
        width, height = (int(part) for part in size.split("x"))
        episodes = read_episodes(options.source, options.max_episodes, width, height)
        print(f"{size}: {len(episodes)} episodes, {sum(map(len, episodes))} frames")
        print(f"{'member':<22}{'bytes/frame':>12}{'PSNR dB':>9}{'encode':>9}{'sequential':>12}{'window':>9}")
        for name, found in measure(episodes, options).items():
            rates = [statistics.median(rate) for rate in (found.encode, found.sequential, found.window)]
            print(
                f"{name:<22}{found.bytes_per_frame:>12.0f}{found.psnr_db:>9.2f}"
                f"{rates[0]:>9.0f}{rates[1]:>12.0f}{rates[2]:>9.0f}"
            )
            row = f"video_member.{name}.{size}"
            values[f"{row}.bytes_per_frame"] = (round(found.bytes_per_frame, 1), "B")
            values[f"{row}.psnr"] = (round(found.psnr_db, 2), "dB")
            for what, rate in zip(("encode", "sequential", "window"), rates, strict=True):
                values[f"{row}.{what}"] = (round(rate), "frames/CPU-s")
    command = f"python tools/bench/video_member.py {options.source.resolve().name}"
    command += f" --sizes {' '.join(options.sizes)} --clip-frames {options.clip_frames}"
    device = f"{cpu_name()}, one used"
    add_rows(options.out, values, device=device, command=command, packages=["av", "numpy", "pillow"])


def candidates() -> Iterator[Candidate]:
    """All that were considered; `vidworld` is what the package writes."""
    yield Candidate(
        "vidworld", lambda frames: [encode_video(frames, FPS)], lambda m, *at: decode_video(m[0], *at)
    )
    videos = {
        f"h264.{chroma}.g{interval}.crf{crf}": ("mp4", "libx264", chroma, x264(interval, crf))
        for chroma, interval, crf in [
            *itertools.product(("420",), (4, 8, 16), (18, 23)),
            ("420", 1, 18),
            *itertools.product(("444",), (8,), (18, 23)),
        ]
    }
    for container, chroma, quantizer in [
        *itertools.product(("mp4", "mov", "avi"), ("420",), (2,)),
        *itertools.product(("mp4",), ("444",), (2, 3, 4)),
    ]:
        options = {"qmin": str(quantizer), "qmax": str(quantizer)}
        videos[f"mjpeg.{container}.{chroma}.q{quantizer}"] = (container, "mjpeg", chroma, options)
    for name, (container, codec, chroma, options) in videos.items():
        encode = partial(encode_stream, container=container, codec=codec, chroma=chroma, options=options)
        yield Candidate(name, encode, partial(decode_stream, container=container))
    for quality, chroma in itertools.product((90, 95), ("4:2:0", "4:4:4")):
        encode = partial(encode_jpegs, quality=quality, subsampling=chroma)
        yield Candidate(f"jpeg.{chroma.replace(':', '')}.{quality}", encode, decode_jpegs)


def x264(interval: int, crf: int) -> dict[str, str]:
    """No B frames, a key frame every `interval` frames."""
    return {"crf": str(crf), "g": str(interval), "sc_threshold": "0", "bf": "0", "preset": "medium"}


def measure(episodes: list[np.ndarray], options: Options) -> dict[str, Found]:
    """Encode once for size and quality, then time all candidates in turn."""
    choices = list(candidates())
    members = {choice.name: [choice.encode(frames) for frames in episodes] for choice in choices}
    total = sum(map(len, episodes))
    found: dict[str, Found] = {}
    for choice in choices:
        error, size = 0.0, 0
        for frames, files in zip(episodes, members[choice.name], strict=True):
            decoded = choice.decode(files, 0, len(frames))
            error += float(np.square(decoded.astype(np.float32) - frames).mean()) * len(frames) / total
            size += sum(map(len, files))
        found[choice.name] = Found(size / total, 10 * np.log10(255**2 / error))
    generator = np.random.default_rng(0)
    for _ in range(options.rounds):
        for choice in choices:
            files, into = members[choice.name], found[choice.name]
            into.encode.append(rate(partial(_encode, choice, episodes, generator), options.seconds))
            into.sequential.append(rate(partial(_whole, choice, files, episodes, generator), options.seconds))
            window = partial(_window, choice, files, episodes, generator, options.clip_frames)
            into.window.append(rate(window, options.seconds))
    return found


def rate(read: Callable[[], int], seconds: float) -> float:
    """Frames per CPU second of this process."""
    begin, frames = time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds:
        frames += read()
    return frames / spent


def _encode(choice: Candidate, episodes: list[np.ndarray], generator: np.random.Generator) -> int:
    frames = episodes[generator.integers(len(episodes))][:64]
    choice.encode(frames)
    return len(frames)


def _whole(
    choice: Candidate, files: list[list[bytes]], episodes: list[np.ndarray], generator: np.random.Generator
) -> int:
    index = generator.integers(len(episodes))
    return len(choice.decode(files[index], 0, len(episodes[index])))


def _window(
    choice: Candidate,
    files: list[list[bytes]],
    episodes: list[np.ndarray],
    generator: np.random.Generator,
    length: int,
) -> int:
    index = generator.integers(len(episodes))
    start = int(generator.integers(len(episodes[index]) - length + 1))
    return len(choice.decode(files[index], start, length))


def encode_stream(
    frames: np.ndarray, container: str, codec: str, chroma: str, options: dict[str, str]
) -> list[bytes]:
    """All frames as one video."""
    buffer, convert = io.BytesIO(), VideoReformatter()
    pixels = f"yuvj{chroma}p" if codec == "mjpeg" else f"yuv{chroma}p"
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(FPS))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.thread_count = 1
        stream.options = dict(options)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = convert.reformat(picture, format=pixels, threads=1)
            picture.pts, picture.time_base = index, Fraction(1, int(FPS))
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return [buffer.getvalue()]


def decode_stream(members: list[bytes], start: int, length: int, container: str) -> np.ndarray:
    """Seek to the key frame before `start`, decode on from there."""
    frames, convert = [], VideoReformatter()
    with av.open(io.BytesIO(members[0]), "r", format=container) as video:
        stream = video.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.average_rate is not None
        assert stream.time_base is not None
        ticks = 1 / (stream.average_rate * stream.time_base)
        video.seek(round(start * ticks), stream=stream)
        for frame in video.decode(stream):
            assert frame.pts is not None
            if round(frame.pts / ticks) >= start:
                frames.append(convert.reformat(frame, format="rgb24", threads=1).to_ndarray())
                if len(frames) == length:
                    break
    return np.stack(frames)


def encode_jpegs(frames: np.ndarray, quality: int, subsampling: str) -> list[bytes]:
    """One JPEG file per frame."""
    members = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        members.append(buffer.getvalue())
    return members


def decode_jpegs(members: list[bytes], start: int, length: int) -> np.ndarray:
    """Open only the files asked for."""
    pictures = (
        Image.open(io.BytesIO(member), formats=["JPEG"]) for member in members[start : start + length]
    )
    return np.stack([np.asarray(picture) for picture in pictures])


def read_episodes(source: Path, count: int, width: int, height: int) -> list[np.ndarray]:
    """The first episodes' frames [T, H, W, 3] uint8, area-averaged to the size."""
    files = sorted(source.glob("**/*.mp4"))[:count]
    if not files:
        raise DataError("no mp4 file", where=source)
    episodes = []
    for path in files:
        with av.open(str(path)) as video:
            pictures = (frame.to_image() for frame in video.decode(video=0))
            size = (width, height)
            episodes.append(np.stack([np.asarray(p.resize(size, Image.Resampling.BOX)) for p in pictures]))
    return episodes


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/video_member.py")
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
