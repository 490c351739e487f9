"""The readout on a drawn world that passes for the lab's: it learns, is kept, and refuses dreams."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch

from vidworld import cli
from vidworld.contract import Dimension
from vidworld.data.convert import ConvertOptions, convert
from vidworld.errors import CheckpointError, ConfigError, DataError, DivergedError
from vidworld.evaluation import lab_truth
from vidworld.evaluation.lab_frames import load_frames, open_datasets
from vidworld.evaluation.quantities import COLOURS, PAINTS, SUBJECTS
from vidworld.evaluation.readout import CARD, WEIGHTS, load_readout, save_readout
from vidworld.evaluation.readout_errors import measure
from vidworld.evaluation.readout_net import ReadoutConfig
from vidworld.evaluation.readout_training import ReadoutTraining, train_readout
from vidworld.lab.truth import pack_mask
from vidworld.types import EmbodimentSpec, Episode, Video

SIZE, FRAMES = 32, 12
NET = ReadoutConfig(widths=(24, 24, 24), keypoints=4, pooled=4, hidden=32)
TRAINING = ReadoutTraining(net=NET, steps=300, rows=6, lr=1e-2, warmup_steps=20, stride=1, augment=0.3)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A source of drawn scenes: liquid that rises in a glass, or a box on a table."""

    kind: str
    episodes: int = 10
    imagined: bool = False
    truth: bool = True
    name: str = "drawn"
    views: tuple[str, ...] = ("scene",)
    fps: float = 12.5

    @property
    def embodiments(self):
        one = (Dimension("x", "m", "position"),)
        return (EmbodimentSpec("drawn", self.fps, one, one),)

    @property
    def fingerprint(self):
        return repr(self)

    def episode_ids(self):
        return [f"{self.kind}-{index}" for index in range(self.episodes)]

    def read(self, episode_id):
        rng = np.random.default_rng(int(episode_id.rpartition("-")[2]))
        draw = {"liquid": draw_liquid, "container": draw_box}[self.kind]
        frames, masks, readouts = draw(rng)
        outcome = {
            "hidden": {},
            "readouts": {name: column.tolist() for name, column in readouts.items()},
            "masks": {name: pack_mask(mask) for name, mask in masks.items()},
        }
        source = {"world": f"lab_{self.kind}", "versions": {"lab": "drawn"}}
        return Episode(
            episode_id=episode_id,
            embodiment="drawn",
            fps=self.fps,
            views={"scene": Video(FRAMES, partial(iter, frames))},
            actions_TA=rng.random((FRAMES, 1), np.float32),
            proprio_TS=rng.random((FRAMES, 1), np.float32),
            timestamps_T=np.arange(FRAMES) / self.fps,
            outcome=outcome if self.truth else {},
            source={"origin": source | {"imagined": True}} if self.imagined else source,
        )


def draw_liquid(rng):
    frames = np.full((FRAMES, SIZE, SIZE, 3), 90, np.uint8)
    mask = np.zeros((FRAMES, SIZE, SIZE), bool)
    level = np.sort(rng.uniform(0, 1, FRAMES))
    left = rng.integers(2, 14)
    for frame, fill in enumerate(level):
        mask[frame, SIZE - 2 - round(26 * fill) : SIZE - 2, left : left + 14] = True
    frames[mask] = (40, 90, 220)
    return frames, {"liquid": mask}, {"fill": level, "received_ml": 300 * level, "spilled_ml": 0 * level}


def draw_box(rng):
    frames = np.full((FRAMES, SIZE, SIZE, 3), 60, np.uint8)
    box, arm = np.zeros((2, FRAMES, SIZE, SIZE), bool)
    x, y = rng.uniform(0, 1, (2, FRAMES))
    for frame in range(FRAMES):
        row, column = 2 + round(20 * y[frame]), 2 + round(20 * x[frame])
        box[frame, row : row + 8, column : column + 8] = True
    arm[:, :, :2] = True
    frames[box], frames[arm] = (200, 150, 90), (240, 240, 240)
    still = np.zeros(FRAMES)
    yaw = np.where(rng.random() < 0.5, 0.2, 0.2 + np.pi) + still
    readouts = {"box_x": 0.3 + 0.4 * x, "box_y": 0.4 * y - 0.2, "box_z": 0.05 + still, "box_yaw": yaw}
    return frames, {"box": box, "arm": arm}, readouts | {"box_tilt": still, "box_clearance_m": still}


def make(folder, **settings):
    convert(Drawn(**settings), ConvertOptions(out=folder, size=f"{SIZE}x{SIZE}", workers=1))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return [make(folder / kind, kind=kind) for kind in ("liquid", "container")]


