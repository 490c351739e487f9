"""The loader end to end: same ordered ids however it runs, exact contents, faults refused in time."""

import dataclasses
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vidworld.data.loader as loader_module
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.clips import ClipReader, cache_pays
from vidworld.data.loader import Loader, LoaderConfig, iter_episodes, make_loader
from vidworld.data.manifest import Manifest, Sample, Shard
from vidworld.data.order import ClipOrder, OrderKey
from vidworld.data.shards import ShardDataset, ShardWriter, json_bytes, latents_member, npy_bytes
from vidworld.errors import ConfigError, DataError
from vidworld.types import Batch

FRAMES = [(12, 9, 3), (20, 8), (15, 11, 7, 10)]  # train shards; one episode is shorter than a clip
DIMS = {"arm": (2, 3), "gripper": (4, 1)}
CONFIG = LoaderConfig(clip_frames=5, clip_stride=2, batch_size=12, shuffle_shards=2, workers=0)


def contract(embodiment: str) -> ActionContract:
    num_actions, num_proprio = DIMS[embodiment]
    return ActionContract(
        embodiment=embodiment,
        rate_hz=10.0,
        action=tuple(Dimension(f"a{i}") for i in range(num_actions)),
        proprio=tuple(Dimension(f"s{i}") for i in range(num_proprio)),
        action_statistics=Statistics.of(np.eye(num_actions)),
        proprio_statistics=Statistics.of(np.eye(num_proprio)),
    )


def write(directory: Path, train: list[tuple[int, ...]] = FRAMES, val: tuple[int, ...] = (6, 30)) -> Path:
    """Latents of two views [T, 1, 2, 2] that hold episode number, frame number and view; two embodiments."""
    (directory / "shards").mkdir(parents=True)
    shards, number = [], 0
    for index, lengths in enumerate([*train, val]):
        split = "train" if index < len(train) else "val"
        file, samples = f"shards/{split}-{index:06d}.tar", []
        if not lengths:
            continue
        with ShardWriter(directory / file) as writer:
            for frames in lengths:
                key, embodiment = f"ep-{number:06d}", ["arm", "gripper"][number % 2]
                num_actions, num_proprio = DIMS[embodiment]
                rows = np.arange(frames, dtype=np.float32)[:, None]
                latents = {
                    view: np.stack([np.full((frames,), number), rows[:, 0], np.full((frames,), column)], 1)
                    for column, view in enumerate(("wrist", "front"))
                }
                tables = {
                    "actions.npy": npy_bytes((rows + 100 * np.arange(num_actions)).astype("f4")),
                    "proprio.npy": npy_bytes((rows - 100 * np.arange(num_proprio)).astype("f4")),
                    "timestamps.npy": npy_bytes(np.arange(frames) / 10),
                    "meta.json": json_bytes({"embodiment": embodiment}),
                }
                pictures = {
                    latents_member(view): npy_bytes(
                        np.broadcast_to(values[..., None, None], (frames, 3, 2, 2)).astype("f2")
                    )
                    for view, values in latents.items()
                }
                writer.add(key, pictures | tables)
                samples.append(Sample(key, frames, embodiment, str(number)))
                number += 1
        shards.append(Shard(file, writer.sha256, writer.bytes, split, tuple(samples)))
    Manifest(
        kind="latents",
        name="numbers",
        fps=10.0,
        height=16,
        width=16,
        views=("wrist", "front"),
        contracts=(contract("arm"), contract("gripper")),
        shards=tuple(shards),
        tokenizer={"digest": "0" * 16, "channels": 3, "spatial_stride": 8, "time_stride": 1},
    ).write(directory)
    return directory


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return ShardDataset.open(write(tmp_path_factory.mktemp("loader") / "numbers"))


def config(**changes: object) -> LoaderConfig:
    return LoaderConfig(**{**CONFIG.__dict__, **changes})  # type: ignore[arg-type]


def expected_ids(dataset: ShardDataset, steps: range, seed: int = 3) -> list[str]:
    """Ids straight from the order, without a loader."""
    key = OrderKey(dataset.manifest.digest, "train", seed, CONFIG.batch_size, 5, 2, 2)
    order, samples = ClipOrder.of(dataset.manifest, key), dataset.manifest.samples("train")
    return [
        f"{samples[episode].key}@{start}"
        for step in steps
        for episode, start in zip(*order.batch(step), strict=True)
    ]


