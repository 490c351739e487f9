"""`vidworld rollout`: imagine what the robot would see, and write videos, pictures and numbers.

Shapes: N samples, T frames, V views, H W pixels, A action dims, S proprio dims.
"""

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from vidworld import __version__, media, plots
from vidworld.config import parse, to_mapping
from vidworld.contract import warn_constant
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError
from vidworld.evaluation import commands, dreams
from vidworld.evaluation.commands import Commands
from vidworld.evaluation.grounding import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Grounding,
    Recording,
    default_context,
    find_sample,
    ground_episode,
    ground_files,
)
from vidworld.output import output_directory
from vidworld.world.build import narrow
from vidworld.world.load import find, load, verify
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.state import Rollout

RECORD = "rollout.json"
DEFAULT_FRAMES = 48
STRIP_COLUMNS = 8
LEAST_COLUMNS = 3
"""With several cameras side by side, fewer columns stay readable."""
STRIP_SAMPLES = 4
GRID_SAMPLES = 15
SWEEP_ROWS = 12


@dataclass(frozen=True)
class Options:
    """Imagine what the robot would see, from a prompt and actions.

    --prompt takes the id of an episode of --data, a picture, or a video (one file a view). --actions takes
    `episode` (the prompt's own), `episode:ID`, a .npy or .csv of raw commands, `sweep` (each dimension over
    its recorded range in turn) or `sweep:NAME`.
    """

    run: tyro.conf.Positional[Path]
    """Directory of a trained world: a run or an export."""
    out: Path
    """Directory to write; it must not exist."""
    prompt: tuple[str, ...]
    """Episode id, or files of a picture or video: one a view, in the world's order."""
    data: Path | None = None
    """Dataset directory, for episodes."""
    actions: str = ""
    """Default: `episode` for an episode, else `sweep`."""
    context: int | None = None
    """Frames of the prompt (default 4, or 1 for a picture; with a time stride, whole latent frames)."""
    start: int = 0
    """First frame of the prompt within its episode or video."""
    frames: int | None = None
    """Frames to imagine (default: what the actions allow, at most 48)."""
    samples: int = 4
    """Futures to imagine; each has its own noise."""
    seed: int = 0
    steps: int | None = None
    """Denoising steps a frame, in place of the world's own."""
    guidance: float | None = None
    """Action guidance, in place of the world's own."""
    embodiment: str | None = None
    """The robot of pictures and videos, where the world knows several; an episode says its own."""
    resize: bool = False
    """Scale and centre-crop a prompt of another size."""
    allow_out_of_range: bool = False
    """Take actions beyond the recorded range."""
    lerobot: bool = False
    """Also write the imagined episodes as a LeRobot v3.0 dataset, OUT/lerobot."""
    device: str | None = None
    """Default: the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier rollout in --out."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Entry point of `vidworld rollout`."""
    options = parse(Options, arguments, prog=prog)
    with output_directory(options.out, RECORD, overwrite=options.overwrite) as folder:
        record = roll_out(options, folder, command=[prog, *arguments])
    print(
        f"{options.samples} samples of {record['frames']} frames at "
        f"{record['speed']['frames_per_s']:.3g} frames/s. Look at:"
    )
    for name in ("grid.mp4", "strip.png", "proprio.png", *([dreams.FOLDER] if options.lerobot else [])):
        print(f"  {options.out / name}")


