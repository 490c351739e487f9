"""Errors that a user can act on, and the exit code each one leaves with."""

import importlib
import importlib.util
from types import ModuleType


class VidworldError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line leaves with."""

    exit_code = 1


class UserError(VidworldError, ValueError):
    """The input is at fault: one line that says what, where, got, expected and how to mend it.

    >>> str(UserError("action dimension count", where="acts.npy", got=6, expected=7, fix="add the gripper"))
    'action dimension count in acts.npy: got 6, expected 7; add the gripper'
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        message = what if where is None else f"{what} in {where}"
        facts = [
            f"{word} {fact}" for word, fact in (("got", got), ("expected", expected)) if fact is not None
        ]
        message += f": {', '.join(facts)}" if facts else ""
        message += f"; {fix}" if fix else ""
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A configuration value, file or flag is wrong."""


class DataError(UserError):
    """A dataset, shard, episode or video is wrong or damaged."""


class ContractError(UserError):
    """Actions or proprioception do not match the embodiment's action contract."""


class CheckpointError(UserError):
    """A run directory, checkpoint or export is missing, damaged or of another architecture."""


class MissingDependencyError(UserError):
    """An optional package is not installed."""


class PreemptedError(VidworldError):
    """The run was asked to stop; a checkpoint was saved and `--resume` continues it."""

    exit_code = 3


class DivergedError(VidworldError):
    """Training produced non-finite values too often to go on."""

    exit_code = 4


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one line how to install it.

    Probes the module's spec first, so that a package that is present but broken keeps its own traceback.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f"the package {package!r} is needed here and is not installed",
            fix=f'run: pip install "vidworld[{extra}]"',
        )
    return importlib.import_module(module)
