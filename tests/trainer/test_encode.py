"""Video shards to latent shards: same episodes, same bytes when repeated, nothing lost to a kill."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vidworld.cli import run
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.loader import LoaderConfig, make_loader
from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.tokenizers.base import to_unit_range
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.tokenizers.store import save_tokenizer
from vidworld.trainer.encode import encode_dataset, latent_statistics
from vidworld.trainer.encode_shards import encode_frames

EPISODES, FRAMES, SIZE = 6, 12, 32
CONFIG = ConvTokenizerConfig(
    latent_channels=4, widths=(8, 8, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0), norm_groups=4
)


class Counting(ConvTokenizer):
    """Counts the frames that it encodes, and can be made to die after some."""

    encoded = 0
    dies_after: int | None = None

    def encode(self, video_BTCHW: Tensor, *, chunk: int = 256) -> Tensor:
        self.encoded += video_BTCHW.shape[1]
        if self.dies_after is not None and self.encoded > self.dies_after:
            raise KeyboardInterrupt
        return super().encode(video_BTCHW, chunk=chunk)


class Skipping(nn.Module):
    """A stand-in that compresses time by 3: it keeps every third frame."""

    time_stride = 3
    spatial_stride, size_multiple, latent_channels, digest = 8, 16, 4, "skipping"

    def __init__(self, frames: ConvTokenizer) -> None:
        super().__init__()
        self.frames = frames

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        assert (video_BTCHW.shape[1] - 1) % 3 == 0
        return self.frames.encode(video_BTCHW[:, ::3])

    def decode(self, latents_BTChw: Tensor) -> Tensor:
        return self.frames.decode(latents_BTChw.repeat_interleave(3, 1)[:, 2:])


def make_tokenizer(seed: int, directory: Path) -> Counting:
    """An untrained tokenizer whose statistics were measured on the dataset."""
    torch.manual_seed(seed)
    tokenizer = Counting(CONFIG).eval().requires_grad_(False)
    dataset = ShardDataset.open(directory)
    videos = []
    for sample in dataset.manifest.samples("train"):
        found = dataset.read(sample.key).video
        assert found is not None
        videos.append(to_unit_range(torch.from_numpy(found["top"])).movedim(-1, -3)[None])
    tokenizer.measure_statistics(videos)
    return tokenizer


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short planar episodes in four shards: read only."""
    out = tmp_path_factory.mktemp("encode") / "videos"
    source = PlanarSource(EPISODES, config=PlanarConfig(frames=FRAMES, size=SIZE))
    options = ConvertOptions(out=out, size=f"{SIZE}x{SIZE}", episodes_per_shard=2, workers=1)
    convert(source, options)
    return out


