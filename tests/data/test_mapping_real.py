"""Mapping and resampling on real logs; skipped where they are not at hand."""

import io
from pathlib import Path

import numpy as np
import pytest

from vidworld.data import rotation
from vidworld.data.contract_file import read_contracts
from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.plan import make_plan
from vidworld.data.prepare import prepare
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.detect import open_source

LOGS = Path(__file__).parents[3] / "shared" / "data"


def logs(path: str):
    if not (LOGS / path).is_dir():
        pytest.skip(f"no {path}")
    return open_source(LOGS / path)


def example() -> str:
    """The YAML of docs/data-format.md."""
    page = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text()
    return page.split("```yaml\n")[1].split("```")[0]


def test_poses_of_a_franka_as_rot6d_with_state_deltas(tmp_path, contract_file):
    source = logs("ctrl_world_droid/dataset_example/droid_new_setup")
    options = ConvertOptions(
        out=tmp_path / "d",
        contract=contract_file(example()),
        trim="shorter",
        size="32x16",
        views=("wrist",),
        episodes=("val-0003", "val-0005"),
        val_episodes=("val-0005",),
        workers=1,
    )
    (robot,) = convert(source, options).contracts
    assert [d.name for d in robot.proprio][3:] == [*(f"ee_rot6d_{index}" for index in range(6)), "gripper"]
    assert [d.kind for d in robot.action] == ["delta"] * 9 + ["position"]
    dataset = ShardDataset.open(tmp_path / "d")
    steps = []
    for sample in dataset.manifest.samples():
        read, recorded = dataset.read(sample.key), source.read(sample.episode_id)
        euler = recorded.proprio_TS[: len(read.proprio_TS), 3:6]
        truth = rotation.to_matrix(euler, "euler_xyz")
        found = rotation.to_matrix(read.proprio_TS[:, 3:9], "rot6d")
        assert rotation.angle_between(found, truth).max() < 1e-6
        assert read.proprio_TS[:, 9] == pytest.approx(1 - recorded.proprio_TS[: len(euler), 6], abs=1e-6)
        turned = rotation.to_matrix(read.actions_TA[:-1, 3:9], "rot6d") @ found[:-1]
        assert rotation.angle_between(turned, found[1:]).max() < 1e-5
        assert read.proprio_TS[:-1, :3] + read.actions_TA[:-1, :3] == pytest.approx(read.proprio_TS[1:, :3])
        assert read.meta["source"].get("trimmed", {}).get("policy") in (None, "shorter")
        steps.append(
            (np.abs(np.diff(euler, axis=0)).max(), np.abs(np.diff(read.proprio_TS[:, 3:9], axis=0)).max())
        )
    assert max(before for before, _ in steps) > 6, "the negative control: roll wraps in these logs"
    assert max(after for _, after in steps) < 0.3


def test_deltas_of_a_widowx_turn_as_its_states_do(tmp_path, contract_file):
    """Bridge's commands are the changes of its states, up to how well the arm follows."""
    text = "control_frame: base\naction_from: state_delta\nproprio: {gripper: {kind: binary, threshold: 0.5}}"
    source = logs("octo_bridge_rlds/bridge_dataset/1.0.0")
    (described,) = read_contracts(contract_file(text), source.embodiments).values()
    assert described.mapping is not None
    recorded, derived = [], []
    for name in source.episode_ids():
        episode = source.read(name)
        recorded.append(episode.actions_TA[:-1])
        derived.append(described.mapping.mapped(episode).actions_TA[:-1])
    recorded, derived = np.concatenate(recorded), np.concatenate(derived)
    correlations = [np.corrcoef(recorded[:, axis], derived[:, axis])[0, 1] for axis in range(6)]
    assert min(correlations) > 0.7
    shifted = [np.corrcoef(recorded[:-3, axis], derived[3:, axis])[0, 1] for axis in range(6)]
    assert max(shifted) < min(correlations), "the negative control: other rows"


CR5 = """
control_frame: joint
action: {joint_*_vel: {unit: rad/s, kind: velocity}, gripper: {unit: "1", kind: binary, invert: true}}
proprio: {joint_*: {unit: rad, kind: position}}
"""


def test_velocities_of_a_jittering_arm_at_another_rate(tmp_path, contract_file):
    """10 Hz with a wall clock that jitters by half a step, to 4 Hz: what the joints do is still commanded."""
    source = logs("cr5_banana_lerobot_v21")
    options = ConvertOptions(
        out=tmp_path / "d",
        contract=contract_file(CR5),
        fps=4,
        resample="nearest",
        size="32x16",
        episodes=("72",),
    )
    plan = make_plan(source, ConvertOptions(**{**vars(options), "val_fraction": 0.0}))
    done = prepare(source.read("episode_000072"), plan.recipe)
    arrays = {
        name: np.load(io.BytesIO(done.members[f"{name}.npy"]))
        for name in ("actions", "proprio", "timestamps")
    }
    assert np.diff(arrays["timestamps"]) == pytest.approx(0.25)
    moved = np.diff(arrays["proprio"], axis=0) / 0.25
    for joint in range(4):
        assert np.corrcoef(arrays["actions"][:-1, joint], moved[:, joint])[0, 1] > 0.95
    assert set(np.unique(arrays["actions"][:, 6])) <= {0, 1}
