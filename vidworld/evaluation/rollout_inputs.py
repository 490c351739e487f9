"""What a rollout begins with and what it is told to do: groundings and commands from the options.

Shapes: T frames, A action dims.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vidworld.contract import ActionContract
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError
from vidworld.evaluation import commands
from vidworld.evaluation.commands import Commands
from vidworld.evaluation.grounding import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Grounding,
    default_context,
    find_sample,
    ground_episode,
    ground_files,
)
from vidworld.evaluation.rollout_options import Options
from vidworld.world.spec import WorldSpec

DEFAULT_FRAMES = 48


@dataclass(frozen=True)
class Scene:
    """One prompt, and the commands that follow it; None where a policy gives them."""

    name: str
    """Of its folder, unique in a rollout."""
    grounding: Grounding
    commands: Commands | None


def with_prompt(options: Options, own: Path | None) -> Options:
    """The options with a prompt: where none is named an episode, and of the world's own dataset at need."""
    data = options.data
    if data is None and not any(map(_is_file, options.prompt)):
        data = own
    if options.prompt or data is None:
        return replace(options, data=data)
    manifest = ShardDataset.open(data).manifest
    first = (manifest.samples("val") or manifest.samples())[0]
    return replace(options, data=data, prompt=(first.key,))


def embodiment(options: Options, spec: WorldSpec) -> str:
    """Whose world is needed: that of the robot asked for, or of the first prompt's episode."""
    if options.embodiment is None and options.data is not None and not _is_file(options.prompt[0]):
        return find_sample(ShardDataset.open(options.data), options.prompt[0]).embodiment
    return spec.contracts[spec.embodiment_index(options.embodiment, where="--embodiment")].embodiment


def scenes(options: Options, spec: WorldSpec) -> list[Scene]:
    """All prompts with their commands, as many for each as the shortest allows.

    Raises ConfigError, DataError or ContractError naming the option, file or dimension.
    """
    groundings = ground(options, spec)
    robots = sorted({grounding.contract.embodiment for grounding in groundings.values()})
    if len(robots) > 1:
        raise ConfigError("--prompt", got=f"episodes of {' and '.join(robots)}", expected="one robot")
    if options.policy:
        return [Scene(name, grounding, None) for name, grounding in groundings.items()]
    found = {
        name: commands_for(options.actions, options, grounding, spec, frames=options.frames)
        for name, grounding in groundings.items()
    }
    shortest = min(len(one.actions_TA) for one in found.values())
    made = []
    for name, grounding in groundings.items():
        cut = found[name].first(shortest, at_most=shortest)
        check(cut, grounding.contract, options)
        made.append(Scene(name, grounding, cut))
    return made


def branches(options: Options, scene: Scene, spec: WorldSpec) -> dict[str, Commands]:
    """Commands of the whole rollout for each branch: the given ones until `fork_at`, then the branch's own.

    The first, "as given", goes on with the given ones. Raises ConfigError for a fork beyond the end.
    """
    given, at = scene.commands, options.fork_at
    assert given is not None
    assert at is not None
    total, k = len(given.actions_TA), spec.frames_per_step
    if not at < total or at % k:
        whole = "" if k == 1 else f" and a multiple of {k}, the frames of a step"
        raise ConfigError("--fork-at", got=at, expected=f"1 to {total - k}: before the last frame{whole}")
    contract, before_TA, rest_TA = scene.grounding.contract, given.actions_TA[:at], given.actions_TA[at:]
    made = {"as given": given}
    for name in options.branches:
        if name == "mirror":
            after = commands.mirror(contract, Commands(rest_TA, given.source), before_TA[-1])
        elif name == "hold":
            after = commands.hold(contract, total - at, before_TA[-1])
        else:
            after = commands_for(name, options, scene.grounding, spec, frames=total - at)
        check(after, contract, options)
        label = name if name not in made else f"{name} {len(made)}"
        made[label] = Commands(np.concatenate([before_TA, after.actions_TA]), after.source)
    return made


def ground(options: Options, spec: WorldSpec) -> dict[str, Grounding]:
    """The prompts by name."""
    names = options.prompt
    files = [_is_file(name) for name in names]
    if not names or (any(files) and not all(files)) or (not any(files) and options.data is None):
        raise ConfigError(
            "--prompt",
            got=" ".join(names) or "nothing",
            expected="episode ids with --data, or files of pictures or videos",
        )
    if not any(files):
        return _unique(
            [(name, _episode(options, name, spec, needs_frames=_takes_recorded(options))) for name in names]
        )
    views = len(spec.views)
    if len(names) % views:
        raise ConfigError(
            "--prompt files",
            got=len(names),
            expected=f"{views} for each prompt, one for each view ({', '.join(spec.views)})",
        )
    groups = [[Path(name) for name in names[i : i + views]] for i in range(0, len(names), views)]
    found = [
        (
            group[0].stem,
            ground_files(
                group,
                spec,
                context=options.context,
                start=options.start,
                embodiment=options.embodiment,
                resize=options.resize,
            ),
        )
        for group in groups
    ]
    lengths = {len(grounding.prompt.frames) for _, grounding in found}
    if len(lengths) > 1:
        raise ConfigError(
            "--prompt files", got=f"prompts of {sorted(lengths)} frames", expected="one length for all"
        )
    return _unique(found)


def commands_for(
    asked: str, options: Options, grounding: Grounding, spec: WorldSpec, *, frames: int | None
) -> Commands:
    """The commands named `asked`, as many as there are frames to imagine."""
    kind, _, argument = asked.partition(":")
    recording = grounding.recording
    given_TA = grounding.prompt.actions
    last_action_A = None if given_TA is None or not len(given_TA) else given_TA[-1]
    match kind or ("sweep" if recording is None else "episode"):
        case "sweep":
            found = commands.sweep(
                grounding.contract,
                spec.fps,
                only=argument or None,
                last_action_A=last_action_A,
                frames=frames,
            )
            most = len(found.actions_TA)
        case "hold":
            most = frames or DEFAULT_FRAMES
            found = commands.hold(grounding.contract, most, last_action_A)
        case "episode":
            source, most = asked or "episode", DEFAULT_FRAMES
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
            found, most = commands.from_file(Path(asked), grounding.contract), DEFAULT_FRAMES
    whole = min(most, len(found.actions_TA)) // spec.frames_per_step * spec.frames_per_step
    return found.first(frames, at_most=max(whole, 1))


def check(found: Commands, contract: ActionContract, options: Options) -> None:
    """Refuse commands that the robot's contract does not allow, naming the dimension."""
    contract.check_actions(
        found.actions_TA, where=found.source, allow_out_of_range=options.allow_out_of_range
    )


def _takes_recorded(options: Options) -> bool:
    return not options.policy and options.actions in ("", "episode")


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


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _unique(found: list[tuple[str, Grounding]]) -> dict[str, Grounding]:
    """By name, a number behind those that come again."""
    named: dict[str, Grounding] = {}
    for name, grounding in found:
        safe = "".join(one if one.isalnum() or one in "-_" else "_" for one in name)
        copies = 1
        while (unique := safe if copies == 1 else f"{safe}-{copies}") in named:
            copies += 1
        named[unique] = grounding
    return named
