"""There and back: the way back leads back in a true simulator; rollouts are compared with the first view."""

import dataclasses
import json

import numpy as np
import pytest

from vidworld import cli
from vidworld.contract import ActionContract, Dimension, Statistics
from vidworld.data.shards import ShardDataset
from vidworld.evaluation.grounding import ground_episode
from vidworld.evaluation.metrics import psnr
from vidworld.evaluation.returned import SETTLE, returned, there_and_back
from vidworld.lab.planar import EMBODIMENT, advance, simulate
from vidworld.world.load import load


def contract(*kinds: str) -> ActionContract:
    dimensions = tuple(Dimension(f"d{n}", "1", kind) for n, kind in enumerate(kinds))
    statistics = Statistics.of(np.linspace([-1] * len(kinds), [1] * len(kinds), 9))
    return ActionContract("arm", 10.0, dimensions, dimensions, statistics, statistics)


def test_by_hand():
    recorded = np.array([[1.0, 10.0, 0.0], [2.0, 20.0, 1.0], [3.0, 30.0, 1.0], [4.0, 40.0, 0.0]])
    last = np.array([0.5, 5.0, 0.0])
    got = there_and_back(contract("velocity", "position", "binary"), recorded, last, 3)
    assert got.tolist() == [
        [1, 10, 0], [2, 20, 1], [3, 30, 1],
        [-3, 20, 1], [-2, 10, 0], [-1, 5, 0],
        *[[0, 5, 0]] * SETTLE,
    ]  # fmt: skip
    short = there_and_back(contract("velocity", "position", "binary"), recorded, last, 1)
    assert short.tolist() == [[1, 10, 0], [-1, 5, 0], *[[0, 5, 0]] * SETTLE]


def test_where_there_is_no_way_back():
    recorded = np.ones((4, 1))
    assert there_and_back(contract("force"), recorded, recorded[0], 2) is None
    assert there_and_back(contract("position"), recorded, None, 2) is None
    assert there_and_back(contract("velocity"), recorded, None, 2) is not None
    assert there_and_back(contract("velocity"), recorded, None, 5) is None, "too few recorded commands"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_leads_back_in_the_true_simulator(seed):
    trajectory = simulate(seed)
    own = ActionContract(
        *(EMBODIMENT.embodiment, 10.0, EMBODIMENT.action, EMBODIMENT.proprio),
        Statistics.of(trajectory.actions_T3),
        Statistics.of(np.linspace([-1] * 4, [1] * 4, 9)),
    )
    start, turn = 4, 6
    commands = there_and_back(own, trajectory.actions_T3[start:], trajectory.actions_T3[start - 1], turn)
    joints, disc = trajectory.joints_T2[start], trajectory.disc_T2[start]
    away = []
    for command in commands:
        joints, disc = advance(joints, disc, command[:2])
        away.append(np.abs(joints - trajectory.joints_T2[start]).max())
    assert away[turn - 1] > 0.05, "it was away"
    assert away[-1] < 1e-5


def test_the_figures_are_those_of_the_rollout(untrained_run, planar_data):
    world, dataset = load(untrained_run, "cpu"), ShardDataset.open(planar_data)
    sampler = dataclasses.replace(world.spec.sampler, window=12)
    key = dataset.manifest.samples("train")[0].key
    grounding = ground_episode(dataset, key, world.spec, context=4)
    found = returned(world, [grounding], sampler, context=4, seed=3)
    assert (found["rollouts"], found["frames"]) == (1, 2 * 3 + SETTLE)

    prompt = grounding.prompt
    commands = there_and_back(grounding.contract, grounding.recording.actions_TA, prompt.actions[-1], 3)
    state = world.reset(prompt, seed=3, sampler=sampler)
    rolled = world.rollout(state, commands, sampler=sampler, allow_out_of_range=True)
    video, last = rolled.video_BTVHWC[0].numpy(), np.asarray(prompt.frames_TVHWC(world.spec))[-1]
    assert found["psnr_turn"] == pytest.approx(psnr(video[2], last).mean(), abs=0.05)
    assert found["psnr_return"] == pytest.approx(psnr(video[-1], last).mean(), abs=0.05)
    assert found["proprio_return"] > 0
    assert returned(world, [grounding], world.spec.sampler, context=4) is None, "no room in a window of 8"
    with_force = dataclasses.replace(
        grounding,
        contract=dataclasses.replace(
            grounding.contract,
            action=tuple(dataclasses.replace(one, kind="force") for one in grounding.contract.action),
        ),
    )
    assert returned(world, [with_force], sampler, context=4) is None


def test_the_report_shows_it(untrained_run, planar_data, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = ["eval", untrained_run, planar_data, "--out", out, "--frames", 4, "--drift", 8]
    arguments += ["--context", 2]
    assert cli.run([*map(str, arguments), "--windows-per-episode", "1", "--samples", "1"]) == 0
    found = json.loads((out / "metrics.json").read_text())["drift"]["planar_arm"]["returned"]
    assert found["frames"] == 6
    assert "There and back within the window" in (out / "report.html").read_text()
    assert f"there and back {found['psnr_turn']:.1f}" in capsys.readouterr().out