def gathered_ids(
    dataset: ShardDataset,
    steps: range,
    *,
    world_size: int = 1,
    accumulation: int = 1,
    seed: int = 3,
    **changes: object,
) -> list[str]:
    """Ids of the global batches, joined by micro-batch and then by rank."""
    ranks = [
        [
            batch.ids
            for batch in make_loader(
                dataset,
                "train",
                config(**changes),
                seed=seed,
                start_step=steps.start,
                num_steps=len(steps),
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
            )
        ]
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(steps) * accumulation}
    return [name for micro in zip(*ranks, strict=True) for ids in micro for name in ids]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.sampled_from([1, 2, 3]),
    accumulation=st.sampled_from([1, 2]),
    cache_gb=st.sampled_from([0.0, 1e-6, 1.0]),
    cuts=st.lists(st.integers(0, 8), max_size=2),
)
def test_ordered_ids_are_the_same_however_the_loader_runs(
    numbers: ShardDataset, world_size: int, accumulation: int, cache_gb: float, cuts: list[int]
) -> None:
    """Whatever the ranks, accumulation and cache, and resumed up to twice (28 clips: epochs end within)."""
    bounds = [0, *sorted(cuts), 8]
    found = [
        name
        for begin, end in itertools.pairwise(bounds)
        for name in gathered_ids(
            numbers, range(begin, end), world_size=world_size, accumulation=accumulation, cache_gb=cache_gb
        )
    ]
    assert found == expected_ids(numbers, range(8))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(workers=st.integers(1, 2), layout=st.sampled_from([(1, 1), (2, 2), (1, 3)]), start=st.integers(0, 5))
def test_ordered_ids_are_the_same_with_worker_processes(
    numbers: ShardDataset, workers: int, layout: tuple[int, int], start: int
) -> None:
    world_size, accumulation = layout
    steps = range(start, start + 3)
    found = gathered_ids(numbers, steps, world_size=world_size, accumulation=accumulation, workers=workers)
    assert found == expected_ids(numbers, steps)
    assert found != gathered_ids(numbers, steps, seed=4), "negative control: another seed"


