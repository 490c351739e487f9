"""Where a rollout begins: an episode of a dataset, pictures, or videos, made into a prompt.

Shapes: T frames, V views, H W pixels, A action dims, S proprio dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidworld import media
from vidworld.contract import ActionContract
from vidworld.data.manifest import Sample
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.world.prompt import Prompt
from vidworld.world.spec import WorldSpec

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
RATE_TOLERANCE = 0.02
DEFAULT_CONTEXT = 4
IDS_SHOWN = 4


@dataclass(frozen=True)
class Recording:
    """What really happened after the prompt."""

    frames_TVHWC: np.ndarray
    proprio_TS: np.ndarray
    actions_TA: np.ndarray
    """`actions_TA[t]` leads to `frames_TVHWC[t]`."""

    def first(self, frames: int) -> "Recording":
        """The first frames of it."""
        return Recording(self.frames_TVHWC[:frames], self.proprio_TS[:frames], self.actions_TA[:frames])


@dataclass(frozen=True)
class Grounding:
    """A prompt, and what is known about where it came from."""

    prompt: Prompt
    contract: ActionContract
    """The world's own contract for the prompt's embodiment."""
    source: dict[str, Any]
    """Plain JSON that finds it again."""
    recording: Recording | None = None


def default_context(frames_per_step: int) -> int:
    """Frames of a prompt if nobody says otherwise: about `DEFAULT_CONTEXT`, and whole latent frames."""
    return 1 + -(-(DEFAULT_CONTEXT - 1) // frames_per_step) * frames_per_step


def ground_episode(
    dataset: ShardDataset,
    name: str,
    spec: WorldSpec,
    *,
    context: int = DEFAULT_CONTEXT,
    start: int = 0,
    frames: int | None = None,
    at_most: int | None = None,
    resize: bool = False,
) -> Grounding:
    """The first `context` frames from `start` of an episode, and the `frames` recorded ones after them.

    `frames` None takes as many as there are, up to `at_most`.

    `name` is a sample key or the source's episode id. Raises DataError or ContractError naming what does not
    fit: kind of dataset, views, size, rate, contract, too few frames.
    """
    sample = find_sample(dataset, name)
    manifest = dataset.manifest
    where = dataset.directory
    if manifest.kind != "video":
        raise DataError("dataset of latents", where=where, expected="the video dataset that it was made from")
    missing = [view for view in spec.views if view not in manifest.views]
    if missing:
        raise DataError("views", where=where, got=", ".join(manifest.views), expected=", ".join(spec.views))
    _require_rate(manifest.fps, spec.fps, where)
    contract = spec.contracts[spec.embodiment_index(sample.embodiment, where=where)]
    contract.require_same_robot(manifest.contract(sample.embodiment), where=where)
    left = sample.frames - start - context
    if context < 1 or start < 0 or left < (frames or 0):
        raise DataError(
            f"frames of episode {name!r}",
            where=where,
            got=f"{sample.frames}",
            expected=f"start {start} + context {context} + {frames or 0} to imagine",
            fix="take a smaller --start, --context or --frames",
        )
    recorded = (left if at_most is None else min(left, at_most)) if frames is None else frames
    clip = dataset.read_clip(sample.key, start, context + recorded)
    assert clip.video is not None
    frames_TVHWC = np.stack([clip.video[view] for view in spec.views], 1)
    if resize:
        frames_TVHWC = media.fit(frames_TVHWC, width=spec.width, height=spec.height)
    prompt = Prompt(
        frames_TVHWC[:context],
        clip.proprio_TS[:context],
        clip.actions_TA[: context - 1],
        sample.embodiment,
        sample.text,
    )
    return Grounding(
        prompt,
        contract,
        source={
            "kind": "episode",
            "dataset": manifest.name,
            "dataset_digest": manifest.digest,
            "key": sample.key,
            "episode_id": sample.episode_id,
            "start": start,
            "context": context,
        },
        recording=Recording(
            frames_TVHWC[context:], clip.proprio_TS[context:], clip.actions_TA[context - 1 : -1]
        ),
    )


def ground_files(
    paths: Sequence[Path],
    spec: WorldSpec,
    *,
    context: int | None = None,
    start: int = 0,
    embodiment: str | None = None,
    resize: bool = False,
) -> Grounding:
    """Pictures (one frame) or videos (`context` frames from `start`), one file a view in the spec's order."""
    if len(paths) != len(spec.views):
        raise ConfigError(
            "--prompt files",
            got=len(paths),
            expected=f"{len(spec.views)}, one for each view ({', '.join(spec.views)})",
        )
    contract = spec.contracts[spec.embodiment_index(embodiment, where="--embodiment")]
    pictures = [path.suffix.lower() in IMAGE_SUFFIXES for path in paths]
    if all(pictures):
        if context not in (None, 1) or start:
            raise ConfigError("--context of a picture", got=context, expected=1)
        views = [media.read_image(path)[None] for path in paths]
    else:
        views = [
            _read_context(path, spec, context or default_context(spec.frames_per_step), start)
            for path in paths
        ]
    if resize:
        views = [media.fit(view, width=spec.width, height=spec.height) for view in views]
    sizes = sorted({f"{view.shape[1]}x{view.shape[2]}" for view in views})
    if sizes != [f"{spec.height}x{spec.width}"]:
        raise DataError(
            "size of the prompt (height x width)",
            where=", ".join(map(str, paths)),
            got=", ".join(sizes),
            expected=f"{spec.height}x{spec.width}",
            fix="pass --resize to scale and crop it",
        )
    frames_TVHWC = np.stack(views, 1)
    return Grounding(
        Prompt(frames_TVHWC, embodiment=contract.embodiment),
        contract,
        source={
            "kind": "image" if all(pictures) else "video",
            "files": [str(path) for path in paths],
            "sha256": [file_digest(path) for path in paths],
            "start": start,
            "context": len(frames_TVHWC),
        },
    )


def find_sample(dataset: ShardDataset, name: str) -> Sample:
    """A sample by its key or by its source's episode id; DataError lists some when there is none."""
    samples = dataset.manifest.samples()
    for sample in samples:
        if sample.key == name:
            return sample
    named = [sample for sample in samples if sample.episode_id == name]
    if len(named) == 1:
        return named[0]
    keys = [sample.key for sample in (named or dataset.manifest.samples("val") or samples)]
    shown = ", ".join(keys[:IDS_SHOWN]) + (", ..." if len(keys) > IDS_SHOWN else "")
    raise DataError(
        f"episode {name!r} " + ("has several samples" if named else "is not there"),
        where=dataset.directory,
        fix=f"take one of: {shown}",
    )


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_context(path: Path, spec: WorldSpec, context: int, start: int) -> np.ndarray:
    if context < 1 or start < 0:
        raise ConfigError("--context, --start", got=f"{context}, {start}", expected="1 or more, 0 or more")
    frames_THWC, rate = media.read_video(path, first=start + context)
    if len(frames_THWC) < start + context:
        raise DataError(
            "frames of the prompt video",
            where=path,
            got=len(frames_THWC),
            expected=f"start {start} + context {context}",
        )
    if context > 1:
        _require_rate(rate, spec.fps, path)
    return frames_THWC[start:]


def _require_rate(fps: float, expected: float, where: object) -> None:
    if abs(fps - expected) > RATE_TOLERANCE * expected:
        raise DataError(
            "frame rate",
            where=where,
            got=f"{fps:g} fps",
            expected=f"{expected:g} fps",
            fix="resample it first",
        )
