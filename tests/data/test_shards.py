"""Shards: equal bytes, whole or not at all, and every kind of damage named before it reaches training."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset, ShardWriter, npy_bytes
from vidworld.errors import DataError

TRAIN = "shards/train-000000.tar"
KEYS = ("ep-000000", "ep-000001", "ep-000002")


def tar_members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(entry, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, content in members:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def approve(directory: Path) -> None:
    """Let the manifest vouch for a doctored train shard, so that only the checks of its content are left."""
    manifest = Manifest.read(directory)
    content = (directory / TRAIN).read_bytes()
    sound = replace(manifest.shards[0], sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    replace(manifest, shards=(sound, *manifest.shards[1:])).write(directory)


@pytest.fixture
def doctor(dataset_dir: Path) -> Callable[..., Path]:
    """Rewrite the members of the train shard, with or without the manifest's approval."""

    def rewrite(change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], list], approved: bool = True) -> Path:
        write_tar(dataset_dir / TRAIN, change(tar_members(dataset_dir / TRAIN)))
        if approved:
            approve(dataset_dir)
        return dataset_dir

    return rewrite


# Writing


def test_equal_samples_give_equal_bytes(tmp_path, sample_members):
    for name in "ab":
        with ShardWriter(tmp_path / f"{name}.tar") as writer:
            for key in KEYS:
                writer.add(
                    key, dict(reversed(sample_members(key).items())) if name == "b" else sample_members(key)
                )
        content = (tmp_path / f"{name}.tar").read_bytes()
        assert (writer.sha256, writer.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_headers_say_nothing_of_the_machine(dataset_dir):
    for entry, _ in tar_members(dataset_dir / TRAIN):
        assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, 0, "root", "root")
        assert entry.mode == 0o644
        assert entry.isreg()


def test_exception_in_the_middle_leaves_nothing(tmp_path, sample_members, recwarn):
    path = tmp_path / "train-000000.tar"
    path.write_bytes(b"the shard of an earlier run")
    writer = ShardWriter(path)

    def write_half() -> None:
        with writer:
            writer.add("ep-000000", sample_members("ep-000000"))
            raise RuntimeError("mid-shard")

    with pytest.raises(RuntimeError, match="mid-shard"):
        write_half()
    assert (writer.sha256, writer.bytes) == ("", 0)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"the shard of an earlier run"]
    assert not recwarn.list


def test_full_disk_leaves_nothing(tmp_path, sample_members, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("ep-000000", sample_members("ep-000000"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["between samples", "before the rename"])
def test_kill_leaves_no_final_name(tmp_path, moment):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    script = (
        "import os, signal, sys; from vidworld.data.shards import ShardWriter\n"
        f"if sys.argv[2] == 'before the rename': os.replace = lambda *_: {kill}\n"
        "with ShardWriter(sys.argv[1]) as writer:\n"
        "    for index in range(200): writer.add(f'ep-{index}', {'actions.npy': bytes(5000)})\n"
        f"    if sys.argv[2] == 'between samples': {kill}\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "train-000000.tar"), moment])
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".")
    assert left[0].endswith(".partial")


@pytest.mark.parametrize(
    "key", ["", ".", "..", "a.b", "ep_0.5s", "a/b", "../a", "/a", "a b", "a\\b", "ü", "-a", "a\n", "k" * 65]
)
def test_keys_that_a_reader_could_misread(tmp_path, key):
    with pytest.raises(DataError, match="sample key"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add(key, {"actions.npy": b"0"})
    assert not list(tmp_path.iterdir())


def test_key_twice(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("a", {"actions.npy": b"0"})
        with pytest.raises(DataError, match="'a' given twice"):
            writer.add("a", {"actions.npy": b"1"})


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"actions.pyd": b""},
        {"actions.pickle": b""},
        {"weights.pt": b""},
        {"npy": b""},
        {".npy": b""},
        {"_hidden.npy": b""},
        {"a/b.npy": b""},
        {"../b.npy": b""},
        {"a..npy": b""},
        {"actions.npy.gz": b""},
        {"a" * 99 + ".npy": b""},
        {"top.mp4": b"", "Top.mp4": b""},
    ],
)
def test_members_that_a_reader_could_misread(tmp_path, members):
    with pytest.raises(DataError, match="sample 'ep'"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("ep", members)
    assert not list(tmp_path.iterdir())


# Reading


def test_read_gives_what_was_written(dataset, true_episode):
    for key in KEYS:
        episode, truth = dataset.read(key), true_episode(key)
        assert episode.key == key
        assert episode.latents is None
        assert episode.video is not None
        assert list(episode.video) == ["top"]
        assert episode.video["top"].shape == truth["video"].shape
        np.testing.assert_array_equal(episode.actions_TA, truth["actions"])
        np.testing.assert_array_equal(episode.proprio_TS, truth["proprio"])
        np.testing.assert_array_equal(episode.timestamps_T, truth["timestamps"])
        assert episode.meta["text"] == "push"
        assert dataset.sample(key).frames == len(truth["actions"])


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 16), (7, 9), (30, 10), (39, 1), (0, 40)])
def test_clip_is_a_window_of_the_episode(dataset, latents_dir, start, length):
    for open_dataset in (dataset, ShardDataset.open(latents_dir)):
        whole = open_dataset.read("ep-000000")
        clip = open_dataset.read_clip("ep-000000", start, length)
        for name in ("actions_TA", "proprio_TS", "timestamps_T"):
            np.testing.assert_array_equal(getattr(clip, name), getattr(whole, name)[start : start + length])
        kind = open_dataset.manifest.kind
        for view, frames in getattr(whole, kind).items():
            np.testing.assert_array_equal(getattr(clip, kind)[view], frames[start : start + length])


