"""True ensembles of the container: what could have happened, given the first frames of recorded episodes.

    python tools/bench/uncertainty_truth.py --data data/lab/container --cache outputs/truth --workers 16

makes them ahead of tools/bench/uncertainty.py, which makes what it does not find; no GPU is needed. For each
episode of the evaluation half of the val split that nothing hidden has shown in by the end of the context:

- outcomes of many draws of what is hidden, given the context: the true support and spread;
- pictures of two independent ensembles of them at the leads that are compared;
- outcomes of as many draws with mass, friction and centre uniform over their ranges: what domain
  randomization takes, whatever the frames show;
- the spread at one late frame, given more and more frames, and the support given the most of them.

Shapes: N draws, M draws of an ensemble, L leads, K contexts, Q quantities, S pixels.
"""

import concurrent.futures
import dataclasses
import io
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from uncertainty_worlds import Window, read_windows

from vidworld.config import digest, parse
from vidworld.data.shards import ShardDataset
from vidworld.data.video import decode_video, encode_video
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.distributions import weighted_std
from vidworld.evaluation.oracle import OracleConfig, Recorded, remake
from vidworld.files import write_atomic

KIND = "container"
QUANTITIES = ("box_x", "box_y", "box_z", "box_tilt")
LEAST_WEIGHT = 1e-3
"""Share of the heaviest draw's weight from which on a draw belongs to the support."""
VERSION = 1


@dataclass(frozen=True)
class TruthConfig:
    """What is drawn of each episode."""

    context: int = 8
    leads: tuple[int, ...] = (4, 8, 16, 24, 32)
    """Frames after the context whose pictures are compared."""
    samples: int = 32
    """Draws of an ensemble, M."""
    draws: int = 400
    """For the support and the spread."""
    contexts: tuple[int, ...] = (8, 16, 20, 24, 28, 32)
    """Frames shown, for the narrowing of the spread."""
    target: int = 40
    """The frame, counted from 0, whose spread narrows."""
    seed: int = 0
    variety: str = "core"
    """`--variety` and"""
    exploration: float = 0.35
    """`--exploration` that the dataset was made with."""

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if self.draws < 2 * self.samples:
            raise ConfigError("truth.draws", got=self.draws, expected=f"{2 * self.samples} or more")
        if list(self.contexts) != sorted(set(self.contexts)) or self.contexts[0] != self.context:
            raise ConfigError(
                "truth.contexts", got=self.contexts, expected=f"rising, from the context {self.context}"
            )
        if self.contexts[-1] > self.target or min(self.leads) < 1:
            raise ConfigError(
                "truth.target", got=self.target, expected=f"{self.contexts[-1]} or later, leads from 1"
            )

    @property
    def last(self) -> int:
        """Frames that matter."""
        return max(self.context + max(self.leads), self.target + 1)


@dataclass(frozen=True)
class Truth:
    """The true ensembles of one episode."""

    hidden: dict[str, float]
    support_NLQ: np.ndarray
    """Outcomes of many draws given the context, at the leads."""
    indices_2M: np.ndarray
    """Which of them the two ensembles are."""
    frames_2MLHWC: np.ndarray
    """Their pictures."""
    uniform_MLQ: np.ndarray
    """Outcomes under uniform domain randomization."""
    spread_KQ: np.ndarray
    """True spread at the target frame, given each of the contexts."""
    effective_K: np.ndarray
    """How many equal draws it was told from."""
    target_low_Q: np.ndarray
    """Support at the target frame, given the most frames."""
    target_high_Q: np.ndarray
    uniform_target_NQ: np.ndarray
    """Outcomes at the target frame under uniform domain randomization."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make true ensembles ahead."""

    data: Path
    """Dataset of the container."""
    cache: Path = Path("outputs/truth")
    episodes: int = 24
    split: str = "val"
    half: Literal["evaluation", "both"] = "evaluation"
    workers: int = os.cpu_count() or 1
    truth: TruthConfig = field(default_factory=TruthConfig)


def main(arguments: Sequence[str], prog: str) -> None:
    """Fill the cache."""
    options = parse(Options, arguments, prog=prog)
    dataset, half = ShardDataset.open(options.data), None if options.half == "both" else options.half
    windows = fitting(dataset, options.truth, options.episodes, options.split, half)
    began = time.monotonic()
    with Pool(options.cache, options.truth, options.workers) as pool:
        jobs = [pool.submit(window, dataset.manifest.height) for window in windows]
        for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            job.result()
            print(f"{number} of {len(jobs)} after {time.monotonic() - began:.0f} s", flush=True)


def fitting(
    dataset: ShardDataset,
    config: TruthConfig,
    count: int,
    split: str = "val",
    half: str | None = "evaluation",
) -> list[Window]:
    """Held-out episodes that nothing hidden has shown in by the end of the context, and does later."""
    found = read_windows(
        dataset,
        KIND,
        split=split,
        half=half,
        context=config.context,
        frames=config.last - config.context,
        count=10**6,
    )
    kept = []
    for window in found:
        assert window.episode is not None
        touched = window.episode.meta["outcome"]["readouts"]["touched"]
        if not touched[config.context - 1] and touched[config.target - 1]:
            kept.append(window)
    if not kept:
        raise DataError(
            "held-out episodes that are touched between context and target",
            where=dataset.directory,
            got=f"none of {len(found)}",
            fix="make more episodes",
        )
    return kept[:count]


