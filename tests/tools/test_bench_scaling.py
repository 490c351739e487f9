"""Weak scaling and equality of ranks: the figures from log lines, and toy runs on gloo ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidworld.errors import ConfigError

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def scaling(monkeypatch):
    """The two scripts, imported by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    import scaling
    import scaling_runs

    yield scaling, scaling_runs
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def line(step, step_s, loss=1.0, norm=2.0):
    return {
        "step": step,
        "step_s": step_s,
        "tokens_per_s": 100 / step_s,
        "wait_share": 0.01,
        "memory_gb": 3.0,
        "loss": loss,
        "grad_norm": norm,
    }


def test_speed_is_the_median_after_the_first_lines(scaling):
    lines = [line(number, seconds) for number, seconds in enumerate((9, 9, 9, 0.1, 0.2, 0.3, 0.2, 7.0))]
    speed = scaling[1].Speed.of(lines, skip=3)
    assert speed.step_ms == pytest.approx(200)
    assert speed.tok_s == pytest.approx(500)
    assert speed.spread == pytest.approx(0.5)


def test_differences_are_relative_and_of_the_same_steps(scaling):
    one = [line(1, 1.0), line(2, 1.0)]
    assert scaling[1].differences(one, [line(1, 5.0), line(2, 1.0, loss=1.01, norm=2.1)]) == [
        0,
        pytest.approx(0.05),
    ]
    with pytest.raises(AssertionError, match="same steps"):
        scaling[1].differences(one, [line(2, 1.0)])


def test_a_line_that_is_half_written_is_left_for_later(scaling, tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert scaling[1].read_lines(path) == []
    path.write_text(
        json.dumps(line(1, 1.0)) + "\n" + json.dumps({"step": 1, "event": "x"}) + '\n{"step": 2, '
    )
    assert [row["step"] for row in scaling[1].read_lines(path)] == [1]


def test_variants_are_compared_with_one_gpu_of_the_same_optimizer(scaling, tmp_path):
    case = scaling[1].make_case("2x64", tmp_path, rows=None, toy=True, overrides=["--optim.lr", "0.001"])
    assert case.training.optim.lr == 0.001
    bench = scaling[0].Scaling(scaling[0].Options(out=None), tmp_path, "")
    ones = {name: bench._one(case, name) for name in scaling[0].CHANGES}
    assert ones == {name: "muon" if name.startswith("muon") else "ddp" for name in scaling[0].CHANGES}


def test_no_run_begins_that_would_not_end_in_time(scaling, tmp_path, capsys):
    case = scaling[1].make_case("2x64", tmp_path, rows=None, toy=True, overrides=[])
    bench = scaling[0].Scaling(scaling[0].Options(out=None, budget_s=100, seconds=20), tmp_path, "")
    begun = []

    def run(case, name, ranks, changes, **more):
        begun.append(name)
        return [line(number, 1.0) for number in range(9)]

    bench.trainer.run = run
    bench.took_s += [70.0, 79.0]
    bench.speed(case, "ddp", 1)
    assert begun == ["2x64-ddp-1"]
    bench.took_s.append(81.0)
    bench.speed(case, "ddp", 2)
    assert begun == ["2x64-ddp-1"]
    bench.close()
    assert "left out for want of time: 2x64-ddp-2" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "said"), [("large", "--cases"), ("none.yaml", "cannot read")])
def test_a_case_that_is_none_is_refused(scaling, tmp_path, name, said):
    with pytest.raises(ConfigError, match=said):
        scaling[1].make_case(name, tmp_path, rows=None, toy=True, overrides=[])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_gloo_ranks_are_measured_and_equal_one(scaling, tmp_path):
    """Through the command line; and another seed, the negative control, is not equal."""
    out, work = tmp_path / "rows.json", tmp_path / "work"
    flags = [
        "--device",
        "cpu",
        "--gpus",
        "1",
        "2",
        "--cases",
        "2x64",
        "--variants",
        "ddp",
        "ddp_bf16",
        "fsdp2",
    ]
    flags += ["--seconds", "1", "--log-every", "1", "--equal-steps", "3", "--budget-s", "1000"]
    done = subprocess.run(
        [sys.executable, str(BENCH / "scaling.py"), *flags, "--work", str(work), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"].removeprefix("scaling.cpu."): row["value"] for row in json.loads(out.read_text())}
    for label in ("2x64.2", "2x64.ddp_bf16.2", "2x64.fsdp2.2"):
        assert rows[f"weak.{label}"] > 0
        assert rows[f"step_ms.{label}"] > 0
    assert rows["weak.2x64.2"] == pytest.approx(rows["tok_s.2x64.2"] / (2 * rows["tok_s.2x64.1"]), rel=1e-3)
    assert rows["equal.2x64.2"] <= 1e-5
    assert rows["equal_3.2x64.2"] <= 1e-3

    _, runs = scaling
    case = runs.make_case("2x64", tmp_path / "other", rows=None, toy=True, overrides=["--seed", "1"])
    lines = runs.Trainer(tmp_path / "other", "cpu", 240).run(
        *(case, "other", 1, {"engine.accumulation": 2}), log_every=1, enough=lambda lines, _: len(lines) >= 3
    )
    two = runs.read_lines(work / "2x64-equal-2" / "metrics.jsonl")[:3]
    assert runs.differences(lines[:3], two)[0] > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_blocks_are_trained_alike_with_weights_cut_across_ranks(scaling, tmp_path):
    """Matrices above ZeRO-3's threshold of what every rank keeps; its hooks cannot be in a block's graph."""
    _, runs = scaling
    overrides = ["--engine.compile", "on", "--optim.name", "adamw", "--optim.warmup-steps", "1"]
    case = runs.make_case("2x256", tmp_path, rows=None, toy=True, overrides=overrides)
    trainer = runs.Trainer(tmp_path, "cpu", 500)

    def first_steps(name, ranks, changes):
        lines = trainer.run(case, name, ranks, changes, log_every=1, enough=lambda lines, _: len(lines) >= 6)
        return lines[:6]

    one = first_steps("one", 1, {"engine.accumulation": 2})
    for strategy in ("zero3", "fsdp2"):
        two = first_steps(strategy, 2, {"engine.strategy": strategy})
        assert max(runs.differences(one, two)) < 1e-4
    assert len({line["loss"] for line in one}) == 6