def test_every_clip_once_an_epoch_and_resume_at_its_end(numbers: ShardDataset) -> None:
    clips = make_loader(numbers, "train", config(), seed=3).order.num_clips
    ids = expected_ids(numbers, range(clips))  # 12 epochs
    epochs = [ids[i * clips : (i + 1) * clips] for i in range(12)]
    assert all(len(set(epoch)) == clips and set(epoch) == set(epochs[0]) for epoch in epochs)
    boundary = next(step for step in range(1, clips) if step * CONFIG.batch_size % clips == 0)
    resumed = gathered_ids(numbers, range(boundary, boundary + 2))
    assert resumed == ids[boundary * 12 : (boundary + 2) * 12]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_their_ids_say(numbers: ShardDataset, workers: int) -> None:
    for batch in make_loader(numbers, "train", config(workers=workers), seed=0, num_steps=3):
        assert batch.video_BTVCHW is None
        assert batch.latents_BTVChw is not None
        assert (batch.latents_BTVChw.dtype, batch.latents_BTVChw.shape) == (
            torch.float16,
            (12, 5, 2, 3, 2, 2),
        )
        assert (batch.actions_BTA.shape, batch.proprio_BTS.shape) == ((12, 5, 4), (12, 5, 3))
        assert (batch.actions_BTA.dtype, batch.embodiment_B.dtype) == (torch.float32, torch.int64)
        for row, name in enumerate(batch.ids):
            number, start = int(name[3:9]), int(name.partition("@")[2])
            rows = torch.arange(start, start + 5).float()
            num_actions, num_proprio = list(DIMS.values())[number % 2]
            assert batch.embodiment_B[row] == number % 2
            for column in range(num_actions):
                assert torch.equal(batch.actions_BTA[row, :, column], rows + 100 * column)
            for column in range(num_proprio):
                assert torch.equal(batch.proprio_BTS[row, :, column], rows - 100 * column)
            assert not batch.actions_BTA[row, :, num_actions:].any()
            assert not batch.proprio_BTS[row, :, num_proprio:].any()
            latents_TVC = batch.latents_BTVChw[row, ..., 0, 0].float()
            assert (latents_TVC[..., 0] == number).all()
            assert torch.equal(latents_TVC[..., 1], rows[:, None].expand(5, 2))
            assert torch.equal(latents_TVC[..., 2], torch.tensor([0.0, 1.0]).expand(5, 2))


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_video_clips_are_the_decoded_frames(
    dataset: ShardDataset, true_episode: Callable[[str], dict[str, np.ndarray]], cache_gb: float
) -> None:
    settings = LoaderConfig(clip_frames=6, batch_size=4, workers=0, cache_gb=cache_gb)
    batch = next(iter(make_loader(dataset, "train", settings, seed=0)))
    assert batch.latents_BTVChw is None
    assert batch.video_BTVCHW is not None
    assert (batch.video_BTVCHW.dtype, batch.video_BTVCHW.shape) == (torch.uint8, (4, 6, 1, 3, 32, 48))
    images = batch.video_BTVCHW.flatten(0, 2)
    assert images.data_ptr() == batch.video_BTVCHW.data_ptr()
    assert images.is_contiguous(memory_format=torch.channels_last)
    for row, name in enumerate(batch.ids):
        key, _, start = name.partition("@")
        rows = slice(int(start), int(start) + 6)
        frames_THWC = batch.video_BTVCHW[row, :, 0].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(frames_THWC, dataset.read(key).video["top"][rows])  # type: ignore[index]
        true = true_episode(key)
        assert np.abs(frames_THWC.astype(int) - true["video"][rows]).mean() < 6
        assert np.array_equal(batch.actions_BTA[row].numpy(), true["actions"][rows])


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_beside_a_gpu(dataset: ShardDataset, workers: int) -> None:
    torch.zeros(1, device="cuda")
    config = LoaderConfig(clip_frames=6, batch_size=4, workers=workers)
    batch = next(iter(make_loader(dataset, "train", config, seed=0)))
    assert batch.video_BTVCHW is not None
    assert batch.video_BTVCHW.is_pinned()
    assert batch.actions_BTA.is_pinned()
    assert batch.video_BTVCHW.flatten(0, 2).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.to("cuda", non_blocking=True).video_BTVCHW.cpu(), batch.video_BTVCHW)  # type: ignore[union-attr]


def test_each_iteration_starts_again_and_waiting_is_measured(numbers: ShardDataset) -> None:
    loader = make_loader(numbers, "train", config(workers=1), seed=3, start_step=2, num_steps=2)
    first, second = ([name for batch in loader for name in batch.ids] for _ in range(2))
    assert first == second == expected_ids(numbers, range(2, 4))
    assert loader.wait_s > 0
    assert loader.key(4) == loader.order.key.at(4)
    assert loader.key(4).manifest_digest == numbers.manifest.digest


def test_loading_leaves_the_global_random_streams_alone(numbers: ShardDataset) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(iter(make_loader(numbers, "train", config(), seed=3)))
    assert torch.equal(state, torch.get_rng_state())


def test_episodes_stream_whole_and_in_manifest_order(numbers: ShardDataset) -> None:
    episodes = list(iter_episodes(numbers, "val"))
    assert [episode.key for episode in episodes] == ["ep-000009", "ep-000010"]
    assert [len(episode.actions_TA) for episode in episodes] == [6, 30]


