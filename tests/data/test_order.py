"""The order of clips: exactly once an epoch, the same however it is cut up, resumable by step alone."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidworld.data.order import ClipOrder, OrderKey, permute, rank_slice, stream_keys
from vidworld.errors import ConfigError, DataError

KEY = OrderKey(
    "0123456789abcdef", "train", seed=7, batch_size=8, clip_frames=4, clip_stride=2, shuffle_shards=2
)


some = settings(max_examples=60, deadline=None)


@st.composite
def orders(draw: st.DrawFn) -> ClipOrder:
    """Small datasets of any shape that hold at least one clip."""
    frames = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    steps = draw(st.lists(st.integers(0, 2), min_size=len(frames), max_size=len(frames)))
    key = dataclasses.replace(
        KEY,
        seed=draw(st.integers(0, 2**63)),
        batch_size=draw(st.sampled_from([1, 2, 6, 12, 24])),
        clip_frames=draw(st.integers(1, max(frames))),
        clip_stride=draw(st.integers(1, 5)),
        shuffle_shards=draw(st.integers(1, 5)),
    )
    return ClipOrder(np.array(frames), np.cumsum(steps), key)


def stream(order: ClipOrder, start: int, stop: int) -> list[tuple[int, int]]:
    episodes, starts = order.locate(np.arange(start, stop))
    return list(zip(episodes.tolist(), starts.tolist(), strict=True))


def all_clips(frames: np.ndarray, key: OrderKey) -> list[tuple[int, int]]:
    return [
        (episode, start)
        for episode, count in enumerate(frames.tolist())
        for start in range(0, count - key.clip_frames + 1, key.clip_stride)
    ]


def gather(order: ClipOrder, steps: range, world_size: int, accumulation: int, slicer=rank_slice) -> list:
    """The stream as ranks and micro-batches read it, put together again."""
    size = order.key.batch_size
    return [
        clip
        for step in steps
        for micro in range(accumulation)
        for rank in range(world_size)
        for index in [
            slicer(step, micro, batch_size=size, accumulation=accumulation, rank=rank, world_size=world_size)
        ]
        for clip in stream(order, index.start, index.stop)
    ]


@some
@given(orders(), st.integers(0, 5))
def test_every_clip_comes_exactly_once_an_epoch(order: ClipOrder, epoch: int) -> None:
    clips = stream(order, epoch * order.num_clips, (epoch + 1) * order.num_clips)
    assert len(set(clips)) == order.num_clips
    ends = np.diff(np.append(order._episode_starts, order.num_clips))
    assert sorted(clips) == [
        (e, i * order.key.clip_stride) for e, count in enumerate(ends.tolist()) for i in range(count)
    ]


def test_clips_are_the_windows_of_episodes_that_are_long_enough() -> None:
    frames = np.array([3, 4, 9, 1, 16])
    order = ClipOrder(frames, np.array([0, 0, 1, 2, 3]), KEY)
    assert sorted(stream(order, 0, order.num_clips)) == all_clips(frames, KEY)
    assert (order.num_excluded, order.num_episodes) == (2, 3)
    assert "2 shorter left out" in order.describe()


@some
@given(orders(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(0, 40))
def test_ids_do_not_depend_on_ranks_or_accumulation(
    order: ClipOrder, world_size: int, accumulation: int, first: int
) -> None:
    size = order.key.batch_size
    if size % (world_size * accumulation):
        return
    steps = range(first, first + 4)
    expected = stream(order, steps.start * size, steps.stop * size)
    assert gather(order, steps, world_size, accumulation) == expected


def test_negative_control_a_wrong_slicing_is_noticed() -> None:
    def strided(step: int, micro: int, *, batch_size: int, accumulation: int, rank: int, world_size: int):
        length = batch_size // (world_size * accumulation)
        start = step * batch_size + (rank * accumulation + micro) * length
        return range(start, start + length)

    order = ClipOrder(np.full(6, 30), np.arange(6), KEY)
    expected = stream(order, 0, 32)
    assert gather(order, range(4), 2, 2) == expected
    assert gather(order, range(4), 2, 2, slicer=strided) != expected


@some
@given(orders(), st.lists(st.integers(0, 24), min_size=1, max_size=3))
def test_resuming_any_number_of_times_changes_nothing(order: ClipOrder, stops: list[int]) -> None:
    size = order.key.batch_size
    cuts = [0, *sorted(stops), 24]
    resumed = []
    for begin, end in itertools.pairwise(cuts):
        fresh = ClipOrder.__new__(ClipOrder)  # as another process would have it, without cached epochs
        fresh.__dict__.update(order.__dict__, _epochs={})
        for step in range(begin, end):
            resumed += list(zip(*(part.tolist() for part in fresh.batch(step)), strict=True))
    assert resumed == stream(order, 0, 24 * size)


@pytest.mark.parametrize("batch_size", [1, 6, 7])
def test_resuming_exactly_at_the_end_of_an_epoch(batch_size: int) -> None:
    """42 clips: 7 steps of 6 or 6 steps of 7 end with the epoch."""
    frames, shard_of = np.array([30, 9, 31, 24]), np.array([0, 1, 1, 2])
    key = dataclasses.replace(KEY, batch_size=batch_size)
    steps = ClipOrder(frames, shard_of, key).num_clips // batch_size
    assert steps * batch_size == 42
    resumed = [
        clip
        for step in range(steps, 2 * steps)
        for clip in zip(
            *(part.tolist() for part in ClipOrder(frames, shard_of, key).batch(step)), strict=True
        )
    ]
    assert resumed == stream(ClipOrder(frames, shard_of, key), 42, 84)
    assert sorted(resumed) == sorted(all_clips(frames, key))
    assert resumed != stream(ClipOrder(frames, shard_of, key), 0, 42)


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"manifest_digest": "0123456789abcdee"}, {"split": "val"}], ids=str
)
def test_negative_control_another_seed_or_dataset_gives_another_order(change: dict) -> None:
    frames, shards = np.full(6, 40), np.arange(6)
    one, same = ClipOrder(frames, shards, KEY), ClipOrder(frames, shards, dataclasses.replace(KEY))
    other = ClipOrder(frames, shards, dataclasses.replace(KEY, **change))
    assert stream(one, 0, 64) == stream(same, 0, 64)
    assert stream(one, 0, 64) != stream(other, 0, 64)
    assert stream(one, 0, one.num_clips) != stream(one, one.num_clips, 2 * one.num_clips)


def test_the_order_is_fixed_for_good() -> None:
    order = ClipOrder(np.array([20, 9, 33, 14, 3, 25]), np.array([0, 0, 1, 2, 2, 3]), KEY)
    assert order.num_clips == 44
    assert stream(order, 40, 48) == [
        (2, 28), (2, 18), (2, 20), (1, 4), (0, 8), (2, 18), (0, 12), (0, 16)
    ]  # fmt: skip
    assert order.replacement(5, 1) == (1, 4)


def test_clips_are_mixed_within_groups_of_shards_only() -> None:
    shard_of = np.repeat(np.arange(7), 5)
    order = ClipOrder(np.full(35, 23), shard_of, dataclasses.replace(KEY, shuffle_shards=3))
    shards = shard_of[[episode for episode, _ in stream(order, 0, order.num_clips)]]
    groups = np.split(
        shards, np.array([2, 4]) * 50
    )  # seven shards of 50 clips in groups of two, two and three
    assert [len(np.unique(group)) for group in groups] == [2, 2, 3]
    assert len(np.unique(shards)) == 7
    for group in groups:
        turns = np.count_nonzero(np.diff(group))
        assert turns > len(group) / 3


@some
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(length: int, key: int) -> None:
    out = permute(np.arange(length), np.full(length, length), np.full(length, key, np.uint64))
    assert np.array_equal(np.sort(out), np.arange(length))


def test_permute_reaches_large_domains_and_mixed_lengths() -> None:
    lengths = np.array([1, 2, 10**12, 10**12, 2**40])
    out = permute(np.array([0, 1, 5, 10**12 - 1, 77]), lengths, np.arange(5, dtype=np.uint64))
    assert ((out >= 0) & (out < lengths)).all()


@pytest.mark.parametrize("length", [3, 4, 5])
def test_all_permutations_of_few_clips_are_equally_likely(length: int) -> None:
    count = 20_000
    keys = np.repeat(stream_keys(np.array([5], np.uint64), count), length)
    rows = permute(np.tile(np.arange(length), count), np.full(count * length, length), keys)
    codes = rows.reshape(count, length) @ (length ** np.arange(length))
    _, seen = np.unique(codes, return_counts=True)
    possible = math.factorial(length)
    expected = count / possible
    chi_square = ((seen - expected) ** 2).sum() / expected
    assert len(seen) == possible
    assert chi_square < possible - 1 + 4 * math.sqrt(2 * (possible - 1))


def test_neighbours_are_scattered_over_a_group() -> None:
    """Steps between successive positions of a random permutation are uncorrelated and far."""
    length = 40_000
    out = permute(np.arange(length), np.full(length, length), np.full(length, 3, np.uint64)) / length
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02
    assert abs(np.abs(np.diff(out)).mean() - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(length), out)[0, 1]) < 0.02


def test_ten_million_clips_cost_about_a_millisecond_a_batch() -> None:
    generator = np.random.default_rng(0)
    frames = generator.integers(60, 172, 100_000)
    shard_of = np.sort(generator.integers(0, 1000, len(frames)))
    key = dataclasses.replace(KEY, batch_size=64, clip_frames=16, clip_stride=1, shuffle_shards=16)
    order = ClipOrder(frames, shard_of, key)
    assert order.num_clips > 1e7
    order.batch(0)
    seconds = []
    for step in range(1000, 1200):
        begin = time.process_time()
        order.batch(step)
        seconds.append(time.process_time() - begin)
    assert np.median(seconds) < 2e-2, "listing the clips would take seconds; a busy machine has its share"
    arrays = [value for value in order.__dict__.values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 5e6


def test_replacements_depend_on_the_index_and_attempt_only() -> None:
    order = ClipOrder(np.full(6, 30), np.arange(6), KEY)
    draws = [order.replacement(index, attempt) for index in range(40) for attempt in (1, 2)]
    assert draws == [order.replacement(index, attempt) for index in range(40) for attempt in (1, 2)]
    assert len(set(draws)) > 30
    assert set(draws) <= set(all_clips(np.full(6, 30), KEY))


@pytest.mark.parametrize(
    ("world_size", "accumulation"), [(3, 1), (1, 3), (2, 8), (16, 1)], ids=lambda value: str(value)
)
def test_a_batch_that_cannot_be_shared_out_is_refused(world_size: int, accumulation: int) -> None:
    with pytest.raises(ConfigError, match=r"batch_size.*got 8, expected a multiple of"):
        rank_slice(0, 0, batch_size=8, world_size=world_size, accumulation=accumulation)


def test_a_place_outside_the_batch_is_refused() -> None:
    for place in ({"rank": 2}, {"rank": -1}):
        with pytest.raises(ConfigError, match="rank below 2"):
            rank_slice(0, 0, batch_size=8, world_size=2, **place)
    with pytest.raises(ConfigError, match="step -1"):
        rank_slice(-1, 0, batch_size=8)


def test_a_split_without_a_clip_is_refused_with_its_longest_episode() -> None:
    with pytest.raises(DataError, match="longest episode of 3 frames, expected at least one of 4 frames"):
        ClipOrder(np.array([3, 2]), np.array([0, 0]), KEY)
    with pytest.raises(DataError, match="the 'train' split: got no episode"):
        ClipOrder(np.array([]), np.array([]), KEY)
    with pytest.raises(ConfigError, match="clip_stride"):
        ClipOrder(np.array([9]), np.array([0]), dataclasses.replace(KEY, clip_stride=0))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(OrderKey) if f.name != "step"])
def test_resuming_another_order_is_refused_by_name(field: str) -> None:
    value = getattr(KEY, field)
    other = dataclasses.replace(KEY, **{field: value + 1 if isinstance(value, int) else value + "x"})
    with pytest.raises(DataError, match=f"{field} of the sample order in run-3"):
        KEY.require_equal(other, where="run-3")
    KEY.at(3).require_equal(KEY.at(4))


def test_a_key_survives_its_checkpoint() -> None:
    stored = KEY.at(41).to_mapping()
    assert OrderKey.from_mapping(stored) == KEY.at(41)
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        OrderKey.from_mapping({**stored, "sed": 1})
    with pytest.raises(DataError, match="version of the sample order"):
        ClipOrder(np.array([9]), np.array([0]), dataclasses.replace(KEY, version=2))
