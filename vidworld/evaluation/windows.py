"""Which stretches of which episodes a world is measured on, and what was recorded there.

Shapes: T frames, V views, H W pixels, A action dims, S proprio dims.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidworld.data.manifest import Sample
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.calibration import require_samples
from vidworld.evaluation.grounding import (
    DEFAULT_CONTEXT,
    Grounding,
    default_context,
    ground_episode,
)
from vidworld.world.calibration import Calibration
from vidworld.world.spec import SamplerConfig, WorldSpec

Half = Literal["auto", "both", "calibration", "evaluation"]
WRONG = ("shuffled", "mean", "late")
"""Wrong actions of a rollout: those of another window, the recorded mean, the true ones a frame late."""


HORIZONS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Frames of the horizon in tables, beside the last one."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    split: str = "val"
    """Split of the dataset: val or train."""
    half: Half = "auto"
    """Half of its episodes, by a hash of their ids: `calibration` is what vidworld calibrate takes; `auto` is
    `evaluation` for a world that was calibrated on this dataset, else `both`."""
    episodes: int | None = None
    """Episodes, evenly spaced over those long enough (default: all)."""
    windows_per_episode: int = 4
    """Evenly spaced starts in each episode."""
    context: int = DEFAULT_CONTEXT
    """Known frames before each rollout."""
    frames: int = 16
    """Frames to imagine: the horizon."""
    samples: int = 4
    """Futures of each window."""
    steps: int | None = None
    """Denoising steps a frame, in place of the world's own."""
    guidance: float | None = None
    """Action guidance, in place of the world's own."""
    temperature: float | None = None
    """Factor on the noise that frames are drawn from, in place of the world's own: 0 is one future."""
    seed: int = 0
    """Seed of the noise."""
    batch: int | None = None
    """Rollouts side by side (default: 128 on a GPU, 32 on a CPU)."""
    clips: int = 4
    """Windows to show."""
    resize: bool = False
    """Scale and centre-crop videos of another size."""
    calibration: bool = False
    """Verify whether the spread of the samples is honest; wants many (--samples 32)."""
    readout: Path | None = None
    """Readout (see vidworld readout) with which --calibration also reads outcomes and events of lab data."""
    lpips: Path | None = None
    """Weights with which pictures are also compared by LPIPS (`python tools/lpips_weights.py FILE`)."""
    rank_scenes: bool = False
    """Of an ensemble: rank the windows by what is unknown in them, for what to collect next (scenes.csv)."""
    drift: int | None = None
    """Also imagine this many frames at a stretch, such as 512, and measure whether they hold."""

    def __post_init__(self) -> None:
        """Refuse counts below their least with ConfigError."""
        least = {"windows_per_episode": 1, "context": 1, "frames": 1, "samples": 1, "clips": 0, "seed": 0}
        least |= {
            name: 1 for name in ("episodes", "steps", "batch", "drift") if getattr(self, name) is not None
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(
                    f"--{name.replace('_', '-')}", got=getattr(self, name), expected=f"{minimum} or more"
                )

        if self.rank_scenes and self.samples < 2:
            raise ConfigError("--samples", got=self.samples, expected="2 or more with --rank-scenes")
        if self.calibration:
            require_samples(self.samples)
        elif self.readout is not None:
            raise ConfigError("--readout", got="no --calibration", expected="both")

    @property
    def horizons(self) -> tuple[int, ...]:
        """Frames of the horizon in tables, counted from 1."""
        return (*(horizon for horizon in HORIZONS if horizon < self.frames), self.frames)

    def sampler(self, own: SamplerConfig) -> SamplerConfig:
        """The world's sampler with these settings."""
        return own.changed(steps=self.steps, guidance=self.guidance, temperature=self.temperature)


@dataclass(frozen=True)
class Window:
    """A stretch of an episode: `start` is the first frame of its context."""

    sample: Sample
    start: int


@dataclass(frozen=True)
class Plan:
    """The windows to measure, and the episodes that are too short for one."""

    windows: tuple[Window, ...]
    """An embodiment's windows stand together, the first ones of all its episodes first."""
    too_short: tuple[Sample, ...]

    @property
    def embodiments(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(dict.fromkeys(window.sample.embodiment for window in self.windows))

    def of(self, embodiment: str) -> list[Window]:
        """Windows of one embodiment."""
        return [window for window in self.windows if window.sample.embodiment == embodiment]


@dataclass(frozen=True)
class Recorded:
    window: Window
    grounding: Grounding
    frames_TVHWC: np.ndarray
    """Context and truth."""
    proprio_TS: np.ndarray
    actions_TA: np.ndarray
    """Row t leads from frame t to t + 1; one fewer than frames."""
    context: int
    meta: Mapping[str, Any]
    """What the episode's meta.json says; empty where calibration is not asked for."""

    @property
    def future_TA(self) -> np.ndarray:
        return self.actions_TA[self.context - 1 :]

    def wrong(self, kind: str, partner: "Recorded | None") -> np.ndarray | None:
        """Other actions for the same frames."""
        match kind:
            case "shuffled":
                return None if partner is None else partner.future_TA
            case "mean":
                mean_A = np.array(self.grounding.contract.action_statistics.mean, np.float32)
                return np.broadcast_to(mean_A, self.future_TA.shape)
            case "late":
                padded_TA = np.concatenate([self.actions_TA[:1], self.actions_TA])
                return padded_TA[self.context - 1 : -1]
        raise ConfigError("wrong actions", got=kind, expected=" or ".join(WRONG))


def half_of(episode_id: str) -> Literal["calibration", "evaluation"]:
    """The half of its split that an episode is in: the same for ever, whatever else the split holds."""
    odd = hashlib.sha256(episode_id.encode()).digest()[0] % 2
    return "calibration" if odd else "evaluation"


def chosen_half(
    settings: Settings, dataset: ShardDataset, calibration: Calibration | None
) -> Literal["both", "calibration", "evaluation"]:
    """What `half` means for a world with this calibration."""
    if settings.half != "auto":
        return settings.half
    calibrated = [one.get("digest") for one in calibration.fit.get("datasets", ())] if calibration else []
    return "evaluation" if dataset.manifest.digest in calibrated else "both"


def plan_windows(dataset: ShardDataset, spec: WorldSpec, settings: Settings) -> Plan:
    """Choose episodes and starts, evenly spaced and the same every time.

    Raises DataError where nothing is left to measure, ContractError for a dataset of another robot, and
    ConfigError for lengths that the tokenizer's time stride does not divide.
    """
    k = spec.frames_per_step
    if (settings.context - 1) % k or settings.frames % k:
        raise ConfigError(
            "--context and --frames",
            got=f"{settings.context} and {settings.frames}",
            expected=f"1 more than a multiple of {k}, and a multiple of {k} (the tokenizer's time stride)",
            fix=f"pass --context {default_context(k)} --frames {max(1, settings.frames // k) * k}",
        )
    samples = [
        sample
        for sample in dataset.manifest.samples(settings.split)
        if settings.half in ("auto", "both", half_of(sample.episode_id))
    ]
    if not samples:
        part = "" if settings.half in ("auto", "both") else f", {settings.half} half"
        raise DataError(f"no episodes in split {settings.split!r}{part}", where=dataset.directory)
    for name in dict.fromkeys(sample.embodiment for sample in samples):
        own = spec.contracts[spec.embodiment_index(name, where=dataset.directory)]
        own.require_same_robot(dataset.manifest.contract(name), where=dataset.directory)
    length = settings.context + settings.frames
    fitting = [sample for sample in samples if sample.frames >= length]
    if not fitting:
        longest = max(samples, key=lambda sample: sample.frames)
        raise DataError(
            f"all {len(samples)} episodes of split {settings.split!r} are too short",
            where=dataset.directory,
            got=f"at most {longest.frames} frames ({longest.key})",
            expected=f"context {settings.context} + {settings.frames} frames",
            fix="take a smaller --frames",
        )
    too_short = tuple(sample for sample in samples if sample.frames < length)
    chosen = spaced(len(fitting) - 1, min(len(fitting), settings.episodes or len(fitting)))
    fitting = [fitting[index] for index in chosen]
    numbered = [
        (sample.embodiment, number, Window(sample, start))
        for sample in fitting
        for number, start in enumerate(spaced(sample.frames - length, settings.windows_per_episode))
    ]
    order = {name: index for index, name in enumerate(dict.fromkeys(row[0] for row in numbered))}
    numbered.sort(key=lambda row: (order[row[0]], row[1]))
    return Plan(tuple(window for *_, window in numbered), too_short)


def spaced(last: int, count: int) -> list[int]:
    """Whole numbers from 0 to `last`, evenly spaced, without repeats; one alone is the middle."""
    if count == 1:
        return [last // 2]
    return sorted({round(value) for value in np.linspace(0, last, count)})


def read_window(dataset: ShardDataset, spec: WorldSpec, settings: Settings, window: Window) -> Recorded:
    grounding = ground_episode(
        dataset,
        window.sample.key,
        spec,
        context=settings.context,
        start=window.start,
        frames=settings.frames,
        resize=settings.resize,
    )
    prompt, recording = grounding.prompt, grounding.recording
    assert recording is not None
    assert prompt.proprio is not None
    assert prompt.actions is not None
    frames = slice(settings.frames)
    return Recorded(
        window,
        grounding,
        np.concatenate([prompt.frames, recording.frames_TVHWC[frames]]),
        np.concatenate([prompt.proprio, recording.proprio_TS[frames]]),
        np.concatenate([prompt.actions, recording.actions_TA[frames]]),
        settings.context,
        dataset.meta(window.sample.key) if settings.calibration else {},
    )


def pairs(
    dataset: ShardDataset, spec: WorldSpec, settings: Settings, windows: Sequence[Window]
) -> Iterator[tuple[Recorded, Recorded | None]]:
    """Each window with the next one, cyclically: the one whose actions it is given when they are shuffled."""
    first = current = read_window(dataset, spec, settings, windows[0])
    for window in windows[1:]:
        following = read_window(dataset, spec, settings, window)
        yield current, following
        current = following
    yield current, first if len(windows) > 1 else None
