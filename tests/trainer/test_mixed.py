"""Two robots in one run, from video to rollouts: other cameras, sizes, rates and numbers of dimensions."""

import dataclasses
import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vidworld.config import from_mapping
from vidworld.contract import Dimension, Statistics
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.shards import ShardDataset
from vidworld.errors import CheckpointError, ConfigError, ContractError, DataError
from vidworld.evaluation import evaluate, rollout
from vidworld.evaluation.export import export
from vidworld.lab.planar import PlanarConfig, PlanarSource
from vidworld.model.embodiments import carry_over
from vidworld.tokenizers.base import to_unit_range
from vidworld.tokenizers.conv import ConvTokenizer
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import MixPart, TokenizerTraining, WorldTraining, read_training
from vidworld.trainer.corpus import by_embodiment, held_out, open_corpus, open_latents, robots, world_spec
from vidworld.trainer.feed import clip_feed
from vidworld.trainer.loop import noise_generator
from vidworld.trainer.tasks import Moment, TokenizerTask, WorldTask
from vidworld.trainer.train import train
from vidworld.types import EmbodimentSpec, Episode, Layout, Video
from vidworld.world.build import build, load_weights, narrow
from vidworld.world.load import find, load
from vidworld.world.prompt import Prompt
from vidworld.world.spec import WorldSpec

MIX_LOOK = {"validate_clips": 4, "validate_batches": 1, "horizon": 3, "sample_episodes": 1}


def _mirrored(frames, width: int):
    for frame in frames():
        yield np.ascontiguousarray(frame[:, ::-1])[:, :width]


@dataclasses.dataclass(frozen=True)
class TwinSource:
    """The planar arm as another robot: two cameras, half the rate, one action more, two states fewer."""

    episodes: int
    base: PlanarSource

    name = "twin"
    views = ("left", "right")
    fps = 5.0

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        action = (*self.base.embodiments[0].action, Dimension("idle", "1", "position"))
        return (EmbodimentSpec("twin", 5.0, action, self.base.embodiments[0].proprio[:2]),)

    @property
    def fingerprint(self) -> str:
        return f"twin {self.base.fingerprint}"

    def episode_ids(self) -> list[str]:
        return self.base.episode_ids()

    def read(self, episode_id: str) -> Episode:
        episode = self.base.read(episode_id)
        top = episode.views["top"]
        idle = np.linspace(-1, 1, len(episode), dtype=np.float32)[:, None]
        return dataclasses.replace(
            episode,
            embodiment="twin",
            fps=self.fps,
            views={"left": top, "right": Video(top.num_frames, partial(_mirrored, top.frames, 48))},
            actions_TA=np.concatenate([episode.actions_TA, idle], 1),
            proprio_TS=episode.proprio_TS[:, :2],
            timestamps_T=np.arange(len(episode)) / self.fps,
        )


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten episodes of the second robot at 48x48."""
    out = tmp_path_factory.mktemp("data") / "twin"
    source = TwinSource(10, PlanarSource(10, 50, PlanarConfig(frames=16, size=48)))
    convert(source, ConvertOptions(out=out, size="48x48", workers=1))
    return out


def mix(*paths: Path) -> list[dict]:
    return [{"data": str(path), "weight": weight} for path, weight in zip(paths, (0.6, 0.4), strict=True)]


def tokenizer_settings(*paths: Path) -> TokenizerTraining:
    return from_mapping(
        TokenizerTraining,
        {
            "kind": "tokenizer",
            "mix": mix(*paths),
            "tokenizer": {"widths": [16, 16, 16], "encoder_blocks": [0, 0, 1], "decoder_blocks": [0, 0, 1]},
            "loader": {"batch_size": 4, "workers": 0},
            "loop": {"steps": 4, "log_every": 2},
            "look": {"validate_clips": 4, "validate_batches": 1},
            "wandb": "off",
        },
    )


def world_settings(tokenizer: Path, data: dict, **settings) -> WorldTraining:
    base = {
        "kind": "world",
        "tokenizer": str(tokenizer),
        "model": {"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2},
        "loader": {"clip_frames": 6, "batch_size": 4, "workers": 0},
        "optim": {"warmup_steps": 2},
        "loop": {"steps": 8, "log_every": 4},
        "look": MIX_LOOK,
        "wandb": "off",
    }
    return from_mapping(WorldTraining, base | data | settings)


@pytest.fixture(scope="session")
def mixed(planar: Path, twin: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tokenizer and a world that were trained on both robots for a moment."""
    root = tmp_path_factory.mktemp("mixed")
    train(tokenizer_settings(planar, twin), root / "tokenizer", progress_bar=False)
    settings = world_settings(root / "tokenizer", {"mix": mix(planar, twin)})
    train(settings, root / "world", progress_bar=False)
    return SimpleNamespace(tokenizer=root / "tokenizer", world=root / "world", settings=settings)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_robot_is_measured_by_itself(mixed: SimpleNamespace) -> None:
    last = {name: value for row in rows(mixed.world) for name, value in row.items()}
    for name in ("val_loss/planar_arm", "val_loss/twin", "sample_psnr/planar", "sample_psnr/twin"):
        assert np.isfinite(last[name])
    assert last["val_loss"] == pytest.approx(
        (last["val_loss/planar_arm"] + last["val_loss/twin"]) / 2, rel=1e-5
    )
    assert {"faithful_ratio_shuffled/planar_arm", "faithful_ratio_shuffled/twin"} <= last.keys()
    of_tokenizer = {name for row in rows(mixed.tokenizer) for name in row}
    assert {"val_loss/planar_arm", "val_loss/twin", "held_out_psnr"} <= of_tokenizer
    assert {path.parent.name for path in (mixed.world / "samples").rglob("*.mp4")} == {"planar", "twin"}


