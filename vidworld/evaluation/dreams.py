"""Imagined episodes as a LeRobot dataset, for whoever trains a policy on dreams.

One episode a sample: the frames of the prompt (`is_context` true), then the imagined ones, with the commands
that were given and the proprioception that was predicted. Where the prompt has no commands or proprioception
(pictures, videos), the episode begins at its last frame, with the proprioception that the world reads off it.

Shapes: N samples, T frames, V views, H W pixels, A action dims, S proprio dims.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vidworld import __version__
from vidworld.data import lerobot_format as lerobot
from vidworld.data.export_lerobot_writer import Layout, LeRobotWriter, Take, encode_episode
from vidworld.errors import ConfigError
from vidworld.evaluation.grounding import Grounding
from vidworld.evaluation.imagining import Imagined
from vidworld.world.spec import WorldSpec

FOLDER = "lerobot"
"""Of the dataset in the output directory of a rollout."""
IMAGINED = "imagined"
"""True in what an imagined episode, and every dataset made of it, says of its source."""


@dataclass(frozen=True)
class Dream:
    """What was imagined from one prompt: its samples become episodes."""

    name: str
    """Of the prompt, which keeps the episodes of several apart."""
    grounding: Grounding
    imagined: Imagined
    record: Mapping[str, Any]
    """What its rollout.json holds."""


def check_world(spec: WorldSpec) -> None:
    """Refuse a world whose predictions are sparser than its frames, before anything is imagined."""
    if spec.frames_per_step != 1:
        raise ConfigError(
            "--lerobot",
            got=f"a world that predicts proprioception every {spec.frames_per_step} frames",
            expected="one row a frame",
            fix="leave it out: proprio.npz and the videos hold the same",
        )


def is_imagined(facts: Any) -> bool:
    """Whether an episode's `source`, or what it says of its own origin, says that it was imagined."""
    match facts:
        case Mapping():
            return facts.get(IMAGINED) is True or any(map(is_imagined, facts.values()))
        case list() | tuple():
            return any(map(is_imagined, facts))
        case _:
            return False


def write_lerobot(folder: Path, spec: WorldSpec, dreams: Sequence[Dream]) -> None:
    """Write the samples of all dreams, of one robot, as episodes into a new folder."""
    first = dreams[0]
    layout = Layout(
        fps=spec.fps,
        height=spec.height,
        width=spec.width,
        views=spec.views,
        contract=first.grounding.contract,
        columns={lerobot.IS_CONTEXT: "bool"},
    )
    folder.mkdir()
    with LeRobotWriter(folder, layout) as writer:
        for dream in dreams:
            known = _known(dream.record)
            prefix = f"dream-{dream.record['seed']}" + (f"-{dream.name}" if len(dreams) > 1 else "")
            for index, sample in enumerate(dream.record["sample_ids"]):
                facts = {
                    lerobot.SOURCE_ID: f"{prefix}-{sample}",
                    lerobot.SEED: dream.record["seed"],
                    lerobot.SAMPLE: sample,
                    lerobot.SPLIT: "train",
                    lerobot.OUTCOME: "{}",
                    lerobot.ORIGIN: json.dumps({IMAGINED: True, **known}, sort_keys=True),
                }
                writer.add(encode_episode(_take(spec, dream, index, facts), layout))
        shared = _known(first.record) if len(dreams) == 1 else {"prompts": [dream.name for dream in dreams]}
        writer.finish(
            splits={"train": f"0:{writer.num_episodes}"},
            note={"created_by": f"vidworld {__version__}", IMAGINED: True, **shared},
        )


def _known(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("prompt", "actions", "sampler", "world")}


def _take(spec: WorldSpec, dream: Dream, index: int, facts: Mapping[str, str | int]) -> Take:
    """One sample with what is known of its prompt."""
    grounding, imagined = dream.grounding, dream.imagined
    prompt, proprio_dims = grounding.prompt, len(grounding.contract.proprio)
    context_TVHWC, given_TA = prompt.frames_TVHWC(spec), imagined.actions_NTA[index]
    if prompt.proprio is None or prompt.actions is None:
        context_TVHWC = context_TVHWC[-1:]
        before_TA = given_TA[:0]
        given_TS = imagined.grounded_NS[index, None, :proprio_dims]
    else:
        before_TA, given_TS = prompt.actions, prompt.proprio
    context = len(context_TVHWC)
    # No command follows the last frame; the one before is held, so that every row has one.
    actions_TA = np.concatenate([before_TA, given_TA, given_TA[-1:]])
    frames = len(actions_TA)
    return Take(
        name=str(facts[lerobot.SOURCE_ID]),
        text=prompt.text,
        actions_TA=actions_TA,
        proprio_TS=np.concatenate([given_TS, imagined.proprio_NTS[index, :, :proprio_dims]]),
        timestamps_T=np.arange(frames) / spec.fps,
        pictures=partial(_pictures, spec.views, context_TVHWC, imagined.video_NTVHWC[index]),
        columns={lerobot.IS_CONTEXT: np.arange(frames) < context},
        facts=facts,
    )


def _pictures(views: tuple[str, ...], *parts_TVHWC: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for part_TVHWC in parts_TVHWC:
        yield {view: part_TVHWC[:, index] for index, view in enumerate(views)}
