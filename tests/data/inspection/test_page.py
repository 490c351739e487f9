"""The page: one file, nothing fetched, hostile texts harmless, the same size for many episodes."""

import dataclasses
import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from vidworld.cli import run
from vidworld.data.inspect import describe
from vidworld.data.inspection.detectors import suspicious
from vidworld.data.inspection.page import build_page
from vidworld.data.inspection.survey import Survey, choose, read
from vidworld.data.manifest import Quarantined, Sample, Shard
from vidworld.data.shards import ShardDataset

EVIL = '</style><script>alert(1)</script><img src="http://x/" onerror=alert(1)> $\\frac{1} \ud800 \n-->'


class Tags(HTMLParser):
    """Every tag, and whatever a browser would fetch; fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(survey: Survey) -> str:
    findings = suspicious(survey)
    summary = describe(survey.manifest) | {"verified": False, "episodes_read": len(survey.looks)}
    return build_page(summary, survey, findings).render()


def test_the_page_says_what_is_there(clean_dir, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert run(["inspect", str(clean_dir), "--html", str(path)]) == 0
    assert f"page: {path}" in capsys.readouterr().out
    tags = Tags(path.read_text())
    assert all(source.startswith(("data:", "#")) for source in tags.sources)
    assert tags.tags.count("img") == 1, "one contact sheet a view"
    assert tags.tags.count("svg") == 4, "actions, proprioception, timing, lengths"
    text = " ".join(tags.text)
    for fact in (
        "planted",
        "video dataset, 32x32 at 10 fps, views top",
        "Nothing looks wrong.",
        "10 of 10 episodes read",
        "24 detectors found nothing",
        "shoulder_velocity",
        "accepted from",
        "shoulder_velocity drives shoulder (1.00)",
        "push the disc",
        "Every episode of the source is here.",
        "shards/train-000000.tar",
        "--verify does",
    ):
        assert fact in text, fact
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html"]


def test_findings_quarantine_and_many_robots_and_views(plant_dataset, tmp_path, pictures):
    from vidworld.data.sources.base import video_of

    def plant(episode, index):
        black = np.zeros_like(pictures(episode))
        bad = episode.proprio_TS * np.nan if index == 3 else episode.proprio_TS
        return dataclasses.replace(episode, proprio_TS=bad, views={**episode.views, "wrist": video_of(black)})

    directory = plant_dataset(plant, views=("top", "wrist"))
    path = tmp_path / "page.html"
    assert run(["inspect", str(directory), "--html", str(path), "--max-episodes", "4"]) == 0
    tags = Tags(path.read_text())
    text = " ".join(tags.text)
    assert "View 'wrist' is dark" in text
    assert "4 of 9 episodes read" in text
    assert "planar-000003" in text
    assert "finite numbers" in text
    assert tags.tags.count("img") == 2


def test_hostile_texts_stay_text(clean, tmp_path):
    manifest = clean.manifest
    contract = manifest.contracts[0]
    evil_dimension = dataclasses.replace(contract.action[0], name=EVIL, unit=EVIL)
    contract = dataclasses.replace(
        contract, note=EVIL, control_frame=EVIL, action=(evil_dimension, *contract.action[1:])
    )
    shards = tuple(
        dataclasses.replace(
            shard, samples=tuple(dataclasses.replace(s, text=EVIL, episode_id=EVIL) for s in shard.samples)
        )
        for shard in manifest.shards
    )
    evil = dataclasses.replace(
        manifest,
        name=EVIL,
        contracts=(contract,),
        shards=shards,
        quarantined=(Quarantined(EVIL, EVIL),) * 9,
        created_by=EVIL,
        options={EVIL: EVIL},
    )
    by_key = {sample.key: sample for sample in evil.samples()}
    looks = tuple(dataclasses.replace(look, sample=by_key[look.sample.key]) for look in clean.looks)
    evil_survey = Survey(evil, looks)
    summary = describe(evil) | {"verified": False, "episodes_read": len(looks)}
    build_page(summary, evil_survey, suspicious(evil_survey)).write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    tags = Tags(page)
    assert "script" not in tags.tags
    assert tags.tags.count("img") == 1
    assert all(source.startswith(("data:", "#")) for source in tags.sources)
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_ten_thousand_episodes_stay_a_small_page(clean):
    samples = [
        Sample(f"e-{i}", 40 + i % 50, "planar_arm", f"e-{i}", f"instruction {i}") for i in range(10_000)
    ]
    shards = tuple(
        Shard(f"shards/train-{i:06d}.tar", "0" * 64, 10**8, "train", tuple(samples[i * 64 : i * 64 + 64]))
        for i in range(-(-10_000 // 64))
    )
    many = dataclasses.replace(
        clean.manifest,
        shards=shards,
        quarantined=tuple(Quarantined(f"bad-{i}", "NaN") for i in range(3000)),
        options={"episodes": [sample.key for sample in samples]},
    )
    page = page_of(Survey(many, clean.looks))
    assert len(page) < 1e6
    text = " ".join(Tags(page).text)
    assert "9,960 more are in manifest.json." in text
    assert "2,960 more are in manifest.json." in text
    assert "10 of 10000 episodes read" in text


@pytest.mark.parametrize("stride", [1, 3])
def test_latents(latents_dir, tmp_path, stride, capsys):
    """Latents have no brightness; motion, figures and the sheet of false colours are there all the same."""
    if stride == 3:
        with_stride(latents_dir, stride)
    path = tmp_path / "page.html"
    assert run(["inspect", str(latents_dir), "--html", str(path)]) == 0
    tags = Tags(path.read_text())
    text = " ".join(tags.text)
    assert "first three channels" in text
    assert "22 detectors found nothing" in text, "darkness and sameness of pictures were not judged"
    assert "follow an action to judge its timing" in text
    assert tags.tags.count("img") == 1
    dataset = ShardDataset.open(latents_dir)
    looks = read(dataset, choose(dataset.manifest, 3)).looks
    assert [len(look.views["top"].change_T) for look in looks] == [
        (len(look.actions_TA) - 1) // stride for look in looks
    ]
    assert looks[0].stride == stride


def with_stride(directory, stride):
    """Rewrite the fixture's latents as those of a tokenizer with a time stride."""
    from vidworld.data.manifest import Manifest
    from vidworld.data.shards import ShardWriter, json_bytes, latents_member, npy_bytes

    dataset = ShardDataset.open(directory)
    shards = []
    for shard in dataset.manifest.shards:
        samples, packed = [], []
        for sample in shard.samples:
            episode = dataset.read(sample.key)
            assert episode.latents is not None
            frames = 1 + (sample.frames - 1) // stride * stride
            packed.append(
                {
                    latents_member("top"): npy_bytes(episode.latents["top"][:frames:stride]),
                    "actions.npy": npy_bytes(episode.actions_TA[:frames]),
                    "proprio.npy": npy_bytes(episode.proprio_TS[:frames]),
                    "timestamps.npy": npy_bytes(episode.timestamps_T[:frames]),
                    "meta.json": json_bytes(episode.meta),
                }
            )
            samples.append(dataclasses.replace(sample, frames=frames))
        with ShardWriter(directory / shard.file) as writer:
            for sample, members in zip(samples, packed, strict=True):
                writer.add(sample.key, members)
        shards.append(
            dataclasses.replace(shard, sha256=writer.sha256, bytes=writer.bytes, samples=tuple(samples))
        )
    manifest: Manifest = dataset.manifest
    tokenizer = dict(manifest.tokenizer or {}) | {"time_stride": stride}
    dataclasses.replace(manifest, shards=tuple(shards), tokenizer=tokenizer).write(directory)


