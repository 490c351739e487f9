"""How the uncertainty bench asks worlds: no future and no score depends on what goes beside it."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.errors import ConfigError
from vidworld.model.config import DiTConfig
from vidworld.model.inputs import FrameShape
from vidworld.tokenizers.conv import ConvTokenizer, ConvTokenizerConfig
from vidworld.world.build import build
from vidworld.world.ensemble import Ensemble
from vidworld.world.spec import SamplerConfig, WorldSpec

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SIZE, CONTEXT, FRAMES = 32, 3, 4


@pytest.fixture
def bench(monkeypatch):
    """Import a script by its name."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def make_world(seed):
    generator = np.random.default_rng(0)
    contract = ActionContract(
        embodiment="arm",
        rate_hz=12.5,
        action=(Dimension("a", "rad", "position"), Dimension("b", "rad", "position")),
        proprio=(Dimension("x", "m", "position"),),
        action_statistics=Statistics.of(generator.uniform(-1, 1, (50, 2))),
        proprio_statistics=Statistics.of(generator.uniform(-1, 1, (50, 1))),
    )
    torch.manual_seed(0)
    tokenizer = ConvTokenizer(
        ConvTokenizerConfig(latent_channels=4, widths=(16, 16, 16), encoder_blocks=(0, 1, 1), norm_groups=4)
    )
    spec = WorldSpec(
        model=DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2, num_registers=1),
        shape=FrameShape.from_contracts(
            (contract,), views=1, channels=4, height=SIZE // 8, width=SIZE // 8
        ),
        views=("scene",), height=SIZE, width=SIZE, fps=12.5, contracts=(contract,),
        sampler=SamplerConfig(steps=2, window=6),
    )  # fmt: skip
    world = build(spec, tokenizer)
    torch.manual_seed(seed)
    for parameter in world.model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    return world.requires_grad_(False).eval().double()


@pytest.fixture(scope="module")
def worlds():
    return [make_world(seed) for seed in (1, 2)]


def windows_of(bench, count=5):
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        length = CONTEXT + FRAMES
        frames = rng.integers(0, 256, (length, SIZE, SIZE, 3), dtype=np.uint8)
        actions = rng.uniform(-1, 1, (length - 1, 2)).astype(np.float32)
        proprio = rng.uniform(-1, 1, (length, 1)).astype(np.float32)
        made.append(
            bench("uncertainty_worlds").Window(f"e{number}", "container", frames, actions, proprio, CONTEXT)
        )
    return made


def test_futures_do_not_depend_on_how_many_go_at_once(bench, worlds):
    imaginer, windows = bench("uncertainty_worlds").Imaginer, windows_of(bench)
    at = [0, FRAMES - 1]
    found = [list(imaginer(worlds[0], samples=4, rows=rows)(windows, at)) for rows in (4, 12)]
    for one, *others in zip(*found, strict=True):
        assert one.video_MTHWC.shape == (4, 2, SIZE, SIZE, 3)
        assert one.proprio_MTS.shape == (4, FRAMES, 1)
        for other in others:
            assert other.window.key == one.window.key
            torch.testing.assert_close(other.latents_MTX, one.latents_MTX, rtol=0, atol=1e-5)
            assert np.abs(other.video_MTHWC.astype(int) - one.video_MTHWC).max() <= 1
    assert not torch.allclose(found[0][0].latents_MTX[0], found[0][0].latents_MTX[1]), "samples differ"
    assert not torch.allclose(found[0][0].latents_MTX, found[0][1].latents_MTX), "windows differ"
    state = worlds[0].reset(windows[0].prompt(worlds[0]), 4, 0)
    rolled = worlds[0].rollout(state, windows[0].actions_TA[CONTEXT - 1 :], allow_out_of_range=True)
    torch.testing.assert_close(
        found[0][0].latents_MTX, rolled.latents_BTVChw.float().flatten(2), rtol=0, atol=1e-5
    )
    picture = rolled.video_BTVHWC[:, at, 0].numpy()
    assert np.abs(found[0][0].video_MTHWC.astype(int) - picture).max() <= 1


