"""What a world is made of, apart from its weights: `world.json` in a run or an export."""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vidworld import __version__
from vidworld.config import digest, from_mapping, to_mapping
from vidworld.contract import ActionContract
from vidworld.errors import CheckpointError, ConfigError, ContractError, UserError
from vidworld.model.config import DiTConfig
from vidworld.model.embodiments import Robots
from vidworld.model.inputs import FrameShape
from vidworld.types import Layout
from vidworld.world.noise_scale import NoiseScale

FILE_NAME = "world.json"
SCHEMA_VERSION = 1


Method = Literal["euler", "heun"]
"""Samplers that a rollout knows."""


@dataclass(frozen=True)
class SamplerSettings:
    """How frames are imagined, as far as it can be chosen freely."""

    steps: int = 4
    """Denoising steps a frame, K; a power of two with the shortcut objective."""
    method: Method = "euler"
    context_noise: float = 0.1
    """Share of noise mixed into every frame before it becomes context; its level is told to the model."""
    sink: int = 0
    """First frames that stay in sight when the window rolls on."""
    guidance: float = 0.0
    """Weight l of action guidance (1 + l) f_c - l f_u; 0 costs nothing and keeps the spread honest."""
    temperature: float = field(default=1.0, metadata={"omit_default": True})
    """Factor on all noise that frames are drawn from. At 0 there is one future, give or take the noise in the
    context: of a world trained by energy scores with `mean_weight` the mean, in one step."""
    start_noise: float = field(default=1.0, metadata={"omit_default": True})
    """Factor on the noise that frames are denoised from, in a rollout and as energy scores are learnt. At 0
    all chance is the network's own (`model.noise_dims`), the same for a whole frame: its parts agree."""

    def __post_init__(self) -> None:
        """Refuse values outside their range with ConfigError."""
        if self.steps < 1:
            raise ConfigError("sampler.steps", got=self.steps, expected="1 or more")
        if not 0 <= self.context_noise < 1:
            raise ConfigError("sampler.context_noise", got=self.context_noise, expected="from 0 to below 1")
        if self.sink < 0:
            raise ConfigError("sampler.sink", got=self.sink, expected="0 or more")
        if not self.guidance >= 0:
            raise ConfigError("sampler.guidance", got=self.guidance, expected="0 or more")
        if not 0 <= self.temperature <= 2:
            raise ConfigError("sampler.temperature", got=self.temperature, expected="from 0 to 2")
        if not 0 <= self.start_noise <= 1:
            raise ConfigError("sampler.start_noise", got=self.start_noise, expected="from 0 to 1")