def test_json_lists_suspicions(plant_dataset, capsys):
    directory = plant_dataset(lambda e, _: dataclasses.replace(e, actions_TA=-e.actions_TA))
    assert run(["inspect", str(directory), "--json", "--max-episodes", "6", "--seed", "1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["episodes_read"] == 6
    signs = [finding for finding in said["suspicious"] if finding["detector"] == "sign"]
    assert [set(finding) for finding in signs] == [
        {"detector", "what", "where", "got", "expected", "fix"}
    ] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "page.txt"], "--html: got page.txt, expected a file that ends in .html"),
        (["--html", "."], "expected a file that ends in .html"),
        (["--max-episodes", "-1"], "--max-episodes: got -1, expected a positive number"),
        (
            ["--html", "x.html", "--max-episodes", "0"],
            "--max-episodes: got 0, expected at least 1 for a page",
        ),
        (["--workers", "0"], "--workers: got 0"),
    ],
)
def test_wrong_options(clean_dir, capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", str(clean_dir), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_repeatable_and_has_no_duplicate_ids(clean):
    page = page_of(clean)
    assert page == page_of(clean)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_dataset_at_a_url(clean_dir, tmp_path, monkeypatch, capsys):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("VIDWORLD_CACHE", str(tmp_path / "cache"))
    bucket = fsspec.filesystem("memory")
    for path in clean_dir.rglob("*.*"):
        bucket.pipe(f"/inspected/{path.relative_to(clean_dir)}", path.read_bytes())
    try:
        page = tmp_path / "page.html"
        arguments = ["inspect", "memory://inspected", "--html", str(page), "--max-episodes", "3"]
        assert run(arguments) == 0
        assert "suspicious: nothing (3 of 10 episodes read)" in capsys.readouterr().out
        assert page.exists()
    finally:
        bucket.rm("/inspected", recursive=True)


def test_a_large_dataset_is_described_in_a_moment(clean, tmp_path, capsys):
    """10,000 episodes of which only the manifest is touched; their tars are holes, 16 GB of zeros to read."""
    samples = [Sample(f"e-{i}", 40 + i % 50, "planar_arm", f"e-{i}", "push") for i in range(10_000)]
    (tmp_path / "shards").mkdir()
    shards = []
    for i in range(-(-10_000 // 64)):
        file = f"shards/train-{i:06d}.tar"
        with (tmp_path / file).open("wb") as hole:
            hole.truncate(10**8)
        shards.append(Shard(file, "0" * 64, 10**8, "train", tuple(samples[i * 64 : i * 64 + 64])))
    dataclasses.replace(clean.manifest, shards=tuple(shards)).write(tmp_path)
    began = time.process_time()
    assert run(["inspect", str(tmp_path)]) == 0
    assert time.process_time() - began < 20
    assert "10000 episodes" in capsys.readouterr().out