def test_the_world_knows_how_each_robot_sees(mixed: SimpleNamespace) -> None:
    spec = WorldSpec.read(mixed.world)
    assert spec.layouts == (Layout(("top",), 32, 32, 10.0), Layout(("left", "right"), 48, 48, 5.0))
    assert (spec.shape.views, spec.shape.height, spec.shape.width) == (2, 6, 6)
    assert spec.shape.embodiment_views == (1, 2)
    assert (spec.shape.action_dims, spec.shape.proprio_dims) == (4, 4)
    assert spec.only(["planar_arm"]).fps == 10.0
    with pytest.raises(ConfigError, match="see alike"):
        spec.only(["planar_arm", "twin"])


@pytest.mark.parametrize(("name", "size", "views"), [("planar_arm", 32, 1), ("twin", 48, 2)])
def test_a_robots_world_is_of_its_own_size(mixed, planar, twin, name: str, size: int, views: int) -> None:
    dataset = ShardDataset.open({"planar_arm": planar, "twin": twin}[name])
    sample = dataset.manifest.samples("val")[0]
    episode = dataset.read_clip(sample.key, 0, 9)
    assert episode.video is not None
    frames_TVHWC = np.stack(list(episode.video.values()), 1)
    prompt = Prompt(frames_TVHWC[:4], episode.proprio_TS[:4], episode.actions_TA[:3], name)
    world = load(mixed.world, "cpu", embodiment=name)
    state = world.reset(prompt, 2)
    rolled = world.rollout(state, episode.actions_TA[3:8])
    assert rolled.video_BTVHWC is not None
    assert rolled.video_BTVHWC.shape == (2, 5, views, size, size, 3)
    assert rolled.proprio_BTS.shape == (2, 5, episode.proprio_TS.shape[1])
    with pytest.raises(ConfigError, match="robots that see differently"):
        load(mixed.world, "cpu").reset(prompt)


def parts_of(mixed: SimpleNamespace, planar: Path, twin: Path) -> tuple:
    """A task with weights that are not zero, and a batch of both robots."""
    corpus = open_corpus(mixed.settings)
    latents = open_latents(corpus, mixed.world / "latents")
    tokenizer = load_tokenizer(mixed.tokenizer)
    world = build(world_spec(mixed.settings, corpus, tokenizer), tokenizer)
    torch.manual_seed(0)
    for parameter in world.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    objective = dataclasses.replace(mixed.settings.objective, motion_weight=1.0, resample_fraction=0.5)
    task = WorldTask(world.model, world.normalizer, objective)
    batch = next(iter(clip_feed(latents, mixed.settings.loader, seed=3).open(0)))
    assert set(batch.embodiment_B.tolist()) == {0, 1}
    return task, batch