def test_members_that_differ_disagree_and_copies_do_not(bench, worlds):
    imaginer, ood = bench("uncertainty_worlds").Imaginer, bench("uncertainty_ood")
    windows = windows_of(bench, 3)

    def score(members):
        return ood.parts_of(imaginer(Ensemble(members), samples=16, rows=32))["E"](windows)

    apart, copies = score(worlds), score([worlds[0], worlds[0]])
    assert (apart > 0).all()
    assert np.abs(copies).max() < 0.3 * apart.min()
    parts = ood.parts_of(imaginer(Ensemble(worlds), samples=16, rows=32))
    assert set(parts) == {"E", "E8", "A"}
    np.testing.assert_array_equal(parts["E8"](windows), parts["E"](windows), "all frames are among the first")
    np.testing.assert_array_equal(parts["E"](windows[:1]), apart[:1], "each list has scores of its own")
    assert (parts["A"](windows) > 0).all()
    with pytest.raises(ConfigError, match="multiple of 2 members"):
        imaginer(Ensemble(worlds), samples=5, rows=8)


def test_scores_do_not_depend_on_neighbours(bench, worlds):
    ood, windows = bench("uncertainty_ood"), windows_of(bench)
    novel, few = ood.novel(Ensemble(worlds), at_once=2), windows_of(bench, 3)
    assert set(novel) == {"surprise", "proprio", "known"}
    assert set(ood.novel(worlds[0])) == {"surprise", "proprio"}
    for name, score in novel.items():
        alone = np.concatenate([ood.novel(Ensemble(worlds))[name]([one]) for one in few])
        np.testing.assert_allclose(score(few), alone, rtol=1e-4)
        assert (alone > 0).all()
    together = ood.flow_loss(worlds[0], frames=5, at_once=3)(windows)
    alone = np.concatenate([ood.flow_loss(worlds[0], frames=5)([one]) for one in windows])
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert len(set(together.round(6))) == len(windows)
    nearest = ood.nearest(worlds[0], windows[:3])(windows)
    assert nearest[:3].max() < 1e-3 < nearest[3:].min()


def test_the_probe_ranks_what_came_among_samples(bench, worlds, monkeypatch):
    """Without a ruler the probe sees latents; a world of its own truth ranks evenly, a sure one does not."""
    container = bench("uncertainty_container")
    base = windows_of(bench, 1)[0]

    def features(window, imaginer, ruler, at):
        return np.array([window.value])

    monkeypatch.setattr(container, "_true_features", features)
    monkeypatch.setattr(container, "_features", lambda video, latents, *rest: latents[:, 0].numpy())
    monkeypatch.setattr(container, "outcome_of", lambda window: {"hidden": {"mass_kg": np.exp(window.mass)}})

    def episodes(count, seed):
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(count):
            one = bench("uncertainty_worlds").Window(**vars(base))
            object.__setattr__(one, "mass", float(rng.normal()))
            object.__setattr__(one, "value", one.mass + 0.1 * float(rng.normal()))
            found.append(one)
        return found

    class Prior:
        samples = 15

        def __init__(self, spread):
            self.spread = spread

        def __call__(self, windows, at):
            rng = np.random.default_rng(9)
            for one in windows:
                drawn = self.spread * np.sqrt(1.01) * np.repeat(rng.normal(size=(15, 1, 1)), FRAMES, 1)
                yield bench("uncertainty_worlds").Imagined(
                    one,
                    torch.from_numpy(drawn),
                    np.zeros((15, FRAMES, 1)),
                    np.zeros((15, 0, 4, 4, 3), np.uint8),
                )

    train, held = episodes(200, 0), episodes(300, 1)
    found = {
        spread: container.probe_mass(train, held, Prior(spread), None, lambda: False) for spread in (1.0, 0.4)
    }
    rows = {spread: {name: value for name, (value, _) in one.rows().items()} for spread, one in found.items()}
    assert rows[1.0]["uncertainty.mass_probe_r2"] > 0.9
    assert rows[1.0]["uncertainty.sbc_mass_p"] > 0.01 > rows[0.4]["uncertainty.sbc_mass_p"]
    assert found[1.0].counts_R.sum() == 300
    assert container.probe_mass(train[:5], held, Prior(1.0), None, lambda: False) is None
