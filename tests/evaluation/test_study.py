"""Evaluation against worlds whose scores are known: the truth itself, a still picture, random weights."""

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.manifest import Manifest
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, ContractError, DataError
from vidworld.evaluation.evaluate import evaluate
from vidworld.evaluation.windows import Settings, pairs, plan_windows, read_window
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.types import EmbodimentSpec, Episode
from vidworld.world.build import build
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.state import Rollout
from vidworld.world.world import WorldModel, to_video

SIZE, FPS = 32, 10.0
LENGTHS = {"a": 30, "b": 34, "c": 26, "short": 6, "trained": 60, "taught": 60}
SHORT = Settings(context=3, frames=5, windows_per_episode=3, samples=2, clips=2, batch=8)


class Blocks(nn.Module):
    """A tokenizer without weights: pixels of a block become channels, averaged over `coarse` x `coarse`.

    With a time stride k, the k camera frames of a latent frame are stacked in the channels.
    """

    digest, spatial_stride, size_multiple = "blocks", 8, 16

    def __init__(self, coarse: int = 2, time_stride: int = 1) -> None:
        super().__init__()
        self.coarse, self.time_stride = coarse, time_stride
        self.latent_channels = 3 * (8 // coarse) ** 2 * time_stride

    def encode(self, video_BTCHW: torch.Tensor) -> torch.Tensor:
        k = self.time_stride
        padded = torch.cat([video_BTCHW[:, :1]] * (k - 1) + [video_BTCHW], 1)
        small = nn.functional.avg_pool2d(padded.flatten(0, 1), self.coarse)
        blocks = nn.functional.pixel_unshuffle(small, 8 // self.coarse)
        return blocks.unflatten(0, (len(video_BTCHW), -1, k)).flatten(2, 3)

    def decode(self, latents_BTChw: torch.Tensor) -> torch.Tensor:
        k = self.time_stride
        blocks = latents_BTChw.unflatten(2, (k, -1)).flatten(0, 2)
        small = nn.functional.pixel_shuffle(blocks, 8 // self.coarse)
        video = nn.functional.interpolate(small, scale_factor=self.coarse)
        return video.unflatten(0, (len(latents_BTChw), -1))[:, k - 1 :]


@dataclasses.dataclass(frozen=True)
class Robots:
    """Planar episodes of several lengths, views and robots; numbered so that `episode_id` finds them."""

    names: tuple[str, ...] = ("a", "b", "c", "short", "trained")
    views: tuple[str, ...] = ("top",)
    second: tuple[str, ...] = ()
    """Ids of the episodes of a second robot, which has one action and no proprioception to speak of."""

    name, fps, fingerprint = "robots", FPS, "robots"

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        arm = PlanarSource(1).embodiments[0]
        other = dataclasses.replace(arm, embodiment="other", action=arm.action[:1], proprio=arm.proprio[:2])
        return (arm, other) if self.second else (arm,)

    def episode_ids(self) -> list[str]:
        return list(self.names)

    def read(self, episode_id: str) -> Episode:
        number = list(LENGTHS).index(episode_id)
        config = PlanarConfig(LENGTHS[episode_id], SIZE)
        source = PlanarSource(1, seed=20 + number, config=config)
        episode = dataclasses.replace(source.read(source.episode_ids()[0]), episode_id=episode_id)
        views = dict.fromkeys(self.views, episode.views["top"])
        if episode_id in self.second:
            return dataclasses.replace(
                episode,
                embodiment="other",
                views=views,
                actions_TA=episode.actions_TA[:, :1],
                proprio_TS=episode.proprio_TS[:, :2],
            )
        return dataclasses.replace(episode, views=views)


def shard(out: Path, source: Robots = Robots()) -> Path:
    held_out = tuple(name for name in source.names if name not in ("trained", "taught"))
    convert(source, ConvertOptions(out=out, size=f"{SIZE}x{SIZE}", workers=1, val_episodes=held_out))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return shard(tmp_path_factory.mktemp("robots") / "data")


def make_world(
    data: Path, tokenizer: Blocks | None = None, kind: type[WorldModel] = WorldModel
) -> WorldModel:
    """A world with random weights on block latents, as the class `kind`."""
    manifest = Manifest.read(data)
    tokenizer = tokenizer or Blocks()
    torch.manual_seed(0)
    shape = FrameShape.from_contracts(
        manifest.contracts,
        views=len(manifest.views),
        channels=tokenizer.latent_channels,
        height=SIZE // 8,
        width=SIZE // 8,
        actions_per_frame=tokenizer.time_stride,
    )
    spec = WorldSpec(
        model=DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2, num_registers=1),
        shape=shape,
        views=manifest.views,
        height=SIZE,
        width=SIZE,
        fps=manifest.fps,
        contracts=manifest.contracts,
        sampler=SamplerConfig(steps=2, window=6),
        dataset_digest=manifest.digest,
    )
    built = build(spec, tokenizer)
    for parameter in built.model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    world = kind(spec, built.model, built.normalizer, built.tokenizer)
    return world.requires_grad_(False).eval()


class Oracle(WorldModel):
    """Knows what was recorded under every sequence of actions of the dataset, and nothing else."""

    known: dict[bytes, tuple[torch.Tensor, np.ndarray]]

    def _shown(self, state, latents_BTVChw):
        """With the frame before them, since with a time stride a first latent is one frame."""
        video = self.decode(torch.cat([state.newest.latents_BTVChw, latents_BTVChw], 1))
        return to_video(video)[:, 1:]

    def rollout(self, state, actions, *, decode=True, **_):
        latents, proprio = [], []
        for row, actions_TA in enumerate(np.asarray(actions, np.float32)):
            found = self.known.get(actions_TA.tobytes())
            # The other wrong actions were never recorded: the world stands still.
            steps = actions_TA.shape[0] // self.spec.frames_per_step
            still = state.newest.latents_BTVChw[row].repeat(steps, 1, 1, 1, 1)
            latents.append(still if found is None else found[0])
            proprio.append(np.zeros((steps, self.spec.shape.proprio_dims)) if found is None else found[1])
        latents_BTVChw = torch.stack(latents)
        return Rollout(
            latents_BTVChw,
            torch.tensor(np.stack(proprio)),
            self._shown(state, latents_BTVChw) if decode else None,
            state,
        )


def make_oracle(data: Path, settings: Settings, tokenizer: Blocks | None = None) -> Oracle:
    world = make_world(data, tokenizer, Oracle)
    assert isinstance(world, Oracle)
    dataset = ShardDataset.open(data)
    world.known = {}
    k, width = world.spec.frames_per_step, world.spec.shape.proprio_dims
    for window in plan_windows(dataset, world.spec, settings).windows:
        recorded = read_window(dataset, world.spec, settings, window)
        latents_TVChw = world.encode(torch.from_numpy(recorded.frames_TVHWC)[None])[0]
        first = (settings.context - 1) // k + 1
        proprio_TS = recorded.proprio_TS[settings.context - 1 :: k][1:]
        proprio_TS = np.pad(proprio_TS, ((0, 0), (0, width - proprio_TS.shape[1])))
        actions = np.ascontiguousarray(recorded.future_TA, np.float32).tobytes()
        world.known[actions] = (latents_TVChw[first:], proprio_TS)
    return world


@dataclasses.dataclass
class Plain:
    """Passes for an engine: rolls a world out by its own method."""

    world: WorldModel

    @property
    def sampler(self):
        return self.world.spec.sampler

    def rollout(self, state, actions, **options):
        return self.world.rollout(state, actions, **options)


def evaluate_plainly(world: WorldModel, data: Path, settings: Settings) -> dict:
    return evaluate(world, data, settings, engine=Plain(world))


class Still(WorldModel):
    """Holds the last frame that it knows, whatever it is told."""

    def rollout(self, state, actions, *, decode=True, **_):
        steps = np.shape(actions)[1] // self.spec.frames_per_step
        latents_BTVChw = state.newest.latents_BTVChw.repeat(1, steps, 1, 1, 1, 1)
        proprio_BTS = state.newest.proprio_BTS.repeat(1, steps, 1)
        return Rollout(
            latents_BTVChw,
            self.normalizer.denormalize_proprio(proprio_BTS, state.embodiment_B),
            to_video(self.decode(latents_BTVChw)) if decode else None,
            state,
        )


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return 100.0 if error == 0 else min(100.0, 10 * np.log10(255**2 / error))


def test_the_baseline_and_the_bound_are_what_they_are_said_to_be(data):
    world, dataset = make_world(data), ShardDataset.open(data)
    metrics = evaluate(world, data, SHORT)
    table = metrics["pictures"]["all"]
    copies, bounds, holds = [], [], []
    for window in metrics["windows"]:
        episode = dataset.read(window["key"])
        assert episode.video is not None
        known = window["start"] + SHORT.context
        video = episode.video["top"]
        small = torch.from_numpy(video).movedim(-1, 1).double().unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
        coarse = (
            small.mean((3, 5)).round().repeat_interleave(2, 2).repeat_interleave(2, 3).movedim(1, -1).numpy()
        )
        for horizon in table["horizons"]:
            truth = video[known + horizon - 1]
            copies.append(psnr(video[known - 1], truth))
            bounds.append(psnr(coarse[known + horizon - 1], truth))
        last = known + SHORT.frames - 1
        holds.append(np.abs(episode.proprio_TS[last] - episode.proprio_TS[known - 1]))
    expected = np.array(copies).reshape(-1, len(table["horizons"]))
    np.testing.assert_allclose(table["mean"]["psnr_copy"], expected.mean(0), rtol=1e-4)
    expected = np.array(bounds).reshape(expected.shape)
    np.testing.assert_allclose(table["mean"]["psnr_bound"], expected.mean(0), rtol=2e-3)
    held = [found["mae_copy"][-1] for found in metrics["proprio"]["planar_arm"]["dimensions"].values()]
    np.testing.assert_allclose(held, np.mean(holds, 0), rtol=1e-4)
    assert [found["unit"] for found in metrics["proprio"]["planar_arm"]["dimensions"].values()] == [
        "rad", "rad", "m", "m",
    ]  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2])
