"""Does a world know when it is shown what it has not learnt? Shifted lab episodes and three scores of them.

Shifts, each of held-out episodes of the container, all of them within the known frames:

- `colour`: a carton and tape of colours that no episode has;
- `force`: a push out of nowhere slides the box before the arm is there;
- `speed`: the arm follows its commands at more than twice the pace;
- `corrupted`: blocks of the known frames are noise, as when a camera's link fails;
- `embodiment`: another arm, thicker, of other links and colours.

Scores: E of the ensemble (what its members disagree about beyond their samples' spread), the flow loss (how
badly the known and next frames are denoised, given those before), and the distance to the nearest training
episode in pooled latents. Of the known frames alone: how far the mean of each is from what came, and what
members disagree about there. Shapes: W windows, J members, M samples, T frames, X latent values.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from uncertainty_worlds import Imaginer, Window

from vidworld.diffusion.path import constant_level, mix
from vidworld.evaluation.distributions import auroc, auroc_interval
from vidworld.evaluation.oracle import OracleConfig, Recorded, remake
from vidworld.model.inputs import Conditioning
from vidworld.model.two_stream import target_predictor
from vidworld.tokenizers.base import chunk_actions
from vidworld.types import Frames
from vidworld.world.noise import CONTEXT, START, NoiseStream
from vidworld.world.novelty import novelty
from vidworld.world.uncertainty import split
from vidworld.world.world import WorldModel

if TYPE_CHECKING:
    from vidworld.lab.episode import LabEpisode

NAMES = ("E", "E8", "A", "surprise", "proprio", "known", "flow", "nearest")
"""Of the scores."""
SHIFTS = ("colour", "force", "speed", "corrupted", "embodiment")
CARTON, TAPE = (0.16, 0.55, 0.62), (0.85, 0.2, 0.65)
PUSH_M_S2, PUSH_FRAMES = 3.0, (2, 5)
"""What the push accelerates the box by, its friction overcome, and from which frame to which it lasts."""
GRAVITY_M_S2 = 9.81
PACE = 2.2
NOISY_SHARE, BLOCK = 0.35, 8
LEVELS = (0.25, 0.5, 0.75)
FIRST = 8
Score = Callable[[Sequence[Window]], np.ndarray]
"""A number for each window, higher where it is stranger."""


@dataclass(frozen=True)
class Job:
    """A shift of one recorded episode, for a worker."""

    recorded: Recorded
    shift: str
    frames: int
    config: OracleConfig


def make_shifts(
    windows: Sequence[Window], shifts: Sequence[str], config: OracleConfig, size: int, workers: int
) -> dict[str, list[Window]]:
    """The same windows, each as it would have been under each shift."""
    asked = [shift for shift in shifts if shift != "corrupted"]
    jobs = []
    for shift in asked:
        for window in windows:
            assert window.episode is not None
            recorded = Recorded.of(window.episode, size, window.key)
            jobs.append((window, Job(recorded, shift, len(window.frames_THWC), config)))
    found: dict[str, list[Window]] = {shift: [] for shift in shifts}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for (window, job), made in zip(jobs, pool.map(play_shift, [job for _, job in jobs]), strict=True):
            if made is not None:
                frames_THWC, actions_TA, proprio_TS = made
                found[job.shift].append(
                    dataclasses.replace(
                        window,
                        frames_THWC=frames_THWC,
                        actions_TA=actions_TA[: len(frames_THWC) - 1],
                        proprio_TS=proprio_TS,
                        episode=None,
                    )
                )
    if "corrupted" in shifts:
        found["corrupted"] = [corrupt(window) for window in windows]
    return found


def corrupt(window: Window, seed: int = 0) -> Window:
    """A share of the blocks of each known frame is noise."""
    rng = np.random.default_rng([seed, *map(ord, window.key)])
    frames_THWC = window.frames_THWC.copy()
    height, width = frames_THWC.shape[1:3]
    for frame_HWC in frames_THWC[: window.context]:
        lost = rng.random((height // BLOCK, width // BLOCK)) < NOISY_SHARE
        lost_HW = np.kron(lost, np.ones((BLOCK, BLOCK), bool))
        frame_HWC[: lost_HW.shape[0], : lost_HW.shape[1]][lost_HW] = rng.integers(0, 256, (lost_HW.sum(), 3))
    return dataclasses.replace(window, frames_THWC=frames_THWC, episode=None)


def play_shift(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Frames, actions and proprioception of a shifted episode; None where its arm cannot follow."""
    from vidworld.errors import DataError

    episode = remake(job.recorded, job.config)
    match job.shift:
        case "colour":
            played = recoloured(episode)
        case "force":
            played = pushed(episode)
        case "speed":
            played = hurried(episode)
        case "embodiment":
            try:
                played = other_arm(episode)
            except DataError:
                return None
        case other:
            raise AssertionError(other)
    frames_THWC = played.frames_THWC
    assert frames_THWC is not None
    count = slice(job.frames)
    return frames_THWC[count], played.actions_TA[count], played.proprio_TS[count]