@pytest.fixture
def tokenizer(videos: Path) -> Counting:
    return make_tokenizer(0, videos)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "latents"


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_latent_shards_hold_the_same_episodes(videos: Path, tokenizer: Counting, out: Path) -> None:
    returned = encode_dataset(videos, tokenizer, out)
    before, after = ShardDataset.open(videos), ShardDataset.open(out)
    after.verify_all()
    manifest = after.manifest
    assert manifest == returned
    assert manifest.kind == "latents"
    assert manifest.tokenizer == {
        "digest": tokenizer.digest,
        "channels": 4,
        "spatial_stride": 8,
        "time_stride": 1,
    }
    for split in ("train", "val"):
        assert manifest.samples(split) == before.manifest.samples(split) != ()
    for name in ("name", "fps", "height", "width", "views", "contracts", "quarantined"):
        assert getattr(manifest, name) == getattr(before.manifest, name), name
    for sample in manifest.samples():
        video, latent = before.read(sample.key), after.read(sample.key)
        assert np.array_equal(video.actions_TA, latent.actions_TA)
        assert np.array_equal(video.proprio_TS, latent.proprio_TS)
        assert np.array_equal(video.timestamps_T, latent.timestamps_T)
        assert video.meta == latent.meta
        assert video.video is not None
        assert latent.latents is not None
        frames = to_unit_range(torch.from_numpy(video.video["top"])).movedim(-1, -3)[None]
        expected = tokenizer.encode(frames)[0].numpy()
        assert latent.latents["top"].dtype == np.float16
        assert latent.latents["top"].shape == (FRAMES, 4, SIZE // 8, SIZE // 8)
        np.testing.assert_allclose(latent.latents["top"], expected, rtol=2e-3, atol=2e-3)


def test_the_loader_takes_them(videos: Path, tokenizer: Counting, out: Path) -> None:
    encode_dataset(videos, tokenizer, out)
    config = LoaderConfig(clip_frames=5, batch_size=2, workers=0)
    batch = next(iter(make_loader(ShardDataset.open(out), "train", config, seed=0, num_steps=1)))
    assert batch.latents_BTVChw is not None
    assert batch.latents_BTVChw.shape == (2, 5, 1, 4, SIZE // 8, SIZE // 8)


def test_repeated_it_gives_the_same_bytes(videos: Path, tokenizer: Counting, out: Path) -> None:
    encode_dataset(videos, tokenizer, out)
    encode_dataset(videos, tokenizer, out.with_name("again"))
    first = contents(out)
    assert first == contents(out.with_name("again"))
    assert "manifest.json" in first
    other = make_tokenizer(1, videos)
    encode_dataset(videos, other, out.with_name("other"))
    assert first != contents(out.with_name("other"))


def test_a_finished_directory_is_left_alone(videos: Path, tokenizer: Counting, out: Path) -> None:
    first = encode_dataset(videos, tokenizer, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    tokenizer.encoded = 0
    assert encode_dataset(videos, tokenizer, out, batch_frames=3) == first
    assert tokenizer.encoded == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == times


@pytest.mark.parametrize("dies_after", [0, FRAMES, 3 * FRAMES, EPISODES * FRAMES - 1])
def test_interrupted_work_continues(videos: Path, tokenizer: Counting, out: Path, dies_after: int) -> None:
    encode_dataset(videos, tokenizer, out.with_name("straight"))
    tokenizer.encoded, tokenizer.dies_after = 0, dies_after
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(videos, tokenizer, out)
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("shards/*"))
    finished = [path.stem for path in out.glob(".partial/*.tar")]
    tokenizer.encoded, tokenizer.dies_after = 0, None
    manifest = encode_dataset(videos, tokenizer, out)
    skipped = sum(
        sample.frames
        for shard in manifest.shards
        for sample in shard.samples
        if Path(shard.file).stem in finished
    )
    assert tokenizer.encoded == EPISODES * FRAMES - skipped
    assert bool(skipped) == (dies_after >= 3 * FRAMES)
    assert contents(out) == contents(out.with_name("straight"))


def test_a_shard_damaged_meanwhile_is_made_again(videos: Path, tokenizer: Counting, out: Path) -> None:
    encode_dataset(videos, tokenizer, out.with_name("straight"))
    tokenizer.encoded, tokenizer.dies_after = 0, 3 * FRAMES
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(videos, tokenizer, out)
    shard = next(out.glob(".partial/train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    tokenizer.dies_after = None
    encode_dataset(videos, tokenizer, out)
    assert contents(out) == contents(out.with_name("straight"))


def test_another_tokenizer_needs_overwrite(videos: Path, tokenizer: Counting, out: Path) -> None:
    encode_dataset(videos, tokenizer, out)
    other = make_tokenizer(1, videos)
    with pytest.raises(ConfigError, match=r"option 'tokenizer' .*--overwrite"):
        encode_dataset(videos, other, out)
    assert encode_dataset(videos, other, out, overwrite=True).tokenizer != Manifest.read(videos).tokenizer
    assert (ShardDataset.open(out).manifest.tokenizer or {})["digest"] == other.digest


def test_the_video_is_never_overwritten(videos: Path, tokenizer: Counting) -> None:
    before = contents(videos)
    with pytest.raises(ConfigError, match="--out holds a video dataset"):
        encode_dataset(videos, tokenizer, videos, overwrite=True)
    assert contents(videos) == before


def test_latents_are_not_encoded_again(videos: Path, tokenizer: Counting, out: Path) -> None:
    encode_dataset(videos, tokenizer, out)
    with pytest.raises(DataError, match="got latents, expected video"):
        encode_dataset(out, tokenizer, out.with_name("twice"))


def test_a_size_that_does_not_fit_is_refused_before_any_work(
    videos: Path, tokenizer: Counting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counting, "size_multiple", 64)
    with pytest.raises(DataError, match=f"got {SIZE}x{SIZE}, expected width and height divisible by 64"):
        encode_dataset(videos, tokenizer, out)
    assert not out.exists()


def test_damaged_video_is_refused(
    videos: Path, tokenizer: Counting, tmp_path: Path, copy: Callable[[Path], Path]
) -> None:
    damaged = copy(videos)
    shard = next(damaged.glob("shards/train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        encode_dataset(damaged, tokenizer, tmp_path / "latents")
    assert not (tmp_path / "latents" / "manifest.json").exists()


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a directory to where a test may damage it."""
    import shutil

    return lambda directory: Path(shutil.copytree(directory, tmp_path / "copy"))


def test_a_diverged_tokenizer_is_refused(videos: Path, tokenizer: Counting, out: Path) -> None:
    tokenizer.std_C.mul_(1e-8)
    with pytest.raises(DataError, match=r"not finite in float16.*train it anew"):
        encode_dataset(videos, tokenizer, out)
    assert not (out / "manifest.json").exists()


def test_latents_that_are_not_normalised_raise_an_alarm(videos: Path, tokenizer: Counting, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        encode_dataset(videos, tokenizer, out)
    statistics = latent_statistics(out)
    assert statistics.mean_C.abs().max() < 0.05
    assert (statistics.std_C - 1).abs().max() < 0.05
    tokenizer.set_statistics(torch.zeros(4), torch.full((4,), 10.0))
    with pytest.warns(UserWarning, match="never measured"):
        encode_dataset(videos, tokenizer, out.with_name("inert"))


@pytest.mark.parametrize("batch_frames", [1, 5, FRAMES, 100])
def test_batches_of_frames_change_nothing(tokenizer: Counting, batch_frames: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    whole = encode_frames(tokenizer, frames)
    np.testing.assert_allclose(encode_frames(tokenizer, frames, batch_frames), whole, rtol=2e-3, atol=2e-3)


def test_a_time_stride_cuts_episodes_to_whole_latent_frames(
    videos: Path, tokenizer: Counting, out: Path
) -> None:
    encode_dataset(videos, Skipping(tokenizer), out, batch_frames=2)
    before, after = ShardDataset.open(videos), ShardDataset.open(out)
    assert (after.manifest.tokenizer or {})["time_stride"] == 3
    for sample in after.manifest.samples():
        assert sample.frames == 10  # of 12: 1 + 3 * 3
        video, latent = before.read(sample.key), after.read(sample.key)
        assert np.array_equal(latent.actions_TA, video.actions_TA[:10])
        assert video.video is not None
        assert latent.latents is not None
        assert latent.meta["frames"] == 10
        expected = encode_frames(tokenizer, video.video["top"][:10:3])
        np.testing.assert_allclose(latent.latents["top"], expected, rtol=2e-3, atol=2e-3)


def test_the_command(
    videos: Path, tokenizer: Counting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(tokenizer, tmp_path / "run" / "tokenizer")
    arguments = ["encode", str(videos), "--out", str(tmp_path / "latents"), "--device", "cpu"]
    assert run([*arguments, "--tokenizer", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert f"{EPISODES} episodes, {EPISODES * FRAMES} frames of top" in printed
    assert "channel means" in printed
    assert os.listdir(tmp_path / "latents" / "shards")
    assert run([*arguments, "--tokenizer", str(tmp_path / "nowhere")]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    assert run([*arguments, "--tokenizer", str(tmp_path / "run"), "--batch-frames", "0"]) == 2
    assert "--batch-frames: got 0" in capsys.readouterr().err