@pytest.fixture(scope="module")
def trained(data):
    torch.set_num_threads(1)
    return train_readout(open_datasets(data), TRAINING)


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readout")
    save_readout(trained, folder / "ruler")
    return folder / "ruler"


def test_it_reads_what_it_learnt_from_the_same_frames(trained, data):
    frames = load_frames(open_datasets(data), "train", stride=1, memory_gb=1)
    liquid, box = measure(trained, frames["liquid"]), measure(trained, frames["container"])
    assert liquid["masks"]["liquid"]["iou"] > 0.9
    assert box["masks"]["box"]["iou"] > 0.9
    assert liquid["quantities"]["fill"]["r2"] > 0.95
    assert box["quantities"]["box_x"]["r2"] > 0.95
    assert box["quantities"]["box_y"]["mae"] < 0.03
    assert box["quantities"]["box_yaw"]["mae"] < 0.1, "half a turn is no turn"
    assert box["distances"]["box_position_m"]["mean"] < 0.05
    assert box["distances"]["box_position_m"]["mean"] < 0.3 * box["distances"]["box_position_m"]["mean_hold"]


def test_held_out_errors_beat_both_blind_readers_and_do_not_with_the_truth_of_other_frames(trained, data):
    fill = trained.errors["liquid"]["quantities"]["fill"]
    assert fill["unit"] == "1"
    assert fill["frames"] == FRAMES
    assert fill["mae"] < 0.4 * min(fill["mae_mean"], fill["mae_hold"])
    held_out = load_frames(open_datasets(data), "val", stride=1, memory_gb=1)["liquid"]
    order = np.random.default_rng(0).permutation(len(held_out))
    shuffled = dataclasses.replace(
        held_out, bits_NMX=held_out.bits_NMX[order], values_NQ=held_out.values_NQ[order]
    )
    wrong = measure(trained, shuffled)
    assert wrong["quantities"]["fill"]["r2"] < 0.3
    assert wrong["masks"]["liquid"]["iou"] < trained.errors["liquid"]["masks"]["liquid"]["iou"] - 0.2


def test_the_same_seed_trains_the_same_weights(data):
    short = dataclasses.replace(TRAINING, steps=3)
    one, two = (train_readout(open_datasets(data), short).net.state_dict() for _ in range(2))
    other = train_readout(open_datasets(data), dataclasses.replace(short, seed=1)).net.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_ends_when_its_minutes_are_over(data, monkeypatch):
    # Asked for before training, at its start, before each step, and at its end.
    clock = iter([0.0, 0.0, *(15.0 * step for step in range(100))])
    monkeypatch.setattr("vidworld.evaluation.readout_training.time.perf_counter", lambda: next(clock))
    losses = []
    training = dataclasses.replace(TRAINING, steps=50, minutes=1.0)
    readout = train_readout(open_datasets(data[:1]), training, progress=losses.append)
    assert len(losses) == readout.training["steps"] == 4


def test_a_training_that_diverges_says_so(data):
    training = dataclasses.replace(TRAINING, steps=20, lr=1e30, warmup_steps=0)
    with pytest.raises(DivergedError, match="lower --lr"):
        train_readout(open_datasets(data[:1]), training)