def _replay(episode: "LabEpisode", effect: Any, visible: Mapping[str, Any] | None = None) -> "LabEpisode":
    """Play an episode with another effect or something else in sight."""
    from vidworld.lab.episode import play
    from vidworld.lab.scene import Scene

    changed = dataclasses.replace(episode, visible=episode.visible if visible is None else visible)
    effect.frames = episode.config.frames
    scene = Scene(effect, changed.look, changed.visible, changed.config.size, changed.config.robot)  # type: ignore[arg-type]
    try:
        return play(changed, effect, scene, changed.hidden, render=True)
    finally:
        scene.close()


def recoloured(episode: "LabEpisode") -> "LabEpisode":
    """A carton of new colours."""
    from vidworld.lab import container

    class Painted(container.Container):
        def build(self, spec: Any, visible: Mapping[str, Any]) -> None:
            cartons, tapes = container.CARTONS, container.TAPES
            # Only this process plays it, and only until its model is built.
            container.CARTONS, container.TAPES = (CARTON,) * len(cartons), (TAPE,) * len(tapes)
            try:
                super().build(spec, visible)
            finally:
                container.CARTONS, container.TAPES = cartons, tapes

    return _replay(episode, Painted())


def pushed(episode: "LabEpisode") -> "LabEpisode":
    """A force that nothing in sight explains slides the box sideways within the first frames."""
    from vidworld.lab.container import FREE, Container
    from vidworld.lab.effect import FRAME_S

    class Pushed(Container):
        def substep(self, scene: Any, dt: float) -> None:
            frame = scene.data.time / FRAME_S
            force_3 = np.zeros(3)
            if PUSH_FRAMES[0] <= frame < PUSH_FRAMES[1]:
                if not self._touched:
                    self._touched = True
                    self._set_bits(FREE)
                side = 1.0 if episode.visible["y"] < 0 else -1.0
                friction_m_s2 = episode.hidden["friction"] * GRAVITY_M_S2
                force_3[1] = side * episode.hidden["mass_kg"] * (friction_m_s2 + PUSH_M_S2)
            scene.data.xfrc_applied[self._body, :3] = force_3
            super().substep(scene, dt)

    return _replay(episode, Pushed())


def hurried(episode: "LabEpisode") -> "LabEpisode":
    """The same path at a higher pace; the last pose is held."""
    from vidworld.lab.container import Container

    plan = episode.plan
    at_T = np.minimum(np.arange(len(plan.gripper_T)) * PACE + PACE - 1, len(plan.gripper_T) - 1)
    rows_T = np.arange(len(plan.gripper_T))
    targets_TJ = np.stack([np.interp(at_T, rows_T, column) for column in plan.joint_targets_TJ.T], 1)
    gripper_T = np.interp(at_T, rows_T, plan.gripper_T)
    faster = dataclasses.replace(
        episode,
        plan=dataclasses.replace(plan, joint_targets_TJ=targets_TJ, gripper_T=gripper_T),
        actions_TA=np.concatenate([targets_TJ, gripper_T[:, None]], 1).astype(np.float32),
    )
    return _replay(faster, Container())


