"""The bench of rollouts: its cases and parts are what their names say, and what counts is measured first."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vidworld.errors import ConfigError
from vidworld.model.config import DiTConfig

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("rollout")


def test_a_case_is_its_name(rollout: ModuleType) -> None:
    case = rollout.Case.parse("16x512.b128.k4")
    assert (case.size, case.batch, case.steps, case.name) == ("16x512", 128, 4, "16x512.b128.k4")
    for text in ("16x512", "16x512.k4.b1", "17x512.b1.k1"):
        with pytest.raises(ConfigError):
            rollout.Case.parse(text)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopB_TNT", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>", "attention"),
        ("triton_red_fused__to_copy_add_mul_rms_norm_0", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 2>", "copy"),
        ("void curand_thing()", "other"),
    ],
)
def test_kernels_belong_to_parts(rollout: ModuleType, kernel: str, part: str) -> None:
    assert rollout.part_of(kernel) == part


def test_the_first_variant_of_all_cases_comes_first(
    rollout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = DiTConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, time_every=2)
    for module in (rollout, sys.modules["rollout_cases"]):
        monkeypatch.setattr(module, "SIZES", {"a": (small, 32), "b": (small, 32)})
    limits = sys.modules["roofline"].Machine(1e12, 1e10)
    monkeypatch.setattr(rollout, "machine", lambda device: limits)
    out = tmp_path / "rows.json"
    asked = ["--cases", "a.b1.k1", "b.b2.k2", "--variants", "engine", "plain", "--window", "3"]
    asked += ["--frames", "4", "--repeats", "1", "--latency-steps", "2", "--out", str(out)]
    rollout.main(asked, "rollout")
    names = [row["name"] for row in json.loads(out.read_text())]
    rates = [name for name in names if name.startswith("rollout.cpu_fps.") and name.count(".") in (5, 6)]
    first = ["rollout.cpu_fps.a.b1.k1.engine", "rollout.cpu_fps.b.b2.k2.engine"]
    rest = [name for name in rates if name.endswith((".decoded", ".plain"))]
    assert max(map(names.index, first)) < min(map(names.index, rest))
    assert "rollout.cpu_fps.b.b2.k2.plain.decoded" in rest
    assert "rollout.latency_ms.a.b1.k1.engine.p99" in names
    assert not any(name.startswith("rollout.latency_ms.b") for name in names), "at batch 1 alone"
    # When the time is over, nothing begins.
    rollout.main([*asked[:-1], str(tmp_path / "none.json"), "--budget-s", "0"], "rollout")
    assert not (tmp_path / "none.json").exists()
