"""Open a trained world: the folder of a run or of an export."""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vidworld.errors import CheckpointError, ConfigError
from vidworld.tokenizers.store import load_tokenizer
from vidworld.world.build import build, load_weights, merged, narrow
from vidworld.world.calibration import FILE_NAME as FILE_OF_CALIBRATION
from vidworld.world.calibration import Calibration
from vidworld.world.ensemble import Ensemble
from vidworld.world.shipped import prompts_of, resolve
from vidworld.world.spec import FILE_NAME, WorldSpec, read_json
from vidworld.world.world import WorldModel

ENSEMBLE = "ensemble.json"
ENSEMBLE_VERSION = 1


@dataclass(frozen=True)
class Files:
    """Where the parts of a trained world lie."""

    directory: Path
    weights: Path
    checkpoint: str
    """Name of the run's checkpoint; `export` for an export."""

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder; the members of a packed ensemble share one."""
        own, parent = self.directory / "tokenizer", self.directory.parent
        return parent / "tokenizer" if not own.is_dir() and (parent / ENSEMBLE).is_file() else own

    @property
    def prompts(self) -> Path | None:
        """Dataset of episodes that came along to begin rollouts with, if any."""
        return prompts_of(self.directory)


def load(
    path: Path | str | Sequence[Path | str],
    device: torch.device | str | None = None,
    *,
    autocast: bool = True,
    embodiment: str | None = None,
    calibrated: bool = True,
    members: int | Literal["all"] | None = None,
) -> WorldModel:
    """Open a run or an export for simulation, with its averaged (EMA) weights where there are any.

    Several of them, or a folder with an `ensemble.json` that lists them, make an `Ensemble`. Of a folder
    whose members share a network the first one is opened, which costs no more than a world without members;
    `members=4` gives the ensemble of the first four (of all folders together), "all" that of all. A name
    such as "lab" opens the world of that name that comes with the package. `device` defaults to the
    GPU if there is one. `embodiment` gives the world of that robot alone, which a world of robots that see
    differently needs before it can be reset. Weights are held in float32 whatever the file's precision; see
    `WorldModel` for what `autocast` does. Parameters do not require grad; actions may. A
    `calibration.json` of these weights is applied to the sampler, which is said on standard error;
    `calibrated=False` leaves it.
    Raises CheckpointError saying what is missing, damaged or of another architecture, ConfigError for a
    device that is not here or for more members than there are.
    """
    chosen = usable_device(device)
    paths = folders(path)
    options: dict[str, Any] = {"embodiment": embodiment, "calibrated": calibrated}
    found: list[WorldModel] = []
    names: list[str] = []
    for one in paths:
        world = open_world(one, autocast=autocast, **options).to(chosen)
        count = world.spec.model.members if members is not None else min(1, world.spec.model.members)
        found += [merged(world, member) for member in range(count)] if count else [world]
        names += [f"{one}, member {member}" for member in range(count)] if count else [str(one)]
    if isinstance(members, int):
        if not 1 <= members <= len(found):
            raise ConfigError(
                "members", where=", ".join(map(str, paths)), got=members, expected=f"1 to {len(found)}"
            )
        found, names = found[:members], names[:members]
    return Ensemble(found, names) if len(found) > 1 else found[0]


def open_world(
    path: Path | str, *, autocast: bool = True, embodiment: str | None = None, calibrated: bool = True
) -> WorldModel:
    """One run or export as it was trained, on the CPU: members that share a network are left in it."""
    files = find(path)
    spec = WorldSpec.read(files.directory)
    weights_sha256 = verify(files.weights)
    calibration = None
    if calibrated and (files.directory / FILE_OF_CALIBRATION).is_file():
        calibration = Calibration.read(files.directory)
        spec, calibration = apply_calibration(spec, calibration, weights_sha256, files.directory)
    world = build(spec, load_tokenizer(files.tokenizer), autocast=autocast)
    load_weights(world.model, files.weights)
    world.requires_grad_(False).eval()
    world.calibration = calibration
    if embodiment is not None:
        world = narrow(world, [embodiment])
    return world


def apply_calibration(
    spec: WorldSpec, calibration: Calibration, weights_sha256: str, directory: Path
) -> tuple[WorldSpec, Calibration | None]:
    """The spec with calibrated noise, and the calibration; neither if it is of other weights or sampling."""
    path = directory / FILE_OF_CALIBRATION
    reason = None
    if calibration.weights_sha256 != weights_sha256:
        reason = f"it is of weights {calibration.weights_sha256[:12]}, and these are {weights_sha256[:12]}"
    elif not calibration.fits(spec.sampler):
        reason = "it was fitted to another sampler"
    if reason is not None:
        print(
            f"vidworld: NOT calibrated: {path} is left out: {reason}; run vidworld calibrate again",
            file=sys.stderr,
        )
        return spec, None
    scale = calibration.noise_scale
    print(f"vidworld: calibrated by {path}: noise {scale or 'as trained'}", file=sys.stderr)
    return dataclasses.replace(
        spec, sampler=dataclasses.replace(spec.sampler, noise_scale=scale)
    ), calibration


def asked_members(
    run: Path | str, members: Sequence[Path | str]
) -> tuple[list[Path], int | Literal["all"] | None]:
    """Folders of a world, and how many of its members, from a run and what `--members` says.

    That is one number, or `all`, of members that the run's own folder holds, or the folders of further runs.
    """
    if len(members) == 1 and not Path(members[0]).exists():
        said = str(members[0])
        if said == "all":
            return folders(run), "all"
        if said.isdecimal():
            return folders(run), int(said)
    return folders([run, *members]), None


def folders(path: Path | str | Sequence[Path | str]) -> list[Path]:
    """The folders of a world: those that an `ensemble.json` lists, else the path or the paths themselves.

    Raises CheckpointError for a list that cannot be read.
    """
    if not isinstance(path, str | Path):
        if not path:
            raise ConfigError("worlds to open", got="none", expected="one or more")
        return [member for one in path for member in folders(one)]
    listing = resolve(path) / ENSEMBLE
    if not listing.is_file():
        return [Path(path)]
    content = read_json(listing)
    listed = content.get("members")
    names = listed if isinstance(listed, list) else []
    plain = len(names) > 1 and all(isinstance(name, str) and name for name in names)
    if content.get("schema_version") != ENSEMBLE_VERSION or not plain:
        raise CheckpointError(
            "list of members",
            where=listing,
            got=f"version {content.get('schema_version')}, members {listed}",
            expected=f"version {ENSEMBLE_VERSION} and the folders of two or more",
        )
    return [listing.parent / name for name in names]


def usable_device(name: torch.device | str | None) -> torch.device:
    """A device that can be used; by default the GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError("device", got=name, expected="cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        here = f"one of {count} GPUs" if count else "cpu: PyTorch sees no GPU"
        raise ConfigError("device", got=name, expected=here)
    return device


def find(path: Path | str) -> Files:
    """Find the newest weights of a run, or those of an export or a name; raises CheckpointError."""
    directory = resolve(path)
    if not (directory / FILE_NAME).is_file():
        raise CheckpointError(
            f"no {FILE_NAME}",
            where=directory,
            got="a folder" if directory.is_dir() else "no such folder",
            expected="a run of a world model, or an export",
            fix="give the directory that `vidworld train` or `vidworld export` wrote",
        )
    exported = directory / "model.safetensors"
    if exported.is_file():
        return Files(directory, exported, "export")
    checkpoints = directory / "checkpoints"
    try:
        name = (checkpoints / "latest").read_text().strip()
    except OSError:
        raise CheckpointError(
            "no finished checkpoint", where=directory, fix="train on until the first one is saved"
        ) from None
    if not name or name != Path(name).name:
        raise CheckpointError("name of the latest checkpoint", where=checkpoints / "latest", got=repr(name))
    for candidate in ("ema.safetensors", "model.safetensors"):
        weights = checkpoints / name / candidate
        if weights.is_file():
            return Files(directory, weights, name)
    raise CheckpointError(
        f"checkpoint {name!r} has no weights",
        where=checkpoints,
        fix="resume the training, or name another checkpoint in `checkpoints/latest`",
    )


def verify(weights: Path) -> str:
    """sha256 of a weights file; CheckpointError when the manifest beside it, if any, says otherwise."""
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = weights.with_name("manifest.json")
    if manifest.is_file():
        recorded = read_json(manifest).get("files", {}).get(weights.name, {}).get("sha256")
        if recorded != found:
            raise CheckpointError(
                "the weights are damaged",
                where=weights,
                got=f"sha256 {found[:12]}",
                expected=str(recorded)[:12],
                fix="copy them again, or name an older checkpoint in `checkpoints/latest`",
            )
    return found
