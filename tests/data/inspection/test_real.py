"""Detectors on real logs, against what is known of them: they see what is there and nothing else."""

from pathlib import Path

import pytest

from vidworld.data.convert import ConvertOptions, convert
from vidworld.data.inspection.detectors import suspicious
from vidworld.data.inspection.finding import Finding
from vidworld.data.inspection.lag import action_curve, find_pairs, video_curve
from vidworld.data.inspection.survey import Survey, choose, read
from vidworld.data.shards import ShardDataset
from vidworld.data.sources.detect import open_source

ROOT = Path(__file__).resolve().parents[3]
LOGS = ROOT.parent / "shared" / "data"


def inspected(logs: str, out: Path, **options) -> tuple[Survey, list[Finding]]:
    if not (LOGS / logs).exists():
        pytest.skip(f"no {logs}")
    convert(open_source(LOGS / logs), ConvertOptions(out=out, workers=1, **options))
    dataset = ShardDataset.open(out)
    survey = read(dataset, choose(dataset.manifest, 100))
    return survey, suspicious(survey)


@pytest.mark.slow
def test_cr5(tmp_path):
    """Measured velocities, lag 0 of actions and pictures, joint 4 almost still, a jittered clock at 10 Hz."""
    contract = (ROOT / "datasets" / "cr5_banana.contract.yaml",)
    survey, findings = inspected("cr5_banana_lerobot_v21", tmp_path, size="128x96", contract=contract)
    assert [finding.what for finding in findings] == ["action 'joint_4_vel' hardly ever moves"]
    contract, looks = survey.manifest.contracts[0], survey.of("cr5")
    pairs = find_pairs(contract, looks)
    assert [(pair.action, pair.proprio) for pair in pairs] == [(i, i) for i in range(6)]
    assert all(pair.correlation > 0.94 and 0.9 < pair.slope < 1.1 for pair in pairs)
    curve, seen = action_curve(contract, looks, pairs), video_curve(survey, looks, "top")
    assert curve is not None
    assert seen is not None
    assert (curve.peak, seen.peak) == (0, 0)


def test_bridge(tmp_path):
    """Deltas of the end effector: all six drive their own state, at lag 0; ten frames an episode."""
    contract = ROOT / "datasets" / "bridge_rlds.contract.yaml"
    logs = "octo_bridge_rlds/bridge_dataset/1.0.0"
    survey, findings = inspected(logs, tmp_path, size="64x64", contract=(contract,))
    assert [finding.detector for finding in findings] == ["short episodes"]
    (contract,) = survey.manifest.contracts
    pairs = find_pairs(contract, survey.of(contract.embodiment))
    assert [(p.action, p.proprio) for p in pairs if p.action < 6] == [(i, i) for i in range(6)]
    curve = action_curve(contract, survey.of(contract.embodiment), pairs)
    assert curve is not None
    assert curve.peak == 0


@pytest.mark.slow
def test_droid(tmp_path):
    """Commanded poses that the arm reaches a frame (0.2 s) later; roll wraps; some have no text."""
    survey, findings = inspected(
        "ctrl_world_droid/dataset_example/droid_subset", tmp_path, size="64x64", trim="shorter"
    )
    assert {finding.detector for finding in findings} == {"action lag", "wraps", "missing texts"}
    assert findings[0].what == "motion comes 1 frame after its action"
    assert {f.what for f in findings if f.detector == "wraps"} == {
        "action 'ee_roll' wraps around",
        "proprio 'ee_roll' wraps around",
    }
    for view in survey.manifest.views:
        curve = video_curve(survey, survey.of(survey.manifest.contracts[0].embodiment), view)
        assert curve is not None
        assert curve.peak == 0
