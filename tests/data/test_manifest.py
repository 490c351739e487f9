"""The manifest: round trip, what it refuses, what its digest covers, whole or not at all."""

import dataclasses
import json
from pathlib import Path

import pytest

from vidworld.data.manifest import MANIFEST, Manifest, Quarantined, Sample, Shard
from vidworld.errors import ContractError, DataError, UserError


@pytest.fixture
def manifest(dataset) -> Manifest:
    return dataset.manifest


def test_round_trip(manifest, tmp_path):
    rich = dataclasses.replace(
        manifest,
        quarantined=(Quarantined("7", "NaN in action 'vx' at step 3"),),
        created_by="vidworld 0",
        options={"size": "48x32", "workers": None, "nested": {"a": [1, 2.5, "ü"]}},
    )
    path = rich.write(tmp_path)
    assert path.name == MANIFEST
    assert Manifest.read(tmp_path) == rich
    assert Manifest.read(path) == rich
    assert Manifest.read(str(tmp_path)).digest == rich.digest
    assert [entry.name for entry in tmp_path.iterdir()] == [MANIFEST]


def test_equal_manifests_write_equal_bytes(manifest, tmp_path):
    first = manifest.write(tmp_path).read_bytes()
    assert Manifest.read(tmp_path).write(tmp_path).read_bytes() == first


def test_digest_is_of_the_data_and_not_of_its_making(manifest):
    other = dataclasses.replace(
        manifest, name="x", created_by="y", options={"workers": 8}, quarantined=(Quarantined("9", "short"),)
    )
    assert other.digest == manifest.digest
    shard = manifest.shards[0]
    for changed in (
        {"fps": 5.0},
        {"shards": manifest.shards[::-1]},
        {"shards": (dataclasses.replace(shard, sha256="0" * 64), manifest.shards[1])},
        {"shards": (dataclasses.replace(shard, samples=shard.samples[::-1]), manifest.shards[1])},
        {"contracts": (dataclasses.replace(manifest.contracts[0], control_frame="base"),)},
    ):
        assert dataclasses.replace(manifest, **changed).digest != manifest.digest


def test_samples_of_a_split(manifest):
    assert [sample.key for sample in manifest.samples("train")] == ["ep-000000", "ep-000001"]
    assert [sample.key for sample in manifest.samples("val")] == ["ep-000002"]
    assert len(manifest.samples()) == 3
    with pytest.raises(DataError, match="'test', expected train or val"):
        manifest.samples("test")


def test_contract_by_name(manifest):
    assert manifest.contract("toy") is manifest.contracts[0]
    assert manifest.embodiment_index("toy") == 0
    with pytest.raises(ContractError, match=r"'other'.*expected 'toy'"):
        manifest.contract("other")


def test_missing_manifest_is_an_unfinished_conversion(tmp_path):
    with pytest.raises(DataError, match=r"conversion unfinished\? run vidworld shard again"):
        Manifest.read(tmp_path)
    with pytest.raises(DataError, match="no such dataset directory"):
        Manifest.read(tmp_path / "nowhere")


def edited(tmp_path: Path, manifest: Manifest, **changes: object) -> Path:
    path = manifest.write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_unknown_schema_version(manifest, tmp_path):
    edited(tmp_path, manifest, schema_version=2)
    with pytest.raises(DataError, match=r"schema version in .*manifest.json: got 2, expected 1"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1', "\x00" * 20, "[" * 100_000])
def test_what_is_not_a_manifest(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"fps": 20.0},
        {"height": 64},
        {"views": ["front"]},
        {"kind": "latents"},
        {"kind": "audio"},
        {"width": "48"},
        {"tokenizer": {}},
        {"surprise": 1},
        {"digest": None},
        {"contracts": []},
    ],
)
def test_manifest_edited_by_hand_is_refused(manifest, tmp_path, changes):
    edited(tmp_path, manifest, **changes)
    with pytest.raises(UserError):
        Manifest.read(tmp_path)


