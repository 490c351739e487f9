"""What `vidworld rollout` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vidworld.errors import ConfigError

Format = Literal["mp4", "gif", "png"]
Compare = Literal["auto", "truth", "none"]


FUTURES = 4
"""Samples of a prompt, unless told otherwise."""


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
    members: tuple[Path, ...] = ()
    """Further members of an ensemble with `run`: the same world, trained with other seeds. Or a number, or
    `all`: so many of the members that `run` itself holds. Each imagines --samples futures."""
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
    samples: int | None = None
    """Futures to imagine of each prompt, each with its own noise (default 4, or 1 at temperature 0, where all
    would be the same)."""
    batch: int = 64
    """Rows imagined at once; the result does not depend on it."""
    seed: int = 0
    steps: int | None = None
    """Denoising steps a frame, in place of the world's own."""
    guidance: float | None = None
    """Action guidance, in place of the world's own."""
    temperature: float | None = None
    """Factor on the noise that frames are drawn from, in place of the world's own: 0 is one future."""
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
    uncertainty: bool = False
    """Show how sure it is: maps over the pictures (uncertainty.mp4), fan charts (uncertainty.png), variances
    (uncertainty.npz), and a page. What the model does not know needs members."""
    readout: Path | None = None
    """A trained readout (lab scenes): its quantities are drawn with --uncertainty, and can be rewarded."""
    kind: str | None = None
    """Kind of lab scene that the readout reads (default: as the episode says)."""
    stop_when_unsure: bool = False
    """Leave out all frames from the first on of which the calibrated radius exceeds a --tolerance."""
    tolerance: tuple[str, ...] = ("pixels=0.1",)
    """How far off the mean of the futures may be: pixels=X (root mean square, pixels from 0 to 1) and
    'proprio NAME=X' in its units."""
    risk: str = ""
    """Which future to show by its --reward: worst, best, or cvar:SHARE (the mean of the worst share)."""
    reward: str = ""
    """What a future is worth: an expression such as 'last(tool_z) - mean(abs(wrist))' over names of
    proprioception and of --readout, or module:callable, called with one future as a policy sees it."""
    search: int = 0
    """Gradient steps with --risk over the network's own noise, for a worse (or better) future than was
    drawn, with its likelihood; for worlds with model.noise_dims."""
    search_mass: float = 0.9
    """Share of all noise that the search stays in."""
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

    @property
    def appraises(self) -> bool:
        """Whether the rollout is asked about itself."""
        return bool(self.uncertainty or self.stop_when_unsure or self.risk)

    @property
    def futures(self) -> int:
        """Of each prompt, unless the temperature says otherwise."""
        return self.samples or FUTURES

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
        if self.fork_at is not None and self.appraises:
            asked = "--uncertainty, --stop-when-unsure or --risk as well"
            raise ConfigError("--fork-at", got=asked, expected="a rollout without branches for these")
        if bool(self.risk) != bool(self.reward):
            raise ConfigError("--risk and --reward", got="one of them", expected="both, or neither")
        if self.search and (self.search < 0 or not self.risk or self.risk.startswith("cvar")):
            raise ConfigError(
                "--search",
                got=f"{self.search} with --risk {self.risk or 'nothing'}",
                expected="--risk worst or best",
            )
        if not 0 < self.search_mass < 1:
            raise ConfigError("--search-mass", got=self.search_mass, expected="a share between 0 and 1")
        if self.readout is not None and not (self.uncertainty or self.reward):
            raise ConfigError("--readout", got="nothing that uses it", expected="--uncertainty or --reward")
        if self.fork_at is not None and self.lerobot:
            raise ConfigError("--lerobot", got="--fork-at as well", expected="a rollout without branches")
