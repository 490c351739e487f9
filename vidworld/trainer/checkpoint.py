"""Checkpoints that a killed save cannot spoil: stage, fsync, manifest, rename, and only then `latest`.

    checkpoints/step-00000500/{model,ema,optimizer-<rank>}.safetensors, state.json, manifest.json
    checkpoints/latest          a text file that holds the name of the newest

A directory with a final name is complete; its manifest carries the size and sha256 of every file, so that a
bit that flips later is found before anything is loaded. Nothing here is a pickle.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidworld.errors import CheckpointError, VidworldError
from vidworld.files import sha256_of, sync_directory, sync_file, write_atomic
from vidworld.trainer.pieces import StoredPieces

MANIFEST = "manifest.json"
LATEST = "latest"
STATE = "state.json"
STAGING = ".staging-"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on as if it had never stopped; there is no random state (see `loop`)."""

    step: int
    model: Mapping[str, Tensor]
    """Whole on the first rank; what the others hold here is not written."""
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    """This rank's part; every rank writes one when the optimizer is sharded, the first alone otherwise."""
    optimizer_groups: Mapping[str, Any]
    state: Mapping[str, Any]
    """Plain JSON: the counters, the sample order, the digest of what was trained."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk whose every byte was checked."""

    directory: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `model`, `ema` or `optimizer-<rank>`, on the CPU."""
        path = self.directory / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"checkpoint has no {path.name}", where=self.directory)
        return load_file(path)

    def pieces(self, name: str) -> StoredPieces:
        """The tensors of `model` or `ema`, or those of all ranks' `optimizer`, to be read range by range."""
        paths = sorted(self.directory.glob(f"{name}.safetensors"))
        paths += sorted(self.directory.glob(f"{name}-*.safetensors"))
        if not paths:
            raise CheckpointError(f"checkpoint has no {name}", where=self.directory)
        return StoredPieces(paths, self.directory)


class SaveError(VidworldError):
    """A checkpoint could not be written; those before it are whole."""


class CheckpointStore:
    """The `checkpoints/` directory of a run; the first process writes its manifest.

    agree: called by every rank with whether its part went well; true everywhere when all did.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        rank: int = 0,
        num_writers: int = 1,
        agree: Callable[[bool], bool] = lambda well: well,
    ) -> None:
        assert keep >= 1, "the last good checkpoint is never deleted"
        self.directory, self.keep, self.rank, self.num_writers = directory, keep, rank, num_writers
        self.agree = agree

    def save(self, snapshot: Snapshot, *, reached: Callable[[str], None] = lambda point: None) -> Path:
        """Write a checkpoint; returns its directory when it is on disk, checked, and `latest` names it.

        `reached` is called with the name of each point passed, which the kill tests use. At every one of
        them the process may die: the checkpoints that were good before stay good.
        Raises SaveError on every rank when any of them could not write its part.
        """
        final = self.directory / f"step-{snapshot.step:08d}"
        staging = self.directory / f"{STAGING}{final.name}"

        def stage() -> None:
            if self.rank == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                for leftover in self.directory.glob(f"{STAGING}*"):
                    shutil.rmtree(leftover)
                staging.mkdir()
                reached("staged")

        def write_part() -> None:
            if self.rank < self.num_writers:
                name = f"optimizer-{self.rank}.safetensors"
                _write_tensors(staging / name, snapshot.optimizer, snapshot.optimizer_groups)
                reached("optimizer")

        def finish() -> None:
            if self.rank == 0:
                _write_tensors(staging / "model.safetensors", snapshot.model)
                reached("model")
                _write_tensors(staging / "ema.safetensors", snapshot.ema)
                reached("ema")
                state = {"step": snapshot.step, **snapshot.state}
                write_atomic(staging / STATE, json.dumps(state, indent=1).encode())
                reached("state")
                write_atomic(staging / MANIFEST, json.dumps(_manifest(staging), indent=1).encode())
                reached("manifest")
                self._publish(staging, self._free(final), reached)
                self._prune()
                reached("pruned")

        for part in (stage, write_part, finish):
            failed = None
            try:
                part()
            except (OSError, SafetensorError, CheckpointError) as error:
                failed = error
            if not self.agree(failed is None):
                if self.rank == 0:
                    shutil.rmtree(staging, ignore_errors=True)
                reason = failed if failed is not None else "another rank could not write its part"
                raise SaveError(
                    f"checkpoint of step {snapshot.step} in {self.directory} could not be written: {reason}; "
                    "the ones before it are whole: make room, then go on with --resume"
                ) from failed
        return self.directory / self.names()[0]

    def newest(self, *, up_to: int | None = None) -> Saved | None:
        """The newest checkpoint that is whole, or None when there is none at all; of a step `up_to` at most.

        Damaged ones are passed over with a warning that names the damage. CheckpointError when all are.
        """
        names = [name for name in self.names() if up_to is None or step_of(name) <= up_to]
        for name in names:
            try:
                saved = verify(self.directory / name)
            except CheckpointError as error:
                warnings.warn(f"checkpoint {name} is damaged and passed over: {error}", stacklevel=2)
                continue
            if up_to is None:
                self._check_latest(name)
            return saved
        if names:
            raise CheckpointError(
                "checkpoints of which none is whole",
                where=self.directory,
                got=f"{len(names)} damaged",
                fix="restore one from a copy, or train anew with --overwrite",
            )
        return None

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, which a run that went back will do again, otherwise."""
        kept = [name for name in self.names() if step_of(name) <= step]
        write_atomic(self.directory / LATEST, f"{kept[0]}\n".encode())
        for name in set(self.names()) - set(kept):
            shutil.rmtree(self.directory / name)

    def names(self) -> list[str]:
        """Names of the checkpoints with a final name, newest first."""
        return sorted((path.name for path in self.directory.glob("step-*") if path.is_dir()), reverse=True)

    def _free(self, final: Path) -> Path:
        """`final`, or with a suffix when the step was saved before: nothing good is removed to make room."""
        taken = sum(1 for name in self.names() if name == final.name or name.startswith(f"{final.name}-"))
        return final.with_name(f"{final.name}-{taken + 1}") if taken else final

    def _publish(self, staging: Path, final: Path, reached: Callable[[str], None]) -> None:
        staging.rename(final)
        sync_directory(self.directory)
        reached("renamed")
        write_atomic(self.directory / LATEST, f"{final.name}\n".encode())
        reached("latest")

    def _prune(self) -> None:
        """Delete what is older than the `keep` newest whole checkpoints; damaged ones do not count."""
        whole = 0
        for name in self.names():
            directory = self.directory / name
            if whole >= self.keep:
                shutil.rmtree(directory)
                continue
            try:
                verify(directory)
                whole += 1
            except CheckpointError as error:
                warnings.warn(f"checkpoint {name} is damaged: {error}", stacklevel=2)

    def _check_latest(self, chosen: str) -> None:
        pointer = self.directory / LATEST
        named = pointer.read_text().strip() if pointer.is_file() else "nothing"
        if named != chosen:
            warnings.warn(
                f"{pointer} names {named}; going on from {chosen}, the newest whole one", stacklevel=3
            )