def test_losses_do_not_count_padding(mixed, planar, twin) -> None:
    """Other values in the padding give the same loss to the bit; a loss is that of a robot's own latents."""
    task, batch = parts_of(mixed, planar, twin)
    assert task.net.used_latents_EV1hw is not None
    assert batch.latents_BTVChw is not None
    used, given = task.net.used_latents_EV1hw[batch.embodiment_B][:, None], batch.latents_BTVChw

    def loss(value: float, progress: float) -> dict[str, torch.Tensor]:
        other = dataclasses.replace(batch, latents_BTVChw=given.where(used, value))
        return task(other, noise_generator(0, 0, 0, "cpu"), Moment(progress))

    for progress in (0.0, 0.9):
        zero, loud, nan = (loss(value, progress) for value in (0.0, 1e4, float("nan")))
        assert zero["loss"].isfinite()
        assert all(torch.equal(zero[name], loud[name]) for name in zero)
        assert all(torch.equal(zero[name], nan[name]) for name in zero)

    # With heads at zero the prediction is zero, and the error the mean square of what is really there.
    for parameter in (*task.net.patch_head.parameters(), *task.net.proprio_head.parameters()):
        torch.nn.init.zeros_(parameter)
    for index in (0, 1):
        rows = [row for row, one in enumerate(batch.embodiment_B.tolist()) if one == index]
        found = task(batch.rows(rows), noise_generator(0, 0, 0, "cpu"), Moment())["latents"]
        mine = given[rows].float()
        real = mine[used[rows].expand_as(mine)]
        assert float(found) == pytest.approx(float(real.square().mean()), rel=1e-5)
        diluted = float(mine.where(used[rows], 0).square().mean())
        if index == 0:
            assert float(found) > 3 * diluted, "negative control: a mean over padding too"


def test_the_tokenizer_meets_pictures_without_their_padding(mixed, planar, twin) -> None:
    corpus = open_corpus(tokenizer_settings(planar, twin), "video")
    tokenizer = load_tokenizer(mixed.tokenizer)
    assert isinstance(tokenizer, ConvTokenizer)
    task = TokenizerTask(tokenizer, robots(corpus)[1])
    batches = held_out(tokenizer_settings(planar, twin), corpus)
    for name, size in (("planar_arm", 32), ("twin", 48)):
        batch = batches[name][0]
        video = batch.video_BTVCHW
        assert video is not None
        noisy = video.clone()
        if name == "planar_arm":
            noisy[:, :, 1:] = 255
            noisy[..., size:, :] = 255
        loud = dataclasses.replace(batch, video_BTVCHW=noisy)
        losses = [task(one, torch.Generator().manual_seed(0), Moment())["loss"] for one in (batch, loud)]
        assert torch.equal(*losses)
        views = 1 if name == "planar_arm" else 2
        own = video[:, :, :views, :, :size, :size].movedim(2, 1).flatten(0, 1)
        expected = tokenizer.training_loss(to_unit_range(own), torch.Generator().manual_seed(0))["loss"]
        torch.testing.assert_close(losses[0], expected)
    weights = [task.weight(batches[name][0]) for name in ("planar_arm", "twin")]
    assert weights == [4 * 32 * 32, 4 * 2 * 48 * 48]