def other_arm(episode: "LabEpisode") -> "LabEpisode":
    """The same seed with an arm of other links, thicker and of other colours."""
    from vidworld.lab.arm import MJCF
    from vidworld.lab.episode import generate

    changes = {
        'rgba="0.92 0.92 0.9 1"': 'rgba="0.16 0.3 0.24 1"',
        'rgba="0.17 0.19 0.23 1"': 'rgba="0.8 0.75 0.3 1"',
        'rgba="0.94 0.47 0.11 1"': 'rgba="0.5 0.1 0.5 1"',
        'pos="0 -0.316 0"': 'pos="0 -0.346 0"',
        'fromto="0 -0.04 0 0 -0.25 0"': 'fromto="0 -0.04 0 0 -0.28 0"',
        'size="0.066"': 'size="0.088"',
        'size="0.061"': 'size="0.084"',
        'size="0.053"': 'size="0.074"',
        'size="0.049"': 'size="0.07"',
    }
    text = MJCF
    for old, new in changes.items():
        assert old in text, f"{old} is no longer in the arm"
        text = text.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        robot = Path(folder) / "other_arm.xml"
        robot.write_text(text)
        return generate(episode.kind, episode.seed, dataclasses.replace(episode.config, robot=robot))


def parts_of(imaginer: Imaginer) -> dict[str, Score]:
    """Means over the imagined frames' latents, in their normalised units. Needs two members or more.

    `E` is what members disagree in, over all frames; `E8` over the first 8; `A` is their samples' spread.
    """
    kept: dict[int, tuple[Sequence[Window], np.ndarray]] = {}

    def of(windows: Sequence[Window]) -> np.ndarray:
        if id(windows) not in kept:  # the windows are kept too, or another list could get their place
            found = []
            for imagined in imaginer(windows, []):
                parted = split(imagined.latents_MTX.unflatten(0, (1, imaginer.members, imaginer.each)))
                assert parted.epistemic_SX is not None
                epistemic_TX, aleatoric_TX = parted.epistemic_SX[0], parted.aleatoric_SX[0]
                of_one = (epistemic_TX.mean(), epistemic_TX[:FIRST].mean(), aleatoric_TX.mean())
                found.append(torch.stack(of_one).double().cpu().numpy())
            kept[id(windows)] = (windows, np.array(found))
        return kept[id(windows)][1]

    names = ("E", f"E{FIRST}", "A")
    return {name: lambda windows, place=place: of(windows)[:, place] for place, name in enumerate(names)}


def novel(world: WorldModel, at_once: int = 8) -> dict[str, Score]:
    """Of the known frames alone, one step ahead from no noise: `surprise`, `proprio` (its own), `known` (E).

    `known` needs an ensemble. See `vidworld.world.novelty`.
    """
    kept: dict[int, tuple[Sequence[Window], np.ndarray]] = {}

    def of(windows: Sequence[Window]) -> np.ndarray:
        if id(windows) not in kept:
            found = []
            for first in range(0, len(windows), at_once):
                some = [window.prompt(world) for window in windows[first : first + at_once]]
                one = novelty(world, some, allow_out_of_range=True)
                parts = [one.surprise_PT, one.proprio_PT]
                parts += [] if one.disagreement_PT is None else [one.disagreement_PT]
                found.append(torch.stack([part.mean(1) for part in parts], 1).double().cpu().numpy())
            kept[id(windows)] = (windows, np.concatenate(found))
        return kept[id(windows)][1]

    members = world.num_members > 1
    names = ("surprise", "proprio", "known") if members else ("surprise", "proprio")
    return {name: lambda windows, place=place: of(windows)[:, place] for place, name in enumerate(names)}


@torch.no_grad()
def flow_loss(world: WorldModel, *, frames: int, at_once: int = 16, seed: int = 0) -> Score:
    """Mean square error of denoising each of the first frames, given those before it and the commands."""

    def score(windows: Sequence[Window]) -> np.ndarray:
        found: list[Tensor] = []
        for first in range(0, len(windows), at_once):
            with torch.no_grad(), world.precision():
                found.append(_losses(world, windows[first : first + at_once], frames, seed))
        return torch.cat(found).double().cpu().numpy()

    return score


