"""`vidworld train` from settings to a run that loads, resumed in a fresh process, and what it refuses."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import vidworld
from vidworld.cli import run as run_command
from vidworld.config import to_mapping, to_yaml
from vidworld.data.manifest import Manifest
from vidworld.errors import CheckpointError, ConfigError, DataError, PreemptedError
from vidworld.tokenizers.store import load_tokenizer
from vidworld.trainer.config import absolute, read_training
from vidworld.trainer.loop import Loop
from vidworld.trainer.train import train


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGTERM during the `step`-th step."""
    plain = Loop.step

    def interrupted(self: Loop, micro_batches: Any) -> None:
        if self.clock.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, micro_batches)

    monkeypatch.setattr(Loop, "step", interrupted)


def fingerprint(run: Path, step: int) -> dict[str, str]:
    """Hashes of the tensors' files of a checkpoint."""
    directory = run / "checkpoints" / f"step-{step:08d}"
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.glob("*.safetensors")}


def test_a_tokenizer_run(tokenizer_run: Path, planar: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_run)
    last = rows(tokenizer_run)[-1]
    assert last["event"] == "tokenizer"
    assert last["digest"] == tokenizer.digest
    assert 3 < last["held_out_psnr"] < 40
    assert "val_psnr" in rows(tokenizer_run)[-2]
    assert (tokenizer_run / "samples" / "step-00000004.png").is_file()
    training = read_training(tokenizer_run / "config.yaml")
    assert training.data == planar
    assert absolute(training) == training
    # Statistics come from the averaged weights and the data: latents are normalised.
    assert not torch.equal(tokenizer.mean_C, torch.zeros_like(tokenizer.mean_C))


