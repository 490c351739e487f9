"""The settings of a training run: a YAML whose `kind` says whether a tokenizer or a world is trained."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from vidworld.config import from_mapping, read_yaml
from vidworld.data.loader import LoaderConfig
from vidworld.diffusion.objective import ObjectiveConfig
from vidworld.errors import ConfigError
from vidworld.files import anchored
from vidworld.model.config import DiTConfig
from vidworld.tokenizers.conv import ConvTokenizerConfig
from vidworld.trainer.engine import EngineConfig
from vidworld.trainer.logging import WandbMode
from vidworld.trainer.loop_config import LoopConfig
from vidworld.trainer.optim import OptimConfig
from vidworld.world.shipped import resolve
from vidworld.world.spec import SamplerSettings


@dataclass(frozen=True)
class TokenizerLoader(LoaderConfig):
    """Short clips: neighbouring frames teach an autoencoder little."""

    clip_frames: int = 2


@dataclass(frozen=True)
class TokenizerOptim(OptimConfig):
    """AdamW: the weights are convolutions."""

    lr: float = 4e-4


@dataclass(frozen=True)
class WorldOptim(OptimConfig):
    """Muon on the blocks' matrices."""

    name: Literal["muon", "adamw"] = "muon"


@dataclass(frozen=True)
class LookConfig:
    """How often the averaged weights are looked at; 0 never. The end of a run is always looked at."""

    validate_every: int = 500
    """Steps between losses on the validation split; for a world also the action-faithfulness alarm."""
    validate_batches: int = 4
    """Batches of the validation split, the same every time."""
    validate_clips: int = 16
    """Clips in each of them."""
    sample_every: int = 1000
    """Steps between sample clips (truth beside model), in RUN/samples."""
    sample_episodes: int = 2
    prompt_frames: int = 4
    horizon: int = 24
    """Imagined frames of a sample clip."""
    alarm_ratio: float = 1.05
    """Warn when the loss with shuffled actions is less than this times the loss with true ones."""
    alarm_after: float = 0.3
    """Share of training after which the alarm may sound."""

    def __post_init__(self) -> None:
        for name in ("validate_batches", "validate_clips", "sample_episodes", "prompt_frames", "horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"look.{name}", got=getattr(self, name), expected="at least 1")


@dataclass(frozen=True)
class MixPart:
    """One dataset of a mixture."""

    data: Path
    """Dataset that `vidworld shard` wrote, or `vidworld encode`."""
    weight: float = 1.0
    """Share of the clips, against the weights of the others."""


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """What is trained on: one dataset, or several in shares."""

    data: Path | None = None
    """Dataset that `vidworld shard` wrote; for a world also one of `vidworld encode`."""
    mix: tyro.conf.Fixed[tuple[MixPart, ...]] = ()
    """In place of `data`: several, each with its `data` and `weight`."""

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.mix):
            raise ConfigError(
                "settings 'data' and 'mix'",
                got="neither" if self.data is None else "both",
                expected="exactly one of them",
                fix="`data: PATH`, or `mix: [{data: PATH, weight: 0.7}, ...]`",
            )

    @property
    def datasets(self) -> tuple[Path, ...]:
        """Where the data lie."""
        return tuple(part.data for part in self.mix) if self.data is None else (self.data,)


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(DataChoice):
    """Train a tokenizer on video shards."""

    kind: Literal["tokenizer"] = "tokenizer"
    seed: int = 0
    tokenizer: ConvTokenizerConfig = field(default_factory=ConvTokenizerConfig)
    loader: TokenizerLoader = field(default_factory=TokenizerLoader)
    optim: TokenizerOptim = field(default_factory=TokenizerOptim)
    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    look: LookConfig = field(default_factory=LookConfig)
    wandb: WandbMode = "offline"


