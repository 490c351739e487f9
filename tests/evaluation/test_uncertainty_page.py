"""The blocks of docs/uncertainty.md on samples and members run as they stand."""

import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

PAGE = Path(__file__).parents[2] / "docs" / "uncertainty.md"


def test_the_page_runs(untrained_run, tmp_path, monkeypatch):
    for name in ("seed0", "seed1"):
        shutil.copytree(untrained_run, tmp_path / "runs" / name)
    (weights,) = (tmp_path / "runs" / "seed1").glob("checkpoints/*/ema.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights)
    monkeypatch.chdir(tmp_path)
    own = PAGE.read_text().partition("## Calibration")[0]
    blocks = re.findall(r"```python\n(.*?)```", own, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
