"""Tokenizers on disk: bitwise round trips, and a refusal for everything that can be wrong with a folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidworld.errors import CheckpointError
from vidworld.tokenizers.conv import ConvTokenizer
from vidworld.tokenizers.store import load_tokenizer, save_tokenizer

Make = Callable[..., ConvTokenizer]


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer: Make) -> Path:
    save_tokenizer(make_tokenizer(), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_comes_back_bit_by_bit(folder: Path, make_tokenizer: Make) -> None:
    tokenizer, loaded = make_tokenizer(), load_tokenizer(folder)
    assert isinstance(loaded, ConvTokenizer)
    assert loaded.config == tokenizer.config
    assert loaded.digest == tokenizer.digest
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    clip = torch.rand(1, 2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.encode(clip), tokenizer.encode(clip))
    assert torch.equal(loaded.decode(loaded.encode(clip)), tokenizer.decode(tokenizer.encode(clip)))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_equal_tokenizers_give_equal_bytes(folder: Path, tmp_path: Path, make_tokenizer: Make) -> None:
    digest = save_tokenizer(load_tokenizer(folder), tmp_path / "again")  # type: ignore[arg-type]
    other = save_tokenizer(make_tokenizer(seed=1), tmp_path / "other")
    assert digest != other
    for name in ("tokenizer.json", "tokenizer.safetensors"):
        content = (folder / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content
        assert (tmp_path / "other" / name).read_bytes() != content
    assert sorted(os.listdir(folder)) == ["tokenizer.json", "tokenizer.safetensors"]


def test_the_description_says_what_it_is(folder: Path, make_tokenizer: Make) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = make_tokenizer()
    assert described["kind"] == "conv"
    assert (described["spatial_stride"], described["time_stride"], described["latent_channels"]) == (8, 1, 16)
    assert torch.equal(torch.tensor(described["statistics"]["std"]), tokenizer.std_C)
    assert described["digest"] == tokenizer.digest


def test_a_run_directory_opens_too(folder: Path, make_tokenizer: Make) -> None:
    assert load_tokenizer(folder.parent).digest == make_tokenizer().digest


def test_statistics_are_part_of_the_digest(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    before = tokenizer.digest
    tokenizer.set_statistics(tokenizer.mean_C + 0.5, tokenizer.std_C.clone())
    assert tokenizer.digest != before


def test_saving_over_an_older_tokenizer_replaces_it(folder: Path, make_tokenizer: Make) -> None:
    digest = save_tokenizer(make_tokenizer(seed=3), folder)
    assert load_tokenizer(folder).digest == digest


def flip_a_bit(folder: Path) -> None:
    path = folder / "tokenizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "tokenizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "tokenizer.safetensors")
        change(weights)
        save_file(weights, folder / "tokenizer.safetensors")

    return apply


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["encoder.1.weight"]


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["mean_C"][0] = torch.nan


def of_half(weights: dict[str, torch.Tensor]) -> None:
    weights["mean_C"] = weights["mean_C"].half()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no tokenizer.json .*: got a folder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot read the tokenizer's descr"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "schema version"),
        (lambda folder: edit(folder, schema_version=99), "schema version .*got 99, expected 1"),
        (lambda folder: edit(folder, kind="wan"), "tokenizer kind .*got 'wan', expected 'conv'"),
        (lambda folder: edit(folder, config={"width": [1, 2, 3]}), "did you mean 'widths'"),
        (lambda folder: edit(folder, config=None), "config of the tokenizer"),
        (lambda folder: edit(folder, spatial_stride=16), "spatial_stride .*got 16, expected 8"),
        (lambda folder: edit(folder, statistics={"mean": [], "std": []}), "statistics .*does not match"),
        (lambda folder: edit(folder, digest="0" * 16), "digest .*does not match"),
        (lambda folder: (folder / "tokenizer.safetensors").unlink(), "cannot read the tokenizer's weights"),
        (cut, "cannot read the tokenizer's weights"),
        (flip_a_bit, "does not match its weights"),
        (change_weights(drop), r"1 missing \(encoder.1.weight\)"),
        (change_weights(lambda weights: weights.update(extra=torch.ones(1))), r"1 unknown \(extra\)"),
        (change_weights(of_half), r"1 of another shape or dtype \(mean_C\)"),
        (change_weights(poison), r"1 not finite \(mean_C\)"),
    ],
)
def test_damage_is_refused_by_name(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    load_tokenizer(folder)  # as it is, it opens
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder.parent)


def test_weights_of_another_save_are_refused(folder: Path, tmp_path: Path, make_tokenizer: Make) -> None:
    """As after a save that was killed between its two files."""
    save_tokenizer(make_tokenizer(seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.safetensors", folder)
    with pytest.raises(CheckpointError, match="does not match its weights"):
        load_tokenizer(folder)


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path, make_tokenizer: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the tokenizer"):
        save_tokenizer(make_tokenizer(), tmp_path / "file")