def test_the_cache_stays_in_its_budget_and_reads_each_episode_once(
    numbers: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    whole = numbers.read_clip
    monkeypatch.setattr(numbers, "read_clip", lambda key, *rows: reads.append(key) or whole(key, *rows))
    roomy, tight = ClipReader(numbers, 5, 1 << 20), ClipReader(numbers, 5, 1500)
    for reader in (roomy, tight):
        reads.clear()
        for key in ["ep-000000", "ep-000001", "ep-000003", "ep-000003", "ep-000000"]:
            reader.read(key, 1)
        assert reader._cache is not None
        assert reader._cache.used_bytes <= reader._cache.budget_bytes
        expected = ["ep-000000", "ep-000001", "ep-000003"] + (["ep-000000"] if reader is tight else [])
        assert reads == expected


def test_the_cache_is_used_when_it_pays(numbers: ShardDataset) -> None:
    shard_bytes = [sum(lengths) * 2 * 3 * 4 * 2 for lengths in FRAMES]

    def pays(budget: int, readers: int = 1) -> bool:
        return cache_pays(
            numbers.manifest, "train", clip_frames=5, clip_stride=2, mixed=2, readers=readers, budget=budget
        )

    assert pays(sum(shard_bytes), readers=100)
    assert pays(sum(shard_bytes) - 1, readers=2)
    assert not pays(sum(shard_bytes) - 1, readers=3), "each would decode more than it uses"
    assert not pays(sum(sorted(shard_bytes)[-2:]) - 1)


def test_layouts_that_do_not_fit_are_refused(numbers: ShardDataset) -> None:
    for layout in ({"world_size": 5}, {"accumulation": 8}, {"world_size": 4, "accumulation": 2}):
        with pytest.raises(ConfigError, match="'batch_size': got 12, expected a multiple of"):
            make_loader(numbers, "train", CONFIG, seed=0, **layout)
    with pytest.raises(ConfigError, match="rank below 2"):
        make_loader(numbers, "train", CONFIG, seed=0, rank=2, world_size=2)


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"clip_frames": -1},
        {"workers": -1},
        {"cache_gb": float("nan")},
        {"timeout_s": 0},
        {"prefetch": 0},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_out_of_range_are_refused_by_name(setting: dict) -> None:
    with pytest.raises(ConfigError, match=f"setting '{next(iter(setting))}'"):
        config(**setting)