def test_arrays_may_be_written_to(dataset, latents_dir):
    for episode in (dataset.read("ep-000001"), ShardDataset.open(latents_dir).read("ep-000001")):
        for array in (episode.actions_TA, *(episode.video or episode.latents or {}).values()):
            array += 1


def test_latents_come_back_bit_for_bit_reading_only_the_rows(latents_dir, true_episode, monkeypatch):
    open_dataset = ShardDataset.open(latents_dir)
    open_dataset.read_clip("ep-000000", 0, 1)
    sizes: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda h, size, at: sizes.append(size) or pread(h, size, at))
    clip = open_dataset.read_clip("ep-000000", 5, 2)
    assert clip.video is None
    assert clip.latents is not None
    truth = true_episode("ep-000000")["latents"]
    np.testing.assert_array_equal(clip.latents["top"], truth[5:7])
    assert clip.latents["top"].dtype == np.float16
    assert truth[5:7].nbytes in sizes
    assert max(sizes) <= 4096  # a header, or rows


def test_latents_with_a_time_stride(latents_dir, true_episode, tmp_path):
    """Row j > 0 stands for frames 1 + (j - 1) k .. j k."""
    manifest, stride = Manifest.read(latents_dir), 5
    shards = []
    for shard in manifest.shards:
        samples = []
        members = {entry.name: content for entry, content in tar_members(latents_dir / shard.file)}
        with ShardWriter(latents_dir / shard.file) as writer:
            for sample in shard.samples:
                frames = 1 + (sample.frames - 1) // stride * stride
                own = {n.partition(".")[2]: c for n, c in members.items() if n.startswith(sample.key)}
                for suffix in ("actions.npy", "proprio.npy", "timestamps.npy"):
                    own[suffix] = npy_bytes(np.load(io.BytesIO(own[suffix]))[:frames])
                own["top.latents.npy"] = npy_bytes(true_episode(sample.key)["latents"][:frames:stride])
                writer.add(sample.key, own)
                samples.append(replace(sample, frames=frames))
        shards.append(replace(shard, sha256=writer.sha256, bytes=writer.bytes, samples=tuple(samples)))
    tokenizer = {**(manifest.tokenizer or {}), "time_stride": stride}
    replace(manifest, tokenizer=tokenizer, shards=tuple(shards)).write(latents_dir)
    open_dataset, truth = ShardDataset.open(latents_dir), true_episode("ep-000000")["latents"][:36:stride]
    whole = open_dataset.read("ep-000000")
    assert whole.latents is not None
    np.testing.assert_array_equal(whole.latents["top"], truth)
    clip = open_dataset.read_clip("ep-000000", 10, 11)
    assert clip.latents is not None
    np.testing.assert_array_equal(clip.latents["top"], truth[2:5])
    assert len(clip.actions_TA) == 11
    for start, length in ((1, 6), (5, 5), (0, 2)):
        with pytest.raises(DataError, match="divisible by the tokenizer's time stride 5"):
            open_dataset.read_clip("ep-000000", start, length)