def test_name_may_be_edited_by_hand(manifest, tmp_path):
    """Negative control of the test above: what is not part of the data is free."""
    edited(tmp_path, manifest, name="renamed", options={})
    assert Manifest.read(tmp_path).name == "renamed"


def test_every_field_of_a_shard_counts(manifest, tmp_path):
    shards = json.loads(manifest.write(tmp_path).read_text())["shards"]
    for field, value in {"file": "shards/x.tar", "sha256": "1", "bytes": 5, "split": "val"}.items():
        edited(tmp_path, manifest, shards=[shards[0] | {field: value}, shards[1]])
        with pytest.raises(DataError, match="digest"):
            Manifest.read(tmp_path)
    for field, value in {"key": "a", "frames": 41, "episode_id": "5", "text": "pull"}.items():
        samples = [shards[0]["samples"][0] | {field: value}, *shards[0]["samples"][1:]]
        edited(tmp_path, manifest, shards=[shards[0] | {"samples": samples}, shards[1]])
        with pytest.raises(DataError, match="digest"):
            Manifest.read(tmp_path)


def with_sample(manifest: Manifest, **changes: object) -> tuple[Shard, ...]:
    first, *rest = manifest.shards
    sample = dataclasses.replace(first.samples[0], **changes)  # type: ignore[arg-type]
    return (dataclasses.replace(first, samples=(sample, *first.samples[1:])), *rest)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"key": "ep.0"}, "sample key 'ep.0'"),
        ({"key": "../ep"}, "sample key '../ep'"),
        ({"key": "k" * 65}, "sample key 'kkk"),
        ({"key": ""}, "sample key ''"),
        ({"key": "ep-000002"}, "sample key 'ep-000002' twice"),
        ({"frames": 0}, "0 frames"),
        ({"embodiment": "other"}, "'other', which has no contract"),
    ],
)
def test_bad_samples(manifest, changes, says):
    with pytest.raises(DataError, match=says):
        dataclasses.replace(manifest, shards=with_sample(manifest, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"file": "../elsewhere.tar"}, "inside the dataset"),
        ({"file": "/etc/passwd"}, "inside the dataset"),
        ({"file": "shards/val-000000.tar"}, "'shards/val-000000.tar' twice"),
        ({"split": "test"}, "split 'test'"),
        ({"samples": ()}, "no samples"),
    ],
)
def test_bad_shards(manifest, changes, says):
    with pytest.raises(DataError, match=says):
        dataclasses.replace(
            manifest, shards=(dataclasses.replace(manifest.shards[0], **changes), manifest.shards[1])
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"fps": 0.0}, "fps 0"),
        ({"views": ()}, "no views"),
        ({"views": ("a.b",)}, "view name 'a.b'"),
        ({"views": ("_hidden",)}, "view name '_hidden'"),
        ({"views": ("top", "Top")}, "view 'top' twice"),
        ({"kind": "latents"}, "do not go together"),
        ({"kind": "latents", "tokenizer": {"digest": "a", "channels": 4}}, "needs digest"),
    ],
)
def test_bad_datasets(manifest, changes, says):
    with pytest.raises(DataError, match=says):
        dataclasses.replace(manifest, **changes)


def test_latents_must_fit_the_tokenizer(manifest):
    tokenizer = {"digest": "a", "channels": 4, "spatial_stride": 16, "time_stride": 3}
    shards = tuple(
        dataclasses.replace(shard, samples=tuple(dataclasses.replace(s, frames=31) for s in shard.samples))
        for shard in manifest.shards
    )
    latents = dataclasses.replace(manifest, kind="latents", tokenizer=tokenizer, shards=shards)
    for changes, says in (
        ({"spatial_stride": 32}, "48x32 is not divisible"),
        ({"time_stride": 4}, "31 frames are not 1"),
        ({"time_stride": 0}, "needs digest"),
    ):
        with pytest.raises(DataError, match=says):
            dataclasses.replace(latents, tokenizer=tokenizer | changes)


def test_sample_defaults():
    assert Sample("a", 1, "toy", "0").text == ""
