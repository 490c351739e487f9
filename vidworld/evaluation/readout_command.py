"""`vidworld readout`: train a ruler on true lab frames, or read masks and quantities off videos with one.

vidworld readout train data/lab/rigid data/lab/paint --out runs/readout
vidworld readout apply runs/readout data/lab/paint --out outputs/readings
vidworld readout apply runs/readout outputs/rollout --kind paint --out outputs/readings
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from vidworld import media
from vidworld.config import from_yaml, parse, to_yaml
from vidworld.data.manifest import MANIFEST
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation import readout_picture
from vidworld.evaluation.dreams import is_imagined
from vidworld.evaluation.fidelity import frame_errors, horizon_errors
from vidworld.evaluation.grounding import VIDEO_SUFFIXES
from vidworld.evaluation.lab_frames import open_datasets, scene, view_of
from vidworld.evaluation.lab_truth import Truth, has_truth, kind_of, read_truth
from vidworld.evaluation.quantities import subject_of
from vidworld.evaluation.readout import CARD, Readout, load_readout, readout_folder, save_readout
from vidworld.evaluation.readout_errors import blunt
from vidworld.evaluation.readout_training import ReadoutTraining, train_readout
from vidworld.files import require_local, url_of
from vidworld.output import output_directory
from vidworld.world.load import usable_device

RECORD = "readings.json"
CONFIG = "config.yaml"
ROLLOUT = "rollout.json"
ROLLOUT_VIDEOS = "sample-*.mp4"
CLIPS_SHOWN = 4
HORIZONS = (8, 16, 24, 32, 48, 64)
USAGE = "train DATA... --out RUN, or apply READOUT DATA --out DIR"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a readout on true frames of the lab, and measure it on their held-out episodes."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Datasets that `vidworld lab` wrote, of any kinds."""
    out: Path
    """Directory to write; it must not exist."""
    config: Path | None = None
    """YAML of settings that differ from the defaults."""
    training: Annotated[ReadoutTraining, tyro.conf.arg(name="")] = field(default_factory=ReadoutTraining)
    device: str | None = None
    """Default: the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier readout in --out."""


@dataclass(frozen=True, kw_only=True)
class ApplyOptions:
    """Read masks and quantities off a dataset, a rollout or a video."""

    readout: tyro.conf.Positional[Path]
    """Directory that `vidworld readout train` wrote."""
    data: tyro.conf.Positional[Path]
    """A dataset, the directory of a rollout, or a video."""
    out: Path
    """Directory to write; it must not exist."""
    kind: str | None = None
    """Kind of the lab that is to be read; true lab episodes say their own."""
    split: str = "val"
    """Of a dataset."""
    episodes: int | None = None
    """Of a dataset: how many, from the first; default all of the split."""
    device: str | None = None
    """Default: the GPU if there is one."""
    overwrite: bool = False
    """Replace earlier readings in --out."""


