"""Mixtures: shares that hold exactly, the same clips however the batch is cut, no row always of one robot."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.loader import LoaderConfig, make_loader
from vidworld.data.manifest import Manifest, Sample, Shard
from vidworld.data.mixture import PERIOD, Mixture, MixtureOrder
from vidworld.data.order import OrderKey, rank_slice
from vidworld.data.shards import ShardDataset, ShardWriter, json_bytes, latents_member, npy_bytes
from vidworld.errors import ConfigError, ContractError, DataError
from vidworld.types import Batch, Layout

some = settings(max_examples=40, deadline=None)


def robot(name: str, dims: int, seed: int = 0) -> ActionContract:
    rng = np.random.default_rng(seed + dims)
    dimensions = tuple(Dimension(f"d{n}", "rad", "velocity") for n in range(dims))
    statistics = Statistics.of(rng.normal(size=(50, dims)))
    return ActionContract(name, 10.0, dimensions, dimensions, statistics, statistics)


def manifest(
    contract: ActionContract, name: str, frames: tuple[int, ...] = (20, 30, 9), **changes
) -> Manifest:
    """A dataset as its manifest tells it; its shard is never opened."""
    samples = tuple(
        Sample(f"ep-{n:06d}", count, contract.embodiment, str(n)) for n, count in enumerate(frames)
    )
    base = Manifest(
        kind="latents",
        name=name,
        fps=10.0,
        height=32,
        width=48,
        views=("top",),
        contracts=(contract,),
        shards=(Shard("shards/train-000000.tar", name.ljust(64, "0"), 1, "train", samples),),
        tokenizer={"digest": "0" * 16, "channels": 4, "spatial_stride": 8, "time_stride": 1},
    )
    return dataclasses.replace(base, **changes)


def unread(*manifests: Manifest, weights: tuple[float, ...] = (0.7, 0.3)) -> Mixture:
    datasets = [SimpleNamespace(directory=Path(f"/data/{one.name}"), manifest=one) for one in manifests]
    return Mixture.of(cast(list[ShardDataset], datasets), weights)


def pair(weights: tuple[float, ...] = (0.7, 0.3)) -> Mixture:
    return unread(manifest(robot("a", 2), "one"), manifest(robot("b", 3), "two", (40, 12)), weights=weights)


def order_of(mixture: Mixture, seed: int = 7, batch_size: int = 8) -> MixtureOrder:
    key = OrderKey(mixture.digest, "train", seed, batch_size, clip_frames=4, clip_stride=2, shuffle_shards=2)
    return MixtureOrder(mixture, key)


@some
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 2**63), st.integers(0, 10**6))
def test_shares_hold_in_every_period_and_closely_in_every_stretch(
    weights: list[int], seed: int, period: int
) -> None:
    manifests = [manifest(robot(f"r{n}", 2 + n), f"d{n}") for n in range(len(weights))]
    mixture = unread(*manifests, weights=tuple(weights))
    order = order_of(mixture, seed)
    owners, places = order.places(np.arange(period * PERIOD, (period + 1) * PERIOD))
    exact = np.array(weights) / sum(weights) * PERIOD
    for part, count in enumerate(mixture.counts):
        assert abs(count - exact[part]) < 1
        mine = places[owners == part]
        # The closed form: places follow each other without a gap from period to period.
        np.testing.assert_array_equal(mine, np.arange(period * count, (period + 1) * count))
        drift = np.cumsum(owners == part) - np.arange(1, PERIOD + 1) * count / PERIOD
        assert np.abs(drift).max() <= len(weights) + 1, "low discrepancy"
    assert sum(mixture.counts) == PERIOD


def test_each_dataset_keeps_its_own_order_and_epochs() -> None:
    mixture = pair()
    order = order_of(mixture)
    episodes, starts = order.locate(np.arange(5000))
    owners, places = order.places(np.arange(5000))
    for part, own in enumerate(order.orders):
        expected = own.locate(np.arange((owners == part).sum()))
        offset = 0 if part == 0 else 3
        np.testing.assert_array_equal(episodes[owners == part] - offset, expected[0])
        np.testing.assert_array_equal(starts[owners == part], expected[1])
        first = places[owners == part][: own.num_clips]
        np.testing.assert_array_equal(first, np.arange(own.num_clips))


def gather(order: MixtureOrder, steps: range, world_size: int, accumulation: int) -> list[int]:
    size = order.key.batch_size
    out = []
    for step in steps:
        for micro, rank in itertools.product(range(accumulation), range(world_size)):
            index = rank_slice(
                step, micro, batch_size=size, accumulation=accumulation, rank=rank, world_size=world_size
            )
            episodes, starts = order.locate(np.arange(index.start, index.stop))
            out += (episodes * 1000 + starts).tolist()
    return out


@some
@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (1, 8)]),
    st.integers(0, 400),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_neither_ranks_nor_accumulation_nor_resuming_change_the_clips(
    layout: tuple[int, int], first: int, stops: list[int]
) -> None:
    whole = gather(order_of(pair()), range(first, first + 12), 1, 1)
    pieces: list[int] = []
    cuts = [0, *sorted(stops), 12]
    for begin, end in itertools.pairwise(cuts):
        fresh = order_of(pair())  # as a new process has it: nothing but the step is handed on
        pieces += gather(fresh, range(first + begin, first + end), *layout)
    assert pieces == whole


def test_negative_control_a_counter_that_starts_anew_is_noticed() -> None:
    """An order that forgot how many picks came before would repeat clips after a resume."""
    order = order_of(pair())
    owners, places = order.places(np.arange(1500, 2000))
    forgetful = np.concatenate([np.arange((owners == part).sum()) for part in range(2)])
    assert sorted(places.tolist()) != sorted(forgetful.tolist())


def test_no_row_of_a_batch_always_belongs_to_one_dataset() -> None:
    owners, _ = order_of(pair((0.5, 0.5))).places(np.arange(4 * 1000))
    by_row = owners.reshape(1000, 4).mean(0)
    assert (np.abs(by_row - 0.5) < 0.1).all(), by_row


def test_the_order_outlives_releases() -> None:
    """Pinned: a stored run must find its clips again."""
    mixture = pair()
    mixture.__dict__["digest"] = "0123456789abcdef"  # whatever manifests come to hold
    owners, places = order_of(mixture).places(np.arange(995, 1010))
    assert owners.tolist() == OWNERS
    assert places.tolist() == PLACES


OWNERS = [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
PLACES = [696, 697, 299, 698, 699, 700, 300, 701, 702, 703, 301, 704, 705, 302, 706]


def test_other_data_shares_or_seeds_are_other_orders() -> None:
    assert pair().digest == pair((7, 3)).digest, "weights are relative"
    assert pair().digest != pair((0.6, 0.4)).digest
    first = order_of(pair()).locate(np.arange(100))
    assert not np.array_equal(first, order_of(pair(), seed=8).locate(np.arange(100)))


def test_a_replacement_comes_from_the_same_dataset() -> None:
    order = order_of(pair())
    owners, _ = order.places(np.arange(200))
    for index in range(200):
        episode, _ = order.replacement(index, 1)
        assert (episode >= 3) == (owners[index] == 1)


def test_embodiments_are_joined_by_name() -> None:
    shared = robot("a", 2)
    mixture = unread(
        manifest(shared, "one"),
        manifest(shared, "two", (11,)),
        manifest(robot("b", 3), "x"),
        weights=(1, 1, 1),
    )
    assert [contract.embodiment for contract in mixture.contracts] == ["a", "b"]
    assert mixture.layouts == (Layout(("top",), 32, 48, 10.0),) * 2
    assert mixture.samples("train")[0].key == "one/ep-000000"
    assert [part.label for part in unread(manifest(shared, "s"), manifest(shared, "s", (11,))).parts] == [
        "s",
        "s-2",
    ]


def test_statistics_of_one_robot_are_pooled() -> None:
    one, two = robot("a", 2), robot("a", 2)
    wider = dataclasses.replace(two.action_statistics, minimum=(-9.0, -9.0), q01=(-8.0, -8.0), count=300)
    two = dataclasses.replace(two, action_statistics=wider)
    (joined,) = unread(manifest(one, "p"), manifest(two, "q", (11,))).contracts
    assert joined.action_statistics == one.action_statistics.pooled(wider)
    assert joined.action_statistics.minimum == (-9.0, -9.0)
    assert joined.proprio_statistics.count == 2 * one.proprio_statistics.count
    joined.require_same_robot(two, where="q")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: unread(manifest(robot("a", 2), "p"), manifest(robot("a", 3), "q")),
            ContractError,
            "'a' with another action contract",
        ),
        (
            lambda: unread(manifest(robot("a", 2), "p"), manifest(robot("a", 2), "q", fps=5.0)),
            ContractError,
            "another views, size or rate",
        ),
        (
            lambda: unread(manifest(robot("a", 2), "p"), manifest(robot("a", 2), "p")),
            DataError,
            "the same data twice",
        ),
        (lambda: pair((1.0, 0.0)), ConfigError, "weight of dataset 'two'"),
        (lambda: pair((1.0, float("nan"))), ConfigError, "weight of dataset 'two'"),
        (lambda: pair((10_000.0, 1.0)), ConfigError, "at least 1/1000"),
        (lambda: Mixture.of([], []), ConfigError, "no dataset"),
        (
            lambda: unread(
                manifest(robot("a", 2), "p"),
                manifest(
                    robot("b", 2),
                    "q",
                    tokenizer={"digest": "1" * 16, "channels": 4, "spatial_stride": 8, "time_stride": 1},
                ),
            ),
            DataError,
            "tokenizer of the latents in the mix",
        ),
        (
            lambda: unread(
                manifest(robot("a", 2), "p"), manifest(robot("b", 2), "q", kind="video", tokenizer=None)
            ),
            DataError,
            "kind of dataset in the mix",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    build: Callable[[], Mixture], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_dataset_without_a_clip_is_refused() -> None:
    mixture = unread(manifest(robot("a", 2), "p"), manifest(robot("b", 3), "q", (3, 2)))
    with pytest.raises(DataError, match="longest episode of 3 frames"):
        order_of(mixture)


def write(
    directory: Path, name: str, dims: int, views: tuple[str, ...], size: tuple[int, int]
) -> ShardDataset:
    """A small dataset of latents, the numbers of which say where they stand."""
    (directory / "shards").mkdir(parents=True)
    contract, height, width = robot(name, dims), size[0] // 8, size[1] // 8
    samples = []
    with ShardWriter(directory / "shards/train-000000.tar") as writer:
        for n, frames in enumerate((12, 9)):
            key = f"ep-{n:06d}"
            rows = np.arange(frames, dtype=np.float32)[:, None] + np.zeros(dims, np.float32)
            latents = np.full((frames, 4, height, width), dims, np.float16) + np.arange(frames)[
                :, None, None, None
            ].astype("f2")
            tables = {"actions.npy": npy_bytes(rows), "proprio.npy": npy_bytes(rows)}
            tables |= {"timestamps.npy": npy_bytes(np.arange(frames) / 10), "meta.json": json_bytes({})}
            pictures = {
                latents_member(view): npy_bytes(latents + np.float16(100 * v)) for v, view in enumerate(views)
            }
            writer.add(key, pictures | tables)
            samples.append(Sample(key, frames, name, str(n)))
    shard = Shard("shards/train-000000.tar", writer.sha256, writer.bytes, "train", tuple(samples))
    manifest(contract, name, views=views, height=size[0], width=size[1], shards=(shard,)).write(directory)
    return ShardDataset.open(directory)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """One small camera with two numbers, two large ones with three."""
    root = tmp_path_factory.mktemp("mixed")
    small = write(root / "a", "small", 2, ("top",), (16, 32))
    large = write(root / "b", "large", 3, ("left", "wrist"), (32, 48))
    return Mixture.of([small, large], [0.5, 0.5])


CONFIG = LoaderConfig(clip_frames=4, batch_size=8, workers=0)


def test_batches_are_padded_with_zeros_to_the_widest(mixed: Mixture) -> None:
    (batch,) = make_loader(mixed, "train", CONFIG, seed=1, num_steps=1)
    assert batch.latents_BTVChw is not None
    assert batch.latents_BTVChw.shape == (8, 4, 2, 4, 4, 6)
    assert batch.actions_BTA.shape == (8, 4, 3)
    assert set(batch.embodiment_B.tolist()) == {0, 1}
    for row, name in enumerate(batch.ids):
        label, start = name.split("/")[0], int(name.split("@")[1])
        first = batch.latents_BTVChw[row, 0]
        if label == "small":
            assert int(batch.embodiment_B[row]) == 0
            assert (first[0, :, :2, :4] == 2 + start).all()
            assert not first[1].any()
            assert not first[0, :, 2:].any()
            assert not first[0, :, :, 4:].any()
            assert not batch.actions_BTA[row, :, 2:].any()
        else:
            assert (first[0] == 3 + start).all()
            assert (first[1] == 103 + start).all()


def collect(mixture: Mixture, **layout: int) -> list[Batch]:
    config = dataclasses.replace(CONFIG, workers=layout.pop("workers", 0), cache_gb=layout.pop("cache", 1))
    return list(make_loader(mixture, "train", config, seed=1, num_steps=3, **layout))


def test_the_loader_gives_the_same_ids_on_any_layout(mixed: Mixture) -> None:
    whole = [name for batch in collect(mixed) for name in batch.ids]
    assert [name for batch in collect(mixed, cache=0) for name in batch.ids] == whole
    ranks = [collect(mixed, rank=rank, world_size=2, accumulation=2) for rank in range(2)]
    joined = [name for pieces in zip(*ranks, strict=True) for batch in pieces for name in batch.ids]
    assert joined == whole
    late = make_loader(mixed, "train", CONFIG, seed=1, start_step=2, num_steps=1)
    assert [name for batch in late for name in batch.ids] == whole[16:]


def test_workers_read_mixtures_too(mixed: Mixture) -> None:
    assert [batch.ids for batch in collect(mixed, workers=1)] == [batch.ids for batch in collect(mixed)]