def test_windows_outside_the_episode(dataset):
    for start, length in ((-1, 4), (0, 41), (40, 1), (3, 0)):
        with pytest.raises(DataError, match="expected within 0 to 40"):
            dataset.read_clip("ep-000000", start, length)
    with pytest.raises(DataError, match="no sample 'ep-000009'"):
        dataset.read("ep-000009")


def test_pickled_and_shared_between_threads(dataset, true_episode):
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 20_000
    failures: list[str] = []

    def read(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(10):
            key = KEYS[generator.integers(3)]
            start = int(generator.integers(20))
            clip = copy.read_clip(key, start, 4)
            if not np.array_equal(clip.actions_TA, true_episode(key)["actions"][start : start + 4]):
                failures.append(key)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_each_shard_is_hashed_once_and_when_touched(dataset_dir, monkeypatch):
    hashed: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, name: hashed.append(f.name) or digest(f, name))
    open_dataset = ShardDataset.open(dataset_dir)
    assert not hashed
    for _ in range(3):
        open_dataset.read_clip("ep-000000", 0, 2)
        open_dataset.read_clip("ep-000001", 0, 2)
    assert hashed == [str(dataset_dir / TRAIN)]
    ShardDataset.open(dataset_dir, verify=False).read("ep-000000")
    assert len(hashed) == 1


# Damage


def test_any_flipped_bit_is_found(dataset_dir):
    """400 flips anywhere in the shard; the control is that plain tarfile reads on through most of them."""
    content = (dataset_dir / TRAIN).read_bytes()
    open_dataset, generator, silent = ShardDataset.open(dataset_dir), np.random.default_rng(0), 0
    shard = open_dataset.manifest.shards[0]
    open_dataset.verify_shard(shard)
    for _ in range(400):
        damaged, bit = bytearray(content), int(generator.integers(8 * len(content)))
        damaged[bit // 8] ^= 1 << bit % 8
        (dataset_dir / TRAIN).write_bytes(damaged)
        with contextlib.suppress(tarfile.TarError, ValueError):
            silent += bool(tar_members(dataset_dir / TRAIN))
        with pytest.raises(DataError, match=r"shard shards/train-000000.tar is damaged.*sha256"):
            open_dataset.verify_shard(shard)
    assert silent > 300


def test_flipped_bit_stops_the_first_read(dataset_dir):
    path = dataset_dir / TRAIN
    content = bytearray(path.read_bytes())
    content[2000] ^= 4
    path.write_bytes(content)
    open_dataset = ShardDataset.open(dataset_dir)
    with pytest.raises(DataError, match=TRAIN):
        open_dataset.read("ep-000000")
    assert len(open_dataset.read("ep-000002").actions_TA) == 31  # the other shard is sound


def test_cut_at_a_member_boundary(dataset_dir):
    """The cut tar is valid and short: tarfile and webdataset read it without complaint."""
    path = dataset_dir / TRAIN
    entries = tar_members(path)
    boundary = next(entry for entry, _ in entries if entry.name.startswith("ep-000001")).offset
    path.write_bytes(path.read_bytes()[:boundary] + bytes(1024))
    assert len(tar_members(path)) == 5
    with pytest.raises(DataError, match=rf"{TRAIN} is damaged.*bytes"):
        ShardDataset.open(dataset_dir)
    approve(dataset_dir)
    with pytest.raises(DataError, match=rf"{TRAIN} is damaged.*got 1 samples \(ep-000000\), expected 2"):
        ShardDataset.open(dataset_dir).read("ep-000000")


def test_interleaved_members(doctor):
    directory = doctor(lambda members: sorted(members, key=lambda pair: pair[0].name.partition(".")[2]))
    with pytest.raises(DataError, match=r"sample 'ep-000000' in pieces"):
        ShardDataset.open(directory).read("ep-000000")


def test_member_missing_or_twice(doctor):
    directory = doctor(lambda members: [m for m in members if m[0].name != "ep-000001.proprio.npy"])
    with pytest.raises(DataError, match=r"sample 'ep-000001' without proprio.npy"):
        ShardDataset.open(directory).read("ep-000000")
    directory = doctor(lambda members: [members[0], *members])
    with pytest.raises(DataError, match=r"'ep-000000\.actions\.npy' twice"):
        ShardDataset.open(directory).read("ep-000000")


def test_samples_in_another_order_or_of_another_name(doctor):
    directory = doctor(lambda members: members[5:] + members[:5])
    with pytest.raises(DataError, match=r"2 samples \(ep-000001, ep-000000\)"):
        ShardDataset.open(directory).read("ep-000000")


def test_missing_or_changed_shard(dataset_dir):
    open_dataset = ShardDataset.open(dataset_dir)
    open_dataset.read("ep-000000")
    path = dataset_dir / TRAIN
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=f"cannot read shard {TRAIN}"):
        open_dataset.read("ep-000000")
    with pytest.raises(DataError, match=f"cannot read shard {TRAIN}"):
        ShardDataset.open(dataset_dir)
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=f"shard {TRAIN} changed while it was in use"):
        open_dataset.read("ep-000000")