class Pool:
    """Worker processes that make true ensembles, each kept in a file."""

    def __init__(self, cache: Path, config: TruthConfig, workers: int) -> None:
        self.cache, self.config = cache, config
        # Processes are the parallelism: threads in them would only fight. This one has its threads already.
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        # Spawned, not forked: a fork of a process with CUDA or threads may hang.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn")
        )

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        # What is still being made would take minutes more; what is done is in its file.
        for child in multiprocessing.active_children():
            child.terminate()

    def submit(self, window: Window, size: int) -> "concurrent.futures.Future[Path]":
        """Make the truth of a window, unless its file is there."""
        assert window.episode is not None
        recorded = Recorded.of(window.episode, size, window.key)
        facts = [VERSION, dataclasses.asdict(self.config), recorded.meta["outcome"]["readouts"]]
        path = self.cache / f"{window.key}-{digest(facts)}.npz"
        if path.is_file():  # no process is started where all are there
            done: concurrent.futures.Future[Path] = concurrent.futures.Future()
            done.set_result(path)
            return done
        return self._pool.submit(_made, recorded, self.config, path)


def _made(recorded: Recorded, config: TruthConfig, path: Path) -> Path:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **_arrays(make(recorded, config)))  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return path


def load_truth(path: Path) -> Truth:
    """Read what a worker kept."""
    with np.load(path) as stored:
        found = {name: stored[name] for name in stored.files}
    hidden = json.loads(str(found.pop("hidden")))
    frames = decode_video(found.pop("video").tobytes())
    draws, leads = found["indices_2M"].shape[1], found["support_NLQ"].shape[1]
    return Truth(hidden, frames_2MLHWC=frames.reshape(2, draws, leads, *frames.shape[1:]), **found)


def _arrays(truth: Truth) -> dict[str, np.ndarray]:
    found = {one.name: getattr(truth, one.name) for one in dataclasses.fields(truth)}
    frames = found.pop("frames_2MLHWC")
    found["hidden"] = np.array(json.dumps(found["hidden"]))
    # Through the codec, as the dataset's own frames went.
    found["video"] = np.frombuffer(encode_video(frames.reshape(-1, *frames.shape[3:]), 12.5), np.uint8)
    return found


def make(recorded: Recorded, config: TruthConfig) -> Truth:
    """Play an episode again and again. Raises DataError where it cannot be made again here."""
    from vidworld.lab.conditional import conditional
    from vidworld.lab.episode import resimulate

    settings = OracleConfig(config.context, variety=config.variety, exploration=config.exploration)  # type: ignore[arg-type]
    episode = remake(recorded, settings)
    plan = dataclasses.replace(
        episode.plan,
        joint_targets_TJ=episode.plan.joint_targets_TJ[: config.last],
        gripper_T=episode.plan.gripper_T[: config.last],
    )
    begun = dataclasses.replace(episode, plan=plan)
    at = [config.context - 1 + lead for lead in config.leads]

    def stacked(outcomes: dict[str, np.ndarray] | object, frames: Sequence[int] | int) -> np.ndarray:
        return np.stack([outcomes[name][..., frames] for name in QUANTITIES], -1)  # type: ignore[index]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few effective draws are told in the result
        known = {
            k: conditional(episode, k, config.draws, seed=config.seed + place)
            for place, k in enumerate(config.contexts)
        }
    first = known[config.context]
    drawn = first.resample(2 * config.samples, config.seed)
    order = np.random.default_rng(config.seed).permutation(len(drawn))
    indices_2M = drawn[order].reshape(2, config.samples)
    played = {index: resimulate(begun, first.hidden[index]) for index in dict.fromkeys(indices_2M.ravel())}
    pictures = []
    for index in indices_2M.ravel():
        frames_THWC = played[index].frames_THWC
        assert frames_THWC is not None
        pictures.append(frames_THWC[at])
    rng = np.random.default_rng([config.seed, episode.seed, 0xD2])
    uniform = [
        resimulate(begun, uniform_hidden(rng, episode.visible), render=False)
        for _ in range(config.samples * 2)
    ]
    targets = {k: stacked(found.outcomes_NT, config.target) for k, found in known.items()}
    most = known[config.contexts[-1]]
    possible = most.weights_N >= LEAST_WEIGHT * most.weights_N.max()
    return Truth(
        hidden=dict(episode.hidden),
        support_NLQ=stacked(first.outcomes_NT, at),
        indices_2M=indices_2M,
        frames_2MLHWC=np.stack(pictures).reshape(2, config.samples, len(at), *pictures[0].shape[1:]),
        uniform_MLQ=np.stack([stacked(run.outcomes_T, at) for run in uniform]),
        spread_KQ=np.array(
            [[weighted_std(column, known[k].weights_N) for column in targets[k].T] for k in config.contexts]
        ),
        effective_K=np.array([found.effective_draws for found in known.values()]),
        target_low_Q=targets[config.contexts[-1]][possible].min(0),
        target_high_Q=targets[config.contexts[-1]][possible].max(0),
        uniform_target_NQ=np.stack([stacked(run.outcomes_T, config.target) for run in uniform]),
    )


def uniform_hidden(rng: np.random.Generator, visible: object) -> dict[str, float]:
    """Mass, friction and centre of mass uniform over their ranges: ordinary domain randomization."""
    from vidworld.lab.container import FRICTION, MASS_KG, OFF_CENTRE

    half_3 = np.array(visible["half_m"])  # type: ignore[index]
    centre_3 = OFF_CENTRE * rng.uniform(-1, 1, 3) * half_3
    return {
        "mass_kg": float(rng.uniform(*MASS_KG)),
        "friction": float(rng.uniform(*FRICTION)),
        **{f"centre_{axis}_m": float(value) for axis, value in zip("xyz", centre_3, strict=True)},
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/uncertainty_truth.py")
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
