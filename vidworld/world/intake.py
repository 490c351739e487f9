"""What callers hand in, in raw units: prompts, actions, proprioception; checked, made into padded tensors.

Shapes: P prompts, B samples, T camera frames, V views, H W pixels, A action dims, S proprio dims.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vidworld.contract import ActionContract
from vidworld.errors import ConfigError, ContractError, DataError
from vidworld.world import noise
from vidworld.world.prompt import Prompt
from vidworld.world.spec import WorldSpec
from vidworld.world.uncertainty import Rows

Numbers = Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Given:
    """Prompts of equal length side by side, in raw units, padded to the widest embodiment."""

    video_PTVHWC: Tensor
    proprio_PTS: Tensor
    has_proprio_P: Tensor
    actions_PTA: Tensor
    """Row t leads from camera frame t to t + 1; the last row is unknown and zero."""
    has_actions_P: Tensor
    embodiment_P: Tensor


def gather_prompts(prompts: Sequence[Prompt], spec: WorldSpec, *, allow_out_of_range: bool) -> Given:
    """Check prompts against the world and stack them, on the CPU."""
    if not prompts:
        raise ConfigError("prompts", got="none", expected="at least one")
    if spec.layouts:
        raise ConfigError(
            "prompt for a world of robots that see differently",
            fix="take the world of one: vidworld.load(run, embodiment=...), with one of "
            + ", ".join(repr(contract.embodiment) for contract in spec.contracts),
        )
    lengths = sorted({prompt.num_frames for prompt in prompts})
    if len(lengths) > 1:
        raise DataError("frames of the prompts", got=lengths, expected="the same number for all")
    shape = (len(prompts), lengths[0])
    proprio_PTS = torch.zeros(*shape, spec.shape.proprio_dims, dtype=torch.float64)
    actions_PTA = torch.zeros(*shape, spec.shape.action_dims, dtype=torch.float64)
    videos, embodiments = [], []
    for row, prompt in enumerate(prompts):
        videos.append(torch.tensor(prompt.frames_TVHWC(spec)))
        contract = prompt.check(spec, allow_out_of_range=allow_out_of_range)
        embodiments.append(spec.embodiment_index(contract.embodiment))
        if prompt.proprio is not None:
            proprio_PTS[row, :, : len(contract.proprio)] = torch.as_tensor(prompt.proprio)
        if prompt.actions is not None:
            actions_PTA[row, :-1, : len(contract.action)] = torch.as_tensor(prompt.actions)
    return Given(
        video_PTVHWC=torch.stack(videos),
        proprio_PTS=proprio_PTS,
        has_proprio_P=torch.tensor([prompt.proprio is not None for prompt in prompts]),
        actions_PTA=actions_PTA,
        has_actions_P=torch.tensor([prompt.actions is not None for prompt in prompts]),
        embodiment_P=torch.tensor(embodiments),
    )


def gather_rows(
    prompts: int, members: int, samples: int, seed: int, sample_ids: Sequence[int] | None
) -> tuple[Rows, Tensor]:
    """Whose futures the rows of a new state are (by prompt, then member, then sample), and their noise.

    sample_ids: of the first member, [prompts * samples]. Raises ConfigError for numbers that cannot be.
    """
    if samples < 1:
        raise ConfigError("samples", got=samples, expected="at least 1")
    if not 0 <= seed < noise.MAX_SEED:
        raise ConfigError("seed", got=seed, expected=f"0 to {noise.MAX_SEED - 1}")
    ids = range(prompts * samples) if sample_ids is None else sample_ids
    most = noise.MAX_SAMPLE_ID if members == 1 else noise.MEMBER_STRIDE
    if len(ids) != prompts * samples or not all(0 <= one < most for one in ids):
        raise ConfigError(
            "sample_ids",
            got=list(ids),
            expected=f"{prompts * samples} numbers from 0 to 2**{most.bit_length() - 1} - 1",
        )
    ids_P1M = torch.tensor(list(ids), dtype=torch.int64).view(prompts, 1, samples)
    member_J1 = torch.arange(members)[:, None]
    ids_PJM = ids_P1M + member_J1 * noise.MEMBER_STRIDE
    scene_B = torch.arange(prompts).repeat_interleave(members * samples)
    return Rows(scene_B, member_J1.expand_as(ids_PJM).flatten()), ids_PJM.flatten()


def one_step(action: Numbers, spec: WorldSpec) -> Tensor | np.ndarray:
    """The actions of one step with an axis of length k before the last; raises ContractError."""
    k = spec.frames_per_step
    action = action if isinstance(action, Tensor) else np.asarray(action)
    if k == 1:
        return action[..., None, :] if action.ndim else action
    if action.ndim not in (2, 3) or action.shape[-2] != k:
        raise ContractError(
            "actions of a step",
            got=f"shape {tuple(action.shape)}",
            expected=f"[B, {k}, A] or [{k}, A]: a step is {k} camera frames",
        )
    return action


def gather_actions(
    actions: Numbers,
    embodiment_B: Tensor,
    spec: WorldSpec,
    dtype: torch.dtype,
    *,
    check: bool = True,
    allow_out_of_range: bool = False,
) -> Tensor:
    """Actions [B, T, A] or [T, A] as padded rows [B, T, A] on the device of `embodiment_B`, differentiable.

    Values are looked at when `check`, unless they require grad: an optimiser may pass through odd ones, and
    looking waits for the device. Raises ContractError naming the dimension and the step.
    """
    rows_BTA = _rows(actions, embodiment_B, spec, "action", dtype)
    if check and not rows_BTA.requires_grad:
        for contract, rows in _by_embodiment(embodiment_B, spec):
            values = rows_BTA[rows, :, : len(contract.action)]
            contract.check_actions(
                values.cpu().numpy(), allow_out_of_range=allow_out_of_range or not values.numel()
            )
    return rows_BTA


def gather_proprio(proprio: Numbers, embodiment_B: Tensor, spec: WorldSpec, dtype: torch.dtype) -> Tensor:
    """Proprioception [B, T, S] or [T, S], likewise; only wrong widths and values not finite are refused."""
    rows_BTS = _rows(proprio, embodiment_B, spec, "proprio", dtype)
    if not rows_BTS.requires_grad:
        for contract, rows in _by_embodiment(embodiment_B, spec):
            contract.check_proprio(rows_BTS[rows, :, : len(contract.proprio)].cpu().numpy())
    return rows_BTS


def gather_noise(
    noise_BTX: Tensor | None, size: tuple[int, int], spec: WorldSpec, device: torch.device, dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """The network's own noise of each of (rows, frames), frame by frame; None where it is the streams'."""
    if noise_BTX is None:
        return [None] * size[1]
    whole = (*size, spec.model.noise_dims)
    if not whole[-1] or tuple(noise_BTX.shape) != whole:
        raise ConfigError(
            "noise of the network",
            got=f"shape {tuple(noise_BTX.shape)}",
            expected=f"{whole}, with noise_dims above 0",
        )
    return noise_BTX.to(device, dtype).unbind(1)


def gather_pictures(pictures: Tensor | np.ndarray, batch: int, spec: WorldSpec) -> np.ndarray:
    """One frame for each sample, uint8 [B, V, H, W, 3], or [V, H, W, 3] for all alike."""
    array = np.asarray(pictures.cpu() if isinstance(pictures, Tensor) else pictures)
    if array.ndim == 4:
        array = np.broadcast_to(array, (batch, *array.shape))
    if array.ndim != 5 or len(array) != batch:
        raise DataError(
            "shape of the observed frames", got=array.shape, expected=f"[{batch}, V, H, W, 3] or [V, H, W, 3]"
        )
    for picture_VHWC in array:
        Prompt(picture_VHWC[None]).frames_TVHWC(spec)
    return array


def _rows(values: Numbers, embodiment_B: Tensor, spec: WorldSpec, role: str, dtype: torch.dtype) -> Tensor:
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise ContractError(f"{role} dtype", got=array.dtype, expected="numbers")
        values = torch.tensor(array)
    batch, widest = len(embodiment_B), spec.shape.action_dims if role == "action" else spec.shape.proprio_dims
    widths = {widest} | _common_width(embodiment_B, spec, role)
    if values.ndim not in (2, 3) or values.shape[-1] not in widths:
        contract = next(_by_embodiment(embodiment_B, spec))[0]
        dimensions = contract.action if role == "action" else contract.proprio
        raise ContractError(
            f"{role} dimensions",
            got=f"shape {tuple(values.shape)}",
            expected=f"{len(dimensions)} in the last axis for embodiment {contract.embodiment!r} "
            f"({', '.join(dimension.name for dimension in dimensions)})",
        )
    if values.ndim == 3 and len(values) not in (1, batch):
        raise ContractError(
            f"{role} rows", got=f"{len(values)} samples", expected=f"{batch}, as in the state"
        )
    values = values.to(device=embodiment_B.device, dtype=dtype)
    values = torch.nn.functional.pad(values, (0, widest - values.shape[-1]))
    return values.expand(batch, *values.shape[-2:])


def _common_width(embodiment_B: Tensor, spec: WorldSpec, role: str) -> set[int]:
    """The width that all samples share without padding, if they do."""
    used = {
        len(contract.action if role == "action" else contract.proprio)
        for contract, _ in _by_embodiment(embodiment_B, spec)
    }
    return used if len(used) == 1 else set()


def _by_embodiment(embodiment_B: Tensor, spec: WorldSpec) -> Iterator[tuple[ActionContract, Tensor]]:
    """Each contract in use with its rows; a world of one embodiment need not ask the device."""
    if len(spec.contracts) == 1:
        yield spec.contracts[0], torch.arange(len(embodiment_B), device=embodiment_B.device)
        return
    for index in sorted(set(embodiment_B.tolist())):
        yield spec.contracts[index], torch.nonzero(embodiment_B == index)[:, 0]