def test_unfinished_conversion(dataset_dir):
    (dataset_dir / "manifest.json").unlink()
    with pytest.raises(DataError, match="conversion unfinished"):
        ShardDataset.open(dataset_dir)


def test_extra_members_of_allowed_kinds_are_left_alone(doctor):
    def add(members: list) -> list:
        return [*members[:1], (tarfile.TarInfo("ep-000000.note.txt"), b"hello"), *members[1:]]

    assert len(ShardDataset.open(doctor(add)).read("ep-000000").actions_TA) == 40


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickle_is_never_executed(doctor, tmp_path):
    canary = tmp_path / "executed"
    bomb = pickle.dumps(Canary(canary))
    directory = doctor(lambda members: [*members, (tarfile.TarInfo("ep-000001.evil.pyd"), bomb)])
    with pytest.raises(DataError, match=r"ep-000001\.evil\.pyd"):
        ShardDataset.open(directory).read("ep-000000")
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()  # negative control: the payload is live


def test_object_array_is_never_unpickled(doctor, tmp_path):
    canary, buffer = tmp_path / "executed", io.BytesIO()
    np.save(buffer, np.array([Canary(canary)] * 40, dtype=object), allow_pickle=True)

    def swap(members: list) -> list:
        return [(e, buffer.getvalue() if e.name == "ep-000000.actions.npy" else c) for e, c in members]

    with pytest.raises(DataError, match=r"ep-000000.actions.npy in .*: got object"):
        ShardDataset.open(doctor(swap)).read("ep-000000")
    assert not canary.exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_and_folders_are_refused(doctor, kind):
    def add(members: list) -> list:
        entry = tarfile.TarInfo("ep-000001.note.txt")
        entry.type, entry.linkname = kind, "/etc/passwd"
        return [*members, (entry, b"")]

    with pytest.raises(DataError, match=r"ep-000001\.note\.txt"):
        ShardDataset.open(doctor(add)).read("ep-000000")


