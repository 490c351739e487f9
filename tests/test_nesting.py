"""Files that are nested a hundred thousand deep end in one line, whoever reads them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vidworld.config import read_yaml
from vidworld.data.manifest import MANIFEST, Manifest
from vidworld.data.sources.lerobot import LeRobotSource
from vidworld.errors import UserError
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.checkpoint import verify
from vidworld.world.spec import WorldSpec

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a dataset": (MANIFEST, Manifest.read),
    "a tokenizer": ("tokenizer.json", load_tokenizer),
    "a pretrained autoencoder": ("config.json", load_tokenizer),
    "a checkpoint": ("manifest.json", verify),
    "a world": ("world.json", WorldSpec.read),
    "robot logs": ("meta/info.json", LeRobotSource),
    "settings": ("deep.yaml", lambda folder: read_yaml(folder / "deep.yaml")),
}


@pytest.mark.parametrize("name", READERS)
def test_nested_files_are_refused(tmp_path: Path, name: str) -> None:
    file, read = READERS[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("[" * 100_000)
    if file == "config.json":
        (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
