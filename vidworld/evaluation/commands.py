"""The actions of a rollout: from a file, from an episode, or a scripted sweep of every dimension.

Shapes: T frames to imagine, A action dims. All in raw units.
"""

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vidworld.contract import ActionContract
from vidworld.errors import ConfigError, ContractError, DataError

MAX_FILE_BYTES = 256 * 2**20
SECONDS_PER_SWEEP = 2.0


@dataclass(frozen=True)
class Commands:
    """Actions and where they came from."""

    actions_TA: np.ndarray
    source: str
    labels: tuple[str, ...] = ()
    """For each frame, what a sweep is moving."""

    def first(self, frames: int | None, *, at_most: int) -> "Commands":
        """The first `frames`, or all up to `at_most`; ContractError when there are too few."""
        count = min(len(self.actions_TA), at_most) if frames is None else frames
        if not 0 < count <= len(self.actions_TA):
            raise ContractError(
                "number of actions",
                where=self.source,
                got=len(self.actions_TA),
                expected=f"{max(count, 1)}, one for each frame to imagine",
            )
        return replace(self, actions_TA=self.actions_TA[:count], labels=self.labels[:count])


def from_file(path: Path, contract: ActionContract) -> Commands:
    """Rows of a .npy or .csv file; their range is left to the caller.

    A csv whose first line names the dimensions is matched by name, in any order; without names its columns
    are taken in the contract's order. Raises DataError or ContractError naming the row or dimension.
    """
    if not path.is_file():
        raise DataError("no such file of actions", where=path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(
            "file of actions", where=path, got="too large", expected=f"{MAX_FILE_BYTES} bytes at most"
        )
    match path.suffix.lower():
        case ".npy":
            actions = _read_npy(path)
        case ".csv":
            actions = _read_csv(path, contract)
        case suffix:
            raise DataError("file of actions", where=path, got=suffix or "no suffix", expected=".npy or .csv")
    if actions.ndim != 2:
        raise ContractError("shape of the actions", where=path, got=actions.shape, expected="[T, A]")
    contract.check_actions(actions, where=path, allow_out_of_range=True)
    return Commands(actions.astype(np.float32), str(path))


def sweep(
    contract: ActionContract,
    fps: float,
    *,
    only: str | None = None,
    last_action_A: np.ndarray | None = None,
    frames: int | None = None,
) -> Commands:
    """Move each action dimension up and down over its recorded range (1 % to 99 %) in turn, then back.

    The others rest: rates and steps at zero, positions at the last known command (else the recorded mean).
    `only` is the name or index of the one dimension to move.
    """
    names = [dimension.name for dimension in contract.action]
    chosen = range(len(names)) if only is None else [_dimension(only, names)]
    statistics = contract.action_statistics
    low_A, high_A = np.array(statistics.q01), np.array(statistics.q99)
    rest_A = rest(contract, last_action_A)
    for index, dimension in enumerate(contract.action):
        if dimension.kind == "binary":
            low_A[index], high_A[index] = 0.0, 1.0
    count = max(4, round(SECONDS_PER_SWEEP * fps))
    phase_T = np.arange(1, count + 1) / count
    rows, labels = [], []
    for index in chosen:
        wave_T = np.sin(2 * np.pi * phase_T)
        if contract.action[index].kind == "binary":
            wave_T = np.where((phase_T > 0.25) & (phase_T <= 0.75), 1 if rest_A[index] < 0.5 else -1, 0)
        block_TA = np.tile(rest_A, (count, 1))
        block_TA[:, index] += np.where(
            wave_T > 0, wave_T * (high_A[index] - rest_A[index]), wave_T * (rest_A[index] - low_A[index])
        )
        rows.append(block_TA)
        labels += [names[index]] * count
    actions_TA = np.concatenate(rows).astype(np.float32)
    if frames is not None and frames > len(actions_TA):
        copies = math.ceil(frames / len(actions_TA))
        actions_TA, labels = np.tile(actions_TA, (copies, 1)), labels * copies
    source = "sweep" if only is None else f"sweep:{names[chosen[0]]}"
    return Commands(actions_TA[:frames], source, tuple(labels[:frames]))


def rest(contract: ActionContract, last_action_A: np.ndarray | None = None) -> np.ndarray:
    """The command [A] that asks for nothing new.

    Rates and steps are zero (as near as they were recorded), positions and switches stay at the last known
    command, else at the recorded mean.
    """
    statistics = contract.action_statistics
    rest_A = np.array(statistics.mean)
    for index, dimension in enumerate(contract.action):
        match dimension.kind:
            case "velocity" | "delta":
                rest_A[index] = np.clip(0.0, statistics.q01[index], statistics.q99[index])
            case "binary":
                rest_A[index] = round(rest_A[index]) if last_action_A is None else last_action_A[index]
            case "position":
                rest_A[index] = rest_A[index] if last_action_A is None else last_action_A[index]
            case "force" | "unknown":
                pass
            case _:
                raise ConfigError("kind of dimension", got=dimension.kind)
    return rest_A


def hold(contract: ActionContract, frames: int, last_action_A: np.ndarray | None = None) -> Commands:
    """Ask for nothing new for some frames: see `rest`."""
    rest_A = rest(contract, last_action_A)
    return Commands(np.tile(rest_A, (frames, 1)).astype(np.float32), "hold")


def mirror(contract: ActionContract, commands: Commands, last_action_A: np.ndarray | None = None) -> Commands:
    """The opposite of some commands: reflected at rest, switches flipped, within the recorded 1 to 99 %."""
    rest_A, statistics = rest(contract, last_action_A), contract.action_statistics
    mirrored_TA = 2 * rest_A - commands.actions_TA
    mirrored_TA = np.clip(mirrored_TA, np.array(statistics.q01), np.array(statistics.q99))
    switches_A = np.array([dimension.kind == "binary" for dimension in contract.action])
    mirrored_TA = np.where(switches_A, 1 - commands.actions_TA, mirrored_TA)
    return Commands(mirrored_TA.astype(np.float32), "mirror")


def _dimension(only: str, names: list[str]) -> int:
    if only in names:
        return names.index(only)
    if only.isdecimal() and int(only) < len(names):
        return int(only)
    raise ConfigError("dimension to sweep", got=repr(only), expected=f"one of {', '.join(names)}")


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError("not a plain .npy array", where=path, got=error) from None


def _read_csv(path: Path, contract: ActionContract) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("not a csv file", where=path, got=error) from None
    if not rows:
        raise DataError("csv without rows", where=path)
    names = [dimension.name for dimension in contract.action]
    order = list(range(len(rows[0])))
    header = [cell.strip() for cell in rows[0]]
    if not all(_is_number(cell) for cell in header):
        if sorted(header) != sorted(names):
            missing, extra = sorted(set(names) - set(header)), sorted(set(header) - set(names))
            facts = [
                f"{word} {', '.join(some)}" for word, some in (("no", missing), ("unknown", extra)) if some
            ]
            raise ContractError(
                "action names in the first line",
                where=path,
                got="; ".join(facts) or "a name twice",
                expected=", ".join(names),
            )
        order, rows = [header.index(name) for name in names], rows[1:]
    table = []
    for number, row in enumerate(rows, 1):
        if len(row) != len(order) or not all(_is_number(cell) for cell in row):
            raise ContractError(
                f"row {number} of the actions",
                where=path,
                got=",".join(row)[:80],
                expected=f"{len(order)} numbers",
            )
        table.append([float(row[index]) for index in order])
    return np.array(table, dtype=np.float64).reshape(-1, len(order))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
