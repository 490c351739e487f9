"""Several processes write the bytes that one writes; a killed one loses no finished shard."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidworld.cli import run
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.manifest import Manifest
from vidworld.errors import ConfigError, DataError
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.tokenizers.pretrained import PretrainedTokenizer, wrap
from vidworld.tokenizers.store import load_tokenizer, save_tokenizer
from vidworld.trainer.encode import Work, encode_dataset, latent_statistics
from vidworld.trainer.encode_shards import encode_frames

EPISODES, FRAMES, SIZE = 8, 14, 32
CONFIG = ConvTokenizerConfig(
    latent_channels=4, widths=(8, 8, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0), norm_groups=4
)


class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short planar episodes in five shards: read only."""
    out = tmp_path_factory.mktemp("encode") / "videos"
    source = PlanarSource(EPISODES, config=PlanarConfig(frames=FRAMES, size=SIZE))
    convert(source, ConvertOptions(out=out, size=f"{SIZE}x{SIZE}", episodes_per_shard=2, workers=1))
    return out


@pytest.fixture
def tokenizer(videos: Path) -> ConvTokenizer:
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(CONFIG).eval().requires_grad_(False)
    tokenizer.set_statistics(torch.zeros(4), torch.full((4,), 0.3))
    return tokenizer


def make_vae(cls: str, **changes: object) -> torch.nn.Module:
    import diffusers

    config: dict[str, object] = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * 4,
        "latents_std": [0.3] * 4,
    }
    if cls == "AutoencoderKLHunyuanVideo15":
        config = {"latent_channels": 4, "block_out_channels": (16,) * 5, "layers_per_block": 1}
    torch.manual_seed(0)
    return getattr(diffusers, cls)(**config | changes).eval()


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.filterwarnings("ignore:latent channels have")
def test_two_processes_write_the_bytes_of_one(videos: Path, tokenizer: ConvTokenizer, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # the bits of a convolution may depend on it
        encode_dataset(videos, tokenizer, tmp_path / "one")
        work = Work()
        manifest = encode_dataset(videos, tokenizer, tmp_path / "two", processes=2, work=work)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(manifest.shards) == 5
    assert (work.frames, work.processes) == (EPISODES * FRAMES, 2)
    assert work.bytes_out == sum(shard.bytes for shard in manifest.shards)
    assert work.bytes_in == sum(shard.bytes for shard in Manifest.read(videos).shards)
    assert "frames/s in 2 process(es)" in work.report()
    again = Work()
    encode_dataset(videos, tokenizer, tmp_path / "two", processes=2, work=again)
    assert "all was here already" in again.report()


@pytest.mark.filterwarnings("ignore:latent channels have")
def test_a_killed_command_goes_on(videos: Path, tokenizer: ConvTokenizer, tmp_path: Path) -> None:
    """SIGKILL as soon as one shard is done."""
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    encode_dataset(videos, tokenizer, tmp_path / "straight")
    out = tmp_path / "latents"
    arguments = ["encode", str(videos), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(out)]
    arguments += ["--processes", "2", "--device", "cpu"]
    code = f"from vidworld.cli import run; run({arguments!r})"
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        while not list(out.glob(".partial/*-*.json")) and child.poll() is None:
            time.sleep(0.002)
        child.kill()
        child.wait()
        if not (out / "manifest.json").exists():
            break
        shutil.rmtree(out)  # on a busy machine the kill may come too late
    assert list(out.glob(".partial/*-*.json"))
    assert not (out / "manifest.json").exists()
    encode_dataset(videos, tokenizer, out)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.filterwarnings("ignore:latent channels have")
def test_a_shard_that_is_done_stays_done(videos: Path, tokenizer: ConvTokenizer, tmp_path: Path) -> None:
    """Also behind one that is not, as processes leave them."""
    encode_dataset(videos, tokenizer, tmp_path / "straight")
    encoded = []

    def encode(video_BTCHW: Tensor) -> Tensor:
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(video_BTCHW.shape[1])
        return ConvTokenizer.encode(tokenizer, video_BTCHW)

    out = tmp_path / "latents"
    tokenizer.encode = encode  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(videos, tokenizer, out)
    del tokenizer.encode
    first, second = sorted(out.glob(".partial/train-*.json"))[:2]
    first.unlink()
    before = second.stat().st_mtime_ns
    work = Work()
    tokenizer.bomb = Bomb()  # type: ignore[assignment]
    message = r"an encoding process died: got process .* with code 3.*; .*run again: it continues"
    with pytest.raises(DataError, match=message):
        encode_dataset(videos, tokenizer, out, processes=2)
    del tokenizer.bomb
    assert second.stat().st_mtime_ns == before
    encode_dataset(videos, tokenizer, out, processes=2, work=work)
    assert work.frames == (EPISODES - 2) * FRAMES
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.filterwarnings("ignore:latent channels have")
def test_an_error_in_a_process_is_one_line(videos: Path, tokenizer: ConvTokenizer, tmp_path: Path) -> None:
    tokenizer.std_C.mul_(1e-9)
    with pytest.raises(DataError, match=r"latents of view 'top' of sample .*not finite in float16"):
        encode_dataset(videos, tokenizer, tmp_path / "latents", processes=2)
    assert not (tmp_path / "latents" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="--processes: got 0, expected at least 1"):
        encode_dataset(videos, tokenizer, tmp_path / "none", processes=0)
    assert not (tmp_path / "none").exists()


def test_a_launcher_is_told_what_to_do(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(["encode", str(videos), "--tokenizer", "run", "--out", str(tmp_path / "none")]) == 2
    assert "got 4 ranks; run it once, with --processes 4" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("batch_frames", [1, 4, 9, 100])
def test_a_stream_in_batches_gives_the_bits_of_the_whole(batch_frames: int) -> None:
    vae = make_vae("AutoencoderKLWan")
    tokenizer = wrap(vae, "AutoencoderKLWan", vae.config)  # type: ignore[arg-type]
    frames = torch.randint(0, 256, (21, SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    whole = encode_frames(tokenizer, frames, 1000)
    assert whole.shape == (6, 4, SIZE // 8, SIZE // 8)
    assert (encode_frames(tokenizer, frames, batch_frames) == whole).all()


@pytest.mark.filterwarnings("ignore:latent channels have")
def test_latents_of_a_pretrained_tokenizer_name_it(videos: Path, tmp_path: Path) -> None:
    """Through the command: measured statistics, frames cut to 1 + 4n, and a reference beside the latents."""
    make_vae("AutoencoderKLHunyuanVideo15", scaling_factor=1.0).save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    out = tmp_path / "latents"
    arguments = ["encode", str(videos), "--tokenizer", str(tmp_path / "vae"), "--device", "cpu"]
    assert run([*arguments, "--out", str(out)]) == 0
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, PretrainedTokenizer)
    assert tokenizer.statistics_from == "measurement"
    manifest = Manifest.read(out)
    assert manifest.tokenizer == {
        "digest": tokenizer.digest,
        "channels": 4,
        "spatial_stride": 16,
        "time_stride": 4,
    }
    assert {sample.frames for sample in manifest.samples()} == {13}  # of 14
    statistics = latent_statistics(out)
    assert statistics.mean_C.abs().max() < 0.1
    assert (statistics.std_C - 1).abs().max() < 0.1
    assert sorted(path.name for path in (out / "tokenizer").iterdir()) == ["tokenizer.json"]
    # The reference opens where the folder itself does; another precision is another tokenizer.
    encode_dataset(videos, tokenizer, out)
    assert run([*arguments, "--out", str(out), "--dtype", "bfloat16"]) == 2
    arguments = ["encode", str(videos), "--tokenizer", str(out), "--out", str(tmp_path / "again")]
    assert run([*arguments, "--processes", "2", "--device", "cpu"]) == 0
    for shard in manifest.shards:
        assert (out / shard.file).read_bytes() == (tmp_path / "again" / shard.file).read_bytes()