@dataclass(frozen=True)
class SamplerConfig(SamplerSettings):
    """How frames are imagined, with what training fixes; every rollout may override it."""

    finest_steps: int = 16
    """`objective.finest_steps` of training: the model is never told a smaller step than 1/finest_steps."""
    window: int = 16
    """Frames in sight, the new one included: the clip length of training."""
    one_step: bool = field(default=False, metadata={"omit_default": True})
    """Whether training showed nothing between pure noise and a frame (`regression`, `energy`): more steps
    than one would ask the network what it never learnt, and are refused."""
    noise_scale: NoiseScale | None = field(default=None, metadata={"omit_default": True})
    """Factors on the noise, from `calibration.json`; it belongs to one way of sampling, see `changed`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range with ConfigError."""
        super().__post_init__()
        if self.finest_steps < 1:
            raise ConfigError("sampler.finest_steps", got=self.finest_steps, expected="1 or more")
        if self.window < self.sink + 2:
            raise ConfigError(
                "sampler.window", got=f"{self.window} with a sink of {self.sink}", expected="sink + 2 or more"
            )
        if self.one_step and (self.steps, self.method) != (1, "euler"):
            raise ConfigError(
                "denoising steps of a world that was trained for one",
                got=f"steps {self.steps}, method {self.method}",
                expected="steps 1, method euler",
                fix="leave --steps (sampler.steps) at 1, or train with objective.kind shortcut for more",
            )

    @property
    def scales_noise(self) -> bool:
        """Whether frames are drawn from anything but standard normal noise."""
        return self.noise_scale is not None or self.temperature != 1 or self.start_noise != 1

    @property
    def draws(self) -> bool:
        """Whether futures of one prompt differ: not without noise in frames and context."""
        return bool(self.temperature or self.context_noise)

    def factors(self, lead: int) -> tuple[float, float, float]:
        """On the noise of latents, of proprioception and of the network at a lead, counted from 1."""
        latents, proprio, model = (1.0, 1.0, 1.0) if self.noise_scale is None else self.noise_scale.at(lead)
        start = self.temperature * self.start_noise
        return latents * start, proprio * start, model * self.temperature

    def changed(
        self, *, steps: int | None = None, guidance: float | None = None, temperature: float | None = None
    ) -> "SamplerConfig":
        """With other denoising steps, guidance or temperature, where they are not None.

        Noise scales were fitted to the old ones: they are left out where these differ, with a warning unless
        the temperature is 0, where there is nothing to scale.
        """
        given = {"steps": steps, "guidance": guidance, "temperature": temperature}
        new = replace(self, **{name: value for name, value in given.items() if value is not None})
        if self.noise_scale is None or new == self:
            return new
        if new.temperature == 0:
            return replace(new, noise_scale=None)
        warnings.warn(
            f"not calibrated: noise scales were fitted to {self.steps} steps, guidance {self.guidance:g} and "
            f"temperature {self.temperature:g}, and are left out for {new.steps}, {new.guidance:g} and "
            f"{new.temperature:g}",
            stacklevel=2,
        )
        return replace(new, noise_scale=None)