def test_a_mixed_run_resumes_bit_by_bit(mixed: SimpleNamespace, tmp_path: Path) -> None:
    """A run that lost its last checkpoint ends where the whole one ended; other shares are refused."""
    loop = dataclasses.replace(mixed.settings.loop, save_every=4)
    settings = dataclasses.replace(mixed.settings, latents=mixed.world / "latents", loop=loop)
    run = tmp_path / "halves"
    train(settings, run, progress_bar=False)
    last = find(run).weights
    expected = load_file(last)
    whole = load_file(find(mixed.world).weights)
    assert all(torch.equal(whole[name], weight) for name, weight in expected.items())
    shutil.rmtree(last.parent)
    (run / "checkpoints/latest").write_text("step-00000004")
    train(settings, run, resume=True, progress_bar=False)
    found = load_file(find(run).weights)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())

    other = dataclasses.replace(settings, mix=(settings.mix[0], MixPart(settings.mix[1].data, 5.0)))
    with pytest.raises(
        (DataError, CheckpointError), match=r"manifest_digest of the sample order|world of the"
    ):
        train(other, run, resume=True, progress_bar=False)


@pytest.mark.parametrize("name", ["planar_arm", "twin"])
def test_commands_pick_the_robot_from_the_episode(mixed, planar, twin, name: str, tmp_path: Path) -> None:
    data = {"planar_arm": planar, "twin": twin}[name]
    key = ShardDataset.open(data).manifest.samples("val")[0].key
    run = str(mixed.world)
    prompt = ["--prompt", key, "--data", str(data), "--frames", "3", "--samples", "1", "--device", "cpu"]
    rollout.main([run, "--out", str(tmp_path / "r"), *prompt], "vidworld rollout")
    record = json.loads((tmp_path / "r/rollout.json").read_text())
    assert record["world"]["embodiment"] == name
    assert record["fps"] == {"planar_arm": 10.0, "twin": 5.0}[name]
    few = ["--frames", "4", "--samples", "1", "--windows-per-episode", "2", "--device", "cpu"]
    evaluate.main([run, str(data), "--out", str(tmp_path / "e"), *few], "vidworld eval")
    metrics = json.loads((tmp_path / "e/metrics.json").read_text())
    assert metrics["world"]["views"] == {"planar_arm": ["top"], "twin": ["left", "right"]}[name]