def _losses(world: WorldModel, windows: Sequence[Window], frames: int, seed: int) -> Tensor:
    """Losses [W]; the noise is the same for every window."""
    shape, sampler = world.spec.shape, world.spec.sampler
    count = min(frames, sampler.window, min(len(window.frames_THWC) for window in windows))
    video = np.stack([window.frames_THWC[:count, None] for window in windows])
    latents = world.encode(torch.from_numpy(video).to(world.device)).float()
    zeros_W = torch.zeros(len(windows), dtype=torch.int64, device=world.device)

    def padded(rows: Sequence[np.ndarray], width: int) -> Tensor:
        values = torch.tensor(np.stack(rows), dtype=world.dtype, device=world.device)
        return torch.nn.functional.pad(values, (0, width - values.shape[-1]))

    proprio = padded([window.proprio_TS[:count] for window in windows], shape.proprio_dims)
    actions = padded([_rows(window.actions_TA, count) for window in windows], shape.action_dims)
    clean = Frames(latents, world.normalizer.proprio(proprio, zeros_W))
    conditioning = Conditioning(*chunk_actions(world.normalizer.actions(actions, zeros_W), 1), zeros_W)
    stream = NoiseStream(seed, zeros_W, world.dtype)
    (noise,) = stream.frames(shape, range(count), CONTEXT)
    context_level = constant_level(clean, 1 - sampler.context_noise)
    predict = target_predictor(world.model, mix(clean, noise, context_level), context_level, conditioning)
    total_W = torch.zeros(len(windows), device=world.device)
    for number, signal in enumerate(LEVELS):
        (noise,) = stream.frames(shape, range(number * count, (number + 1) * count), START)
        level = constant_level(clean, signal)
        step = torch.full_like(level.signal, 1 / sampler.finest_steps)
        predicted = predict(mix(clean, noise, level), level, step)
        error = (predicted.latents_BTVChw - clean.latents_BTVChw)[:, 1:].float().square()
        total_W += error.flatten(1).mean(1)
    return total_W / len(LEVELS)


def _rows(actions_TA: np.ndarray, count: int) -> np.ndarray:
    """The first commands; the one that leads out of the clip is not used and may be missing."""
    return np.concatenate([actions_TA, actions_TA[-1:]])[:count]


def nearest(world: WorldModel, train: Sequence[Window]) -> Score:
    """Distance to the nearest training episode: known frames' latents, each channel pooled to 4 x 4."""

    @torch.no_grad()
    def features(windows: Sequence[Window]) -> Tensor:
        found = []
        for window in windows:
            video = torch.from_numpy(window.frames_THWC[: window.context, None])[None].to(world.device)
            latents_TChw = world.encode(video)[0, :, 0].float()
            pooled = torch.nn.functional.adaptive_avg_pool2d(latents_TChw, 4)
            found.append(torch.cat([pooled.mean(0).flatten(), pooled.std(0).flatten()]))
        return torch.stack(found)

    known = features(train)

    def score(windows: Sequence[Window]) -> np.ndarray:
        return torch.cdist(features(windows), known).min(1).values.double().cpu().numpy()

    return score


def rows_of(
    scores: Mapping[str, Score],
    ordinary: Sequence[Window],
    shifted: Mapping[str, Sequence[Window]],
    report: Callable[[Mapping[str, tuple[float, str]]], None] = lambda rows: None,
    late: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, tuple[float, str]], dict[str, dict[str, np.ndarray]]]:
    """AUROC of each score on each shift, E without a name of its own; and the scores, ordinary ones too.

    Rows of a shift are reported as soon as they are told; no new one is begun when it is late.
    """
    told = {name: {"ordinary": score(ordinary)} for name, score in scores.items()}
    rows: dict[str, tuple[float, str]] = {}
    for shift, windows in shifted.items():
        if len(windows) < 2 or late():
            continue
        of_shift: dict[str, tuple[float, str]] = {}
        for name, score in scores.items():
            strange = told[name][shift] = score(windows)
            low, high = auroc_interval(told[name]["ordinary"], strange)
            of_shift[f"uncertainty.ood_auroc.{shift}" + ("" if name == "E" else f".{name}")] = (
                auroc(told[name]["ordinary"], strange),
                f"{name}, {len(ordinary)} and {len(windows)} episodes, 95 % {low:.2f} to {high:.2f}",
            )
        report(of_shift)
        rows |= of_shift
    return rows, told
