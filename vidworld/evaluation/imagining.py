"""Imagine scenes: in batches that do not change the result, open-loop, in branches, or with a policy.

Shapes: N samples, T frames, V views, H W pixels, A action dims, S proprio dims, B rows at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vidworld.evaluation.commands import Commands
from vidworld.evaluation.policy import Actor
from vidworld.evaluation.rollout_inputs import Scene
from vidworld.world.engine import RolloutEngine
from vidworld.world.state import WorldState
from vidworld.world.world import WorldModel

Watch = Callable[[int, np.ndarray | None], object]
"""Told after every step: rows times camera frames imagined, and a picture [V, H, W, 3] of the first row."""


@dataclass(frozen=True)
class Imagined:
    """All samples of one scene under one choice of actions, in raw units."""

    actions_NTA: np.ndarray
    video_NTVHWC: np.ndarray
    proprio_NTS: np.ndarray
    """One row a latent frame."""
    grounded_NS: np.ndarray
    """Proprioception of the prompt's last frame, as the world took it."""
    member_N: np.ndarray
    """Which member of an ensemble imagined each; all 0 for one world."""

    @staticmethod
    def cat(parts: Sequence["Imagined"], axis: int = 0) -> "Imagined":
        """Samples side by side (axis 0), or frames behind each other (axis 1)."""
        first = parts[0]
        return Imagined(
            np.concatenate([part.actions_NTA for part in parts], axis),
            np.concatenate([part.video_NTVHWC for part in parts], axis),
            np.concatenate([part.proprio_NTS for part in parts], axis),
            first.grounded_NS if axis else np.concatenate([part.grounded_NS for part in parts]),
            first.member_N if axis else np.concatenate([part.member_N for part in parts]),
        )

    def rows(self, rows: slice | np.ndarray) -> "Imagined":
        """Some of the samples."""
        return Imagined(
            self.actions_NTA[rows],
            self.video_NTVHWC[rows],
            self.proprio_NTS[rows],
            self.grounded_NS[rows],
            self.member_N[rows],
        )

    def by_member(self) -> "Imagined":
        """The samples of member 0 first, those of each in the order that they have."""
        return self.rows(np.argsort(self.member_N, kind="stable")) if self.member_N.any() else self

    def until(self, steps: int) -> "Imagined":
        """The first latent frames alone."""
        k = self.video_NTVHWC.shape[1] // self.proprio_NTS.shape[1]
        return Imagined(
            self.actions_NTA[:, : steps * k],
            self.video_NTVHWC[:, : steps * k],
            self.proprio_NTS[:, :steps],
            self.grounded_NS,
            self.member_N,
        )