@pytest.mark.parametrize(
    "name", ["../../escape.txt", "/etc/cron.txt", "noextension", "ep-000001.Note.TXT", "a/b.txt"]
)
def test_foreign_names_are_refused(doctor, name):
    directory = doctor(lambda members: [*members, (tarfile.TarInfo(name), b"x")])
    with pytest.raises(DataError, match="is damaged"):
        ShardDataset.open(directory).read("ep-000000")


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        ("actions.npy", npy_bytes(np.zeros((40, 3), "f4")), r"float32 \(40, 3\), expected float32 \(40, 2\)"),
        ("actions.npy", npy_bytes(np.zeros((39, 2), "f4")), r"\(39, 2\)"),
        ("actions.npy", npy_bytes(np.zeros((40, 2), "f8")), "float64"),
        ("actions.npy", npy_bytes(np.zeros((40, 2), ">f4")), ">f4"),
        ("proprio.npy", npy_bytes(np.zeros((40, 3), "f4"))[:-4], "bytes"),
        ("proprio.npy", npy_bytes(np.zeros((40, 3), "f4")) + b"more", "bytes"),
        ("proprio.npy", b"", "npy file"),
        ("proprio.npy", b"\x93NUMPY\x01\x00\xff\xff", "npy file"),
        ("proprio.npy", b"\x93NUMPY\x03\x00" + bytes(100), r"npy version \(3, 0\)"),
        ("timestamps.npy", npy_bytes(np.zeros(40, "i8")), "int64"),
        ("meta.json", b"[]", "list"),
        ("meta.json", b"{", "valid JSON"),
        ("top.mp4", b"no video", "readable video"),
    ],
)
def test_members_that_do_not_fit(doctor, suffix, content, says):
    def swap(members: list) -> list:
        return [(e, content if e.name == f"ep-000000.{suffix}" else c) for e, c in members]

    with pytest.raises(DataError, match=rf"ep-000000.{suffix} in .*{TRAIN}.*({says})"):
        ShardDataset.open(doctor(swap)).read("ep-000000")


def test_video_of_another_length_or_size(doctor, sample_members, dataset_dir):
    other = sample_members("ep-000001")["top.mp4"]  # 25 frames

    def swap(members: list) -> list:
        return [(e, other if e.name == "ep-000000.top.mp4" else c) for e, c in members]

    directory = doctor(swap)
    with pytest.raises(DataError, match=r"ep-000000\.top\.mp4 in .*got 25, expected 40"):
        ShardDataset.open(directory).read_clip("ep-000000", 0, 4)
    manifest = Manifest.read(dataset_dir)
    replace(manifest, height=64).write(dataset_dir)
    with pytest.raises(DataError, match=r"ep-000001\.top\.mp4 in .*48x32.*48x64"):
        ShardDataset.open(directory).read("ep-000001")


def test_huge_header_claims_cost_nothing(doctor):
    """A header that claims 40 TB must not make room for them."""
    entry = np.lib.format.header_data_from_array_1_0(np.zeros((1, 2), "f4")) | {"shape": (10**13, 2)}
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, entry)

    def swap(members: list) -> list:
        return [(e, buffer.getvalue() if e.name == "ep-000000.actions.npy" else c) for e, c in members]

    with pytest.raises(DataError, match="10000000000000"):
        ShardDataset.open(doctor(swap)).read("ep-000000")


# Other people's tools


def test_stock_webdataset_reads_the_shards(dataset_dir, true_episode):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((dataset_dir / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(KEYS)
    for sample in samples:
        members = {"actions.npy", "proprio.npy", "timestamps.npy", "meta.json", "top.mp4"}
        assert {name for name in sample if not name.startswith("__")} == members
        truth = true_episode(sample["__key__"])
        np.testing.assert_array_equal(np.load(io.BytesIO(sample["actions.npy"])), truth["actions"])
        assert json.loads(sample["meta.json"])["embodiment"] == "toy"
        with av.open(io.BytesIO(sample["top.mp4"])) as container:
            pictures = [frame.to_image() for frame in container.decode(video=0)]
        assert len(pictures) == len(truth["video"])
        assert isinstance(pictures[0], Image.Image)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_stock_tar_unpacks_them_without_a_word(dataset_dir, tmp_path):
    done = subprocess.run(
        ["tar", "-xf", str(dataset_dir / TRAIN), "-C", str(tmp_path), "--wildcards", "*.npy"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert np.load(tmp_path / "ep-000000.actions.npy", allow_pickle=False).shape == (40, 2)
