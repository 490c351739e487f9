"""What the true simulator would imagine: lab episodes played on with hidden values that could be true.

An oracle knows the physics, the scene and the commands, and of what is hidden no more than the frames of the
context show. Nothing that imagines from those frames can be expected to come closer to what happened, but for
luck. Hidden values are drawn by
`vidworld.lab.conditional`; pictures go through the codec of a dataset, as the true
frames did.

Shapes: M draws, T frames that are kept, H W pixels.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vidworld.data.shards import EpisodeArrays
from vidworld.data.video import decode_video, encode_video
from vidworld.errors import DataError
from vidworld.evaluation.lab_truth import kind_of

if TYPE_CHECKING:
    from vidworld.lab.episode import LabEpisode

ACTION_TOLERANCE = 1e-5
READOUT_TOLERANCE = 1e-3
"""Of the range of a readout: more apart, a replay is not the episode."""


@dataclass(frozen=True)
class OracleConfig:
    """What is drawn, and how the dataset was made where its episodes do not say."""

    context: int = 8
    """Frames that are known, the episode's first ones."""
    draws: int = 48
    """From the prior, weighted by what the context shows."""
    samples: int = 4
    """Futures, of equal weight."""
    seed: int = 0
    variety: Literal["one", "core", "full"] = "core"
    """`--variety` and"""
    exploration: float = 0.35
    """`--exploration` of the dataset."""


@dataclass(frozen=True)
class Foreseen:
    """Futures of one episode at some of its frames."""

    video: bytes
    """M times T frames, encoded."""
    samples: int
    effective_draws: float
    """How many equal draws the weighted ones are worth; infinite where nothing is hidden."""

    @property
    def frames_MTHWC(self) -> np.ndarray:
        """The frames, uint8."""
        frames = decode_video(self.video)
        return frames.reshape(self.samples, -1, *frames.shape[1:])


@dataclass(frozen=True)
class Recorded:
    """What is needed of a recorded episode, small enough to be sent to another process."""

    meta: Mapping[str, Any]
    """Without its masks."""
    actions_TA: np.ndarray
    size: int
    control: Literal["joint", "ee_delta"]
    where: str

    @classmethod
    def of(cls, episode: EpisodeArrays, size: int, where: str) -> "Recorded":
        """From an episode of a dataset of the lab's own arm."""
        outcome = {name: value for name, value in episode.meta["outcome"].items() if name != "masks"}
        robot = str(episode.meta.get("embodiment", ""))
        return cls(
            {**episode.meta, "outcome": outcome},
            episode.actions_TA,
            size,
            "ee_delta" if "ee_delta" in robot else "joint",
            where,
        )


def foresee(recorded: Recorded, frames: Sequence[int], config: OracleConfig) -> Foreseen:
    """Play an episode on from its context, as often as asked, and keep some frames (counted from its start).

    Raises DataError where the episode cannot be made again here: another variety or exploration, another
    version of the lab or of MuJoCo.
    """
    from vidworld.lab.conditional import conditional
    from vidworld.lab.effect import FRAME_S
    from vidworld.lab.episode import resimulate

    episode = remake(recorded, config)
    futures, effective = [episode.hidden], float("inf")
    if episode.hidden:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few effective draws are told in the result
            known = conditional(episode, config.context, config.draws, seed=config.seed)
        effective = known.effective_draws
        futures = [known.hidden[index] for index in known.resample(config.samples, config.seed)]
    pictures = []
    for hidden in futures:
        played = resimulate(episode, hidden)
        assert played.frames_THWC is not None
        pictures.append(played.frames_THWC[list(frames)])
    video = encode_video(np.concatenate(pictures), 1 / FRAME_S)
    return Foreseen(video, len(futures), effective)


def remake(recorded: Recorded, config: OracleConfig) -> "LabEpisode":
    """The episode as the lab makes it, without pictures. Raises DataError where that is another one."""
    from vidworld.lab.episode import LabConfig, generate

    kind = kind_of(recorded.meta, where=recorded.where)
    settings = LabConfig(
        frames=len(recorded.actions_TA),
        size=recorded.size,
        variety=config.variety,
        exploration=config.exploration,
        control=recorded.control,
        masks=False,
    )
    episode = generate(kind, _seed(recorded), settings, render=False)
    _require_same(recorded, episode.actions_TA, episode.outcomes_T, episode.versions)
    return episode


def _seed(recorded: Recorded) -> int:
    source: Any = recorded.meta.get("source")
    while isinstance(source, Mapping) and "seed" not in source:
        source = source.get("origin")
    if not isinstance(source, Mapping):
        raise DataError("no seed in the episode's source", where=recorded.where)
    return int(source["seed"])


def _require_same(
    recorded: Recorded,
    actions_TA: np.ndarray,
    outcomes_T: Mapping[str, np.ndarray],
    versions: Mapping[str, str],
) -> None:
    """Hold a replay to the recording: its commands, then what came of them."""
    apart = float(np.abs(actions_TA - recorded.actions_TA).max())
    if apart > ACTION_TOLERANCE:
        raise DataError(
            "commands of the episode, made again",
            where=recorded.where,
            got=f"{apart:.3g} apart",
            expected="the same",
            fix="give the --variety and --exploration that the dataset was made with",
        )
    for name, stored in recorded.meta["outcome"]["readouts"].items():
        stored_T = np.asarray(stored, np.float64)
        tolerance = READOUT_TOLERANCE * (np.ptp(stored_T) + 0.1)
        apart = float(np.abs(outcomes_T[name] - stored_T).max())
        if apart > tolerance:
            made = recorded.meta.get("source")
            raise DataError(
                f"{name} of the episode, played again",
                where=recorded.where,
                got=f"{apart:.3g} apart",
                expected=f"at most {tolerance:.2g}",
                fix=f"use the versions that made it ({made}); here are {dict(versions)}",
            )


def settings_of(config: OracleConfig, frames: Sequence[int]) -> dict[str, Any]:
    """What the futures of an episode depend on, for a cache's name."""
    return dataclasses.asdict(config) | {"frames": list(frames)}
