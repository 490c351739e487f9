"""Long clips between short ones: the same mix and the same ids wherever the run resumes."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from vidworld.data.loader import LoaderConfig
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.trainer.feed import clip_batches, clip_feed

CONFIG = LoaderConfig(clip_frames=4, batch_size=6, workers=0)


@pytest.fixture
def dataset(latents: Path) -> ShardDataset:
    return ShardDataset.open(latents)


def ids(dataset: ShardDataset, start: int, count: int, **options: Any) -> list[tuple[str, ...]]:
    feed = clip_feed(dataset, CONFIG, seed=3, **options)
    return [batch.ids for batch in itertools.islice(feed.open(start), count)]


def test_long_clips_come_at_their_share_and_resume(dataset: ShardDataset) -> None:
    options = {"long_clip_frames": 12, "long_clip_fraction": 0.25}
    whole = ids(dataset, 0, 20, **options)
    assert [len(batch) for batch in whole] == ([6, 6, 6, 2] * 5)
    for start in (1, 3, 4, 7, 15):
        assert ids(dataset, start, 20 - start, **options) == whole[start:]
    short = [batch for batch in whole if len(batch) == 6]
    assert short == ids(dataset, 0, 15), "an order of their own"


def test_long_batches_divide_among_ranks_and_micro_batches(dataset: ShardDataset) -> None:
    options = {"long_clip_frames": 12, "long_clip_fraction": 1.0}
    together = ids(dataset, 0, 1, accumulation=1, world_size=2, **options)
    assert [len(batch) for batch in together] == [1]
    assert len(ids(dataset, 0, 2, accumulation=2, **options)[0]) == 1


def test_the_order_of_both_kinds_is_stored(dataset: ShardDataset) -> None:
    feed = clip_feed(dataset, CONFIG, seed=3, long_clip_frames=12, long_clip_fraction=0.25)
    stored = feed.order(10)
    assert (stored["short"]["step"], stored["long"]["step"]) == (8, 2)
    feed.require_same_order(stored, "here")
    plain = clip_feed(dataset, CONFIG, seed=3)
    with pytest.raises(DataError, match="kinds of clips"):
        plain.require_same_order(stored, "here")
    with pytest.raises(DataError, match="seed of the sample order"):
        clip_feed(dataset, CONFIG, seed=4).require_same_order(plain.order(0), "here")


def test_bad_clip_lengths_are_refused(dataset: ShardDataset) -> None:
    with pytest.raises(ConfigError, match="long_clip_frames"):
        clip_feed(dataset, CONFIG, seed=0, long_clip_frames=4, long_clip_fraction=0.5)


def test_held_out_batches_are_the_same_every_time(dataset: ShardDataset) -> None:
    first, second = (clip_batches(dataset, "val", CONFIG, 2) for _ in range(2))
    assert [batch.ids for batch in first] == [batch.ids for batch in second]
    assert len(first) == 2


def test_resuming_exactly_at_the_end_of_an_epoch(dataset: ShardDataset) -> None:
    config = dataclasses.replace(CONFIG, batch_size=9)

    def read(start: int, count: int) -> list[tuple[str, ...]]:
        feed = clip_feed(dataset, config, seed=3)
        return [batch.ids for batch in itertools.islice(feed.open(start), count)]

    clips = 9 * (20 - 4 + 1)
    steps = clips // 9
    whole = read(0, steps + 3)
    assert len({name for batch in whole[:steps] for name in batch}) == clips, "every clip once"
    assert read(steps, 3) == whole[steps:]
    assert whole[steps : steps + 3] != whole[:3], "another epoch, another order"