def roll_out(options: Options, folder: Path, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """Do what the options say, write every file into `folder`, return what `rollout.json` holds."""
    for name in ("samples", "frames", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}", got=value, expected="1 or more")
    world = load(options.run, options.device)
    if world.spec.layouts:
        world = narrow(world, [_embodiment(options, world.spec)])
    if options.lerobot:
        dreams.check_world(world.spec)
    grounding = _ground(options, world.spec)
    actions = _actions(options, grounding, world.spec)
    warn_constant(grounding.contract)
    sampler = world.spec.sampler
    sampler = replace(
        sampler,
        steps=sampler.steps if options.steps is None else options.steps,
        guidance=sampler.guidance if options.guidance is None else options.guidance,
    )
    began = time.perf_counter()
    with torch.no_grad(), tqdm(total=len(actions.actions_TA), unit="frame", disable=None) as bar:
        state = world.reset(
            grounding.prompt,
            options.samples,
            options.seed,
            sampler=sampler,
            allow_out_of_range=options.allow_out_of_range,
        )
        imagined = world.rollout(
            state,
            actions.actions_TA,
            sampler=sampler,
            allow_out_of_range=options.allow_out_of_range,
            progress=lambda: bar.update(world.spec.frames_per_step),
        )
        video_NTVHWC = _numpy(imagined.video_BTVHWC)
    seconds = time.perf_counter() - began
    truth = None
    if actions.source == "episode" and grounding.recording is not None:
        truth = grounding.recording.first(len(actions.actions_TA))
    _write_videos(folder, world.spec, grounding, actions, video_NTVHWC, truth)
    _write_proprio(folder, world.spec, grounding, imagined, truth)
    np.save(folder / "actions.npy", actions.actions_TA)
    record = _record(options, world.spec, grounding, actions, sampler, world.device, seconds)
    record["command"] = list(command)
    if options.lerobot:
        known = world.observation(state, decode=False).proprio_BS
        dreamt = dreams.Dreams(actions.actions_TA, video_NTVHWC, _numpy(imagined.proprio_BTS), _numpy(known))
        dreams.write_lerobot(folder / dreams.FOLDER, world.spec, grounding, dreamt, record)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _embodiment(options: Options, spec: WorldSpec) -> str:
    """Whose world is needed: that of the robot asked for, or of the prompt's episode."""
    if options.embodiment is None and options.data is not None and len(options.prompt) == 1:
        return find_sample(ShardDataset.open(options.data), options.prompt[0]).embodiment
    return spec.contracts[spec.embodiment_index(options.embodiment, where="--embodiment")].embodiment


def _ground(options: Options, spec: WorldSpec) -> Grounding:
    paths = [Path(name) for name in options.prompt]
    if any(path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES for path in paths):
        return ground_files(
            paths,
            spec,
            context=options.context,
            start=options.start,
            embodiment=options.embodiment,
            resize=options.resize,
        )
    if options.data is None or len(options.prompt) != 1:
        raise ConfigError(
            "--prompt",
            got=" ".join(options.prompt) or "nothing",
            expected="an episode id with --data, or files of pictures or videos",
        )
    return _episode(options, options.prompt[0], spec, needs_frames=options.actions in ("", "episode"))


def _episode(options: Options, name: str, spec: WorldSpec, *, needs_frames: bool) -> Grounding:
    if options.data is None:
        raise ConfigError("--data", got="nothing", expected=f"the dataset that holds episode {name!r}")
    return ground_episode(
        ShardDataset.open(options.data),
        name,
        spec,
        context=default_context(spec.frames_per_step) if options.context is None else options.context,
        start=options.start,
        frames=options.frames if needs_frames else None,
        at_most=DEFAULT_FRAMES,
        resize=options.resize,
    )


def _actions(options: Options, grounding: Grounding, spec: WorldSpec) -> Commands:
    """The commands that the options ask for, as many as there are frames to imagine, seen by the contract."""
    kind, _, argument = options.actions.partition(":")
    recording = grounding.recording
    match kind or ("sweep" if recording is None else "episode"):
        case "sweep":
            given_TA = grounding.prompt.actions
            found = commands.sweep(
                grounding.contract,
                spec.fps,
                only=argument or None,
                last_action_A=None if given_TA is None or not len(given_TA) else given_TA[-1],
                frames=options.frames,
            )
            most = len(found.actions_TA)
        case "episode":
            source, most = options.actions or "episode", DEFAULT_FRAMES
            if argument:
                other = _episode(options, argument, spec, needs_frames=True)
                if other.contract != grounding.contract:
                    raise ConfigError(
                        "--actions",
                        got=f"an episode of {other.contract.embodiment!r}",
                        expected=f"one of {grounding.contract.embodiment!r}",
                    )
                recording = other.recording
            if recording is None:
                raise ConfigError(
                    "--actions episode",
                    got="a prompt that is no episode",
                    fix="say which: --actions episode:ID",
                )
            found = Commands(recording.actions_TA, source)
        case _:
            found, most = commands.from_file(Path(options.actions), grounding.contract), DEFAULT_FRAMES
    whole = min(most, len(found.actions_TA)) // spec.frames_per_step * spec.frames_per_step
    found = found.first(options.frames, at_most=max(whole, 1))
    grounding.contract.check_actions(
        found.actions_TA, where=found.source, allow_out_of_range=options.allow_out_of_range
    )
    return found


def _write_videos(
    folder: Path,
    spec: WorldSpec,
    grounding: Grounding,
    actions: Commands,
    video_NTVHWC: np.ndarray,
    truth: Recording | None,
) -> None:
    """sample-000.mp4 ..., grid.mp4 and strip.png; each begins with the prompt's frames."""
    context_THWC = _side_by_side(np.asarray(grounding.prompt.frames_TVHWC(spec)))
    rows = {
        f"sample {index}": np.concatenate([context_THWC, _side_by_side(video)])
        for index, video in enumerate(video_NTVHWC)
    }
    for index, video_THWC in enumerate(rows.values()):
        media.write_mp4(folder / f"sample-{index:03d}.mp4", video_THWC, spec.fps)
    samples = list(rows.items())
    recorded = {}
    if truth is not None:
        recorded["recorded"] = np.concatenate([context_THWC, _side_by_side(truth.frames_TVHWC)])
    gridded = recorded | dict(samples[:GRID_SAMPLES])
    media.write_mp4(folder / "grid.mp4", media.grid(list(gridded.values()), labels=list(gridded)), spec.fps)
    last = len(context_THWC) - 1
    if actions.labels:
        picture = _sweep_strip(samples[0][1][last:], actions.labels, spec.fps)
    else:
        columns = max(LEAST_COLUMNS, STRIP_COLUMNS // len(spec.views))
        shown = recorded | dict(samples[:STRIP_SAMPLES])
        picture = _strip(shown, last, video_NTVHWC.shape[1], spec.fps, columns)
    media.write_png(folder / "strip.png", picture)


def _strip(rows: dict[str, np.ndarray], last: int, total: int, fps: float, columns: int) -> np.ndarray:
    """A row for each sample: the last known frame (index `last`), then imagined ones."""
    steps = sorted({round(step) for step in np.linspace(1, total, min(columns, total))})
    labels = ["prompt", *(f"+{step / fps:.1f} s" for step in steps)]
    return media.strip(rows, [last, *(last + step for step in steps)], labels=labels)


def _sweep_strip(video_THWC: np.ndarray, labels: Sequence[str], fps: float) -> np.ndarray:
    """A row for each swept dimension, of one sample: what it does from the frame before it moves."""
    starts: dict[str, int] = {}
    for index, label in enumerate(labels):
        starts.setdefault(label, index)
    length = list(labels).count(labels[0]) if len(starts) == 1 else sorted(starts.values())[1]
    rows = {
        label: video_THWC[start : start + length + 1] for label, start in list(starts.items())[:SWEEP_ROWS]
    }
    steps = sorted({round(step) for step in np.linspace(0, length, min(STRIP_COLUMNS, length) + 1)})
    return media.strip(rows, steps, labels=[f"+{step / fps:.1f} s" for step in steps])


def _write_proprio(
    folder: Path, spec: WorldSpec, grounding: Grounding, imagined: Rollout, truth: Recording | None
) -> None:
    """proprio.npz and proprio.png: predicted proprioception in its units, beside the recorded one."""
    dimensions = grounding.contract.proprio
    predicted_NTS = _numpy(imagined.proprio_BTS)[..., : len(dimensions)].astype(np.float32)
    k = spec.frames_per_step
    time_T = np.arange(1, predicted_NTS.shape[1] + 1) * k / spec.fps
    arrays = {
        "predicted_NTS": predicted_NTS,
        "time_s": time_T,
        "names": np.array([dimension.name for dimension in dimensions]),
        "units": np.array([dimension.unit for dimension in dimensions]),
    }
    if truth is not None:
        arrays["recorded_TS"] = truth.proprio_TS[k - 1 :: k]
    np.savez(folder / "proprio.npz", **arrays)
    panels = []
    for index, dimension in enumerate(dimensions):
        values_NT = predicted_NTS[:, :, index]
        lines = [plots.Line("imagined, mean", time_T, values_NT.mean(0), values_NT.min(0), values_NT.max(0))]
        if truth is not None:
            lines.append(plots.Line("recorded", time_T, truth.proprio_TS[k - 1 :: k, index]))
        unit = "" if dimension.unit in ("1", "unknown") else f" [{dimension.unit}]"
        panels.append(plots.Panel(tuple(lines), dimension.name, "time [s]", f"value{unit}"))
    if panels:
        columns = min(len(panels), 2 if len(panels) <= 8 else 4)
        figure = plots.draw(panels, columns=columns, panel_size=(4.2, 2.2))
        media.write_bytes(folder / "proprio.png", plots.to_png(figure))


def _record(
    options: Options,
    spec: WorldSpec,
    grounding: Grounding,
    actions: Commands,
    sampler: SamplerConfig,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """All that it takes to repeat the rollout, as plain JSON."""
    files = find(options.run)
    frames = len(actions.actions_TA)
    return {
        "seed": options.seed,
        "samples": options.samples,
        "sample_ids": list(range(options.samples)),
        "frames": frames,
        "fps": spec.fps,
        "prompt": grounding.source,
        "actions": {
            "source": actions.source,
            "file": "actions.npy",
            "sha256": hashlib.sha256(actions.actions_TA.tobytes()).hexdigest(),
            "names": [dimension.name for dimension in grounding.contract.action],
        },
        "sampler": to_mapping(sampler),
        "world": {
            "path": str(options.run),
            "checkpoint": files.checkpoint,
            "weights": files.weights.name,
            "weights_sha256": verify(files.weights),
            "spec_digest": spec.digest,
            "tokenizer_digest": spec.tokenizer_digest,
            "dataset_digest": spec.dataset_digest,
            "embodiment": grounding.contract.embodiment,
            "contract_digest": grounding.contract.digest,
        },
        "versions": {
            "vidworld": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "speed": {"seconds": round(seconds, 3), "frames_per_s": round(options.samples * frames / seconds, 3)},
    }


def _side_by_side(video_TVHWC: np.ndarray) -> np.ndarray:
    """All views of a frame in one picture [T, H, V * W, 3]."""
    return np.concatenate(list(np.moveaxis(video_TVHWC, 1, 0)), axis=2)


def _numpy(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.cpu().numpy()