def test_the_truth_reaches_the_bound_and_listens_to_its_actions(data, stride):
    settings = dataclasses.replace(SHORT, frames=6)
    metrics = evaluate_plainly(make_oracle(data, settings, Blocks(time_stride=stride)), data, settings)
    mean = metrics["pictures"]["all"]["mean"]
    for name in ("psnr", "psnr_mean", "psnr_median", "psnr_best"):
        assert mean[name] == mean["psnr_bound"]
    assert mean["ssim"] == mean["ssim_bound"]
    assert metrics["summary"]["psnr_gain.f6"] > 3
    assert metrics["summary"]["shuffle_ratio"] > 2
    for name in ("contrast", "sharpness", "motion"):
        assert metrics["collapse"][name]["ratio"] == metrics["collapse"][name]["ratio_bound"]
    for found in metrics["proprio"]["planar_arm"]["dimensions"].values():
        assert max(found["mae"]) < 1e-6 < min(found["mae_copy"])
    horizons = [1, 2, 4, 6] if stride == 1 else [2, 4, 6]
    assert metrics["proprio"]["planar_arm"]["horizons"] == horizons
    assert not [warning for warning in metrics["warnings"] if "short" not in warning]


def test_a_still_picture_gains_nothing_and_is_called_out(data):
    metrics = evaluate_plainly(make_world(data, Blocks(coarse=1), Still), data, SHORT)
    mean = metrics["pictures"]["all"]["mean"]
    assert mean["psnr_bound"] == [100.0] * 4
    assert mean["gain"] == mean["gain_pooled"] == mean["gain_median"] == [0.0] * 4
    assert mean["psnr"] == mean["psnr_copy"]
    for kind in ("shuffled", "mean", "late"):
        assert metrics["actions"]["rollout"][kind]["ratio"] == [1.0] * 4
    assert metrics["collapse"]["motion"]["ratio"] == 0
    text = " ".join(metrics["warnings"])
    assert all(words in text for words in ("no better than holding", "ignores them", "frozen"))
    for found in metrics["proprio"]["planar_arm"]["dimensions"].values():
        np.testing.assert_allclose(found["mae"], found["mae_copy"], rtol=1e-3)