@dataclass(frozen=True)
class WorldSpec:
    """Architecture, picture format, embodiments and sampler of a world model."""

    model: DiTConfig
    shape: FrameShape
    views: tuple[str, ...]
    height: int
    width: int
    """Pixels of every view."""
    fps: float
    contracts: tuple[ActionContract, ...]
    """One an embodiment; a sample's embodiment is an index into them."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    tokenizer_digest: str = ""
    """`Tokenizer.digest` that the latents come from; empty leaves it unchecked."""
    dataset_digest: str = ""
    """`Manifest.digest` (or `Mixture.digest`) of the training data."""
    layouts: tuple[Layout, ...] = field(default=(), metadata={"omit_default": True})
    """Where embodiments see differently, how each does, in the order of `contracts`: `views`, `height` and
    `width` are then those of the frame that all are padded to in training, and `only` gives a world of one of
    them. Empty where all see alike."""

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together with ConfigError."""
        names = [contract.embodiment for contract in self.contracts]
        facts = {
            "views": (len(self.views), self.shape.views),
            "embodiments": (len(names), self.shape.num_embodiments),
            "action_dims": (max((len(c.action) for c in self.contracts), default=0), self.shape.action_dims),
            "proprio_dims": (
                max((len(c.proprio) for c in self.contracts), default=0),
                self.shape.proprio_dims,
            ),
        }
        for name, (described, built) in facts.items():
            if described != built:
                raise ConfigError(
                    f"{name} of the world", got=f"a model for {built}", expected=f"{described} as described"
                )
        if len(set(names)) != len(names) or not names:
            raise ConfigError("embodiments of the world", got=names, expected="one contract each")
        if self.layouts and len(self.layouts) != len(names):
            raise ConfigError(
                "layouts of the world", got=len(self.layouts), expected=f"{len(names)}, one each"
            )

    @cached_property
    def digest(self) -> str:
        """Short hash of everything that fixes what a state of this world means; the sampler is left out."""
        return digest({key: value for key, value in to_mapping(self).items() if key != "sampler"})

    @property
    def robots(self) -> Robots:
        """The embodiments as the model's weight tables have them."""
        names = tuple(contract.embodiment for contract in self.contracts)
        return Robots(names, self.shape, self.model.patch_size)

    def layout(self, embodiment: str) -> Layout:
        """How an embodiment sees."""
        index = self.embodiment_index(embodiment)
        return self.layouts[index] if self.layouts else Layout(self.views, self.height, self.width, self.fps)

    def only(self, names: Sequence[str]) -> "WorldSpec":
        """The spec of a world of these embodiments alone, none of them padded more than the others need.

        Raises ContractError for an unknown name, ConfigError where they do not see alike.
        """
        layouts = {self.layout(name) for name in names}
        if len(layouts) != 1:
            raise ConfigError(
                "embodiments of one world", got=", ".join(names), expected="some that see alike"
            )
        (layout,) = layouts
        indices = [self.embodiment_index(name) for name in names]
        contracts = tuple(self.contracts[index] for index in indices)
        _, height, width = self.shape.grid(indices[0])
        shape = FrameShape.from_contracts(
            contracts,
            views=len(layout.views),
            channels=self.shape.channels,
            height=height,
            width=width,
            actions_per_frame=self.shape.actions_per_frame,
        )
        return replace(
            self,
            shape=shape,
            contracts=contracts,
            views=layout.views,
            height=layout.height,
            width=layout.width,
            fps=layout.fps,
            layouts=(),
        )

    @property
    def frames_per_step(self) -> int:
        """Camera frames (and actions) that one latent frame stands for."""
        return self.shape.actions_per_frame

    def embodiment_index(self, name: str | None, *, where: object = "the prompt") -> int:
        """Index of an embodiment by name; None means the only one. Raises ContractError."""
        names = [contract.embodiment for contract in self.contracts]
        if name is None and len(names) == 1:
            return 0
        if name not in names:
            raise ContractError(
                "embodiment",
                where=where,
                got="none" if name is None else repr(name),
                expected=f"one of {', '.join(map(repr, names))}",
            )
        return names.index(name)

    def write(self, directory: Path) -> Path:
        """Write `world.json` atomically and return its path."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "vidworld": __version__,
            "contract_digests": {contract.embodiment: contract.digest for contract in self.contracts},
            # Noise scales belong to weights, not to what a world is: they stay in their own file.
            "spec": to_mapping(replace(self, sampler=replace(self.sampler, noise_scale=None))),
        }
        path = directory / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
        return path

    @classmethod
    def read(cls, directory: Path) -> "WorldSpec":
        """Read `world.json` of a folder; raises CheckpointError when it is missing, damaged or altered."""
        path = directory / FILE_NAME
        content = read_json(path, fix="give a run directory of `vidworld train` or an export")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                "schema version",
                where=path,
                got=content.get("schema_version"),
                expected=SCHEMA_VERSION,
                fix=f"it was written by vidworld {content.get('vidworld')}; this is {__version__}",
            )
        try:
            spec = from_mapping(cls, content.get("spec") or {}, where=path)
        except UserError as error:
            raise CheckpointError(str(error)) from None
        found = {contract.embodiment: contract.digest for contract in spec.contracts}
        digests = content.get("contract_digests")
        if not isinstance(digests, dict) or set(found) != set(digests):
            raise CheckpointError("hashes of the action contracts are missing", where=path)
        for name, recorded in digests.items():
            if found.get(name) != recorded:
                raise CheckpointError(
                    f"action contract of embodiment {name!r} was altered",
                    where=path,
                    got=f"hash {found.get(name)}",
                    expected=recorded,
                    fix="restore the file: the weights only fit the contract that they were trained with",
                )
        return spec


def read_json(path: Path, *, fix: str | None = None) -> dict[str, Any]:
    """Read a JSON object that belongs to a checkpoint, or raise CheckpointError."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError("cannot read", where=path, got=error.strerror, fix=fix) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError("damaged JSON", where=path, got=str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError("damaged JSON", where=path, got=type(content).__name__, expected="an object")
    return content
