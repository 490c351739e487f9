"""`vidworld rollout`: imagine what the robot would see, and write videos, pictures and numbers."""

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vidworld import __version__, media
from vidworld.config import parse, to_mapping
from vidworld.contract import ActionContract, warn_constant
from vidworld.errors import ConfigError
from vidworld.evaluation import comparison, dreams, rollout_files
from vidworld.evaluation.appraisal import Appraisal, Appraiser, cut
from vidworld.evaluation.commands import Commands
from vidworld.evaluation.grounding import Recording
from vidworld.evaluation.imagining import Imagination, Imagined, Watch
from vidworld.evaluation.policy import Actor, open_policy, parse_keys
from vidworld.evaluation.preview import Preview
from vidworld.evaluation.rollout_files import PLAIN, Shown, side_by_side
from vidworld.evaluation.rollout_inputs import (
    DEFAULT_FRAMES,
    Scene,
    branches,
    embodiment,
    scenes,
    with_prompt,
)
from vidworld.evaluation.rollout_options import Options
from vidworld.output import output_directory
from vidworld.world.build import narrow
from vidworld.world.engine import RolloutEngine
from vidworld.world.load import asked_members, find, load, verify
from vidworld.world.noise import MEMBER_STRIDE
from vidworld.world.shipped import prompts_of
from vidworld.world.spec import SamplerConfig
from vidworld.world.world import WorldModel

RECORD = "rollout.json"
COMPARED = "truth.json"


def main(arguments: Sequence[str], prog: str) -> None:
    """Entry point of `vidworld rollout`."""
    options = parse(Options, arguments, prog=prog)
    with output_directory(options.out, RECORD, overwrite=options.overwrite) as folder:
        record = roll_out(options, folder, command=[prog, *arguments])
    several = len(record["scenes"]) if "scenes" in record else 1
    of_members = f" of each of {record['members']} members," if "members" in record else ""
    futures = "1 sample" if record["samples"] == 1 else f"{record['samples']} samples"
    print(
        f"{futures}{of_members} of {record['frames']} frames"
        f"{f' of each of {several} prompts' if several > 1 else ''} at "
        f"{record['speed']['frames_per_s']:.3g} frames/s. Look at:"
    )
    grids = [f"grid{'' if kind == 'png' else f'.{kind}'}" for kind in dict.fromkeys(options.formats)]
    pictures = record["scenes"] if several > 1 else ["strip.png", "proprio.png"]
    compared = ["truth.png"] if options.compare == "truth" and several == 1 else []
    appraised = record.get("appraised", []) if several == 1 else []
    for name in (*grids, *pictures, *compared, *appraised, *([dreams.FOLDER] if options.lerobot else [])):
        print(f"  {options.out / name}")
    if stopped := record.get("stopped"):
        print(f"stopped after {record['frames']} frames: {stopped['because']}")