def test_exports_of_all_robots_and_of_one(mixed: SimpleNamespace, tmp_path: Path) -> None:
    for folder, name in (("all", None), ("one", "twin")):
        (tmp_path / folder).mkdir()
        export(mixed.world, tmp_path / folder, embodiment=name)
    whole, one = load(tmp_path / "all", "cpu", embodiment="twin"), load(tmp_path / "one", "cpu")
    assert one.spec == whole.spec
    pairs = zip(one.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    card = (tmp_path / "all/README.md").read_text()
    assert 'load("path/to/this/folder", embodiment="planar_arm")' in card
    assert "top; 32x32 at 10 frames/s; left, right; 48x48 at 5 frames/s" in card


def test_a_trained_model_meets_a_new_robot(mixed, planar, twin, tokenizer_run, tmp_path: Path) -> None:
    """The old robot's rollouts keep every bit at the start, and a short run learns the new one."""
    base = world_settings(mixed.tokenizer, {"data": str(planar)}, loop={"steps": 6, "log_every": 6})
    train(base, tmp_path / "old", progress_bar=False)
    grown = {"init": str(tmp_path / "old"), "optim": {"warmup_steps": 2, "lr": 3e-3}}
    loop = {"steps": 30, "log_every": 10, "ema_decay": 0.8}
    more = world_settings(mixed.tokenizer, {"data": str(twin)}, loop=loop, **grown)
    more = dataclasses.replace(more, look=dataclasses.replace(more.look, validate_every=5))
    train(more, tmp_path / "new", progress_bar=False)
    spec = WorldSpec.read(tmp_path / "new")
    assert [contract.embodiment for contract in spec.contracts] == ["twin", "planar_arm"], (
        "the data's come first"
    )
    losses = [row["val_loss"] for row in rows(tmp_path / "new") if "val_loss" in row]
    assert losses[-1] < 0.9 * losses[0], losses

    # Weights as the new run began with them: the old robot does not notice.
    known = WorldSpec.read(tmp_path / "old")
    start = build(spec, load_tokenizer(mixed.tokenizer))
    adapt = partial(carry_over, before=known.robots, after=spec.robots)
    load_weights(start.model, find(tmp_path / "old").weights, adapt=adapt)
    own, old = narrow(start, ["planar_arm"]), load(tmp_path / "old", "cpu")
    dataset = ShardDataset.open(planar)
    episode = dataset.read(dataset.manifest.samples("val")[0].key)
    assert episode.video is not None
    prompt = Prompt(episode.video["top"][:4], episode.proprio_TS[:4], episode.actions_TA[:3])
    with torch.no_grad():
        found, expected = (w.rollout(w.reset(prompt), episode.actions_TA[3:7]) for w in (own, old))
    assert torch.equal(found.latents_BTVChw, expected.latents_BTVChw)
    assert torch.equal(found.proprio_BTS, expected.proprio_BTS)


def test_what_does_not_fit_the_world_to_start_from_is_refused(mixed, planar, twin, tokenizer_run) -> None:
    corpus = open_corpus(mixed.settings)
    tokenizer, known = load_tokenizer(mixed.tokenizer), WorldSpec.read(mixed.world)
    with pytest.raises(ConfigError, match="tokenizer of the world to start from"):
        world_spec(mixed.settings, corpus, load_tokenizer(tokenizer_run), known)
    changed = dataclasses.replace(known.contracts[0], rate_hz=20.0)
    other = dataclasses.replace(known, contracts=(changed, known.contracts[1]))
    with pytest.raises(ContractError, match="rate_hz of embodiment 'planar_arm'"):
        world_spec(mixed.settings, corpus, tokenizer, other)
    # Other data of the same robot: what the weights were trained with stays.
    wider = Statistics.of(np.linspace(-9, 9, 50)[:, None] * np.ones(len(known.contracts[0].action)))
    changed = dataclasses.replace(known.contracts[0], action_statistics=wider)
    other = dataclasses.replace(known, contracts=(changed, known.contracts[1]))
    assert world_spec(mixed.settings, corpus, tokenizer, other).contracts[0] == changed
    layouts = (known.layouts[0], dataclasses.replace(known.layouts[1], fps=7.0))
    other = dataclasses.replace(known, layouts=layouts)
    with pytest.raises(ConfigError, match="views, size or rate of embodiment 'twin'"):
        world_spec(mixed.settings, corpus, tokenizer, other)


def test_noise_that_the_world_to_start_from_never_saw_is_told(mixed) -> None:
    """Energy scores with more noise at the start; less of it is what such a stage is for."""
    corpus, tokenizer = open_corpus(mixed.settings), load_tokenizer(mixed.tokenizer)
    known = WorldSpec.read(mixed.world)
    settings = dataclasses.replace(
        mixed.settings,
        model=dataclasses.replace(mixed.settings.model, noise_dims=3),
        objective=dataclasses.replace(mixed.settings.objective, kind="energy"),
        sampler=dataclasses.replace(mixed.settings.sampler, steps=1, method="euler"),
    )
    quiet = dataclasses.replace(known, sampler=dataclasses.replace(known.sampler, start_noise=0.0))
    with pytest.warns(UserWarning, match="start_noise 0 and has never seen the noise"):
        world_spec(settings, corpus, tokenizer, quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world_spec(settings, corpus, tokenizer, known)
        less = dataclasses.replace(settings, sampler=dataclasses.replace(settings.sampler, start_noise=0.0))
        world_spec(less, corpus, tokenizer, known)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: world\ntokenizer: t\n", "exactly one of them"),
        ("kind: world\ntokenizer: t\ndata: a\nmix: [{data: b}]\n", "exactly one of them"),
        ("kind: world\ntokenizer: t\nmix: [{data: b, wieght: 1}]\n", "mix entry 1; did you mean 'weight'"),
        ("kind: tokenizer\nmix: [{weight: 2}]\n", "data"),
    ],
)
def test_bad_mixes_are_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_training(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_clips_are_sorted_by_robot(mixed, planar, twin) -> None:
    _, batch = parts_of(mixed, planar, twin)
    found = by_embodiment([batch, batch], ["planar", "twin"])
    assert sum(len(one.ids) for batches in found.values() for one in batches) == 8
    for index, name in enumerate(found):
        assert all((one.embodiment_B == index).all() for one in found[name])
