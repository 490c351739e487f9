"""The video member: exact frame counts and windows, equal bytes, stock readers, hostile bytes."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidworld.data import video
from vidworld.data.video import decode_video, encode_video
from vidworld.errors import DataError

SOURCE = Path(__file__).parents[3] / "shared/data/cr5_banana_lerobot_v21"


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(np.float64) - other).mean()))


@pytest.fixture(scope="module")
def frames(true_episode) -> np.ndarray:
    return true_episode("ep-000000")["video"]


@pytest.fixture(scope="module")
def encoded(frames: np.ndarray) -> bytes:
    return encode_video(frames, 10.0)


def test_every_frame_comes_back_in_order(frames, encoded):
    decoded = decode_video(encoded)
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    error_TT = np.abs(decoded[:, None].astype(int) - frames[None]).mean((2, 3, 4))
    assert (error_TT.diagonal() == error_TT.min(1)).all()
    assert psnr_db(decoded, frames) > 38


@pytest.mark.parametrize("num_frames", [1, 2, 7, 33])
@pytest.mark.parametrize("fps", [5.0, 10.0, 12.5, 29.97, 1000 / 33, 50.0])
def test_counts_and_windows_are_exact_at_any_rate(frames, num_frames, fps):
    encoded = encode_video(frames[:num_frames], fps)
    whole = decode_video(encoded)
    assert len(whole) == num_frames
    for start in range(num_frames):
        window = decode_video(encoded, start, min(4, num_frames - start))
        np.testing.assert_array_equal(window, whole[start : start + 4])


def test_window_of_h264_with_long_gop_is_exact(frames):
    """Other mp4s that users bring: B frames and key frames far apart."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.options = {"g": "100", "bf": "3", "crf": "10"}
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    whole = decode_video(buffer.getvalue())
    assert psnr_db(whole, frames) > 30
    for start, length in ((1, 3), (17, 16), (39, 1)):
        np.testing.assert_array_equal(decode_video(buffer.getvalue(), start, length), whole[start:][:length])


def test_equal_frames_give_equal_bytes_in_any_process(frames, encoded, tmp_path):
    np.save(tmp_path / "frames.npy", frames)
    script = (
        "import sys, numpy, hashlib; from vidworld.data.video import encode_video;"
        "f = numpy.load(sys.argv[1]);"
        "print(*{hashlib.sha256(encode_video(iter(f), 10.0)).hexdigest() for _ in range(20)})"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "frames.npy")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split() == [hashlib.sha256(encoded).hexdigest()]


def test_colours_are_full_and_not_shifted():
    """4:2:0 smears a red column over its neighbours, and a truncating conversion tints a frame."""
    columns = np.full((1, 32, 32, 3), 128, np.uint8)
    assert abs(decode_video(encode_video(columns, 10.0)).astype(int) - 128).max() <= 1
    columns[:, :, ::2] = (200, 30, 30)
    assert psnr_db(decode_video(encode_video(columns, 10.0, quantizer=1)), columns) > 35
    noise = np.random.default_rng(0).integers(40, 216, (8, 8, 8, 3)).astype(np.uint8)
    noise = noise.repeat(8, axis=1).repeat(8, axis=2)
    shift = decode_video(encode_video(noise, 10.0)).astype(float) - noise
    assert np.abs(shift.mean((0, 1, 2))).max() < 0.3


def test_odd_sizes_and_views_of_arrays(frames):
    odd = frames[:, 1:, 3:][:, ::-1]
    assert decode_video(encode_video(odd, 10.0)).shape == odd.shape


def test_stock_readers_open_it(frames, encoded, tmp_path):
    with av.open(io.BytesIO(encoded)) as container:  # no hint of the format
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.frames, stream.average_rate) == ("mjpeg", len(frames), 10)
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
    pictures = [np.asarray(Image.open(io.BytesIO(packet))) for packet in packets]
    assert psnr_db(np.stack(pictures), frames) > 38


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((0, 32, 32, 3), np.uint8), "no frames"),
        (np.zeros((2, 32, 32, 3), np.float32), "float32"),
        (np.zeros((2, 32, 32), np.uint8), "(32, 32)"),
        (np.zeros((2, 32, 32, 4), np.uint8), "(32, 32, 4)"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)], "frame 1"),
    ],
)
def test_frames_that_are_no_video_are_refused(bad, says):
    with pytest.raises(DataError) as caught:
        encode_video(bad, 10.0)
    assert says in str(caught.value)


def test_asking_for_frames_that_are_not_there(frames, encoded):
    for start, length in ((0, 41), (40, 1), (30, 11), (40, None)):
        with pytest.raises(DataError, match="got 40"):
            decode_video(encoded, start, length)
    with pytest.raises(DataError, match="got 40, expected 39"):
        decode_video(encoded, 0, 4, num_frames=39)


@pytest.mark.parametrize("cut", [0, 10, 100, 0.3, 0.9])
def test_cut_video_is_refused(encoded, cut):
    end = cut if isinstance(cut, int) else int(cut * len(encoded))
    with pytest.raises(DataError):
        decode_video(encoded[:end])


def test_playlists_are_never_followed(encoded, tmp_path):
    """A playlist in disguise would make ffmpeg open other files."""
    target = tmp_path / "target.mp4"
    target.write_bytes(encoded)
    segment = f"#EXTINF:4,\nfile://{target}\n"
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n{segment}#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {target}\n",
    ):
        with pytest.raises(DataError):
            decode_video(text.encode())


def test_huge_pictures_are_refused_before_decoding(monkeypatch):
    """A few bytes of header can claim any size; here the limit is lowered instead."""
    encoded = encode_video(np.zeros((2, 64, 80, 3), np.uint8), 10.0)
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 80 - 1)
    with pytest.raises(DataError, match="80x64"):
        decode_video(encoded)
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_DECODED_BYTES", 2 * 64 * 80 * 3 - 1)
    assert len(decode_video(encoded, 1, 1)) == 1
    with pytest.raises(DataError, match="2 frames of 80x64"):
        decode_video(encoded)


@pytest.mark.skipif(not SOURCE.is_dir(), reason="needs the CR5 recordings")
def test_real_footage_keeps_its_picture():
    path = min(SOURCE.glob("videos/**/*.mp4"))
    with av.open(str(path)) as container:
        pictures = [frame.to_image() for _, frame in zip(range(40), container.decode(video=0), strict=False)]
    frames = np.stack([np.asarray(p.resize((128, 96), Image.Resampling.BOX)) for p in pictures])
    encoded = encode_video(frames, 10.0)
    decoded = decode_video(encoded)
    assert psnr_db(decoded, frames) > 40
    assert len(encoded) / len(frames) < 2600
    assert np.abs((decoded.astype(float) - frames).mean((0, 1, 2))).max() < 0.3
