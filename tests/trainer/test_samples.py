"""What is looked at while training: repeatable losses, an alarm that sounds when it should, clips."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidworld import media
from vidworld.data.loader import LoaderConfig
from vidworld.data.shards import ShardDataset
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import LookConfig
from vidworld.trainer.corpus import world_spec
from vidworld.trainer.engine import EngineConfig, autocast_of
from vidworld.trainer.feed import clip_batches
from vidworld.trainer.samples import FaithfulnessAlarm, Validation, WorldSamples
from vidworld.trainer.tasks import Moment, WorldTask
from vidworld.world.build import build

PLAIN = autocast_of(EngineConfig(precision="fp32"), torch.device("cpu"))


@pytest.fixture
def parts(planar: Path, latents: Path, tokenizer_run: Path, settings: SimpleNamespace) -> SimpleNamespace:
    """A world task with weights that are not zero, and what looks at it."""
    torch.manual_seed(0)
    dataset, tokenizer = ShardDataset.open(latents), load_tokenizer(tokenizer_run)
    spec = world_spec(settings.world(latents, tokenizer_run), dataset, tokenizer)
    world = build(spec, tokenizer)
    for parameter in world.model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    task = WorldTask(world.model, world.normalizer, ObjectiveConfig())
    batches = clip_batches(dataset, "val", LoaderConfig(clip_frames=6, batch_size=4, workers=0), 2)
    return SimpleNamespace(
        task=task,
        batches=batches,
        spec=spec,
        tokenizer=tokenizer,
        latents=dataset,
        video=ShardDataset.open(planar),
    )


def test_validation_repeats(parts: SimpleNamespace) -> None:
    look = Validation({"planar": parts.batches}, PLAIN)
    first, second = look(1, parts.task), look(99, parts.task)
    assert first == second
    assert first.keys() == {"val_loss", "val_flow", "val_latents", "val_proprio"}
    assert first["val_loss"] == pytest.approx(first["val_flow"])


def alarm(parts: SimpleNamespace, progress: float, said: list[str]) -> FaithfulnessAlarm:
    batches = {"planar": parts.batches}
    return FaithfulnessAlarm(batches, parts.spec, LookConfig(), lambda: progress, said.append, PLAIN)


def test_the_alarm_sounds_for_a_model_that_ignores_actions(parts: SimpleNamespace) -> None:
    for parameter in parts.task.net.action_embedding.parameters():
        torch.nn.init.zeros_(parameter)
    said: list[str] = []
    found = alarm(parts, 0.1, said)(10, parts.task)
    assert found["faithful_ratio_shuffled"] == pytest.approx(1.0, abs=1e-4)
    assert said == [], "too early to tell"
    late = alarm(parts, 0.5, said)
    late(10, parts.task)
    assert "hardly listens to its actions" in said[0]
    late(20, parts.task)
    assert len(said) == 1, "once is enough"


def test_one_clip_a_batch_is_a_note_and_not_an_error(parts: SimpleNamespace) -> None:
    said: list[str] = []
    alone = {"planar": [batch.rows([0]) for batch in parts.batches]}
    check = FaithfulnessAlarm(alone, parts.spec, LookConfig(), lambda: 1.0, said.append, PLAIN)
    assert check(10, parts.task) == {} == check(20, parts.task)
    assert said == ["no check of the actions of 'planar': one clip a batch"]


def test_several_embodiments_are_judged_one_by_one(parts: SimpleNamespace) -> None:
    first, second = parts.batches
    named = {"a": [first], "b": [second.rows([0, 1])]}
    values = Validation(named, PLAIN)(1, parts.task)
    assert values["val_loss"] == pytest.approx((values["val_loss/a"] + values["val_loss/b"]) / 2)
    said: list[str] = []
    found = FaithfulnessAlarm(named, parts.spec, LookConfig(), lambda: 0.0, said.append, PLAIN)(1, parts.task)
    assert {"faithful_ratio_shuffled/a", "faithful_ratio_shuffled/b"} <= found.keys()


def test_the_alarm_is_silent_for_a_model_that_listens(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train on latents that are nothing but their action: a few steps teach it."""
    for batch in parts.batches:
        driven = batch.actions_BTA[:, :, 0].roll(1, 1) / 1.6
        batch.latents_BTVChw.copy_(driven[:, :, None, None, None, None].expand_as(batch.latents_BTVChw))
    optimizer = torch.optim.AdamW(parts.task.parameters(), lr=1e-2)
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        parts.task(parts.batches[step % 2], generator, Moment())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    said: list[str] = []
    found = alarm(parts, 1.0, said)(60, parts.task)
    assert found["faithful_ratio_shuffled"] > 1.3, found
    assert said == []


@pytest.mark.parametrize("kind", ["video", "latents"])
def test_sample_clips_show_truth_beside_model(parts: SimpleNamespace, kind: str, tmp_path: Path) -> None:
    look = LookConfig(prompt_frames=3, horizon=5, sample_episodes=1)
    samples = WorldSamples(getattr(parts, kind), parts.tokenizer, parts.spec, look, tmp_path)
    found = samples(7, parts.task)
    assert 0 < found["sample_psnr"] < 60
    (path,) = tmp_path.glob("step-00000007-*.mp4")
    frames_THWC, fps = media.read_video(path)
    assert len(frames_THWC) == 8
    assert fps == parts.spec.fps
    assert samples(7, parts.task) == found, "the same seed every time"


def test_a_wild_model_does_not_stop_its_training(parts: SimpleNamespace, tmp_path: Path) -> None:
    with torch.no_grad():
        parts.task.net.patch_head.bias.fill_(float("nan"))
    samples = WorldSamples(parts.latents, parts.tokenizer, parts.spec, LookConfig(horizon=3), tmp_path)
    with pytest.warns(UserWarning, match="no sample of episode"):
        assert samples(1, parts.task) == {}


def test_looks_leave_no_trace(parts: SimpleNamespace, tmp_path: Path) -> None:
    """Validation and samples change neither weights nor modes, or a resumed run would differ."""

    def state() -> list[Any]:
        return [parts.task.training, *(parameter.clone() for parameter in parts.task.parameters())]

    before, stream = state(), torch.get_rng_state()
    Validation({"planar": parts.batches}, PLAIN)(1, parts.task)
    WorldSamples(parts.latents, parts.tokenizer, parts.spec, LookConfig(horizon=3), tmp_path)(1, parts.task)
    after = state()
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))
    assert torch.equal(stream, torch.get_rng_state())
