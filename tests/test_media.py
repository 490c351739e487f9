import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidworld import media
from vidworld.errors import DataError


@pytest.fixture
def clip() -> np.ndarray:
    """A smooth moving picture, which H.264 keeps almost exactly: [12, 48, 64, 3]."""
    t, y, x = np.meshgrid(np.arange(12), np.arange(48), np.arange(64), indexing="ij")
    waves = [np.sin((x + 2 * t) / 9 + phase) * np.cos(y / 11) for phase in (0, 1, 2)]
    return np.round(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a / 255 - b / 255) ** 2) + 1e-12))


# Writing and reading back


def test_video_comes_back_almost_the_same(clip, tmp_path):
    media.write_mp4(tmp_path / "sub" / "clip.mp4", clip, 12.5)
    frames, fps = media.read_video(tmp_path / "sub" / "clip.mp4")
    assert frames.shape == clip.shape
    assert frames.dtype == np.uint8
    assert fps == pytest.approx(12.5)
    assert psnr(frames, clip) > 36
    assert psnr(frames[1:], clip[:-1]) < 30, "the negative control: a frame late"
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["clip.mp4"], "no temporary file is left"


def test_browsers_can_play_it(clip):
    data = media.encode_mp4(clip, 10)
    assert data == media.encode_mp4(clip, 10), "equal frames, equal bytes"
    assert 0 < data.index(b"moov") < data.index(b"mdat"), "the index comes first"
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (1, 1)])
def test_odd_sizes_are_padded_to_even_by_repeating_the_edge(clip, tmp_path, height, width):
    media.write_mp4(tmp_path / "odd.mp4", clip[:, :height, :width], 10)
    frames, _ = media.read_video(tmp_path / "odd.mp4")
    assert frames.shape == (12, height + height % 2, width + width % 2, 3)
    assert psnr(frames[:, :height, :width], clip[:, :height, :width]) > 30
    assert psnr(frames[:, -1, :width], clip[:, height - 1, :width]) > 28


