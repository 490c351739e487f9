"""Sampling orders as one integer matrix: denoising passes x frames (Chen et al. 2024, Diffusion Forcing).

Entry [m, t] is how many of the `num_steps` denoising steps frame t still has before it after m passes: row 0
is pure noise everywhere, the last row is clean everywhere, and pass m takes the frames from row m to row m +
1.
"""

import numpy as np


def autoregressive(num_frames: int, num_steps: int) -> np.ndarray:
    """Each frame is finished before the next one begins: [frames * steps + 1, frames]."""
    return pyramid(num_frames, num_steps, lag=num_steps)


def full_sequence(num_frames: int, num_steps: int) -> np.ndarray:
    """All frames are denoised together: [steps + 1, frames]."""
    return pyramid(num_frames, num_steps, lag=0)


def pyramid(num_frames: int, num_steps: int, lag: int) -> np.ndarray:
    """Frame t sets out `t * lag` passes after frame 0, so that later frames stay noisier.

    Shape [lag * (frames - 1) + steps + 1, frames], int64. A lag of 0 denoises all together, a lag of
    `num_steps` one after another, more than that would leave idle passes and is refused.
    """
    if num_frames < 1 or num_steps < 1 or not 0 <= lag <= num_steps:
        raise ValueError(
            f"a sampling order of {num_frames} frames, {num_steps} steps and lag {lag}; "
            "expected at least one frame, one step and a lag from 0 to the number of steps"
        )
    passes_P1 = np.arange(lag * (num_frames - 1) + num_steps + 1)[:, None]
    starts_1T = lag * np.arange(num_frames)[None, :]
    matrix_PT = np.clip(num_steps - (passes_P1 - starts_1T), 0, num_steps)
    return check_schedule(matrix_PT, num_steps)


def check_schedule(matrix_PT: np.ndarray, num_steps: int) -> np.ndarray:
    """Return the matrix if every column descends from pure noise to clean; else raise ValueError naming one.

    An off-by-one here starts frames half denoised or leaves a last trace of noise, and pictures hide it.
    """
    if matrix_PT.ndim != 2 or len(matrix_PT) < 2 or matrix_PT.dtype.kind not in "iu":
        raise ValueError(
            f"a schedule of shape {matrix_PT.shape} and type {matrix_PT.dtype}; "
            "expected whole numbers [passes + 1, frames]"
        )
    steps_taken = -np.diff(matrix_PT.astype(np.int64), axis=0)
    rules = {
        f"starts at pure noise ({num_steps} steps to go)": matrix_PT[0] == num_steps,
        "ends clean (0 steps to go)": matrix_PT[-1] == 0,
        "never grows noisier": (steps_taken >= 0).all(axis=0),
    }
    for rule, holds_T in rules.items():
        if not holds_T.all():
            frame = int(np.argmin(holds_T))
            raise ValueError(
                f"frame {frame} of the schedule is {matrix_PT[:, frame].tolist()}; expected one that {rule}"
            )
    idle = np.flatnonzero(steps_taken.sum(axis=1) == 0)
    if idle.size:
        raise ValueError(f"pass {idle[0]} of the schedule denoises nothing; leave it out")
    return matrix_PT