def test_the_engine_finds_what_the_plain_world_does(data):
    world = make_world(data)
    engine, plain = (found(world, data, SHORT) for found in (evaluate, evaluate_plainly))
    for name, value in plain["summary"].items():
        assert engine["summary"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_numbers_do_not_depend_on_the_batch(data):
    world = make_world(data)
    first, second = (evaluate(world, data, dataclasses.replace(SHORT, batch=batch)) for batch in (1, 64))
    for path in ("summary", "pictures", "proprio", "windows", "intervals"):
        flat = [np.array(list(numbers(metrics[path]))) for metrics in (first, second)]
        assert len(flat[0]) > 3 or path == "intervals"
        np.testing.assert_allclose(*flat, rtol=1e-3, atol=1e-3)
    other = evaluate(world, data, dataclasses.replace(SHORT, seed=1))
    assert other["summary"]["psnr.f5"] != first["summary"]["psnr.f5"]


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, float):
        yield value


def test_windows_are_spread_and_swap_actions_with_other_episodes(data):
    world, dataset = make_world(data), ShardDataset.open(data)
    plan = plan_windows(dataset, world.spec, SHORT)
    assert plan == plan_windows(dataset, world.spec, SHORT)
    starts = {}
    for window in plan.windows:
        starts.setdefault(window.sample.episode_id, []).append(window.start)
    assert starts == {"a": [0, 11, 22], "b": [0, 13, 26], "c": [0, 9, 18]}
    assert [sample.episode_id for sample in plan.too_short] == ["short"]
    partners = list(pairs(dataset, world.spec, SHORT, plan.windows))
    assert [one.window for one, _ in partners] == list(plan.windows)
    assert {other.window for _, other in partners if other} == set(plan.windows)
    assert all(other and one.window.sample != other.window.sample for one, other in partners)
    single = dataclasses.replace(SHORT, windows_per_episode=1, episodes=2)
    few = plan_windows(dataset, world.spec, single).windows
    assert [(window.sample.episode_id, window.start) for window in few] == [("a", 11), ("c", 9)]