@dataclass(frozen=True)
class Clip:
    """A video to read."""

    name: str
    kind: str
    frames_THWC: np.ndarray
    fps: float
    truth: Truth | None = None


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld readout`."""
    match arguments:
        case ["train", *rest]:
            _train(rest, f"{prog} train")
        case ["apply", *rest]:
            _apply(rest, f"{prog} apply")
        case ["-h" | "--help", *_]:
            print(f"usage: {prog} {USAGE}\n\n{(__doc__ or '').strip()}\n\n{prog} train --help says more.")
            raise SystemExit(0)
        case _:
            raise ConfigError(
                "first argument", got=arguments[0] if arguments else "nothing", expected="train or apply"
            )


def _train(arguments: Sequence[str], prog: str) -> None:
    training = ReadoutTraining()
    if "--config" in arguments[:-1]:
        training = from_yaml(ReadoutTraining, Path(arguments[arguments.index("--config") + 1]))
    default = TrainOptions(data=tyro.MISSING, out=tyro.MISSING, training=training)
    options = parse(TrainOptions, arguments, prog=prog, default=default)
    device = usable_device(options.device)
    with output_directory(require_local(options.out, "--out"), CARD, overwrite=options.overwrite) as folder:
        datasets = open_datasets(options.data)
        with tqdm(total=options.training.steps, unit="step", disable=None) as bar:

            def advance(loss: float) -> None:
                bar.update()
                if np.isfinite(loss):
                    bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

            readout = train_readout(datasets, options.training, device=device, progress=advance)
        (folder / CONFIG).write_text(to_yaml(options.training))
        digest = save_readout(readout, folder)
    print(table(readout))
    _warn(readout, readout.kinds)
    print(f"{options.out}: readout {digest}; next: vidworld readout apply {options.out} DATA --out DIR")


def _warn(readout: Readout, kinds: Sequence[str]) -> None:
    """Say what this ruler should not be used for."""
    for kind in kinds:
        if names := blunt(readout.errors[kind]):
            print(f"warning: too blunt to judge {kind} by: {', '.join(names)}")


def table(readout: Readout) -> str:
    """Held-out errors for the terminal: what each quantity is read to, beside holding the first frame."""
    lines = [f"{'':28}{'error':>10}{'held':>10}{'spread':>10}{'R2':>7}"]
    for kind, errors in readout.errors.items():
        for name, found in errors["quantities"].items():
            cells = [found[key] for key in ("mae", "mae_hold", "spread")]
            row = "".join(f"{'-' if cell is None else format(cell, '.3g'):>10}" for cell in cells)
            r2 = "-" if found["r2"] is None else f"{found['r2']:.2f}"
            lines.append(
                f"{kind + ' ' + name:28}{row}{r2:>7} {found['unit'] if found['unit'] != '1' else ''}"
            )
        for name, found in errors["masks"].items():
            cells = "".join(
                f"{'-' if cell is None else format(cell, '.3f'):>10}"
                for cell in (found["iou"], found["iou_hold"])
            )
            lines.append(f"{kind + ' ' + name + ' mask':28}{cells}{'':>17} IoU")
    return "\n".join(lines)


def _apply(arguments: Sequence[str], prog: str) -> None:
    options = parse(ApplyOptions, arguments, prog=prog)
    if options.episodes is not None and options.episodes < 1:
        raise ConfigError("--episodes", got=options.episodes, expected="1 or more")
    with output_directory(require_local(options.out, "--out"), RECORD, overwrite=options.overwrite) as folder:
        readout = load_readout(options.readout, usable_device(options.device))
        if options.kind is not None:
            subject_of(options.kind, readout.net.subjects, where=options.readout)
        record = read_clips(readout, clips(options), folder)
        record["readout"] = {
            "path": str(options.readout),
            "digest": json.loads((readout_folder(options.readout) / CARD).read_text())["digest"],
            "held_out_errors": {kind: readout.errors[kind] for kind in record["kinds"]},
            "too_blunt": {kind: blunt(readout.errors[kind]) for kind in record["kinds"]},
        }
        record["command"] = [prog, *arguments]
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{options.out}: {len(record['clips'])} clips of {', '.join(record['kinds'])}")
    _warn(readout, record["kinds"])
    for kind, errors in record["errors"].items():
        for name, row in errors.items():
            if name != "horizons":
                cells = ", ".join("-" if mean is None else f"{mean:.3g}" for mean in row["mean"])
                print(f"  {kind} {name}: {cells} at frames {', '.join(map(str, errors['horizons']))}")


def read_clips(readout: Readout, found: Iterator[Clip], folder: Path) -> dict[str, Any]:
    """Write the readings of each clip, pictures of the first ones, and return what the record holds."""
    record: dict[str, Any] = {"kinds": [], "clips": {}, "errors": {}}
    errors: dict[str, list[dict[str, np.ndarray]]] = {}
    for place, clip in enumerate(found):
        readings = readout(clip.frames_THWC[None], clip.kind)[0]
        arrays: dict[str, Any] = dict(readings.quantities)
        arrays |= {f"{name}_mask": mask_THW for name, mask_THW in readings.masks.items()}
        np.savez_compressed(folder / f"{clip.name}.npz", **arrays)
        if place < CLIPS_SHOWN:
            media.write_png(
                folder / f"{clip.name}.png", readout_picture.strip(clip.frames_THWC, readings, clip.truth)
            )
            figure = readout_picture.curves(readings, clip.truth, clip.fps)
            media.write_bytes(folder / f"{clip.name}-curves.png", figure)
        if clip.kind not in record["kinds"]:
            record["kinds"].append(clip.kind)
        record["clips"][clip.name] = {"kind": clip.kind, "frames": len(clip.frames_THWC), "fps": clip.fps}
        if clip.truth is not None:
            errors.setdefault(clip.kind, []).append(frame_errors(readings, clip.truth))
    for kind, of_clips in errors.items():
        longest = max(len(next(iter(one.values()))) for one in of_clips)
        horizons = [horizon for horizon in HORIZONS if horizon <= longest] or [longest]
        record["errors"][kind] = horizon_errors(of_clips, horizons)
    return record


def clips(options: ApplyOptions) -> Iterator[Clip]:
    """The videos that the options name."""
    path = options.data
    if url_of(path) or (path / MANIFEST).is_file():
        yield from _episodes(options)
        return
    videos = [path]
    if (path / ROLLOUT).is_file():
        videos = sorted(path.glob(ROLLOUT_VIDEOS))
        if not videos:
            raise DataError(f"no {ROLLOUT_VIDEOS} in the rollout", where=path)
    elif path.suffix.lower() not in VIDEO_SUFFIXES:
        raise DataError(
            "what is to be read",
            got=path,
            expected=f"a dataset ({MANIFEST}), a rollout ({ROLLOUT}) or a {'/'.join(VIDEO_SUFFIXES)} file",
        )
    if options.kind is None:
        raise ConfigError("--kind", got="nothing", expected="the kind of lab that the video shows")
    for video in videos:
        frames_THWC, fps = media.read_video(video)
        yield Clip(video.stem, options.kind, frames_THWC, fps)


def _episodes(options: ApplyOptions) -> Iterator[Clip]:
    dataset = ShardDataset.open(options.data)
    view_of(dataset, where=options.data)
    samples = dataset.manifest.samples(options.split)[: options.episodes]
    if not samples:
        raise DataError(f"the {options.split!r} split", where=options.data, got="no episode")
    for sample in samples:
        where = f"{sample.key} of {options.data}"
        episode = dataset.read(sample.key)
        frames_THWC, truth, kind = scene(episode), None, options.kind
        imagined = is_imagined(episode.meta.get("source"))
        if not imagined and (kind is None or has_truth(episode.meta)):
            own = kind_of(episode.meta, where=where)
            if kind not in (None, own):
                raise ConfigError("--kind", where=where, got=kind, expected=own)
            kind = own
            truth = read_truth(episode.meta, frames_THWC, where=where) if has_truth(episode.meta) else None
        if kind is None:
            raise ConfigError("--kind", where=where, got="nothing", expected="the kind that was imagined")
        yield Clip(sample.key, kind, frames_THWC, dataset.manifest.fps, truth)