def write_with(codec: str, path: Path, frames: np.ndarray, pixels: str = "yuv420p") -> Path:
    """Write a video as somebody else would."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("libx264", "a.mov"),
        ("mpeg4", "a.avi"),
        ("libvpx-vp9", "a.webm"),
        ("libsvtav1", "a.mp4"),
        ("libaom-av1", "a.mkv"),
    ],
)
def test_videos_of_other_tools(clip, tmp_path, codec, name):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    large = media.fit(clip, width=128, height=96)
    frames, fps = media.read_video(write_with(codec, tmp_path / name, large))
    assert psnr(frames, large) > 24
    assert fps == pytest.approx(10)


def test_foreign_codecs_are_refused(clip, tmp_path):
    with pytest.raises(DataError, match=r"video codec .* got huffyuv"):
        media.read_video(write_with("huffyuv", tmp_path / "a.avi", clip, "rgb24"))


def test_frame_rates_that_are_no_whole_numbers(clip, tmp_path):
    media.write_mp4(tmp_path / "ntsc.mp4", clip, 30000 / 1001)
    assert media.read_video(tmp_path / "ntsc.mp4")[1] == pytest.approx(30000 / 1001)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8),
     np.zeros((2, 3, 8, 8), np.uint8)],
)  # fmt: skip
def test_other_arrays_are_no_frames(frames):
    with pytest.raises(ValueError, match=r"expected uint8 \[T, H, W, 3\]"):
        media.encode_mp4(frames, 10)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_impossible_rates_are_refused(clip, fps):
    with pytest.raises(ValueError, match="expected a positive number"):
        media.encode_mp4(clip, fps)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.bin"
    media.write_bytes(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        media.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_come_back_exactly(clip, tmp_path):
    media.write_png(tmp_path / "a.png", clip[0])
    assert np.array_equal(media.read_image(tmp_path / "a.png"), clip[0])


# Guards


def test_first_frames_only(clip, tmp_path):
    media.write_mp4(tmp_path / "clip.mp4", clip, 10)
    everything, _ = media.read_video(tmp_path / "clip.mp4")
    some, _ = media.read_video(tmp_path / "clip.mp4", first=5, max_frames=8)
    assert np.array_equal(some, everything[:5])


@pytest.mark.parametrize(
    "caps", [{"max_frames": 11}, {"max_pixels": 48 * 64 - 1}, {"max_bytes": 11 * 48 * 64 * 3}]
)
def test_large_videos_are_refused_before_decoding(clip, tmp_path, caps):
    media.write_mp4(tmp_path / "clip.mp4", clip, 10)
    with pytest.raises(DataError, match="too large to decode"):
        media.read_video(tmp_path / "clip.mp4", **caps)
    assert len(media.read_video(tmp_path / "clip.mp4", max_frames=12, max_pixels=48 * 64)[0]) == 12


def test_a_header_that_hides_its_frames_does_not_pass_the_cap(clip, tmp_path):
    """A matroska stream gives no count in advance, so the cap must hold while decoding."""
    path = write_with("mjpeg", tmp_path / "clip.mkv", clip, "yuvj420p")
    assert len(media.read_video(path)[0]) == 12
    with pytest.raises(DataError, match="more than 11 frames"):
        media.read_video(path, max_frames=11)


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {secret}\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "avi"])
def test_playlists_are_refused_whatever_their_suffix(clip, tmp_path, kind, suffix):
    media.write_mp4(tmp_path / "secret.mp4", clip, 10)
    path = tmp_path / f"innocent.{suffix}"
    path.write_text(PLAYLISTS[kind].format(secret=tmp_path / "secret.mp4"))
    with pytest.raises(DataError, match="not a video file"):
        media.read_video(path)


def test_the_playlist_of_this_test_would_have_been_followed(clip, tmp_path):
    """The negative control: an unguarded open reads the other file."""
    media.write_mp4(tmp_path / "secret.mp4", clip, 10)
    path = tmp_path / "innocent.mp4"
    path.write_text(f"ffconcat version 1.0\nfile {tmp_path / 'secret.mp4'}\n")
    with av.open(str(path), options={"safe": "0"}) as container:
        assert len(list(container.decode(video=0))) == 12


@pytest.mark.parametrize("target", ["missing.mp4", ".", "http://127.0.0.1:9/a.mp4", "concat:a.mp4|b.mp4"])
def test_only_files_are_opened(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        media.read_video(target)
    with pytest.raises(DataError, match="no such file"):
        media.read_image(target)


def test_damaged_videos_are_named(clip, tmp_path):
    data = media.encode_mp4(clip, 10)
    for name, content in {
        "empty": b"",
        "cut": data[: len(data) // 3],
        "head": data[:40],
        "text": b"hello, this is not a video at all",
        "noise": data[:60] + bytes(range(256)) * 8,
    }.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            media.read_video(path)


def test_sound_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match="no video stream"):
        media.read_video(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any claimed size in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [5000, 12_000, 20_000])
def test_huge_pictures_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(size, size))
    with pytest.raises(DataError, match="too large to decode"):
        media.read_image(path)


def test_damaged_and_foreign_pictures_are_named(clip, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(clip[0]).save(buffer, "PNG")
    contents = {
        "cut.png": buffer.getvalue()[:200],
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "text.jpg": b"no picture",
        "bomb.png": png_header(100, 100),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            media.read_image(tmp_path / name)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep)
    with pytest.raises(DataError, match="8 bits a channel"):
        media.read_image(deep)


def test_pictures_of_all_kinds_become_upright_rgb(clip, tmp_path):
    Image.fromarray(clip[0]).convert("L").save(tmp_path / "grey.png")
    assert media.read_image(tmp_path / "grey.png").shape == (48, 64, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.fromarray(clip[0]).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = media.read_image(tmp_path / "turned.jpg")
    assert upright.shape == (64, 48, 3)
    assert psnr(upright, np.rot90(clip[0], -1)) > 30


# Sizes and layouts


def test_fit_modes(clip):
    assert media.fit(clip, width=64, height=48) is clip
    cropped = media.fit(clip, width=24, height=24)
    assert cropped.shape == (12, 24, 24, 3)
    centre = clip[:, :, 8:56].reshape(12, 24, 2, 24, 2, 3).mean((2, 4))
    assert psnr(cropped, centre) > 38, "the centre square, halved"
    assert psnr(media.fit(clip, width=24, height=24, mode="stretch"), centre) < 30, "the negative control"
    padded = media.fit(clip[0], width=32, height=32, mode="pad")
    assert padded.shape == (32, 32, 3)
    assert not padded[:4].any()
    assert not padded[-4:].any()
    assert padded[4:-4].any(axis=-1).all()
    with pytest.raises(ValueError, match="expected crop, pad or stretch"):
        media.fit(clip, width=8, height=8, mode="squash")  # type: ignore[arg-type]


def test_fit_is_anti_aliased():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    small = media.fit(stripes, width=16, height=16)
    assert abs(small.astype(int) - 127).max() <= 16


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_fit_of_any_size(mode):
    generator = np.random.default_rng(0)
    for _ in range(30):
        height, width = (int(value) for value in generator.integers(8, 400, 2))
        picture = generator.integers(0, 256, (height, width, 3), np.uint8)
        assert media.fit(picture, width=48, height=32, mode=mode).shape == (32, 48, 3)


def test_fit_keeps_the_centre_all_or_neither():
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 30:90] = (10, 200, 10)
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))

    def fitted(picture, mode):
        return media.fit(picture, width=32, height=32, mode=mode).astype(int)

    assert np.abs(fitted(wide, "crop")[:, 1:-1] - (10, 200, 10)).max() <= 2
    assert np.abs(fitted(tall, "crop")[1:-1] - (10, 200, 10)).max() <= 2
    padded = fitted(wide, "pad")
    assert (padded[:8] == 0).all()
    assert (padded[24:] == 0).all()
    assert np.abs(padded[10:22, 12:20] - (10, 200, 10)).max() <= 2
    assert (fitted(tall, "pad")[:, :8] == 0).all()
    assert fitted(wide, "stretch")[16, 2, 1] < 5
    assert fitted(wide, "stretch")[2, 16, 1] > 195


def test_grid_places_every_video(clip):
    videos = [clip, clip[:5], 255 - clip]
    plain = media.grid(videos, height=48, gap=4)
    assert plain.shape == (12, 4 + 2 * 52, 4 + 2 * 68, 3)
    assert np.array_equal(plain[:, 4:52, 4:68], clip)
    assert np.array_equal(plain[:5, 4:52, 72:136], clip[:5])
    assert (plain[5:, 4:52, 72:136] == clip[4]).all(), "the last frame is held"
    assert np.array_equal(plain[:, 56:104, 4:68], 255 - clip)
    assert (plain[:, 56:104, 72:136] == 255).all()
    captioned = media.grid(videos, columns=3, labels=["truth", "sample 0", "sample 1"])
    assert captioned.shape[1] > 128
    assert captioned.shape[2] > 3 * 170
    with pytest.raises(ValueError, match="2 labels"):
        media.grid(videos, labels=["a", "b"])
    with pytest.raises(ValueError, match="expected one size"):
        media.grid([clip, clip[:, :40]], height=8)


def test_strip_places_every_frame_and_leaves_gaps_empty(clip):
    picture = media.strip({"truth": clip, "world model": clip[:4]}, [3, 0, 11], height=48, gap=4)
    cells = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (48, 64))
    for time, count in ((3, 2), (0, 2), (11, 1)):
        assert int((cells == clip[time, :, :, 0]).all((-2, -1)).sum()) == count
    assert int((cells == media.FAINT[0]).all((-2, -1)).sum()) == 1, "the shorter row has one empty cell"
    with pytest.raises(ValueError, match="a strip of 0 rows"):
        media.strip({}, [0])
    with pytest.raises(ValueError, match="expected one size"):
        media.strip({"a": clip, "b": clip[:, :40]}, [0], height=8)


def test_small_frames_are_enlarged_to_be_seen(clip):
    picture = media.strip({"truth": clip}, [0, 1])
    assert picture.shape[0] > 128
    assert media.enlarge(clip, 96).shape == (12, 96, 128, 3)
    assert media.enlarge(clip, 20) is clip


def test_a_picture_of_noise_becomes_a_jpeg():
    """Noise takes more bytes than it has pixels, which an encoder with one buffer cannot hold."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    jpeg = media.encode_jpeg(noise)
    assert jpeg.startswith(b"\xff\xd8")
    assert len(jpeg) > 480 * 640, "the case in question"
