"""Policies that act inside an imagined world.

A policy is a callable of one observation, a dict of numpy arrays: a picture [H, W, 3] uint8 a view, the
proprioception [S] in the contract's units, and the task in words. It answers with the next actions [H, A] or
one action [A] in raw units, or with a dict that holds them as `actions`, so that one function serves here and
behind a websocket. Shapes: N samples, V views, A action dims, S proprio dims, k actions a step.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from vidworld.contract import ActionContract
from vidworld.errors import ConfigError, ContractError
from vidworld.evaluation.openpi import OpenpiClient, PolicyError

Policy = Callable[[Mapping[str, Any]], Any]
API_KEY = "OPENPI_API_KEY"
"""Environment variable of the key that a websocket's server asks for."""


@contextmanager
def open_policy(name: str) -> Iterator[Policy]:
    """A policy by `module:callable` (a class is made once, without arguments) or by its websocket's URL.

    Raises ConfigError naming what is not there, PolicyError for a server that cannot be reached.
    """
    if name.startswith(("ws://", "wss://")):
        with OpenpiClient(name, api_key=os.environ.get(API_KEY)) as client:
            yield client
        return
    yield import_callable(name, "--policy", "module:callable, or ws://HOST:PORT")


def import_callable(name: str, option: str, expected: str = "module:callable") -> Policy:
    """What `module:callable` names, from the working directory too; a class is made once, without arguments.

    Raises ConfigError naming the option and what is not there.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(option, got=name, expected=expected)
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module_name.split(".")[0]:
            raise  # The module is there, and what it imports is not: its own traceback says it best.
        raise ConfigError(
            option, got=name, expected="something that can be imported", fix=str(error)
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if inspect.isclass(found):
        found = found()
    if not callable(found):
        raise ConfigError(option, got=f"{name}, a {type(found).__name__}", expected="a callable")
    return found


class Actor:
    """A policy at the reins of N samples: asks it for each, and hands its chunks out step by step.

    keys: names of the views, `state` and `prompt` in its observation, where they are not the default.
    replan: steps after which it is asked again; None when a chunk is used up.
    """

    def __init__(
        self,
        policy: Policy,
        contract: ActionContract,
        views: Sequence[str],
        *,
        actions_per_step: int = 1,
        keys: Mapping[str, str] | None = None,
        replan: int | None = None,
    ) -> None:
        self.policy, self.contract, self.views = policy, contract, tuple(views)
        self.actions_per_step, self.replan = actions_per_step, replan
        self.keys = {view: f"observation/{view}" for view in views}
        self.keys |= {"state": "observation/state", "prompt": "prompt"}
        unknown = set(keys or {}) - set(self.keys)
        if unknown:
            raise ConfigError(
                "--policy-keys", got=", ".join(sorted(unknown)), expected=f"some of {', '.join(self.keys)}"
            )
        self.keys |= keys or {}
        self._chunks: dict[int, np.ndarray] = {}
        self._steps: dict[int, int] = {}

    def act(self, video_NVHWC: np.ndarray, proprio_NS: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Raw actions [N, k, A] of the next step. Raises ContractError or PolicyError for a bad answer."""
        return np.stack(
            [
                self._next(row, picture, state, text)
                for row, (picture, state, text) in enumerate(zip(video_NVHWC, proprio_NS, texts, strict=True))
            ]
        )

    def _next(self, row: int, picture_VHWC: np.ndarray, state_S: np.ndarray, text: str) -> np.ndarray:
        k = self.actions_per_step
        chunk_HA = self._chunks.get(row, np.zeros((0, 0)))
        if len(chunk_HA) < k or (self.replan is not None and self._steps[row] >= self.replan):
            chunk_HA = self._ask(picture_VHWC, state_S, text)
            self._steps[row] = 0
        self._chunks[row] = chunk_HA[k:]
        self._steps[row] += k
        return chunk_HA[:k]

    def _ask(self, picture_VHWC: np.ndarray, state_S: np.ndarray, text: str) -> np.ndarray:
        observation: dict[str, Any] = {
            self.keys[view]: np.ascontiguousarray(picture)
            for view, picture in zip(self.views, picture_VHWC, strict=True)
        }
        observation[self.keys["state"]] = state_S[: len(self.contract.proprio)].astype(np.float32)
        observation[self.keys["prompt"]] = text
        answer = self.policy(observation)
        if isinstance(answer, Mapping):
            if "actions" not in answer:
                raise PolicyError(
                    "answer of the policy",
                    got=f"a dict of {', '.join(map(str, answer)) or 'nothing'}",
                    expected="`actions` in it",
                )
            answer = answer["actions"]
        actions_HA = np.atleast_2d(np.asarray(answer))
        if actions_HA.ndim != 2 or len(actions_HA) < self.actions_per_step:
            raise ContractError(
                "actions of the policy",
                got=f"shape {np.shape(answer)}",
                expected=f"[H, {len(self.contract.action)}] with H >= {self.actions_per_step}",
            )
        self.contract.check_actions(actions_HA, where="the policy's answer", allow_out_of_range=True)
        return actions_HA.astype(np.float32)


def parse_keys(pairs: Sequence[str]) -> dict[str, str]:
    """`OURS=THEIRS` arguments as a dict; raises ConfigError for one without an equals sign."""
    parsed: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError("--policy-keys", got=pair, expected="OURS=THEIRS")
        parsed[ours] = theirs
    return parsed
