"""The uncertainty bench: a world that samples the truth passes every part, and one that does not fails."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidworld.data.shards import EpisodeArrays
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.calibration import Verified, tally
from vidworld.evaluation.oracle import OracleConfig, Recorded
from vidworld.evaluation.readout import Readings

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SIZE, SAMPLES, LEADS = 16, 24, (1, 3)


@pytest.fixture
def bench(monkeypatch):
    """Import a script by its name."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def drawn(values: np.ndarray) -> np.ndarray:
    """Pictures [..., S, S, 3] whose rows of pixels show four quantities [..., 4] from -1 to 1."""
    level = (np.clip(values, -1, 1) * 120 + 128).round().astype(np.uint8)
    bands = np.repeat(level, SIZE // 4, -1)[..., None, None]
    return np.broadcast_to(bands, (*bands.shape[:-2], SIZE, 3)).copy()


class Drawn:
    """A ruler that reads what `drawn` shows."""

    def read(self, videos_NTHWC, kind, reference_HWC):
        rows = videos_NTHWC[..., 0, 0].astype(np.float64)
        parts = rows.reshape(*rows.shape[:-1], 4, -1).mean(-1)
        names = ("box_x", "box_y", "box_z", "box_tilt")
        return Readings(kind, {}, {name: (parts[..., q] - 128) / 120 for q, name in enumerate(names)})

    def values(self, readings, names):
        return np.stack([readings.quantities[name] for name in names], -1)


def window(worlds, key, frames_THWC, context):
    count = len(frames_THWC)
    episode = EpisodeArrays(
        key, {"scene": frames_THWC}, None, np.zeros((count, 2), np.float32),
        np.zeros((count, 3), np.float32), np.arange(count) / 12.5, {"outcome": {"hidden": {"mass_kg": 1.0}}},
    )  # fmt: skip
    return worlds.Window(
        key, "container", frames_THWC, episode.actions_TA[:-1], episode.proprio_TS, context, episode
    )


class Sampler:
    """Imagines true futures: wider, narrower or elsewhere if asked."""

    def __init__(self, worlds, centre, spread=1.0, bias=0.0):
        self.worlds, self.centre, self.spread, self.bias, self.samples = worlds, centre, spread, bias, SAMPLES
        self.world = None

    def __call__(self, windows, at=None):
        for number, one in enumerate(windows):
            rng = np.random.default_rng([77, number, one.context])
            wide = 0.1 * self.spread * rng.normal(size=(SAMPLES, 1, 4)) + self.bias
            values = self.centre(number, one) + np.repeat(wide, len(at), 1)
            yield self.worlds.Imagined(
                one, torch.zeros(SAMPLES, len(at), 1), np.zeros((SAMPLES, len(at), 3)), drawn(values)
            )


def pairs_of(worlds, truth, config, count=8):
    """Episodes with true ensembles around a place of their own, and that place by number."""
    rng = np.random.default_rng(0)
    places = rng.uniform(-0.3, 0.3, (count, 4))
    pairs = []
    for number, place in enumerate(places):
        support = place + 0.1 * np.repeat(rng.normal(size=(80, 1, 4)), len(LEADS), 1)
        indices = rng.permutation(80)[: 2 * SAMPLES].reshape(2, SAMPLES)
        came = place + 0.1 * rng.normal(size=4)
        frames = drawn(np.repeat(came[None], config.last, 0))
        uniform = place + 0.3 * np.repeat(rng.normal(size=(2 * SAMPLES, 1, 4)), len(LEADS), 1)
        made = truth.Truth(
            {}, support, indices, drawn(support[indices]), uniform,
            0.1 * np.ones((len(config.contexts), 4)) / np.arange(1, len(config.contexts) + 1)[:, None],
            np.full(len(config.contexts), 50.0), place - 0.3, place + 0.3, uniform[:, 0],
        )  # fmt: skip
        pairs.append((window(worlds, f"e{number}", frames, config.context), made))
    return pairs, lambda number, one: places[number]


@pytest.fixture
def parts(bench, monkeypatch):
    container = bench("uncertainty_container")
    monkeypatch.setattr(container, "shown", lambda world, frames: frames)
    worlds, truth = bench("uncertainty_worlds"), bench("uncertainty_truth")
    config = truth.TruthConfig(
        context=2, leads=LEADS, samples=SAMPLES, draws=80, contexts=(2, 3, 4), target=5
    )
    return container, worlds, truth, config


def test_true_futures_pass_and_others_do_not(parts):
    container, worlds, truth, config = parts
    pairs, centre = pairs_of(worlds, truth, config)

    def rows(**wrong):
        found = container.compare_futures(
            pairs, Sampler(worlds, centre, **wrong), Drawn(), config, lambda: False
        )
        return {name.removeprefix("uncertainty."): value for name, (value, _) in found.rows().items()}

    honest = rows()
    assert honest["wasserstein_ratio"] == pytest.approx(1, abs=0.2)
    assert honest["crps_ratio_oracle.container"] == pytest.approx(1, abs=0.15)
    assert honest["outside_support"] < 0.1
    assert honest["energy_test.rejected"] <= 0.25
    assert honest["wasserstein_ratio.uniform"] > 2
    sure, elsewhere, wild = rows(spread=0.2), rows(bias=0.25), rows(spread=3.0)
    assert min(one["wasserstein_ratio"] for one in (sure, elsewhere, wild)) > 1.5
    assert min(one["energy_test.rejected"] for one in (sure, elsewhere, wild)) > 0.7
    assert elsewhere["crps_ratio_oracle.container"] > 1.5
    assert wild["outside_support"] > 0.3 > honest["outside_support"]


def test_the_spread_narrows_only_where_it_does(parts):
    container, worlds, truth, config = parts
    pairs, centre = pairs_of(worlds, truth, config)
    noise = np.random.default_rng(0).normal(0, 0.001, (200, 4))

    class Narrowing(Sampler):
        def __call__(self, windows, at=None):
            self.spread = 1 / (windows[0].context - 1)
            assert len({len(one.frames_THWC) for one in windows}) == 1
            assert len(windows[0].frames_THWC) == config.target + 1, "always the same frame"
            yield from super().__call__(windows, at)

    found = container.narrow_spread(pairs, Narrowing(worlds, centre), Drawn(), config, noise, lambda: False)
    np.testing.assert_allclose(found.world_KQ, found.truth_KQ, rtol=0.3)
    assert found.contexts == (2, 3, 4)
    blind = container.narrow_spread(pairs, Sampler(worlds, centre), Drawn(), config, noise, lambda: False)
    assert (blind.world_KQ[-1] > 2 * blind.truth_KQ[-1]).all()
    assert found.outside["world"] < 0.05 < found.outside["uniform"]


def test_latents_are_tallied_as_everything_else(bench):
    calibration = bench("uncertainty_calibration")
    rng = np.random.default_rng(0)
    samples, truth = rng.normal(size=(12, 3, 50)), rng.normal(size=(3, 50))
    ours = calibration.latent_tally(torch.from_numpy(samples), torch.from_numpy(truth))
    other = tally(samples.astype(np.float64), truth, rng)
    for name in ("cases_T", "variance_T", "error_T", "crps_T"):
        np.testing.assert_allclose(getattr(ours, name), getattr(other, name), rtol=1e-6, err_msg=name)
    assert ours.ranks_TR.tolist() == other.ranks_TR.tolist()


@pytest.mark.parametrize(("spread", "honest"), [(1.0, True), (0.4, False)])
def test_headline_rows_tell_honest_from_sure(bench, spread, honest):
    calibration = bench("uncertainty_calibration")
    rng = np.random.default_rng(1)
    found = calibration.Kind("paint")
    for _ in range(80):
        tallies = {}
        for name, unit in (
            ("latents", 1.0),
            ("proprio x", 5.0),
            ("read coverage", 0.01),
            ("read lowest_m", 3.0),
        ):
            truth = unit * rng.normal(size=(20, 1))
            tallies[name] = tally(spread * unit * rng.normal(size=(32, 20, 1)), truth, rng)
        found.verified.append(
            Verified(tallies, np.zeros(20), np.zeros((32, 20, 0)), np.zeros((20, 0)), np.full(20, 1), "paint")
        )
    rows = {name: value for name, (value, _) in calibration.kind_rows(found).items()}
    assert rows["uncertainty.ssr.paint"] == rows["uncertainty.ssr.paint.outcomes"]
    assert rows["uncertainty.ssr.paint"] == pytest.approx(spread, abs=0.06)
    assert (abs(rows["uncertainty.coverage90.paint"] - 0.9) < 0.02) == honest
    assert (rows["uncertainty.rank_p.paint"] > 0.01) == honest
    assert rows["uncertainty.ssr.paint.latents.moving"] == pytest.approx(spread, abs=0.06)
    assert "uncertainty.ssr.paint.latents.contact" not in rows


def test_what_cannot_be_compared_is_refused(bench):
    truth = bench("uncertainty_truth")
    for wrong in ({"draws": 10}, {"contexts": (16, 8)}, {"target": 20}, {"contexts": (10, 20)}):
        with pytest.raises(ConfigError, match=r"truth\."):
            truth.TruthConfig(**wrong)


@pytest.fixture(scope="module")
def recorded():
    """An episode of the container as a dataset has it."""
    pytest.importorskip("mujoco")
    from vidworld.lab.episode import LabConfig, generate
    from vidworld.lab_command import recorded as as_source

    config = LabConfig(frames=44, size=64, variety="one", exploration=0.0, masks=False)
    episode = generate("container", 4, config)
    source = as_source(episode, "container-000004")
    meta = {"source": source.source, "outcome": source.outcome}
    return Recorded(meta, episode.actions_TA, 64, "joint", "container-000004"), episode


CONFIG = OracleConfig(variety="one", exploration=0.0)


def test_shifts_show_in_the_known_frames_and_change_nothing_else(bench, recorded):
    ood = bench("uncertainty_ood")
    made, episode = recorded
    known, arm = slice(0, 8), slice(0, 7)
    for shift in ("colour", "force", "speed", "embodiment"):
        found = ood.play_shift(ood.Job(made, shift, 40, CONFIG))
        assert found is not None
        frames, actions, proprio = found
        apart = np.abs(frames[known].astype(int) - episode.frames_THWC[known])
        assert apart.max(-1).mean() > 0.05, shift
        assert frames.shape == (40, 64, 64, 3)
        same = np.array_equal(proprio[known], episode.proprio_TS[known])
        assert same == (shift in ("colour", "force")), "a look or a push does not move the arm"
        if shift == "colour":
            np.testing.assert_array_equal(proprio, episode.proprio_TS[:40])
        if shift == "speed":
            pace = np.abs(np.diff(proprio[known, arm], axis=0)).sum()
            assert pace > 1.6 * np.abs(np.diff(episode.proprio_TS[known, arm], axis=0)).sum()
            assert not np.array_equal(actions, episode.actions_TA[:40])
        if shift == "force":
            assert not np.array_equal(frames[7], frames[0])


def test_a_corrupted_frame_is_noise_in_blocks_of_the_known_frames(bench):
    ood, worlds = bench("uncertainty_ood"), bench("uncertainty_worlds")
    one = window(worlds, "e0", np.full((6, SIZE, SIZE, 3), 100, np.uint8), 4)
    bad = ood.corrupt(one)
    assert (bad.frames_THWC[4:] == 100).all()
    share = (bad.frames_THWC[:4] != 100).any(-1).mean()
    assert 0.1 < share < 0.7
    assert (one.frames_THWC == 100).all(), "the original stays"


def test_rows_of_shifts_name_scores_and_kinds(bench):
    ood = bench("uncertainty_ood")
    ordinary, strange = [SimpleNamespace(value=v) for v in range(10)], [SimpleNamespace(value=20)] * 5

    def blind(windows):
        return np.zeros(len(windows))

    rows, told = ood.rows_of(
        {"E": lambda windows: np.array([one.value for one in windows]), "flow": blind},
        ordinary,
        {"speed": strange, "colour": []},
    )
    assert rows["uncertainty.ood_auroc.speed"][0] == 1.0
    assert rows["uncertainty.ood_auroc.speed.flow"][0] == 0.5
    assert not any("colour" in name for name in rows)
    assert set(told["E"]) == {"ordinary", "speed"}


@pytest.mark.slow
def test_true_ensembles_are_made_kept_and_read(bench, recorded, tmp_path):
    truth = bench("uncertainty_truth")
    made, episode = recorded
    config = truth.TruthConfig(
        leads=(4, 32), samples=6, draws=40, contexts=(8, 30), variety="one", exploration=0.0
    )
    path = truth._made(made, config, tmp_path / "one.npz")
    found = truth.load_truth(path)
    assert found.hidden == dict(episode.hidden)
    assert found.frames_2MLHWC.shape == (2, 6, 2, 64, 64, 3)
    assert found.support_NLQ.shape == (40, 2, 4)
    # Before contact all futures look alike; later they do not.
    early, late = (np.ptp(found.frames_2MLHWC[:, :, lead].astype(int), axis=(0, 1)).mean() for lead in (0, 1))
    assert late > 3 * early
    assert found.spread_KQ[0].sum() > 2 * found.spread_KQ[1].sum(), "what was seen narrows it"
    assert (found.target_low_Q <= found.target_high_Q).all()


def test_a_truth_that_few_draws_tell_is_left_out(parts):
    container, worlds, truth, config = parts
    pairs, centre = pairs_of(worlds, truth, config, count=3)
    for number, (_, one) in enumerate(pairs):
        one.effective_K[-1] = 1.2
        one.effective_K[1] = 50.0 if number else 2.0
        one.spread_KQ[1] *= 1 if number else 1000
    found = container.narrow_spread(
        pairs, Sampler(worlds, centre), Drawn(), config, np.zeros((9, 4)), lambda: False
    )
    assert np.isnan(found.truth_KQ[-1]).all()
    assert np.isnan(found.world_KQ[-1]).all(), "of the same episodes"
    np.testing.assert_allclose(found.truth_KQ[1], 0.05)
    assert found.outside == {}


def test_what_processes_kept_is_drawn_together(bench, tmp_path, capsys):
    redraw, calibration = bench("uncertainty_redraw"), bench("uncertainty_calibration")
    rng = np.random.default_rng(0)

    def verified(count):
        found = []
        for number in range(count):
            values, came = rng.normal(size=(2, SAMPLES, 9, 1)), rng.normal(size=(2, 9, 1))
            tallies = {
                name: tally(one, truth, rng, unit="1")
                for name, one, truth in zip(("latents", "proprio x"), values, came, strict=True)
            }
            zeros = np.zeros(9)
            found.append(
                Verified(tallies, zeros, values[1], came[1], zeros.astype(int), f"kind {number}", ())
            )
        return found

    kinds = {name: calibration.Kind(name, verified(count)) for name, count in (("rigid", 4), ("paint", 6))}
    longer = calibration.Kind("rigid", verified(8))
    redraw.keep(tmp_path, "calibration-rigid", [kinds["rigid"]])
    redraw.keep(tmp_path, "calibration-paint-smoke", [kinds["paint"], longer])
    redraw.keep(tmp_path, "calibration.uncalibrated-rigid", [kinds["rigid"]])
    found = redraw.together([[kinds["rigid"]], [kinds["paint"], longer]])
    assert [(one.kind, len(one.verified)) for one in found] == [("rigid", 8), ("paint", 6)]
    redraw.main(["--figures", str(tmp_path)], "redraw")
    drawn_files = {path.name for path in tmp_path.glob("*.png")}
    assert drawn_files == {"uncertainty-reliability.png", "uncertainty-reliability-uncalibrated.png"}
    assert "uncertainty-reliability.png" in capsys.readouterr().out
    with pytest.raises(DataError, match="nothing is kept"):
        redraw.main(["--figures", str(tmp_path / "none")], "redraw")


def test_the_budget_is_shared_by_the_parts_that_are_asked_for(bench):
    uncertainty = bench("uncertainty")

    def ends(*parts):
        options = SimpleNamespace(parts=parts, budget_s=100.0)
        it = SimpleNamespace(options=options, began=1000.0)
        return [uncertainty.Bench.until(it, part) - 1000.0 for part in parts]

    assert ends(*uncertainty.PARTS) == pytest.approx([50, 65, 80, 90, 100])
    assert ends("ood") == pytest.approx([100])
    assert ends("futures", "narrowing", "mass") == pytest.approx([37.5, 75, 100])


def test_every_part_has_a_gpu_and_calibration_comes_first(bench, tmp_path, monkeypatch, capsys):
    gpus, table = bench("uncertainty_gpus"), bench("table")
    running, log = {}, []

    class Process:
        def __init__(self, command, env, **given):
            self.words = command[1:]
            self.name = next((word for word in ("calibrate", "--ways") if word in self.words), "")
            log.append((self.words, env["CUDA_VISIBLE_DEVICES"], dict(running)))
            running[id(self)] = self.words
            if "uncertainty.py" in str(self.words[0]):
                out = Path(self.words[self.words.index("--out") + 1])
                row = {f"uncertainty.{out.stem}": (1.0, "1")}
                table.add_rows(out, row, device="a GPU", command="measured")

        def wait(self, timeout):
            running.pop(id(self), None)
            return int("--ways" in self.words)

    for kind in ("rigid", "container", "paint"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        (tmp_path / "data" / kind / "manifest.json").write_text("{}")
    monkeypatch.setattr(gpus.subprocess, "Popen", Process)
    out = tmp_path / "rows.json"
    out.write_text('[{"name": "earlier"}]')
    words = ["--run", "runs/lab", "--data", tmp_path / "data", "--readout", "runs/readout",
             "--figures", tmp_path / "figures", "--out", out, "--calibrate=--episodes 12"]  # fmt: skip
    assert gpus.main([str(word) for word in words], "gpus") == 1
    assert "failed: cost" in capsys.readouterr().out
    assert log[0][0][:4] == ["-m", "vidworld", "calibrate", "runs/lab"]
    assert log[0][0][-2:] == ["--episodes", "12"]
    assert log[0][0][4:7] == [str(tmp_path / "data" / kind) for kind in ("container", "paint", "rigid")]
    parts = {one[0][one[0].index("--parts") + 1 :][0]: one for one in log if "--parts" in one[0]}
    for words, gpu, beside in log:
        busy = [other for other in beside.values() if "calibrate" in other]
        assert bool(busy) == ("--ways" in words or "ood" in words), "what needs the calibration waits for it"
        assert gpu in "0123"
    kinds = [one[0][one[0].index("--kinds") + 1 :] for one in log if "calibration" in one[0]]
    assert [set(one) & {"rigid", "container", "paint", "smoke"} for one in kinds] == [
        {"rigid", "container"}, {"paint"},
    ]  # fmt: skip
    assert len({log[0][1], parts["ood"][1], "2"}) == 3
    assert parts["futures"][1] == "3"
    names = [row["name"] for row in json.loads(out.read_text())]
    assert names[0] == "earlier"
    assert set(names[1:]) == {
        f"uncertainty.{name}" for name in ("ood", "calibration-0", "calibration-1", "container")
    }
