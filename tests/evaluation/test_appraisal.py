"""What a rollout says of itself: maps, fans, where it stops, which future; and that bad input is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vidworld import cli, media
from vidworld.contract import ActionContract
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError
from vidworld.evaluation import unsure
from vidworld.evaluation.imagining import Imagined
from vidworld.files import sha256_of
from vidworld.tokenizers.store import load_tokenizer
from vidworld.world.build import build
from vidworld.world.calibration import Calibration, Conformal, Radii, sampling_of
from vidworld.world.spec import WorldSpec
from vidworld.world.uncertainty import split


@pytest.fixture(scope="session")
def second_run(untrained_run, tmp_path_factory):
    """The same world as if it had been trained with another seed."""
    run = tmp_path_factory.mktemp("member") / "second"
    shutil.copytree(untrained_run, run)
    (weights,) = run.glob("checkpoints/*/ema.safetensors")
    moved = {name: tensor + 0.3 * tensor.roll(1) for name, tensor in load_file(weights).items()}
    save_file(moved, weights)
    return run


@pytest.fixture(scope="session")
def noisy_run(untrained_run, tmp_path_factory):
    """A world with noise of its own."""
    run = tmp_path_factory.mktemp("noisy") / "run"
    shutil.copytree(untrained_run, run)
    spec = WorldSpec.read(run)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, noise_dims=3))
    torch.manual_seed(1)
    world = build(spec, load_tokenizer(run / "tokenizer"))
    for parameter in world.model.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    spec.write(run)
    (weights,) = run.glob("checkpoints/*/ema.safetensors")
    save_file(world.model.state_dict(), weights)
    return run


def calibrate(run, out, floors, quantity="pixels", **sampler):
    """A copy of a run with a calibration whose radii at the leads are `floors` at least."""
    shutil.copytree(run, out)
    spec = WorldSpec.read(out)
    (weights,) = out.glob("checkpoints/*/ema.safetensors")
    radii = Radii("1", 1.0, tuple(floors))
    conformal = Conformal(0.9, 20, len(floors), {quantity: radii})
    settings = sampling_of(dataclasses.replace(spec.sampler, **sampler))
    robot = spec.contracts[0].embodiment
    Calibration(sha256_of(weights), spec.digest, settings, None, {robot: conformal}).write(out)
    return out


@pytest.fixture
def rollout(untrained_run, planar_data, tmp_path):
    episode = ShardDataset.open(planar_data).manifest.samples("val")[0].key

    def run(*arguments, run=untrained_run, out="out"):
        given = ["--prompt", episode, "--data", planar_data, "--frames", 5, "--context", 3]
        out = tmp_path / out
        code = cli.run(["rollout", str(run), "--out", str(out), *map(str, (*given, *arguments))])
        return code, out

    return run


def test_maps_and_fans_of_an_ensemble(rollout, second_run, capsys):
    code, out = rollout("--samples", 3, "--members", second_run, "--uncertainty")
    assert code == 0, capsys.readouterr().err
    record = json.loads((out / "rollout.json").read_text())
    assert record["members"] == 2
    assert len({one["weights_sha256"] for one in record["world"]["members"]}) == 2
    assert len(list(out.glob("sample-*.mp4"))) == 6
    proprio = np.load(out / "proprio.npz")["predicted_NTS"]
    parted = split(torch.from_numpy(proprio.astype(np.float64)).view(1, 2, 3, 5, 4))
    found = np.load(out / "uncertainty.npz")
    assert np.allclose(found["proprio_open_TS"], parted.aleatoric_SX[0], rtol=1e-5)
    assert np.allclose(found["proprio_unknown_TS"], parted.epistemic_SX[0], rtol=1e-4, atol=1e-9)
    assert found["pixels_unknown_TVHW"].shape == (5, 1, 32, 32)
    name = found["names"].tolist()[0]
    drawn = record["uncertainty"]["proprio"][name]["open"]
    assert np.allclose(drawn, np.sqrt(found["proprio_open_TS"][:, 0]), rtol=1e-3)
    assert media.read_video(out / "uncertainty.mp4")[0].shape[0] == 8
    page = (out / "report.html").read_text()
    assert "epistemic" in page
    assert "unknown, last frame" in page.lower()
    printed = capsys.readouterr().out
    assert "3 samples of each of 2 members" in printed
    assert "uncertainty.mp4" in printed


def test_the_batch_changes_nothing(rollout, second_run):
    """Samples that do not fit at once go in turns, and members come out in order."""
    arguments = ("--samples", 3, "--members", second_run)
    assert rollout(*arguments)[0] == 0
    _, first = rollout(*arguments, "--overwrite")
    code, other = rollout(*arguments, "--batch", 2, out="turns")
    assert code == 0
    predicted = [np.load(folder / "proprio.npz")["predicted_NTS"] for folder in (first, other)]
    assert np.allclose(*predicted, atol=1e-4)


def test_one_world_has_no_unknown_part(rollout):
    code, out = rollout("--samples", 2, "--uncertainty")
    assert code == 0
    assert "pixels_unknown_TVHW" not in np.load(out / "uncertainty.npz")
    assert set(json.loads((out / "rollout.json").read_text())["uncertainty"]["pixels"]) == {"open"}


def test_maps_are_the_spread_and_part_it():
    """Two members that agree but for one corner; samples that spread in another."""
    video = np.full((8, 2, 1, 16, 16, 3), 100, np.uint8)
    video[4:, :, :, :6, :6] = 200  # the second member sees something else here
    video[::2, :, :, 10:, 10:] = 140  # and every other sample here
    found = Imagined(np.zeros((8, 2, 3)), video, np.zeros((8, 2, 4)), np.zeros((8, 4)), np.repeat([0, 1], 4))
    measured = unsure.measure(found)
    assert measured.unknown_TVHW is not None
    assert measured.open_TVHW[0, 0, :6, :6].max() == 0
    assert measured.unknown_TVHW[0, 0, :6, :6].min() == pytest.approx((100 / 255) ** 2 / 2, rel=1e-5)
    assert measured.open_TVHW[0, 0, 10:, 10:].min() == pytest.approx((40 / 255) ** 2 / 3, rel=1e-5)
    shown = unsure.overlay(measured, video[0])
    coloured = {name.split(",")[0]: picture[0].astype(int) for name, picture in shown.items()}
    saturation = {name: np.ptp(picture, axis=-1) for name, picture in coloured.items()}
    assert saturation["unknown"][1, 1] > 50 > saturation["open"][1, 1] == 0
    assert saturation["open"][14, 14] > 50 > saturation["unknown"][14, 14]


def test_it_stops_where_the_radius_exceeds_the_tolerance(rollout, untrained_run, tmp_path, capsys):
    run = calibrate(untrained_run, tmp_path / "calibrated", [0.05, 0.05, 9.0, 0.05])
    arguments = ("--samples", 2, "--stop-when-unsure", "--tolerance", "pixels=5")
    code, out = rollout(*arguments, run=run)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    record = json.loads((out / "rollout.json").read_text())
    assert record["frames"] == record["stopped"]["steps_kept"] == 2
    assert "pixels: the truth may be 9" in record["stopped"]["because"]
    assert "stopped after 2 frames" in printed.out
    # The frames after the cut are in no output.
    assert media.read_video(out / "sample-000.mp4")[0].shape[0] == 5
    assert np.load(out / "proprio.npz")["predicted_NTS"].shape[1] == 2
    assert media.read_video(out / "grid.mp4")[0].shape[0] == 5
    # Those before are as they were.
    _, whole = rollout("--samples", 2, run=run, out="whole")
    kept, full = (np.load(one / "proprio.npz")["predicted_NTS"] for one in (out, whole))
    assert np.array_equal(kept, full[:, :2])
    # A tolerance that holds stops nothing, and one that nothing meets leaves nothing.
    _, free = rollout(*arguments[:-1], "pixels=10", run=run, out="free")
    record = json.loads((free / "rollout.json").read_text())
    assert (record["frames"], record["stopped"]) == (5, None)
    capsys.readouterr()
    assert rollout(*arguments[:-1], "pixels=0.01", run=run, out="none")[0] == 2
    assert "allow a larger --tolerance" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_radius_is_that_of_the_spread_of_all_futures(untrained_run, tmp_path):
    contract: ActionContract = WorldSpec.read(untrained_run).contracts[0]
    name = contract.proprio[1].name
    run = calibrate(untrained_run, tmp_path / "calibrated", [0.3, 0.4], f"proprio {name}")
    calibration = Calibration.read(run)
    generator = np.random.default_rng(0)
    proprio = generator.normal(size=(6, 3, 4)) * np.array([0.1, 1.0, 2.0])[:, None]
    video = np.zeros((6, 3, 1, 8, 8, 3), np.uint8)
    found = Imagined(np.zeros((6, 3, 3)), video, proprio, np.zeros((6, 4)), np.zeros(6, np.int64))
    spread = proprio[:, :, 1].std(0, ddof=1)
    radius = np.hypot(spread, [0.3, 0.4, 0.4])
    between = float(radius[:2].max() * 0.5 + radius[2] * 0.5)
    stop = unsure.stop(unsure.measure(found), calibration, contract, {f"proprio {name}": between})
    assert stop is not None
    assert (stop.steps, stop.quantity) == (2, f"proprio {name}")
    assert stop.radius == pytest.approx(radius[2])
    with pytest.raises(ConfigError, match="calibrated quantity: got 'pixels'"):
        unsure.stop(unsure.measure(found), calibration, contract, {"pixels": 0.1})


def test_the_worst_future_is_shown(rollout, second_run):
    arguments = ("--samples", 3, "--members", second_run, "--reward", "last(tip_x)")
    code, out = rollout(*arguments, "--risk", "worst")
    assert code == 0
    risk = json.loads((out / "rollout.json").read_text())["risk"]
    reward = np.load(out / "proprio.npz")["predicted_NTS"][:, -1, 2]
    assert np.allclose(risk["rewards"], reward, rtol=1e-4)
    assert risk["samples"] == [int(reward.argmin())]
    assert risk["value"] == pytest.approx(reward.min(), rel=1e-4)
    assert "epistemic_sd" in risk
    assert (out / "risk.mp4").is_file()
    _, tail = rollout(*arguments, "--risk", "cvar:0.5", out="tail")
    risk = json.loads((tail / "rollout.json").read_text())["risk"]
    assert risk["value"] == pytest.approx(np.sort(reward)[:3].mean(), rel=1e-4)
    assert set(risk["samples"]) == set(np.argsort(reward)[:3].tolist())


def test_a_function_can_be_the_reward(rollout, tmp_path, monkeypatch):
    (tmp_path / "paid.py").write_text("def bright(future):\n    return future['observation/top'].mean()\n")
    monkeypatch.chdir(tmp_path)
    code, out = rollout("--samples", 2, "--risk", "best", "--reward", "paid:bright")
    assert code == 0
    risk = json.loads((out / "rollout.json").read_text())["risk"]
    assert risk["value"] == pytest.approx(max(risk["rewards"]), rel=1e-5)
    assert len(set(risk["rewards"])) == 2


def test_a_search_finds_a_worse_future_and_says_how_likely(rollout, noisy_run):
    code, out = rollout(
        "--samples", 2, "--risk", "worst", "--reward", "mean(tip_x)", "--search", 6, run=noisy_run
    )
    assert code == 0
    risk = json.loads((out / "rollout.json").read_text())["risk"]
    assert risk["search"]["reward"] < risk["value"]
    assert 0.1 <= risk["search"]["chance_of_so_far_out"] <= 1
    assert risk["search"]["noise_dims"] == 15
    assert risk["search"]["log_likelihood_expected"] == pytest.approx(-15 / 2 * (1 + np.log(2 * np.pi)))
    assert "log-likelihood" in (out / "report.html").read_text()


BAD = {
    "one sample": (("--samples", 1, "--uncertainty"), "--samples: got 1"),
    "not calibrated": (("--stop-when-unsure",), "a world that is not calibrated"),
    "tolerance": (("--stop-when-unsure", "--tolerance", "pixels"), "--tolerance: got pixels"),
    "fork": (("--uncertainty", "--fork-at", 2), "--fork-at"),
    "risk alone": (("--risk", "worst"), "--risk and --reward"),
    "risk": (("--risk", "bad", "--reward", "tip_x"), "worst, best, or cvar:SHARE"),
    "reward": (("--risk", "worst", "--reward", "tip_q"), "name 'tip_q' in --reward"),
    "search alone": (("--search", 3), "--search"),
    "no noise": (("--risk", "worst", "--reward", "tip_x", "--search", 3), "noise_dims 0"),
    "readout": (("--readout", "none", "--uncertainty"), "cannot read the readout"),
    "member": (("--members", "none"), "no world.json"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_ends_in_one_line(rollout, tmp_path, capsys, arguments, message):
    code, out = rollout(*arguments)
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert message in error
    assert not out.exists()


def test_another_sampler_than_calibrated_is_not_trusted(rollout, untrained_run, tmp_path, capsys):
    run = calibrate(untrained_run, tmp_path / "calibrated", [0.1])
    assert rollout("--samples", 2, "--stop-when-unsure", "--steps", 1, run=run)[0] == 2
    assert "another way of sampling" in capsys.readouterr().err