@dataclass(frozen=True, kw_only=True)
class WorldTraining(DataChoice):
    """Train a world model on video shards (encoded first) or latent shards."""

    tokenizer: Path
    """Run that trained a tokenizer, or the tokenizer's folder."""
    kind: Literal["world"] = "world"
    latents: Path | None = None
    """Where the latents of a video dataset are, or go: by default `latents/` in the run. Of a mixture, a
    folder with one for each dataset."""
    seed: int = 0
    init: Path | None = None
    """World run whose averaged weights this one starts from, such as for an energy-score fine-tune, or to add
    an embodiment: those that it knows stay known. A run without members starts from the first of its
    members. A name ("lab") is the world that comes with vidworld; as
    `tokenizer` too."""
    model: DiTConfig = field(default_factory=DiTConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    action_dropout: float = 0.1
    """Share of frames whose actions are hidden."""
    clip_dropout: float = 0.05
    """Share of clips whose actions are all hidden."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    long_clip_frames: int = 48
    long_clip_fraction: float = 0.0
    """Share of steps that read long clips, fewer a batch so that the frames stay about as many."""
    optim: WorldOptim = field(default_factory=WorldOptim)
    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    look: LookConfig = field(default_factory=LookConfig)
    wandb: WandbMode = "offline"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("action_dropout", "clip_dropout", "long_clip_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"setting {name!r}", got=getattr(self, name), expected="a share from 0 to 1"
                )
        sampler = (self.sampler.method, self.sampler.steps)
        if self.objective.kind != "shortcut" and sampler != ("euler", 1):
            raise ConfigError(
                f"sampler.method and sampler.steps of objective.kind {self.objective.kind!r}",
                got=f"{sampler[0]}, {sampler[1]}",
                expected="euler, 1: all that it learns",
            )
        if self.objective.kind == "shortcut" and self.sampler.start_noise != 1:
            raise ConfigError(
                "sampler.start_noise of objective.kind 'shortcut'",
                got=self.sampler.start_noise,
                expected="1: it learns to leave noise, and has no other",
            )
        noise = (self.objective.context_noise, self.sampler.context_noise)
        if self.model.copy_gate and any(noise):
            raise ConfigError(
                "objective.context_noise and sampler.context_noise with model.copy_gate",
                got=f"{noise[0]:g} and {noise[1]:g}",
                expected="0 and 0: noise would be copied with the frame that it is in",
            )
        if self.objective.kind == "energy" and not self.model.noise_dims:
            raise ConfigError(
                "objective.kind 'energy'",
                got="model.noise_dims 0",
                expected="above 0",
                fix="set model.noise_dims, in the run that it starts from too",
            )


Training = TokenizerTraining | WorldTraining


def training_class(settings: dict[str, Any], where: object) -> type[Training]:
    """The class that the key `kind` of a YAML names."""
    match settings.get("kind"):
        case "tokenizer":
            return TokenizerTraining
        case "world":
            return WorldTraining
        case other:
            raise ConfigError("setting 'kind'", where=where, got=repr(other), expected="tokenizer or world")


def read_training(path: Path) -> Training:
    """Read the YAML of a run.

    Raises ConfigError that names the key which is missing, unknown or wrong.
    """
    settings = read_yaml(path)
    cls = training_class(settings, path)
    for spelling, mode in ((False, "off"), (True, "online")):
        if settings.get("wandb") is spelling:  # YAML 1.1 reads a bare `off` as false
            settings["wandb"] = mode
    mix = settings.get("mix")
    for number, part in enumerate(mix if isinstance(mix, list) else ()):
        if isinstance(
            part, dict
        ):  # names what is misspelt in a list, which `from_mapping` does not look into
            from_mapping(MixPart, part, where=f"{path}, mix entry {number + 1}")
    return from_mapping(cls, settings, where=path)


def absolute(training: Training) -> Training:
    """The same settings with absolute paths, so that a saved run repeats itself from any directory."""
    paths = {
        name: anchored(resolve(value) if name in ("tokenizer", "init") and not value.exists() else value)
        for name in ("data", "tokenizer", "latents", "init")
        if isinstance(value := getattr(training, name, None), Path)
    }
    mix = tuple(dataclasses.replace(part, data=anchored(part.data)) for part in training.mix)
    return dataclasses.replace(training, mix=mix, **paths)