@pytest.mark.parametrize("kind", ["tokenizer", "world"])
def test_ten_steps_equal_five_and_five_in_a_fresh_process(
    kind: str,
    planar: Path,
    latents: Path,
    tokenizer_run: Path,
    settings: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "tokenizer":
        training = settings.tokenizer(planar, loop={"steps": 10, "log_every": 5})
    else:
        objective = {"resample_fraction": 0.3, "resample_start": 0.3, "motion_weight": 1.0}
        training = settings.world(latents, tokenizer_run, objective=objective)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(training, whole, progress_bar=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(PreemptedError, match="--resume"):
            train(training, parts, progress_bar=False)
    assert len(fingerprint(parts, 5)) == 3
    done = subprocess.run(
        [sys.executable, "-m", "vidworld", "train", str(parts), "--resume"],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "goes on from step 5" in done.stdout
    assert fingerprint(whole, 10) == fingerprint(parts, 10)
    if kind == "tokenizer":
        assert load_tokenizer(whole).digest == load_tokenizer(parts).digest


def test_a_world_run_loads_from_its_first_checkpoint(
    planar: Path,
    tokenizer_run: Path,
    settings: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trained on video, which it encodes; stopped in the middle; then to the end."""
    run = tmp_path / "run"
    training = settings.world(planar, tokenizer_run)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(PreemptedError):
            train(training, run, progress_bar=False)
    world = vidworld.load(run, device="cpu")
    assert world.spec.views == ("camera",) or len(world.spec.views) == 1
    assert (world.spec.sampler.window, world.spec.sampler.finest_steps) == (6, 16)
    before = (run / "latents" / "manifest.json").stat().st_mtime_ns
    train(training, run, resume=True, progress_bar=False)
    assert (run / "latents" / "manifest.json").stat().st_mtime_ns == before, "encoded once"
    again = vidworld.load(run, device="cpu")
    assert world.spec == again.spec
    first, last = (next(w.model.parameters()) for w in (world, again))
    assert not torch.equal(first, last)
    found = rows(run)[-1]
    assert found["faithful_ratio_shuffled"] == pytest.approx(1, abs=0.2)
    assert {"val_loss", "sample_psnr", "faithful_ratio_zero", "faithful_ratio_shifted"} <= found.keys()
    assert list((run / "samples").glob("step-00000010-*.mp4"))
    steps = [row["step"] for row in rows(run) if "step_s" in row]
    assert steps == sorted(set(steps)), "no step is logged twice"


def test_a_world_starts_from_another(
    latents: Path, tokenizer_run: Path, settings: SimpleNamespace, tmp_path: Path
) -> None:
    """Shortcut first, then the energy score, long clips between short ones."""
    model = {**to_mapping(settings.world(latents, tokenizer_run).model), "noise_dims": 4}
    first = settings.world(latents, tokenizer_run, model=model, loop={"steps": 2})
    train(first, tmp_path / "shortcut", progress_bar=False)
    second = settings.world(
        latents,
        tokenizer_run,
        model=model,
        loop={"steps": 2, "log_every": 1},
        init=str(tmp_path / "shortcut"),
        objective={"kind": "energy"},
        sampler={"steps": 1},
        long_clip_frames=12,
        long_clip_fraction=0.5,
    )
    train(second, tmp_path / "energy", progress_bar=False)
    found = [row["frames_per_s"] * row["step_s"] for row in rows(tmp_path / "energy") if "step_s" in row]
    assert found == pytest.approx([24, 24], rel=1e-3), "four clips of six frames, then two of twelve"
    with pytest.raises(ConfigError, match="noise_dims"):
        settings.world(latents, tokenizer_run, objective={"kind": "energy"}, sampler={"steps": 1})


@pytest.mark.parametrize("kind", ["regression", "energy"])
def test_a_world_that_learns_no_steps_between_takes_one(
    latents: Path, tokenizer_run: Path, settings: SimpleNamespace, kind: str
) -> None:
    model = {**to_mapping(settings.world(latents, tokenizer_run).model), "noise_dims": 4}
    given = {"model": model, "objective": {"kind": kind}}
    for wrong in ({"steps": 4}, {"steps": 1, "method": "heun"}):
        with pytest.raises(ConfigError, match=rf"'{kind}' in .*: got \w+, \d, expected euler, 1"):
            settings.world(latents, tokenizer_run, **given, sampler=wrong)
    settings.world(latents, tokenizer_run, **given, sampler={"steps": 1})


def test_shortcuts_start_from_whole_noise(
    latents: Path, tokenizer_run: Path, settings: SimpleNamespace
) -> None:
    """They learn to leave it; energy scores may start from a part."""
    part = {"steps": 1, "start_noise": 0.5}
    with pytest.raises(ConfigError, match=r"sampler\.start_noise of objective\.kind 'shortcut'.*got 0\.5"):
        settings.world(latents, tokenizer_run, sampler=part)
    model = {**to_mapping(settings.world(latents, tokenizer_run).model), "noise_dims": 4}
    found = settings.world(latents, tokenizer_run, model=model, objective={"kind": "energy"}, sampler=part)
    assert found.sampler.start_noise == 0.5


def test_a_gate_that_copies_wants_no_noise_in_the_context(
    latents: Path, tokenizer_run: Path, settings: SimpleNamespace
) -> None:
    gate = {"previous_frame": True, "copy_gate": True}
    quiet = {"context_noise": 0.0}
    for objective, sampler in ((quiet, {}), ({}, quiet)):
        with pytest.raises(ConfigError, match=r"with model.copy_gate.*: got .* expected 0 and 0"):
            settings.world(latents, tokenizer_run, model=gate, objective=objective, sampler=sampler)
    settings.world(latents, tokenizer_run, model=gate, objective=quiet, sampler=quiet)
    with pytest.raises(ConfigError, match=r"'copy_gate' of the model.*: got True, expected previous_frame"):
        settings.world(latents, tokenizer_run, model={"copy_gate": True}, objective=quiet, sampler=quiet)


def test_a_world_begins_from_one_that_was_not_given_the_frame_before(
    latents: Path, tokenizer_run: Path, settings: SimpleNamespace, tmp_path: Path
) -> None:
    """Its new input starts at zero and learns; the way back is refused."""
    plain = to_mapping(settings.world(latents, tokenizer_run).model)
    reads = {**plain, "previous_frame": True}
    first = settings.world(latents, tokenizer_run, loop={"steps": 2})
    train(first, tmp_path / "plain", progress_bar=False)
    old = vidworld.load(tmp_path / "plain", device="cpu").model.state_dict()
    for rate, name in ((0.0, "still"), (1e-3, "learnt")):
        run = settings.world(
            latents,
            tokenizer_run,
            model=reads,
            init=str(tmp_path / "plain"),
            loop={"steps": 2},
            optim={"lr": rate, "muon_lr": rate},
        )
        train(run, tmp_path / name, progress_bar=False)
        new = vidworld.load(tmp_path / name, device="cpu").model.state_dict()
        added = new.keys() - old.keys()
        assert added == {
            f"token_embedding.previous_{part}"
            for part in ("patch.weight", "proprio.weight_EIO", "proprio.bias_EO")
        }
        assert all(bool(new[key].any()) == (name == "learnt") for key in added)
        assert all(torch.equal(new[key], old[key]) for key in old) == (name == "still")
    back = settings.world(latents, tokenizer_run, model=plain, init=str(tmp_path / "learnt"))
    with pytest.raises(CheckpointError, match=r"another architecture.*3 unknown .*previous_"):
        train(back, tmp_path / "back", progress_bar=False)


def test_runs_are_not_overwritten_unasked(
    tokenizer_run: Path, planar: Path, settings: SimpleNamespace, tmp_path: Path
) -> None:
    training = settings.tokenizer(planar, loop={"steps": 2, "log_every": 1})
    run = tmp_path / "run"
    train(training, run, resume=True, progress_bar=False)
    with pytest.raises(ConfigError, match="--resume to go on, --overwrite"):
        train(training, run, progress_bar=False)
    with pytest.raises(ConfigError, match="one of them"):
        train(training, run, resume=True, overwrite=True, progress_bar=False)
    (run / "notes.txt").write_text("mine")
    before = fingerprint(run, 2)
    train(dataclasses.replace(training, seed=1), run, overwrite=True, progress_bar=False)
    assert fingerprint(run, 2) != before
    assert (run / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="other files than a run's"):
        train(training, tmp_path / "other", overwrite=True, progress_bar=False)


def everything(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.parent.name != "heartbeats"
    }


def test_a_start_that_fails_leaves_the_run_as_it_was(
    planar: Path, settings: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    training = settings.tokenizer(planar, loop={"steps": 2, "log_every": 1})
    wrong = settings.tokenizer(tmp_path / "nothing")
    with pytest.raises(DataError, match="no such dataset"):
        train(wrong, run, progress_bar=False)
    assert not (run / "config.yaml").exists(), "so that the same command works once its config is mended"
    train(training, run, progress_bar=False)
    before = everything(run)
    for way in ("overwrite", "resume"):
        with pytest.raises(DataError, match="no such dataset"):
            train(wrong, run, progress_bar=False, **{way: True})
        assert everything(run) == before, way
    # Killed before it began: the next start has the old run again.
    with monkeypatch.context() as patch:
        patch.setattr("vidworld.trainer.train.open_corpus", lambda *_: os._exit(9))
        child = os.fork()
        if child == 0:
            train(training, run, overwrite=True, progress_bar=False)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (run / "checkpoints").exists()
    with pytest.raises(ConfigError, match="--resume to go on, --overwrite"):
        train(training, run, progress_bar=False)
    assert everything(run) == before


def test_a_run_has_one_trainer(planar: Path, settings: SimpleNamespace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process trains"):
            train(settings.tokenizer(planar), run, progress_bar=False)


@pytest.fixture(scope="module")
def stopped(
    latents: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A world run of two of ten steps: copy it before changing it."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    return run, latents, tokenizer_run


def resume_with(stopped: tuple[Path, Path, Path], make: SimpleNamespace, out: Path, **change: Any) -> None:
    """Resume a copy of the stopped run with changed settings."""
    run, latents, tokenizer = stopped
    if not run.exists():
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 2)
            with pytest.raises(PreemptedError):
                train(make.world(latents, tokenizer), run, progress_bar=False)
    shutil.copytree(run, out)
    train(make.world(change.pop("data", latents), tokenizer, **change), out, resume=True, progress_bar=False)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"seed": 1}, DataError, "seed of the sample order"),
        (
            {"loader": {"clip_frames": 6, "batch_size": 2, "workers": 0}},
            DataError,
            "batch_size of the sample",
        ),
        (
            {"model": {"width": 24, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "time_every": 2}},
            CheckpointError,
            "another architecture",
        ),
        ({"optim": {"name": "adamw"}}, CheckpointError, "another optimizer"),
        ({"long_clip_fraction": 0.2, "long_clip_frames": 12}, DataError, "kinds of clips"),
    ],
)
def test_changed_settings_are_refused_on_resume(
    stopped: tuple[Path, Path, Path],
    settings: SimpleNamespace,
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        resume_with(stopped, settings, tmp_path / "copy", **change)
    assert vidworld.load(tmp_path / "copy", device="cpu").spec.model.width == 16, "world.json stays"


def test_another_dataset_is_refused_on_resume(
    stopped: tuple[Path, Path, Path], settings: SimpleNamespace, tmp_path: Path
) -> None:
    """The same episodes with another unit in the action contract."""
    _, latents, _ = stopped
    other = tmp_path / "latents"
    shutil.copytree(latents, other)
    manifest = Manifest.read(other)
    (contract,) = manifest.contracts
    first = dataclasses.replace(contract.action[0], unit="deg/s")
    changed = dataclasses.replace(contract, action=(first, *contract.action[1:]))
    (other / "manifest.json").unlink()
    dataclasses.replace(manifest, contracts=(changed,)).write(other)
    with pytest.raises(DataError, match="manifest_digest of the sample order"):
        resume_with(stopped, settings, tmp_path / "copy", data=other)


def test_wrong_data_is_refused(
    planar: Path, latents: Path, tokenizer_run: Path, settings: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="kind of dataset"):
        train(settings.tokenizer(latents), tmp_path / "a", progress_bar=False)
    other = tmp_path / "other"
    train(settings.tokenizer(planar, seed=7), other, progress_bar=False)
    with pytest.raises(DataError, match="tokenizer of the latents"):
        train(settings.world(latents, other), tmp_path / "b", progress_bar=False)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        train(settings.world(latents, planar), tmp_path / "c", progress_bar=False)
    with pytest.raises(DataError, match="smaller clip_frames"):
        train(settings.world(planar, other, loader={"clip_frames": 999}), tmp_path / "d", progress_bar=False)
    assert not (tmp_path / "d" / "latents").exists(), "said before encoding"


def test_the_command_line(
    planar: Path, settings: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    written = yaml.safe_load(to_yaml(settings.tokenizer(planar))) | {"wandb": False}
    config.write_text(yaml.safe_dump(written))
    run = tmp_path / "run"

    def command(*arguments: str) -> tuple[int, str]:
        code = run_command(["train", *arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, said = command(str(config), "--out", str(run), "--loop.steps", "1")
    assert code == 0, said
    assert "next: set `tokenizer:" in said
    assert read_training(run / "config.yaml").loop.steps == 1
    assert read_training(run / "config.yaml").wandb == "off", "a bare `off` is false in YAML"
    for arguments, says in (
        ([str(config), "--out", str(run)], "--resume to go on"),
        ([str(config), "--loop.step", "1"], "--loop.steps"),
        ([str(tmp_path / "none.yaml")], "cannot read the configuration"),
        ([str(tmp_path)], "run to go on with"),
        (["--resume"], "give a YAML or a run"),
        ([str(config), "--out", str(tmp_path / "x"), "--loop.log-every", "0"], "log_every"),
    ):
        code, said = command(*arguments)
        assert code == 2, said
        assert says in said
        assert "Traceback" not in said
    config.write_text("data: x\n")
    assert command(str(config)) == (
        2,
        f"vidworld: error: setting 'kind' in {config}: got None, expected tokenizer or world\n",
    )


def test_extending_a_run(planar: Path, settings: SimpleNamespace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings.tokenizer(planar, loop={"steps": 2}), run, progress_bar=False)
    first = load_tokenizer(run).digest
    train(settings.tokenizer(planar, loop={"steps": 4}), run, resume=True, progress_bar=False)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000004"
    assert load_tokenizer(run).digest != first
