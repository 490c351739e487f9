"""Pretrained autoencoders on disk: folders that open, references to them, and what is refused by name."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidworld.errors import CheckpointError
from vidworld.tokenizers.pretrained import PretrainedTokenizer
from vidworld.tokenizers.store import copy_tokenizer, has_weights, load_tokenizer, save_tokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(vae_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(vae_folders["wan2.1"], tmp_path / "wan"))


def load(path: Path) -> PretrainedTokenizer:
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, PretrainedTokenizer)
    return tokenizer


def change_weights(folder: Path, name: str = WEIGHTS) -> None:
    weights = load_file(folder / name)
    key = sorted(weights)[0]
    weights[key] = weights[key] + 1e-3
    save_file(weights, folder / name)


def edit(file: Path, /, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def test_layouts_that_open(folder: Path, tmp_path: Path, vae: Callable[..., Any]) -> None:
    tokenizer = load(folder)
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder, pipeline / "vae")
    (pipeline / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    sharded = tmp_path / "sharded"
    vae("wan2.1").save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    renamed = tmp_path / "renamed"
    shutil.copytree(folder, renamed)
    (renamed / WEIGHTS).rename(renamed / "diffusion_pytorch_model.fp16.safetensors")
    clip = torch.rand(1, 5, 3, 16, 16) * 2 - 1
    for other in (pipeline, sharded, renamed):
        loaded = load(other)
        assert loaded.digest == tokenizer.digest
        assert torch.equal(loaded.encode(clip), tokenizer.encode(clip))
    change_weights(folder)
    assert load(folder).digest != tokenizer.digest


def test_a_run_holds_a_reference_and_no_copy(folder: Path, tmp_path: Path) -> None:
    tokenizer = load(folder)
    tokenizer.set_statistics(torch.full((4,), 0.25), torch.tensor([1.0, 0.1, 3.0, 1 / 3]))
    digest = save_tokenizer(tokenizer, tmp_path / "run" / "tokenizer")
    assert [path.name for path in (tmp_path / "run" / "tokenizer").iterdir()] == ["tokenizer.json"]
    loaded = load(tmp_path / "run")
    assert loaded.digest == digest == tokenizer.digest
    assert torch.equal(loaded.std_C, tokenizer.std_C)
    assert loaded.statistics_from == "measurement"
    # Of a reference another reference, to the same place.
    again = save_tokenizer(loaded, tmp_path / "other")
    assert again == digest
    content = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == content


def test_precision_is_part_of_a_reference(folder: Path, tmp_path: Path) -> None:
    half = load_tokenizer(folder, dtype="bfloat16")
    digest = save_tokenizer(half, tmp_path / "half")
    loaded = load(tmp_path / "half")
    assert loaded.digest == digest != load(folder).digest
    assert next(loaded.vae.parameters()).dtype == torch.bfloat16


def test_what_changed_after_it_was_referred_to_is_refused(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_tokenizer(load(folder), run / "tokenizer")
    description = run / "tokenizer" / "tokenizer.json"
    content = description.read_text()
    change_weights(folder)
    message = rf"digest of the tokenizer does not match .*{folder}: got .*bring back the weights"
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(run)
    shutil.move(folder, tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"the pretrained autoencoder is gone in .*set its new `path`"):
        load_tokenizer(run)
    for changes, message in (
        ({"dtype": "float16"}, "dtype of the tokenizer"),
        ({"statistics": {"mean": ["a"]}}, "statistics of the tokenizer"),
        ({"statistics": {"mean": [0.0], "std": [1.0]}}, "statistics of the tokenizer does not match"),
        ({"class": "AutoencoderDC"}, "class of the tokenizer does not match"),
    ):
        description.write_text(content)
        edit(description, path=str(tmp_path / "moved"), **changes)
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(run)


def test_a_copy_brings_the_weights_along(folder: Path, tmp_path: Path, vae: Callable[..., Any]) -> None:
    vae("wan2.1").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    for name, source in (("whole", folder), ("parts", tmp_path / "sharded")):
        digest = save_tokenizer(load(source), tmp_path / name / "run")
        copy_tokenizer(tmp_path / name / "run", tmp_path / name / "light", with_weights=False)
        assert not has_weights(tmp_path / name / "light")
        assert load(tmp_path / name / "light").digest == digest
        copy_tokenizer(tmp_path / name / "run", tmp_path / name / "full", with_weights=True)
        assert has_weights(tmp_path / name / "full")
        shutil.rmtree(source)
        moved = Path(shutil.move(tmp_path / name / "full", tmp_path / name / "moved"))
        assert load(moved).digest == digest
        # A copy of a copy stays whole.
        copy_tokenizer(moved, tmp_path / name / "again", with_weights=False)
        shutil.rmtree(moved)
        assert load(tmp_path / name / "again").digest == digest


class Canary:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("canary-was-run"),)


def test_pickles_are_refused_by_name_and_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    message = (
        r"got diffusion_pytorch_model.bin \(pickle, .*never opened\), expected .*safe_serialization=True"
    )
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(Canary()))
    with pytest.raises(CheckpointError, match="cannot read the autoencoder's weights"):
        load_tokenizer(folder)
    index = {"weight_map": {"encoder.conv_in.weight": "diffusion_pytorch_model.bin"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weight_map .*expected safetensors files only"):
        load_tokenizer(folder)
    assert not (tmp_path / "canary-was-run").exists()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def drop(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights | {"extra": torch.ones(1)}, folder / WEIGHTS)


def poison(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["encoder.conv_in.bias"][0] = torch.nan
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read in .*config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "got list, expected an object"),
        (
            lambda folder: edit(folder / "config.json", _class_name="os.system"),
            "got 'os.system', expected Auto",
        ),
        (
            lambda folder: edit(folder / "config.json", _class_name="AutoencoderKLCogVideoX"),
            "need a causal autoencoder: take one of these",
        ),
        (lambda folder: edit(folder / "config.json", dim_mult="x"), "config of AutoencoderKLWan"),
        (lambda folder: edit(folder / "config.json", base_dim=8), "of another shape"),
        (cut, "cannot read the autoencoder's weights .*copy the folder again"),
        (drop, r"1 missing \(encoder.conv_in.weight\); 1 unknown \(extra\)"),
        (poison, r"1 not finite \(encoder.conv_in.bias\)"),
        (lambda folder: (folder / WEIGHTS).unlink(), "weights of the autoencoder .*got none"),
        (
            lambda folder: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "weight_map .*expected file names of this folder",
        ),
        (
            lambda folder: (folder / f"{WEIGHTS}.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "files of the index are missing .*got b.safetensors",
        ),
    ],
)
def test_damage_is_refused_by_name(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    load(folder)  # as it is, it opens
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)