def test_wrong_actions_are_wrong_in_the_way_they_say(data):
    world, dataset = make_world(data), ShardDataset.open(data)
    plan = plan_windows(dataset, world.spec, SHORT)
    (one, other), *_ = pairs(dataset, world.spec, SHORT, plan.windows[3:])
    assert other is not None
    episode, start = dataset.read(one.window.sample.key), one.window.start + SHORT.context - 1
    assert start > SHORT.context
    np.testing.assert_array_equal(one.future_TA, episode.actions_TA[start : start + SHORT.frames])
    np.testing.assert_array_equal(
        one.wrong("late", other), episode.actions_TA[start - 1 : start - 1 + SHORT.frames]
    )
    np.testing.assert_array_equal(one.wrong("shuffled", other), other.future_TA)
    mean = one.wrong("mean", other)
    assert mean is not None
    np.testing.assert_allclose(mean[2], world.spec.contracts[0].action_statistics.mean, rtol=1e-6)
    assert one.wrong("shuffled", None) is None


def test_views_and_robots_are_told_apart(tmp_path):
    source = Robots(("a", "b", "c", "trained", "taught"), views=("top", "side"), second=("b", "c", "taught"))
    data = shard(tmp_path / "two", source)
    settings = dataclasses.replace(SHORT, windows_per_episode=2)
    metrics = evaluate_plainly(make_oracle(data, settings), data, settings)
    assert list(metrics["pictures"]["views"]) == ["top", "side"]
    assert list(metrics["pictures"]["embodiments"]) == ["planar_arm", "other"]
    assert metrics["pictures"]["all"]["windows"] == [12] * 4
    assert metrics["pictures"]["embodiments"]["other"]["windows"] == [8] * 4
    assert list(metrics["proprio"]["other"]["dimensions"]) == ["shoulder", "elbow"]
    assert set(metrics["actions"]["denoising"]) == {"planar_arm", "other"}
    swapped = {(window["key"], window["shuffled_with"].split("@")[0]) for window in metrics["windows"]}
    assert swapped == {("a", "a"), ("b", "c"), ("c", "b")}, "only within a robot"
    assert metrics["summary"]["psnr.f5"] == metrics["summary"]["psnr_bound.f5"]


def test_one_window_cannot_be_shuffled(data):
    settings = dataclasses.replace(SHORT, episodes=1, windows_per_episode=1, samples=1, clips=0)
    metrics = evaluate(make_world(data), data, settings)
    assert metrics["data"]["windows"] == 1
    assert metrics["summary"]["shuffle_ratio"] is None
    assert metrics["actions"]["rollout"]["shuffled"] is None
    assert metrics["actions"]["rollout"]["late"]["ratio"]
    assert metrics["actions"]["denoising"] == {}
    assert "could not be shuffled" in " ".join(metrics["warnings"])


def test_short_episodes_are_counted_and_named(data):
    metrics = evaluate(make_world(data), data, dataclasses.replace(SHORT, frames=20))
    assert metrics["data"]["too_short"] == ["short (6 frames)"]
    assert metrics["data"]["episodes"] == 3
    assert "too short for the horizon were left out: 1 (short)" in " ".join(metrics["warnings"])