def roll_out(options: Options, folder: Path, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """Do what the options say, write every file into `folder`, return what `rollout.json` holds."""
    options.check()
    paths, count = asked_members(options.run, options.members)
    options = with_prompt(options, prompts_of(find(paths[0]).tokenizer.parent))
    world = load(paths, options.device, calibrated=not options.uncalibrated, members=count)
    if world.spec.layouts:
        world = narrow(world, [embodiment(options, world.spec)])
    spec = world.spec
    if options.lerobot:
        dreams.check_world(spec)
    asked = scenes(options, spec)
    warn_constant(asked[0].grounding.contract)
    for scene in asked:
        _require_truth(options, scene)
    sampler = spec.sampler.changed(
        steps=options.steps, guidance=options.guidance, temperature=options.temperature
    )
    if options.samples is None and not sampler.draws:
        options = dataclasses.replace(options, samples=1)
    appraiser = Appraiser.make(options, world, sampler)
    imagination = Imagination(
        world,
        RolloutEngine(world, sampler=sampler, compile=options.compile),
        options.seed,
        options.futures,
        options.batch,
        options.allow_out_of_range,
        stepwise=options.preview,
    )
    began = time.perf_counter()
    with torch.no_grad():
        found, parted = _imagine(options, imagination, asked)
    seconds = time.perf_counter() - began
    frames = next(iter(found[0].values())).video_NTVHWC.shape[1]
    rows = sum(len(one.video_NTVHWC) for by_label in found for one in by_label.values())
    common = _record(options, paths, world, asked[0].grounding.contract, sampler, frames)
    common["speed"] = {"seconds": round(seconds, 3), "frames_per_s": round(rows * frames / seconds, 3)}
    common["command"] = list(command)
    shown = {
        scene.name: Shown(
            spec,
            scene.grounding,
            by_label,
            _truth(options, scene, frames),
            () if scene.commands is None else scene.commands.labels,
            options.fork_at,
            errors=options.compare == "truth",
        )
        for scene, by_label in zip(asked, found, strict=True)
    }
    appraisals: dict[str, Appraisal] = {}
    if appraiser is not None:
        for scene, by_label in zip(asked, found, strict=True):
            appraisals[scene.name] = appraiser(scene, by_label[PLAIN])
            shown[scene.name] = cut(shown[scene.name], appraisals[scene.name].found)
    records = {}
    for index, scene in enumerate(asked):
        inside = folder if len(asked) == 1 else folder / scene.name
        inside.mkdir(exist_ok=True)
        records[scene.name] = common | _write_scene(options, inside, scene, shown[scene.name], parted[index])
        if (appraisal := appraisals.get(scene.name)) is not None:
            kept = {"frames": appraisal.found.video_NTVHWC.shape[1], "appraised": appraisal.files}
            records[scene.name] |= kept | appraisal.facts
            appraisal.write(inside, scene, shown[scene.name])
        (inside / RECORD).write_text(json.dumps(records[scene.name], indent=1) + "\n")
    record = records[asked[0].name] if len(asked) == 1 else common | {"scenes": list(records)}
    if len(asked) > 1:
        rollout_files.write_overview(folder, shown, options.formats)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if options.lerobot:
        dreams.write_lerobot(
            folder / dreams.FOLDER,
            spec,
            [
                dreams.Dream(scene.name, scene.grounding, one.imagined[PLAIN], records[scene.name])
                for scene, one in zip(asked, shown.values(), strict=True)
            ],
        )
    return record


def _imagine(
    options: Options, imagination: Imagination, asked: Sequence[Scene]
) -> tuple[list[dict[str, Imagined]], list[dict[str, Commands]]]:
    """Each scene's futures by label, and the commands of its branches, if any."""
    spec = imagination.world.spec
    futures = options.futures * imagination.world.num_members
    if options.policy:
        frames = (options.frames or DEFAULT_FRAMES) // spec.frames_per_step * spec.frames_per_step
        if not frames or (options.frames or frames) != frames:
            raise ConfigError(
                "--frames", got=options.frames, expected=f"a multiple of {spec.frames_per_step}"
            )
        keys = parse_keys(options.policy_keys)
        with (
            open_policy(options.policy) as policy,
            _watch(options, imagination, len(asked) * futures * frames) as watch,
        ):

            def actor() -> Actor:
                return Actor(
                    policy,
                    asked[0].grounding.contract,
                    spec.views,
                    actions_per_step=spec.frames_per_step,
                    keys=keys,
                    replan=options.replan,
                )

            found = imagination.scenes(asked, watch, actor=actor, frames=frames)
        return [{PLAIN: one} for one in found], [{} for _ in asked]
    frames = min(len(scene.commands.actions_TA) for scene in asked if scene.commands is not None)
    if options.fork_at is None:
        with _watch(options, imagination, len(asked) * futures * frames) as watch:
            found = imagination.scenes(asked, watch)
        return [{PLAIN: one} for one in found], [{} for _ in asked]
    parted = [branches(options, scene, spec) for scene in asked]
    at = options.fork_at
    total = sum(at + len(one) * (frames - at) for one in parted) * futures
    with _watch(options, imagination, total) as watch:
        by_label = [
            imagination.branches(scene, one, at, watch) for scene, one in zip(asked, parted, strict=True)
        ]
    return by_label, parted


@contextmanager
def _watch(options: Options, imagination: Imagination, total: int) -> Iterator[Watch]:
    """A progress bar with the rate of all samples together, and a picture if it is asked for."""
    preview = Preview() if options.preview else None
    began = time.perf_counter()
    with tqdm(total=total, unit="frame", disable=True if preview else None) as bar:
        done = 0

        def watch(frames: int, picture_VHWC: np.ndarray | None) -> None:
            nonlocal done
            done += frames
            bar.update(frames)
            if preview is not None and picture_VHWC is not None:
                rate = done / (time.perf_counter() - began)
                caption = f"{done} of {total} frames, {rate:.3g} frames/s"
                preview.show(side_by_side(picture_VHWC[None])[0], caption)

        yield watch


def _write_scene(
    options: Options, folder: Path, scene: Scene, shown: Shown, parted: Mapping[str, Commands]
) -> dict[str, Any]:
    """All files of one scene but its record, whose part is returned."""
    rollout_files.write_videos(folder, shown, options.formats)
    rollout_files.write_proprio(folder, shown)
    contract = scene.grounding.contract
    facts: dict[str, Any] = {"prompt": scene.grounding.source}
    names = [dimension.name for dimension in contract.action]
    if scene.commands is None:
        actions_NTA = shown.imagined[PLAIN].actions_NTA
        files = [f"actions-{sample:03d}.npy" for sample in range(len(actions_NTA))]
        for file, actions_TA in zip(files, actions_NTA, strict=True):
            np.save(folder / file, actions_TA)
        facts["actions"] = {"source": options.policy, "files": files, "names": names}
    else:
        facts["actions"] = _saved(folder / "actions.npy", scene.commands) | {"names": names}
    if parted:
        facts["fork"] = {
            "at": options.fork_at,
            "branches": {
                label: _saved(folder / f"actions-branch-{index}.npy", commands)
                for index, (label, commands) in enumerate(parted.items())
            },
        }
    if options.compare == "truth":
        assert shown.truth is not None
        last_VHWC = np.asarray(scene.grounding.prompt.frames_TVHWC(shown.spec))[-1]
        first = next(iter(shown.imagined.values()))
        compared = comparison.compare(first, shown.truth, last_VHWC, contract, shown.spec.fps)
        (folder / COMPARED).write_text(json.dumps(compared, indent=1) + "\n")
        media.write_bytes(folder / "truth.png", comparison.figure(compared))
        facts["psnr_gain_db"] = compared["psnr_gain_db"]
    return facts


def _saved(path: Path, commands: Commands) -> dict[str, Any]:
    np.save(path, commands.actions_TA)
    digest = hashlib.sha256(commands.actions_TA.tobytes()).hexdigest()
    return {"source": commands.source, "file": path.name, "sha256": digest}


def _truth(options: Options, scene: Scene, frames: int) -> Recording | None:
    """What happened under the commands given, if that is known."""
    if options.compare == "none" or scene.commands is None or scene.commands.source != "episode":
        return None
    recording = scene.grounding.recording
    return None if recording is None else recording.first(frames)


def _require_truth(options: Options, scene: Scene) -> None:
    if options.compare == "truth" and _truth(options, scene, 1) is None:
        raise ConfigError(
            "--compare truth",
            got=options.policy or (scene.commands.source if scene.commands else "nothing"),
            expected="an episode under its own actions, which alone says what happened",
        )


def _record(
    options: Options,
    paths: Sequence[Path],
    world: WorldModel,
    contract: ActionContract,
    sampler: SamplerConfig,
    frames: int,
) -> dict[str, Any]:
    """All that it takes to repeat the rollout, but for prompts and actions, as plain JSON."""
    spec, files = world.spec, [find(path) for path in paths]
    streams = [n + m * MEMBER_STRIDE for m in range(world.num_members) for n in range(options.futures)]
    of_each = [
        {
            "path": str(path),
            "checkpoint": one.checkpoint,
            "weights": one.weights.name,
            "weights_sha256": verify(one.weights),
        }
        for path, one in zip(paths, files, strict=True)
    ]
    return {
        "seed": options.seed,
        "samples": options.futures,
        **({"members": world.num_members} if world.num_members > 1 else {}),
        "sample_ids": streams,
        "frames": frames,
        "fps": spec.fps,
        "sampler": to_mapping(sampler),
        "world": {
            **of_each[0],
            **({"members": of_each} if len(of_each) > 1 else {}),
            "spec_digest": spec.digest,
            "tokenizer_digest": spec.tokenizer_digest,
            "dataset_digest": spec.dataset_digest,
            "embodiment": contract.embodiment,
            "contract_digest": contract.digest,
        },
        "versions": {
            "vidworld": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }
