"""Pictures and videos in and out: guarded reading, atomic writing, and layouts that people look at.

All pictures are uint8 RGB numpy arrays: frames_THWC [T, H, W, 3], image_HWC [H, W, 3].
"""

import io
import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vidworld.errors import DataError
from vidworld.files import write_atomic

MAX_PIXELS = 4096 * 4096
MAX_FRAMES = 20_000
MAX_BYTES = 4 * 2**30
"""Caps of what is decoded: pixels of a picture, frames of a video, bytes of all its frames."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
VIDEO_CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mjpeg", "ffv1")

Fit = Literal["crop", "pad", "stretch"]

PAPER, INK, FAINT = (255, 255, 255), (32, 33, 36), (236, 237, 239)


# Reading


def read_image(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a PNG, JPEG, WebP or BMP as RGB [H, W, 3] uint8, upright, its first picture if it holds several.

    Raises DataError for what is missing, damaged, larger than `max_pixels` (before decoding) or of more than
    8 bits a channel.
    """
    path = Path(path)
    try:
        with _open(path) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(path, f"{image.width}x{image.height} pixels", f"at most {max_pixels} pixels")
            if image.mode not in IMAGE_MODES:
                raise DataError("picture mode", where=path, got=image.mode, expected="8 bits a channel")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error), f"at most {max_pixels} pixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            "cannot read the picture", where=path, got=error, expected=f"one of {', '.join(IMAGE_FORMATS)}"
        ) from None


def read_video(
    path: Path | str,
    *,
    first: int | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> tuple[np.ndarray, float]:
    """Read an mp4, mov, mkv, webm or avi as RGB [T, H, W, 3] uint8 and its frames per second.

    `first` reads no more than that many frames. Raises DataError for what is missing, damaged, empty, or
    larger than the caps; they are checked before decoding, and on each frame since headers may lie. Only the
    named file is ever opened: playlists, in which others may be named, are refused whatever their suffix.
    """
    path = Path(path)
    with _open(path) as file:
        container_format = _video_format(file.read(16), path)
        file.seek(0)
        try:
            # The whitelist names no protocol that exists: the demuxer may open nothing beside this file.
            options = {"protocol_whitelist": "none"}
            with av.open(file, "r", format=container_format, options=options) as container:
                if not container.streams.video:
                    raise DataError("no video stream", where=path)
                stream = container.streams.video[0]
                codec = stream.codec_context
                if (kind := codec.codec.canonical_name) not in VIDEO_CODECS:
                    expected = f"one of {', '.join(VIDEO_CODECS)}"
                    raise DataError("video codec", where=path, got=kind, expected=expected)
                width, height = codec.width, codec.height
                if width * height > max_pixels:
                    raise _too_large(path, f"{width}x{height} pixels", f"at most {max_pixels} pixels")
                most = min(max_frames, max_bytes // max(1, 3 * width * height))
                if first is None and stream.frames > most:
                    raise _too_large(path, f"{stream.frames} frames", f"at most {most} frames of this size")
                rate = stream.average_rate or stream.guessed_rate
                stream.thread_type = "AUTO"
                frames: list[np.ndarray] = []
                for frame in container.decode(stream):
                    if (frame.width, frame.height) != (width, height):
                        got = f"{frame.width}x{frame.height} at frame {len(frames)}"
                        expected = f"{width}x{height} throughout"
                        raise DataError("frame size", where=path, got=got, expected=expected)
                    if len(frames) == most:
                        raise _too_large(path, f"more than {most} frames", f"at most {most} of this size")
                    frames.append(frame.to_ndarray(format="rgb24"))
                    if len(frames) == first:
                        break
        except av.FFmpegError as error:
            raise DataError("video does not decode", where=path, got=error.strerror or error) from None
    if not frames:
        raise DataError("video without frames", where=path)
    if not rate:
        raise DataError("video without a frame rate", where=path)
    return np.stack(frames), float(rate)


def _open(path: Path) -> io.BufferedReader:
    """Open a regular file; a URL, a pipe or a folder is a DataError."""
    if not path.is_file():
        raise DataError("no such file", where=path)
    return path.open("rb")


def _video_format(head: bytes, path: Path) -> str:
    """Name of the demuxer by the file's first bytes, so that none is guessed."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    raise DataError(
        "not a video file",
        where=path,
        got=repr(head[:8])[1:],
        expected="the contents of an mp4, mov, mkv, webm or avi",
    )


def _too_large(path: Path, got: str, expected: str) -> DataError:
    return DataError("too large to decode", where=path, got=got, expected=expected)


# Writing


def write_mp4(path: Path | str, frames_THWC: np.ndarray, fps: float) -> None:
    """Write frames as an H.264 mp4 that browsers play, atomically. See `encode_mp4`."""
    write_bytes(path, encode_mp4(frames_THWC, fps))


def encode_mp4(frames_THWC: np.ndarray, fps: float) -> bytes:
    """Encode frames as an H.264 mp4 that browsers play: yuv420p, index in front, equal frames to equal bytes.

    Odd sizes are padded to even ones by repeating the last row or column.
    """
    frames_THWC = _check_frames(frames_THWC)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{fps} frames per second; expected a positive number")
    height, width = frames_THWC.shape[1:3]
    even_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    with tempfile.TemporaryDirectory(prefix="vidworld-") as folder:
        # A real file, because moving the index to the front reads it back.
        path = Path(folder) / "video.mp4"
        with av.open(
            str(path), "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}
        ) as mp4:
            stream = mp4.add_stream("libx264", rate=rate)
            stream.height, stream.width = even_THWC.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            stream.options = {
                "crf": "16",
                "x264-params": "mbtree=0:rc-lookahead=0:weightp=0",
                "preset": "medium",
                "flags": "+bitexact",
                "g": str(max(1, round(fps))),
            }
            for frame in even_THWC:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                mp4.mux(stream.encode(picture))
            mp4.mux(stream.encode(None))
        return path.read_bytes()


def write_gif(path: Path | str, frames_THWC: np.ndarray, fps: float) -> None:
    """Write frames as a GIF that repeats for ever, atomically. See `encode_gif`."""
    write_bytes(path, encode_gif(frames_THWC, fps))


def encode_gif(frames_THWC: np.ndarray, fps: float) -> bytes:
    """Encode frames as a GIF, 256 colours a frame; the format times frames in hundredths of a second."""
    frames_THWC = _check_frames(frames_THWC)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{fps} frames per second; expected a positive number")
    # Rounding each end, not each length, keeps the whole as long as it is.
    ends = [round(100 * (index + 1) / fps) for index in range(len(frames_THWC))]
    lengths_ms = [10 * max(1, after - before) for before, after in itertools.pairwise([0, *ends])]
    first, *others = (Image.fromarray(frame).quantize(256) for frame in frames_THWC)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=lengths_ms, loop=0)
    return buffer.getvalue()


def write_png(path: Path | str, image_HWC: np.ndarray) -> None:
    """Write a picture as PNG, atomically."""
    write_bytes(path, encode_png(image_HWC))


def encode_png(image_HWC: np.ndarray) -> bytes:
    """Encode a picture [H, W, 3] uint8 as PNG."""
    buffer = io.BytesIO()
    # Level 6: `optimize` takes four times as long for one percent.
    Image.fromarray(_check_frames(image_HWC[None])[0]).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def encode_jpeg(image_HWC: np.ndarray, *, quality: int = 88) -> bytes:
    """Encode a picture [H, W, 3] uint8 as JPEG, several times smaller than PNG for photographs."""
    buffer = io.BytesIO()
    picture = Image.fromarray(_check_frames(image_HWC[None])[0])
    # Not `optimize`: it wants the result in one buffer, which a noisy picture outgrows.
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file whole or not at all; makes the folder if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


# Sizes and layouts


def fit(pictures: np.ndarray, *, width: int, height: int, mode: Fit = "crop") -> np.ndarray:
    """Resize a picture or frames [..., H, W, 3] to `height` x `width`, anti-aliased, as `vidworld shard`
    does.

    `crop` cuts the centre to the aspect, `pad` fills with black, `stretch` distorts.
    """
    source_height, source_width = pictures.shape[-3:-1]
    if (source_height, source_width) == (height, width):
        return pictures
    across, down = source_width / width, source_height / height
    box, size = (0.0, 0.0, float(source_width), float(source_height)), (width, height)
    match mode:
        case "crop":
            # Rounding may not push the box over the edge.
            kept_width = min(width * min(across, down), source_width)
            kept_height = min(height * min(across, down), source_height)
            left, top = (source_width - kept_width) / 2, (source_height - kept_height) / 2
            box = (left, top, left + kept_width, top + kept_height)
        case "pad":
            scale = max(across, down)
            size = (max(1, round(source_width / scale)), max(1, round(source_height / scale)))
        case "stretch":
            pass
        case _:
            raise ValueError(f"mode {mode!r}; expected crop, pad or stretch")
    frames_THWC = _check_frames(pictures.reshape(-1, source_height, source_width, 3))
    fitted = np.zeros((len(frames_THWC), height, width, 3), np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    for target, frame in zip(fitted, frames_THWC, strict=True):
        resized = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        target[top : top + size[1], left : left + size[0]] = np.asarray(resized)
    return fitted.reshape(*pictures.shape[:-3], height, width, 3)


def enlarge(frames_THWC: np.ndarray, height: int) -> np.ndarray:
    """Scale frames up to about `height` rows, keeping their aspect; larger ones are left as they are."""
    source_height, source_width = frames_THWC.shape[1:3]
    if source_height >= height:
        return frames_THWC
    return fit(frames_THWC, width=round(source_width * height / source_height), height=height, mode="stretch")


def grid(
    videos: Sequence[np.ndarray],
    columns: int | None = None,
    *,
    labels: Sequence[str] = (),
    height: int = 128,
    gap: int = 6,
) -> np.ndarray:
    """Lay videos [T, H, W, 3] of one size out in a grid video, with a caption over each if there are
    `labels`.

    As square as can be unless `columns` says otherwise; small frames are enlarged to `height`; a video that
    ends early holds its last frame.
    """
    if not videos or (labels and len(labels) != len(videos)):
        raise ValueError(f"{len(videos)} videos and {len(labels)} labels; expected as many, at least one")
    videos = [enlarge(_check_frames(video), height) for video in videos]
    cell_height, cell_width = videos[0].shape[1:3]
    if any(video.shape[1:3] != (cell_height, cell_width) for video in videos):
        raise ValueError(
            f"videos of sizes {sorted({video.shape[1:3] for video in videos})}; expected one size"
        )
    columns = columns or math.ceil(math.sqrt(len(videos)))
    font = _font(15)
    caption = _text_height(font) + gap if labels else 0
    steps_y, steps_x = caption + cell_height + gap, cell_width + gap
    rows = math.ceil(len(videos) / columns)
    canvas = Image.new("RGB", (columns * steps_x + gap, rows * steps_y + gap), PAPER)
    places = [
        (gap + index // columns * steps_y, gap + index % columns * steps_x) for index in range(len(videos))
    ]
    draw = ImageDraw.Draw(canvas)
    for label, (y, x) in zip(labels, places, strict=False):
        draw.text((x + cell_width / 2, y + caption / 2), _shorten(label, font, cell_width), INK, font, "mm")
    frames = np.repeat(np.asarray(canvas)[None], max(len(video) for video in videos), axis=0)
    for video, (y, x) in zip(videos, places, strict=True):
        cell = frames[:, y + caption : y + caption + cell_height, x : x + cell_width]
        cell[: len(video)] = video
        cell[len(video) :] = video[-1]
    return frames


def strip(
    rows: Mapping[str, np.ndarray],
    times: Sequence[int],
    *,
    labels: Sequence[str] = (),
    height: int = 128,
    gap: int = 6,
) -> np.ndarray:
    """Draw a film strip [H, W, 3]: a row for each labelled video, a column for each frame index in `times`.

    Columns are headed by `labels` (default: the index). A row that has no such frame shows an empty cell.
    Small frames are enlarged to `height`.
    """
    labels = labels or [f"frame {time}" for time in times]
    if not rows or not times or len(labels) != len(times) or min(times) < 0:
        raise ValueError(f"a strip of {len(rows)} rows, frames {list(times)}, labels {list(labels)}")
    cells = {
        label: {time: enlarge(video[time : time + 1], height)[0] for time in times if time < len(video)}
        for label, video in rows.items()
    }
    sizes = {cell.shape[:2] for row in cells.values() for cell in row.values()}
    if len(sizes) != 1:
        raise ValueError(f"a strip of pictures of sizes {sorted(sizes)}; expected one size")
    cell_height, cell_width = sizes.pop()
    font = _font(max(15, cell_height // 9))
    header = _text_height(font) + 2 * gap
    margin = math.ceil(max(font.getlength(label) for label in rows)) + 3 * gap
    size = (margin + len(times) * (cell_width + gap) + gap, header + len(rows) * (cell_height + gap) + gap)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(labels):
        x = margin + column * (cell_width + gap)
        draw.text((x + cell_width / 2, header / 2), _shorten(label, font, cell_width), INK, font, "mm")
    for row, (label, row_cells) in enumerate(cells.items()):
        y = header + row * (cell_height + gap)
        draw.text((margin - 2 * gap, y + cell_height / 2), label, INK, font, "rm")
        for column, time in enumerate(times):
            x = margin + column * (cell_width + gap)
            if time in row_cells:
                canvas.paste(Image.fromarray(row_cells[time]), (x, y))
            else:
                draw.rectangle((x, y, x + cell_width - 1, y + cell_height - 1), FAINT)
    return np.asarray(canvas)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font


def _text_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _check_frames(frames_THWC: np.ndarray) -> np.ndarray:
    if (
        frames_THWC.dtype != np.uint8
        or frames_THWC.ndim != 4
        or frames_THWC.shape[-1] != 3
        or not frames_THWC.size
    ):
        raise ValueError(
            f"frames of {frames_THWC.dtype} {frames_THWC.shape}; expected uint8 [T, H, W, 3], not empty"
        )
    return frames_THWC