def test_intervals_are_over_episodes_and_hold_the_figure(tmp_path, monkeypatch):
    lengths = {f"episode{number}": 12 for number in range(6)} | {"trained": 60}
    monkeypatch.setattr(f"{__name__}.LENGTHS", lengths)
    data = shard(tmp_path / "six", Robots(tuple(lengths)))
    metrics = evaluate_plainly(make_oracle(data, SHORT), data, SHORT)
    low, high = metrics["intervals"]["psnr_gain.f5"]
    assert low < metrics["summary"]["psnr_gain.f5"] < high
    low, high = metrics["intervals"]["shuffle_ratio"]
    assert 1 < low < metrics["summary"]["shuffle_ratio"] < high


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"split": "test"}, DataError, "split"),
        ({"frames": 100}, DataError, "too short"),
        ({"frames": 0}, ConfigError, "--frames"),
        ({"samples": 0}, ConfigError, "--samples"),
        ({"windows_per_episode": 0}, ConfigError, "--windows-per-episode"),
        ({"batch": 0}, ConfigError, "--batch"),
    ],
)
def test_bad_settings_are_refused_by_name(data, change, error, words):
    with pytest.raises(error, match=words):
        evaluate(make_world(data), data, dataclasses.replace(SHORT, **change))


def test_lengths_that_the_time_stride_does_not_divide_are_refused(data):
    world = make_world(data, Blocks(time_stride=2))
    with pytest.raises(ConfigError, match="time stride"):
        evaluate(world, data, dataclasses.replace(SHORT, context=4, frames=6))


def altered(data: Path, out: Path, change: Callable[[Manifest], Manifest]) -> Path:
    out.mkdir()
    (out / "shards").symlink_to(data / "shards")
    change(Manifest.read(data)).write(out)
    return out


def other_units(manifest: Manifest) -> Manifest:
    contract = manifest.contracts[0]
    dimensions = (dataclasses.replace(contract.action[0], unit="deg/s"), *contract.action[1:])
    return dataclasses.replace(manifest, contracts=(dataclasses.replace(contract, action=dimensions),))


def other_robot(manifest: Manifest) -> Manifest:
    contract = dataclasses.replace(manifest.contracts[0], embodiment="crane")
    shards = tuple(
        dataclasses.replace(
            shard,
            samples=tuple(dataclasses.replace(sample, embodiment="crane") for sample in shard.samples),
        )
        for shard in manifest.shards
    )
    return dataclasses.replace(manifest, contracts=(contract,), shards=shards)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (other_units, ContractError, "action of embodiment 'planar_arm'"),
        (other_robot, ContractError, "crane"),
        (lambda manifest: dataclasses.replace(manifest, fps=30.0), DataError, "frame rate"),
        (lambda manifest: dataclasses.replace(manifest, views=("front",)), DataError, "views"),
    ],
)
def test_a_dataset_of_another_robot_is_refused_by_name(data, tmp_path, change, error, words):
    world = make_world(data)
    with pytest.raises(error, match=words):
        evaluate(world, altered(data, tmp_path / "other", change), SHORT)


class Hazy(Oracle):
    """Knows what was recorded but for an error of its own, over which its samples spread as `spread` says."""

    spread = 1.0

    def rollout(self, state, actions, *, decode=True, **_):
        rolled = super().rollout(state, actions, decode=False)
        latents, proprio = rolled.latents_BTVChw.clone(), rolled.proprio_BTS.clone()
        for row, actions_TA in enumerate(np.asarray(actions, np.float32)):
            shared = np.random.default_rng(zlib.crc32(actions_TA.tobytes()))
            own = np.random.default_rng([int(state.sample_ids_B[row]), len(latents)])
            for values, scale in ((latents, 0.15), (proprio, 0.2)):
                error, spread = (rng.normal(0, scale, values[row].shape) for rng in (shared, own))
                values[row] += torch.from_numpy(error + self.spread * spread).to(values)
        video = self._shown(state, latents) if decode else None
        return Rollout(latents, proprio, video, state)


def test_calibration_tells_an_honest_world_from_an_overconfident_one(data):
    settings = dataclasses.replace(SHORT, samples=16, windows_per_episode=8, calibration=True)
    plain = evaluate_plainly(make_oracle(data, SHORT), data, SHORT)
    assert "calibration" not in plain
    for spread in (1.0, 0.3):
        world = make_oracle(data, settings)
        hazy = Hazy(world.spec, world.model, world.normalizer, world.tokenizer)
        hazy.known, hazy.spread = world.known, spread
        found = evaluate_plainly(hazy, data, settings)["calibration"]["planar_arm"]
        assert found["samples"] == 16
        for name in ("pixels", "proprio tip_x"):
            one = found["quantities"][name]
            assert one["pooled"]["spread_skill"] == pytest.approx(spread, rel=0.35), name
            assert one["leads"] == list(range(1, 6))
        cases = [one["quantities"]["pixels"]["cases"] for one in found["strata"].values()]
        assert sum(cases) == sum(found["quantities"]["pixels"]["cases"]), "every frame is in one stratum"
        assert "contact" not in found["strata"], "the planar lab tells no contact"
