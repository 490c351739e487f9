"""Which of the futures to look at: the worst, the best, or the mean of a bad tail.

Shapes: N futures, T frames, S proprio dims.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidworld.errors import ConfigError
from vidworld.evaluation.imagining import Imagined
from vidworld.evaluation.reward import Expression, Function
from vidworld.evaluation.rollout_inputs import Scene
from vidworld.world.scenario import Scenario, search
from vidworld.world.spec import SamplerConfig, WorldSpec
from vidworld.world.uncertainty import Rows, cvar
from vidworld.world.world import WorldModel


@dataclass(frozen=True)
class Risk:
    """What is asked of a set of futures: `worst`, `best`, or `cvar:SHARE`, the mean of the worst share."""

    share: float | None
    worst: bool = True

    @classmethod
    def parse(cls, text: str) -> "Risk":
        """From the command line; raises ConfigError."""
        kind, _, share = text.partition(":")
        match kind, share:
            case (("worst" | "best"), ""):
                return cls(None, kind == "worst")
            case "cvar", _:
                try:
                    value = float(share)
                except ValueError:
                    value = math.nan
                if 0 < value <= 1:
                    return cls(value)
        raise ConfigError("--risk", got=text, expected="worst, best, or cvar:SHARE such as cvar:0.1")

    @property
    def name(self) -> str:
        """As it was asked for."""
        if self.share is not None:
            return f"cvar:{self.share:g}"
        return "worst" if self.worst else "best"

    def choose(self, reward_N: np.ndarray) -> tuple[float, list[int]]:
        """The value at risk, and the futures that it is of, the most telling one first."""
        order = np.argsort(reward_N if self.worst else -reward_N, kind="stable")
        if self.share is None:
            return float(reward_N[order[0]]), [int(order[0])]
        count = math.ceil(self.share * len(reward_N) - 1e-9)
        return float(cvar(torch.from_numpy(reward_N), self.share)), [int(one) for one in order[:count]]


def rewards(
    reward: Expression | Function,
    spec: WorldSpec,
    scene: Scene,
    found: Imagined,
    readings: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Of every future [N]. `readings`: name -> curves [N, T] of what was read off the pictures."""
    contract = scene.grounding.contract
    if isinstance(reward, Expression):
        curves = {name: torch.from_numpy(np.asarray(values, np.float64)) for name, values in readings.items()}
        proprio_NTS = torch.from_numpy(found.proprio_NTS.astype(np.float64))
        if readings and set(readings) & reward.names:
            # Readings are of camera frames: a step of proprioception lasts several where time is compressed.
            proprio_NTS = proprio_NTS.repeat_interleave(spec.frames_per_step, 1)
        return reward(curves | proprio_curves(spec, scene, proprio_NTS)).numpy()
    futures = zip(found.video_NTVHWC, found.proprio_NTS, found.actions_NTA, strict=True)
    return np.array(
        [
            reward(
                {
                    **{f"observation/{view}": video[:, index] for index, view in enumerate(spec.views)},
                    "observation/state": proprio_TS[:, : len(contract.proprio)],
                    "actions": actions_TA,
                    "prompt": scene.grounding.prompt.text,
                }
            )
            for video, proprio_TS, actions_TA in futures
        ]
    )


def proprio_curves(spec: WorldSpec, scene: Scene, proprio_NTS: Tensor) -> dict[str, Tensor]:
    """Name of a dimension -> its curves [N, T]."""
    dimensions = scene.grounding.contract.proprio
    return {dimension.name: proprio_NTS[..., index] for index, dimension in enumerate(dimensions)}


def judged(risk: Risk, reward_N: np.ndarray, member_N: np.ndarray) -> dict[str, Any]:
    """What the record says: the value at risk, whose it is, and how the reward spreads. Plain JSON."""
    value, chosen = risk.choose(reward_N)
    facts: dict[str, Any] = {
        "kind": risk.name,
        "value": value,
        "samples": chosen,
        "rewards": [float(f"{one:.6g}") for one in reward_N],
        "mean": float(reward_N.mean()),
    }
    members = len(set(member_N.tolist()))
    if len(reward_N) >= 2 * members:
        rows = Rows(torch.zeros(len(member_N), dtype=torch.int64), torch.from_numpy(member_N))
        parted = rows.split(torch.from_numpy(reward_N))
        facts["aleatoric_sd"] = float(parted.aleatoric_SX.sqrt())
        if parted.epistemic_SX is not None:
            facts["epistemic_sd"] = float(parted.epistemic_SX.clamp(min=0).sqrt())
    return facts


@dataclass(frozen=True)
class Sought:
    """What a search over the network's noise found, as futures to show."""

    imagined: Imagined
    facts: dict[str, Any]


def seek(
    world: WorldModel,
    scene: Scene,
    reward: Expression | Function,
    risk: Risk,
    found: Imagined,
    *,
    steps: int,
    mass: float,
    samples: int,
    seed: int,
    sampler: SamplerConfig,
    allow_out_of_range: bool,
) -> Sought:
    """Search from the noise of the first samples of each member; the one future that it found.

    Raises ConfigError where the reward has no gradient, or the world no noise of its own.
    """
    spec = world.spec
    names = {dimension.name for dimension in scene.grounding.contract.proprio}
    if not isinstance(reward, Expression) or not reward.names <= names:
        raise ConfigError(
            "--search",
            got=f"--reward {getattr(reward, 'text', getattr(reward, 'name', ''))}",
            expected="an expression of proprioception alone, which has a gradient",
        )
    actions_TA = torch.from_numpy(np.ascontiguousarray(found.actions_NTA[0]))
    with torch.enable_grad():
        state = world.reset(
            scene.grounding.prompt,
            samples,
            seed,
            sample_ids=list(range(samples)),
            sampler=sampler,
            allow_out_of_range=allow_out_of_range,
        )
        scenario: Scenario = search(
            world,
            state,
            actions_TA,
            lambda rolled: reward(proprio_curves(spec, scene, rolled.proprio_BTS)),
            worst=risk.worst,
            steps=steps,
            mass=mass,
            sampler=sampler,
            allow_out_of_range=allow_out_of_range,
        )
    row = int(scenario.reward_B.argmin() if risk.worst else scenario.reward_B.argmax())
    with torch.no_grad():
        rolled = world.rollout(
            state.select([row]),
            actions_TA,
            sampler=sampler,
            allow_out_of_range=allow_out_of_range,
            noise_BTX=scenario.noise_BTX[[row]],
        )
    assert rolled.video_BTVHWC is not None
    dims = scenario.noise_BTX[0].numel()
    imagined = Imagined(
        found.actions_NTA[:1],
        rolled.video_BTVHWC.cpu().numpy(),
        rolled.proprio_BTS.cpu().numpy(),
        found.grounded_NS[:1],
        state.member_B[[row]].cpu().numpy(),
    )
    facts = {
        "reward": float(scenario.reward_B[row]),
        "began_at": float(scenario.start_B[row]),
        "member": int(state.member_B[row]),
        "log_likelihood": float(scenario.log_likelihood_B[row]),
        "log_likelihood_expected": -dims / 2 * (1 + math.log(2 * math.pi)),
        "log_likelihood_sd": math.sqrt(dims / 2),
        "chance_of_so_far_out": float(scenario.tail_B[row]),
        "noise_dims": dims,
        "steps": steps,
        "mass": mass,
    }
    return Sought(imagined, facts)
