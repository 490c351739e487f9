"""What `vidworld rollout` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vidworld.errors import ConfigError

Format = Literal["mp4", "gif", "png"]
Compare = Literal["auto", "truth", "none"]


@dataclass(frozen=True)
class Options:
    """Imagine what the robot would see, from a prompt and actions.

    --prompt takes the id of an episode of --data, a picture, or a video (one file a view); several of them
    are imagined side by side. --actions takes `episode` (the prompt's own), `episode:ID`, a .npy or .csv of
    raw commands, `hold` (nothing new), `sweep` (each dimension over its recorded range in turn) or
    `sweep:NAME`. --policy closes the loop instead.
    """

    run: tyro.conf.Positional[Path]
    """Directory of a trained world: a run or an export. Or `lab`, the world that comes with vidworld."""
    out: Path
    """Directory to write; it must not exist."""
    prompt: tuple[str, ...] = ()
    """Episode ids, or files of pictures or videos: one a view, in the world's order. Default: the first
    held-out episode of --data."""
    data: Path | None = None
    """Dataset directory, for episodes. Default: the prompts that came with the world, if any."""
    actions: str = ""
    """Default: `episode` for an episode, else `sweep`."""
    policy: str = ""
    """Who acts in place of --actions: `module:callable`, or ws://HOST:PORT of a server that speaks openpi's
    protocol."""
    policy_keys: tuple[str, ...] = ()
    """Names of what the policy sees, as OURS=THEIRS, such as top=observation/image state=observation/state.
    Ours are the views, `state` and `prompt`; by default observation/VIEW, observation/state and prompt."""
    replan: int | None = None
    """Frames after which the policy is asked again (default: when its chunk of actions is used up)."""
    fork_at: int | None = None
    """Frame after which the future parts: from there --branches go on beside the given actions, under the
    same noise, so that nothing but the actions differs."""
    branches: tuple[str, ...] = ("hold", "mirror")
    """Actions of the branches, as --actions takes them, or `mirror` (the opposite of the given ones)."""
    context: int | None = None
    """Frames of the prompt (default 4, or 1 for a picture; with a time stride, whole latent frames)."""
    start: int = 0
    """First frame of the prompt within its episode or video."""
    frames: Annotated[int | None, tyro.conf.arg(aliases=["--horizon"])] = None
    """Frames to imagine (default: what the actions allow, at most 48)."""
    samples: int = 4
    """Futures to imagine of each prompt; each has its own noise."""
    batch: int = 64
    """Rows imagined at once; the result does not depend on it."""
    seed: int = 0
    steps: int | None = None
    """Denoising steps a frame, in place of the world's own."""
    guidance: float | None = None
    """Action guidance, in place of the world's own."""
    uncalibrated: bool = False
    """Leave out the run's calibration.json."""
    embodiment: str | None = None
    """The robot of pictures and videos, where the world knows several; an episode says its own."""
    resize: bool = False
    """Scale and centre-crop a prompt of another size."""
    allow_out_of_range: bool = False
    """Take actions beyond the recorded range."""
    compare: Compare = "auto"
    """`truth` measures each frame against the recording, beside holding the last frame; `auto` shows the
    recording where there is one; `none` leaves it out."""
    formats: tuple[Format, ...] = ("mp4",)
    """Files of each sample and of the grid: mp4, gif, or png (a folder of frames)."""
    lerobot: bool = False
    """Also write the imagined episodes as a LeRobot v3.0 dataset, OUT/lerobot."""
    preview: bool = False
    """Draw sample 0 in the terminal as it is imagined (24-bit colour)."""
    compile: bool = False
    """Compile the network first: minutes once, then faster; for long rollouts."""
    device: str | None = None
    """Default: the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier rollout in --out."""

    def check(self) -> None:
        """Refuse numbers and pairs of options that make no sense, before anything is loaded."""
        for name in ("samples", "frames", "steps", "batch", "replan", "fork_at"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}", got=value, expected="1 or more")
        if not self.formats:
            raise ConfigError("--formats", got="nothing", expected="mp4, gif or png")
        if self.policy and self.actions:
            raise ConfigError("--policy", got="--actions as well", expected="one of the two")
        if self.policy and self.fork_at is not None:
            raise ConfigError("--fork-at", got="--policy as well", expected="--actions")
        if self.replan is not None and not self.policy:
            raise ConfigError("--replan", got="no --policy", expected="one that can be asked again")
        if self.fork_at is not None and not self.branches:
            raise ConfigError("--branches", got="nothing", expected="one or more")
        if self.fork_at is not None and self.lerobot:
            raise ConfigError("--lerobot", got="--fork-at as well", expected="a rollout without branches")