@dataclass(frozen=True)
class Imagination:
    """A world with what is asked of all its scenes; of an ensemble each member imagines `num_samples`.

    Sample n of every scene has noise stream n, whatever else is imagined beside it: results depend on seed,
    scene and n, and not on `batch` (up to the rounding of larger matrix products).
    """

    world: WorldModel
    engine: RolloutEngine
    seed: int
    num_samples: int
    batch: int
    allow_out_of_range: bool = False
    stepwise: bool = False
    """Decode each frame as it is imagined, for somebody who watches."""

    def scenes(
        self,
        scenes: Sequence[Scene],
        watch: Watch,
        *,
        actor: Callable[[], Actor] | None = None,
        frames: int = 0,
    ) -> list[Imagined]:
        """Every scene under its commands; or `frames` frames of each with an actor, a new one a batch."""
        parts: dict[str, list[Imagined]] = {scene.name: [] for scene in scenes}
        for group, samples in self._batches(scenes):
            state = self._reset(group, samples)
            if actor is not None:
                texts = [scene.grounding.prompt.text for scene in group for _ in self._rows_of(samples)]
                found = self._closed(state, actor(), texts, frames, watch)
            else:
                given = [_commands(scene) for scene in group for _ in self._rows_of(samples)]
                found = self._open(state, np.stack(given), watch)[0]
            for index, scene in enumerate(group):
                rows = len(self._rows_of(samples))
                parts[scene.name].append(found.rows(slice(index * rows, (index + 1) * rows)))
        return [Imagined.cat(parts[scene.name]).by_member() for scene in scenes]

    def branches(
        self, scene: Scene, branches: dict[str, Commands], at: int, watch: Watch
    ) -> dict[str, Imagined]:
        """One scene until frame `at`, and from there each branch under the same noise."""
        parts: dict[str, list[Imagined]] = {name: [] for name in branches}
        for group, samples in self._batches([scene]):
            first = next(iter(branches.values())).actions_TA
            rows = self._rows_of(samples)
            shared, parting = self._open(self._reset(group, samples), _tile(first[:at], rows), watch)
            for name, commands in branches.items():
                after, _ = self._open(parting, _tile(commands.actions_TA[at:], rows), watch)
                parts[name].append(Imagined.cat([shared, after], axis=1))
        return {name: Imagined.cat(found).by_member() for name, found in parts.items()}

    def _batches(self, scenes: Sequence[Scene]) -> Iterator[tuple[Sequence[Scene], range]]:
        """Whole scenes together while they fit, else the samples of one scene in turns."""
        members = self.world.num_members
        if self.num_samples * members > self.batch:
            at_once = max(1, self.batch // members)
            for scene in scenes:
                for first in range(0, self.num_samples, at_once):
                    yield [scene], range(first, min(first + at_once, self.num_samples))
            return
        together = self.batch // (self.num_samples * members)
        for first in range(0, len(scenes), together):
            yield scenes[first : first + together], range(self.num_samples)

    def _rows_of(self, samples: range) -> range:
        """Rows of a scene: so many samples of each member."""
        return range(len(samples) * self.world.num_members)

    def _reset(self, group: Sequence[Scene], samples: range) -> WorldState:
        return self.world.reset(
            [scene.grounding.prompt for scene in group],
            len(samples),
            self.seed,
            sample_ids=list(samples) * len(group),
            sampler=self.engine.sampler,
            allow_out_of_range=self.allow_out_of_range,
        )

    def _open(self, state: WorldState, actions_BTA: np.ndarray, watch: Watch) -> tuple[Imagined, WorldState]:
        k = self.world.spec.frames_per_step
        known = _numpy(self.world.observation(state, decode=False).proprio_BS)
        if not self.stepwise:
            found = self.engine.rollout(
                state,
                actions_BTA,
                allow_out_of_range=self.allow_out_of_range,
                progress=lambda: watch(len(state) * k, None),
            )
            assert found.video_BTVHWC is not None
            video, proprio = _numpy(found.video_BTVHWC), _numpy(found.proprio_BTS)
            return Imagined(actions_BTA, video, proprio, known, _members(state)), found.state
        self.engine.load(state)
        steps = [self._step(chunk, watch) for chunk in np.split(actions_BTA, actions_BTA.shape[1] // k, 1)]
        videos, proprio = zip(*steps, strict=True)
        after = self.engine.state()
        video = np.concatenate(videos, 1)
        return Imagined(actions_BTA, video, np.stack(proprio, 1), known, _members(state)), after

    def _closed(
        self, state: WorldState, actor: Actor, texts: Sequence[str], frames: int, watch: Watch
    ) -> Imagined:
        seen = self.world.observation(state)
        assert seen.video_BVHWC is not None
        picture, proprio = _numpy(seen.video_BVHWC), _numpy(seen.proprio_BS)
        known, actions, videos, proprios = proprio, [], [], []
        self.engine.load(state)
        for _ in range(frames // self.world.spec.frames_per_step):
            actions.append(actor.act(picture, proprio, texts))
            clip, proprio = self._step(actions[-1], watch)
            picture = clip[:, -1]
            videos.append(clip)
            proprios.append(proprio)
        return Imagined(
            np.concatenate(actions, 1),
            np.concatenate(videos, 1),
            np.stack(proprios, 1),
            known,
            _members(state),
        )

    def _step(self, actions_BkA: np.ndarray, watch: Watch) -> tuple[np.ndarray, np.ndarray]:
        """Pictures [B, k, V, H, W, 3] and proprioception [B, S] of one step."""
        action = actions_BkA if self.world.spec.frames_per_step > 1 else actions_BkA[:, 0]
        seen = self.engine.step(action, allow_out_of_range=self.allow_out_of_range)
        assert seen.clip_BkVHWC is not None
        clip, proprio = _numpy(seen.clip_BkVHWC), _numpy(seen.proprio_BS)
        watch(len(clip) * clip.shape[1], clip[0, -1])
        return clip, proprio


def _commands(scene: Scene) -> np.ndarray:
    assert scene.commands is not None
    return scene.commands.actions_TA


def _tile(actions_TA: np.ndarray, samples: range) -> np.ndarray:
    return np.tile(actions_TA[None], (len(samples), 1, 1))


def _members(state: WorldState) -> np.ndarray:
    return state.member_B.cpu().numpy()


def _numpy(tensor: Tensor) -> np.ndarray:
    with torch.no_grad():
        return tensor.cpu().numpy()