def newest_step(directory: Path) -> int:
    """Step of the newest checkpoint in a `checkpoints/` directory by its name, unread; -1 for none."""
    return max((step_of(path.name) for path in directory.glob("step-*") if path.is_dir()), default=-1)


def step_of(name: str) -> int:
    """The step in the name of a checkpoint; -1 if it is none."""
    step = name.split("-")[1]
    return int(step) if step.isdecimal() else -1


def verify(directory: Path) -> Saved:
    """Check every byte of a checkpoint against its manifest; CheckpointError names the first fault."""
    manifest = _read_json(directory / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("digest") != _digest(files):
        raise CheckpointError("checkpoint manifest", where=directory / MANIFEST, got="damaged content")
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError("checkpoint file is missing", where=path)
        found = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        if found != expected:
            raise CheckpointError(
                "checkpoint file is damaged",
                where=path,
                got=f"{found['bytes']} bytes, sha256 {found['sha256'][:12]}",
                expected=f"{expected['bytes']} bytes, sha256 {expected['sha256'][:12]}",
            )
    return Saved(directory, _read_json(directory / STATE))


Shapes = Mapping[str, Sequence[int]]


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, where: object) -> None:
    """Copy weights into `module`, all or nothing.

    Raises CheckpointError with the difference of names and shapes when they are of another architecture.
    """
    require_shapes(shapes_of(module.state_dict()), shapes_of(tensors), where)
    module.load_state_dict(dict(tensors), strict=True)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require_shapes(expected: Shapes, found: Shapes, where: object) -> None:
    """Raises CheckpointError with the difference when tensors are not those of an architecture."""
    missing = [f"-{name}" for name in expected if name not in found]
    unknown = [f"+{name}" for name in found if name not in expected]
    reshaped = [
        f"{name} {list(found[name])} is {list(shape)} here"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    differences = missing + unknown + reshaped
    if differences:
        shown = ", ".join(differences[:6]) + (", ..." if len(differences) > 6 else "")
        raise CheckpointError(
            f"weights of another architecture ({len(differences)} differences)",
            where=where,
            got=shown,
            expected=f"{len(expected)} tensors of this model",
            fix="use the model settings it was trained with",
        )


def _write_tensors(path: Path, tensors: Tensors, groups: Mapping[str, Any] | None = None) -> None:
    """Write safetensors through to the disk; `groups` go into its metadata as JSON."""
    # Views into one flat buffer share memory, which the format refuses.
    copies = {name: _alone(tensor) for name, tensor in tensors.items()}
    save_file(
        copies, path, metadata=None if groups is None else {"groups": json.dumps(groups, sort_keys=True)}
    )
    sync_file(path)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous and in memory of its own; itself if it is so already."""
    alone = tensor.detach().cpu().contiguous()
    shared = alone.untyped_storage().nbytes() > alone.numel() * alone.element_size()
    return alone.clone() if shared else alone


def _manifest(directory: Path) -> dict[str, Any]:
    paths = sorted(directory.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    return {"version": 1, "files": files, "digest": _digest(files)}


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("checkpoint cannot be read", where=path, got=type(error).__name__) from None
    if not isinstance(content, dict):
        raise CheckpointError("checkpoint cannot be read", where=path, got=type(content).__name__)
    return content
