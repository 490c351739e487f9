"""The naive baseline is the same function, and the benchmark of training steps runs and writes its rows."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidworld.model.config import DiTConfig
from vidworld.model.dit import CausalDiT
from vidworld.model.inputs import Conditioning, FrameShape, Streams
from vidworld.types import Frames, SignalLevel

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SHAPE = FrameShape(1, 3, 8, 8, 4, 2)
CONFIG = DiTConfig(width=48, depth=4, num_heads=6, num_kv_heads=2, time_every=2)


def naive():
    spec = importlib.util.spec_from_file_location("naive", BENCH / "baselines" / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(seed=0):
    torch.manual_seed(seed)
    model = CausalDiT(CONFIG, SHAPE).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def loss(model, streams):
    random = torch.Generator().manual_seed(1)
    size = (2, streams.num_queries)

    def normal(*shape):
        return torch.randn(*size, *shape, generator=random, dtype=torch.float64)

    predicted, _ = model(
        Frames(normal(1, 3, 8, 8), normal(4)),
        SignalLevel.from_signal(torch.rand(size, generator=random, dtype=torch.float64)),
        torch.rand(size, generator=random, dtype=torch.float64),
        Conditioning(normal(1, 2), torch.ones(size, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)),
        streams=streams,
    )
    return predicted.latents_BTVChw.square().mean() + predicted.proprio_BTS.square().mean()


def test_the_naive_network_is_the_same_function():
    streams, ours, other = Streams(4, targets=1), make_model(), make_model()
    naive().make_naive(other)
    expected, got = loss(ours, streams), loss(other, streams)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    expected.backward()
    got.backward()
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-11, rtol=1e-9)


def test_full_attention_is_causal_and_another_network():
    streams, full = Streams(4, targets=1), make_model()
    naive().make_naive(full, streams, torch.device("cpu"))
    assert abs(loss(full, streams) - loss(make_model(), streams)) > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_variant_runs_on_a_cpu_and_rows_are_written(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / "train.py"), "--sizes", "2x64", "--side", "4", "--channels", "4"]
    command += [
        "--frames",
        "4",
        "--rows",
        "2",
        "--steps",
        "2",
        "--no-compile",
        "--minutes",
        "30",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=BENCH.parents[1],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["name"]: row["value"] for row in json.loads(out.read_text())}
    for name in ("naive", "naive_compiled", "naive_full"):
        assert rows[f"train.cpu.ratio_{name}.2x64"] > 0
    for name in ("zero1", "zero2", "zero3"):
        assert rows[f"train.cpu.deepspeed_ratio.{name}.2x64"] > 0
    parts = [
        rows[f"train.cpu.part_ms.2x64.{part}"] for part in ("data", "forward", "backward", "optimizer", "ema")
    ]
    tokens = 2 * 8 * (4 + 6)
    assert rows["train.cpu.tok_s.2x64"] == pytest.approx(1e3 * tokens / sum(parts), rel=5)
    assert any(name.startswith("train.cpu.attention.4x8.rectangles") for name in rows)
    assert not any(name.startswith("train.mfu") for name in rows), "a CPU has no place in that row"


def test_a_size_that_is_none_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCH / "train.py"), "--sizes", "large", "--out", "None"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 1
    assert "--sizes: got large, expected LAYERSxWIDTH" in done.stderr
    assert "Traceback" not in done.stderr


def test_as_many_clips_as_fit(monkeypatch):
    """Any whole number, the last one that the plan finds room for, and never more than 64."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    import train

    class Plan:
        def __init__(self, rows: int, fixed: float, each: float) -> None:
            self.total_gib = fixed + each * rows

    def chosen(fixed: float, each: float) -> int:
        monkeypatch.setattr(train, "planner", lambda case: lambda rows: Plan(rows, fixed, each))
        case = train.Case("", None, 16, 8, 8, 1, torch.device("cuda"), BENCH, True, BENCH)
        return train.rows_that_fit(case)

    class Card:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert chosen(fixed=5.0, each=9.0) == 7  # of 68 GiB; 64 + 4 are full and 5 + 8 x 9 too many
    assert chosen(fixed=4.0, each=16.0) == 4, "exactly full"
    assert chosen(fixed=90.0, each=1.0) == 1, "one is tried in any case"
    assert chosen(fixed=1.0, each=0.1) == 64
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_forecast_knows_what_compiles(monkeypatch):
    """Of the first variant's time until one of the kind was measured, and then as the longest of the kind."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    from train_forecast import GUESS, Forecast

    forecast = Forecast()
    assert forecast.seconds("ours") == 0, "the first is measured in any case"
    forecast.took_s["ours"] = 80.0
    assert forecast.seconds("bare") == GUESS["shared"] * 80
    assert forecast.seconds("naive_compiled") == GUESS["own"] * 80
    forecast.took_s |= {"bare": 12.0, "zero1": 20.0, "zero3": 45.0}
    assert forecast.seconds("muon") == forecast.seconds("fsdp2") == 20
    assert forecast.seconds("half_residual") == 45
    assert forecast.seconds("naive") == GUESS["eager"] * 80
    alone = Forecast({"naive": 20.0})
    assert alone.seconds("ours") == GUESS["own"] * 20, "nobody has compiled its blocks"
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