def test_what_is_loaded_is_what_was_saved(trained, saved, tmp_path):
    loaded = load_readout(saved)
    before, after = trained.net.state_dict(), loaded.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.size, loaded.scales, loaded.errors) == (trained.size, trained.scales, trained.errors)
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE, 3), np.uint8)
    one, two = trained(frames, "container"), loaded(frames, "container")
    assert all(np.array_equal(one.quantities[name], two.quantities[name]) for name in one.quantities)
    assert all(np.array_equal(one.masks[name], two.masks[name]) for name in one.masks)
    assert one.masks["box"].shape == (2, 3, SIZE, SIZE)
    assert one.centroids()["box"].shape == (2, 3, 2)
    save_readout(loaded, tmp_path)
    for name in (CARD, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    card = json.loads((saved / CARD).read_text())
    assert set(card["kinds"]) == set(card["held_out_errors"]) == {"liquid", "container"}
    assert len(card["training"]["datasets"]) == 2
    assert card["training"]["versions"]["torch"]


def test_readings_do_not_depend_on_what_is_read_beside_them(trained, monkeypatch):
    frames = np.random.default_rng(1).integers(0, 256, (3, 4, SIZE, SIZE, 3), np.uint8)
    together = trained(frames, "liquid")
    monkeypatch.setattr("vidworld.evaluation.readout.PICTURES_AT_ONCE", 5)
    apart = trained(frames, "liquid")
    alone = trained(frames[1:2], "liquid")
    for other, rows in ((apart, slice(None)), (alone, slice(1, 2))):
        assert np.allclose(together.quantities["fill"][rows], other.quantities["fill"], atol=1e-4)


def test_a_reference_is_the_first_frame_unless_another_is_given(data):
    training = dataclasses.replace(TRAINING, steps=2, net=dataclasses.replace(NET, reference=True))
    readout = train_readout(open_datasets(data[:1]), training)
    frames = np.random.default_rng(2).integers(0, 256, (2, 3, SIZE, SIZE, 3), np.uint8)
    own, same = readout(frames, "liquid"), readout(frames, "liquid", frames[:, 0])
    other = readout(frames, "liquid", frames[:, 1])
    assert np.array_equal(own.quantities["fill"], same.quantities["fill"])
    assert not np.allclose(own.quantities["fill"], other.quantities["fill"])
    with pytest.raises(DataError, match="references: got 1, expected 2"):
        readout(frames, "liquid", frames[:1, 0])


@pytest.mark.parametrize(
    ("frames", "kind", "error", "message"),
    [
        (
            np.zeros((1, 2, SIZE, SIZE, 3), np.uint8),
            "soup",
            ConfigError,
            "got 'soup', expected container or",
        ),
        (np.zeros((1, 2, 64, 64, 3), np.uint8), "liquid", DataError, "got 64x64, expected 32x32"),
        (np.zeros((1, 2, SIZE, 48, 3), np.uint8), "liquid", DataError, "got 48x32, expected 32x32"),
        (np.zeros((1, 2, SIZE, SIZE, 3)), "liquid", DataError, "got float64"),
        (np.zeros((2, SIZE, SIZE, 3), np.uint8), "liquid", DataError, r"expected uint8 \[B, T, H, W, 3\]"),
    ],
)
def test_what_it_was_not_made_for_is_refused(trained, frames, kind, error, message):
    with pytest.raises(error, match=message):
        trained(frames, kind)


def test_a_damaged_or_edited_readout_is_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="cannot read the readout"):
        load_readout(tmp_path)
    card, weights = (saved / CARD).read_bytes(), (saved / WEIGHTS).read_bytes()
    for edited_card, edited_weights in (
        (card.replace(b'"fill"', b'"full"', 1), weights),
        (card, weights[:-1] + bytes([weights[-1] ^ 1])),
    ):
        (tmp_path / CARD).write_bytes(edited_card)
        (tmp_path / WEIGHTS).write_bytes(edited_weights)
        with pytest.raises(CheckpointError, match="does not match its digest"):
            load_readout(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "liquid", "imagined": True}, "an imagined episode"),
        ({"kind": "liquid", "truth": False}, "no truth in the episode's outcome"),
    ],
)
def test_dreams_and_data_without_truth_are_not_trained_on(tmp_path, capsys, settings, message):
    folder = make(tmp_path / "data", **settings)
    assert cli.run(["readout", "train", str(folder), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_data_than_the_labs_is_not_trained_on(planar_data, tmp_path, capsys):
    assert cli.run(["readout", "train", str(planar_data), "--out", str(tmp_path / "out")]) == 2
    assert "lab_rigid or lab_container" in capsys.readouterr().err
    assert cli.run(["readout", "train", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert cli.run(["readout", "cook"]) == 2
    assert "expected train or apply" in capsys.readouterr().err


def test_truth_of_other_frames_is_refused():
    frames, masks, readouts = draw_liquid(np.random.default_rng(0))
    outcome = {"readouts": readouts, "masks": {name: pack_mask(mask) for name, mask in masks.items()}}
    meta = {"source": {"world": "lab_liquid"}, "outcome": outcome}
    truth = lab_truth.read_truth(meta, frames, where="here")
    assert np.array_equal(truth.masks_THW["liquid"], masks["liquid"])
    with pytest.raises(DataError, match="neither resized nor thinned out"):
        lab_truth.read_truth(meta, frames[::2], where="here")
    with pytest.raises(DataError, match="shape of mask 'liquid'"):
        lab_truth.read_truth(meta, frames[:, ::2, ::2], where="here")
    del outcome["readouts"]["spilled_ml"]
    with pytest.raises(DataError, match="no 'spilled_ml' in the truth"):
        lab_truth.read_truth(meta, frames, where="here")


def test_train_and_apply_from_the_command_line(data, saved, tmp_path, capsys):
    ruler, out = tmp_path / "ruler", tmp_path / "readings"
    config = tmp_path / "small.yaml"
    config.write_text("steps: 2\nrows: 2\nnet: {widths: [8, 8, 8]}\n")
    asked = ["readout", "train", *map(str, data), "--out", str(ruler), "--config", str(config)]
    assert cli.run([*asked, "--stride", "3"]) == 0
    printed = capsys.readouterr().out
    assert "liquid fill" in printed
    assert "warning: too blunt to judge liquid by: fill" in printed, "two steps teach nothing"
    settings = json.loads((ruler / CARD).read_text())["training"]["settings"]
    assert (settings["steps"], settings["stride"], settings["net"]["widths"]) == (2, 3, [8, 8, 8])
    assert cli.run(asked) == 2
    assert cli.run(["readout", "apply", str(saved), str(data[0]), "--out", str(out)]) == 0
    record = json.loads((out / "readings.json").read_text())
    (name,) = record["clips"]
    with np.load(out / f"{name}.npz", allow_pickle=False) as arrays:
        assert arrays["fill"].shape == (FRAMES,)
        assert arrays["liquid_mask"].shape == (FRAMES, SIZE, SIZE)
    assert record["errors"]["liquid"]["fill"]["mean"][0] < 0.2
    assert record["readout"]["held_out_errors"]["liquid"]["quantities"]["fill"]["unit"] == "1"
    assert "fill" not in record["readout"]["too_blunt"]["liquid"]
    assert (out / f"{name}.png").stat().st_size > 1000
    assert (out / f"{name}-curves.png").stat().st_size > 1000
    capsys.readouterr()
    for extra, message in (
        (["--kind", "soup"], "expected container or liquid"),
        (["--kind", "container"], "expected liquid"),
        (["--split", "test"], "split"),
        (["--episodes", "0"], "--episodes"),
        (["--device", "abacus"], "device: got abacus"),
    ):
        wrong = tmp_path / "wrong"
        assert cli.run(["readout", "apply", str(saved), str(data[0]), "--out", str(wrong), *extra]) == 2
        assert message in capsys.readouterr().err
        assert not wrong.exists()


def test_dreams_are_read_with_their_kind_and_have_no_truth(saved, tmp_path, capsys):
    dreams = make(tmp_path / "dreams", kind="liquid", imagined=True, episodes=4)
    out = tmp_path / "readings"
    asked = ["readout", "apply", str(saved), str(dreams), "--out", str(out)]
    assert cli.run(asked) == 2
    assert "--kind" in capsys.readouterr().err
    assert cli.run([*asked, "--kind", "liquid"]) == 0
    assert json.loads((out / "readings.json").read_text())["errors"] == {}


def test_names_are_those_of_the_lab():
    pytest.importorskip("mujoco")
    from vidworld.lab import paint_canvas, rigid

    assert dict(COLOURS) == dict(rigid.COLOURS)
    assert set(PAINTS) == set(paint_canvas.PAINTS) - {"white"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("rigid", "container") else [pytest.mark.slow])
        for kind in SUBJECTS
    ],
)
def test_the_lab_tells_all_that_is_read_of_a_kind(kind):
    pytest.importorskip("mujoco")
    from vidworld.lab import gl
    from vidworld.lab.episode import LabConfig, generate
    from vidworld.lab.truth import truth_of

    if not gl.available():
        pytest.skip(gl.INSTALL)
    episode = generate(kind, 1, LabConfig(frames=6, size=64))
    assert episode.frames_THWC is not None
    meta = {"source": {"world": f"lab_{kind}"}, "outcome": truth_of(episode)}
    truth = lab_truth.read_truth(meta, episode.frames_THWC, where="here")
    assert tuple(truth.masks_THW) == SUBJECTS[kind].masks
    assert tuple(truth.quantities_T) == tuple(SUBJECTS[kind].named)
    if kind != "rigid":
        return
    for index, item in enumerate(episode.visible["objects"]):
        colour = item["colour"]
        assert np.array_equal(truth.masks_THW[colour], episode.masks_THW[f"object{index}"])
        true_T, read_T = episode.outcomes_T[f"object{index}_x"], truth.quantities_T[f"{colour}_x"]
        assert np.allclose(read_T[np.isfinite(read_T)], true_T[np.isfinite(read_T)], atol=1e-5)
    absent = set(COLOURS) - {item["colour"] for item in episode.visible["objects"]}
    assert absent
    assert all(np.isnan(truth.quantities_T[f"{colour}_z"]).all() for colour in absent)