def test_splits_without_a_clip_are_refused(numbers: ShardDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longest episode of 20 frames, expected at least one of 21"):
        make_loader(numbers, "train", config(clip_frames=21), seed=0)
    with pytest.raises(DataError, match="split in numbers: got 'test'"):
        make_loader(numbers, "test", CONFIG, seed=0)
    empty = ShardDataset.open(write(tmp_path / "empty", val=()))
    with pytest.raises(DataError, match="the 'val' split: got no episode"):
        make_loader(empty, "val", CONFIG, seed=0)


def test_clips_between_latents_of_several_frames_are_refused(
    numbers: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert numbers.manifest.tokenizer is not None
    monkeypatch.setitem(numbers.manifest.tokenizer, "time_stride", 4)
    make_loader(numbers, "train", config(clip_stride=4), seed=0)
    for setting in ({"clip_stride": 2}, {"clip_stride": 4, "clip_frames": 4}):
        with pytest.raises(ConfigError, match="the tokenizer's time stride"):
            make_loader(numbers, "train", config(**setting), seed=0)


def test_resuming_on_changed_data_is_refused(numbers: ShardDataset, tmp_path: Path) -> None:
    stored = make_loader(numbers, "train", CONFIG, seed=0).key(5).to_mapping()
    same = ShardDataset.open(numbers.directory)
    OrderKey.from_mapping(stored).require_equal(make_loader(same, "train", CONFIG, seed=0).key(0))
    other = ShardDataset.open(write(tmp_path / "other", train=FRAMES[:2]))
    for loader, name in (
        (make_loader(other, "train", CONFIG, seed=0), "manifest_digest"),
        (make_loader(same, "train", CONFIG, seed=1), "seed"),
        (make_loader(same, "train", config(batch_size=6), seed=0), "batch_size"),
    ):
        with pytest.raises(DataError, match=f"^{name} of the sample order"):
            OrderKey.from_mapping(stored).require_equal(loader.key(5))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """The second train shard (episodes 3 and 4) has one bit flipped."""
    directory = write(tmp_path_factory.mktemp("loader") / "damaged")
    path = directory / "shards" / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return ShardDataset.open(directory)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_episode_is_fatal_unless_allowed(damaged: ShardDataset, workers: int) -> None:
    with pytest.raises(DataError, match=r"^shard shards/train-000001\.tar is damaged") as caught:
        list(make_loader(damaged, "train", config(workers=workers), seed=0, num_steps=20))
    assert "Traceback" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_bad_episodes_are_replaced_the_same_way_everywhere(damaged: ShardDataset) -> None:
    def ids(rank: int, world_size: int, workers: int) -> list[tuple[str, ...]]:
        loader = make_loader(
            damaged,
            "train",
            config(max_bad_episodes=2, workers=workers),
            seed=0,
            num_steps=4,
            rank=rank,
            world_size=world_size,
        )
        with pytest.warns(UserWarning, match="was replaced by another clip: shard shards/train-000001.tar"):
            found = [batch.ids for batch in loader]
        assert set(loader.bad_episodes) == {"ep-000003", "ep-000004"}
        return found

    alone, with_worker = ids(0, 1, 0), ids(0, 1, 1)
    halves = [first + second for first, second in zip(ids(0, 2, 0), ids(1, 2, 0), strict=True)]
    assert alone == with_worker == halves
    used = {name.partition("@")[0] for batch in alone for name in batch}
    assert used == {f"ep-{number:06d}" for number in (0, 1, 5, 6, 7, 8)}
    healthy = expected_ids(damaged, range(4), seed=0)
    flat = [name for batch in alone for name in batch]
    assert [a == b for a, b in zip(flat, healthy, strict=True)] == [
        name[:9] not in ("ep-000003", "ep-000004") for name in healthy
    ]


@pytest.mark.filterwarnings("ignore:episode")
def test_more_bad_episodes_than_allowed_are_fatal(damaged: ShardDataset) -> None:
    with pytest.raises(DataError, match=r"damaged|unreadable episodes: got 2 .* expected at most max_bad"):
        list(make_loader(damaged, "train", config(max_bad_episodes=1), seed=0, num_steps=20))


def running(dataset: ShardDataset) -> tuple[Loader, Iterator[Batch], list]:
    """An endless loader that has given a batch, and its worker processes."""
    others = set(multiprocessing.active_children())
    loader = make_loader(dataset, "train", config(workers=2, prefetch=1), seed=0)
    batches = iter(loader)
    next(batches)
    workers = sorted(set(multiprocessing.active_children()) - others, key=lambda child: child.pid or 0)
    return loader, batches, workers


def test_a_killed_worker_fails_the_job_in_seconds(numbers: ShardDataset) -> None:
    _, batches, workers = running(numbers)
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a reading process died: got process .* with code -9"):
        list(itertools.islice(batches, 100))  # pytest's own deadline ends a job that goes on waiting
    workers[1].join(60)
    assert not workers[1].is_alive()


@pytest.mark.parametrize("announced", [False, True])
def test_a_hung_worker_fails_the_job_at_the_deadline(numbers: ShardDataset, announced: bool) -> None:
    """Stopped before it made a batch, or between announcing one and handing over its memory."""
    loader, batches, workers = running(numbers)
    loader.config = dataclasses.replace(loader.config, timeout_s=3.0)  # starting may take longer
    if announced:
        announcements = getattr(loader._loader._iterator, "_data_queue")  # noqa: B009 its type hides it
        assert announcements._reader.poll(60)
    for worker in workers[: 2 if announced else 1]:
        os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=r"no batch from the reading processes: got \d+ s of") as caught:
        list(itertools.islice(batches, 100))
    assert int(str(caught.value).partition("got ")[2].split()[0]) >= 3
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()


def test_a_slow_worker_is_waited_for(numbers: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent for longer than one look at the workers: the batch comes, and the wait counts."""
    monkeypatch.setattr(loader_module, "_POLL_S", 0.2)
    loader = make_loader(numbers, "train", config(workers=1, prefetch=1), seed=3, num_steps=4)
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    ids = list(next(batches).ids)
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    before = loader.wait_s
    threading.Timer(3.0, os.kill, (worker.pid, signal.SIGCONT)).start()
    ids += [name for batch in batches for name in batch.ids]
    assert ids == expected_ids(numbers, range(4))
    assert loader.wait_s - before > 0.2


def test_a_reader_travels_to_a_process_without_its_cache_or_open_files(numbers: ShardDataset) -> None:
    reader = ClipReader(numbers, 5, 1 << 20)
    reader.read("ep-000000", 0)
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(
        copy.read("ep-000000", 1).arrays.actions_TA, reader.read("ep-000000", 1).arrays.actions_TA
    )
