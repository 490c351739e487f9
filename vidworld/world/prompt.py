"""What grounds a rollout: the frames that are known when imagination begins."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from vidworld import media
from vidworld.contract import ActionContract
from vidworld.errors import ContractError, DataError
from vidworld.world.spec import WorldSpec


@dataclass(frozen=True)
class Prompt:
    """Known frames of one world, oldest first, in raw units.

    >>> Prompt(np.zeros((4, 96, 128, 3), np.uint8)).num_frames
    4

    frames: uint8 RGB [T, V, H, W, 3], or [T, H, W, 3] where there is one view.
    proprio: [T, S] in the contract's units. Without it the model reads it off the pictures: the prompt's
        proprioception is denoised with the pictures held fixed, K passes a frame.
    actions: [T - 1, A], `actions[t]` between frame t and t + 1. Without them the model is told that it does
        not know what was commanded, as in training with action dropout.
    embodiment: name of a contract; None means the only one.
    text: kept for models that read it.
    """

    frames: np.ndarray
    proprio: np.ndarray | None = None
    actions: np.ndarray | None = None
    embodiment: str | None = None
    text: str = ""

    @property
    def num_frames(self) -> int:
        """Frames along time."""
        return len(self.frames)

    def resized(self, height: int, width: int) -> "Prompt":
        """The same prompt with pictures scaled and centre-cropped to `height` x `width`."""
        return dataclasses.replace(self, frames=media.fit(self.frames, width=width, height=height))

    def frames_TVHWC(self, spec: WorldSpec) -> np.ndarray:
        """Frames as uint8 [T, V, H, W, 3] of the world's size, or DataError that says what does not fit."""
        frames = np.asarray(self.frames)
        if frames.dtype != np.uint8:
            raise DataError(
                "dtype of the prompt's frames", got=frames.dtype, expected="uint8 RGB from 0 to 255"
            )
        if frames.ndim == 4:
            frames = frames[:, None]
        if frames.ndim != 5 or frames.shape[-1] != 3 or not len(frames):
            raise DataError(
                "shape of the prompt's frames",
                got=np.asarray(self.frames).shape,
                expected="[T, V, H, W, 3] or [T, H, W, 3] with T > 0",
            )
        if frames.shape[1] != len(spec.views):
            raise DataError(
                "views of the prompt",
                got=frames.shape[1],
                expected=f"{len(spec.views)} ({', '.join(spec.views)})",
                fix="give every view in this order",
            )
        height, width = frames.shape[2:4]
        if (height, width) != (spec.height, spec.width):
            raise DataError(
                "size of the prompt's frames",
                got=f"{height}x{width} (height x width)",
                expected=f"{spec.height}x{spec.width}",
                fix=f"use prompt.resized({spec.height}, {spec.width})",
            )
        k = spec.frames_per_step
        if (len(frames) - 1) % k:
            raise DataError("frames of the prompt", got=len(frames), expected=f"1 + a multiple of {k}")
        return frames

    def check(self, spec: WorldSpec, *, allow_out_of_range: bool = False) -> ActionContract:
        """Refuse proprioception or actions that do not fit the contract; returns the contract."""
        contract = spec.contracts[spec.embodiment_index(self.embodiment)]
        if self.proprio is not None:
            contract.check_proprio(self.proprio, where="the prompt")
            _check_rows("proprio", self.proprio, self.num_frames, "one a frame")
        if self.actions is not None:
            _check_rows("action", self.actions, self.num_frames - 1, "one between each two frames")
            contract.check_actions(
                self.actions,
                where="the prompt",
                allow_out_of_range=allow_out_of_range or not len(self.actions),
            )
        return contract


def _check_rows(role: str, values: np.ndarray, expected: int, meaning: str) -> None:
    shape = np.shape(values)
    if len(shape) != 2 or shape[0] != expected:
        raise ContractError(
            f"{role} rows of the prompt", got=f"shape {shape}", expected=f"{expected} rows, {meaning}"
        )
