"""`vidworld export`: pack a run into a small folder to share, which `vidworld.load` opens."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from safetensors.torch import save_file

from vidworld import __version__
from vidworld.config import parse
from vidworld.contract import ActionContract
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError
from vidworld.evaluation.grounding import ground_episode
from vidworld.files import sha256_of
from vidworld.output import output_directory
from vidworld.quantize import Precision, compress
from vidworld.tokenizers.conv import ConvTokenizer
from vidworld.tokenizers.store import copy_tokenizer, has_weights, save_tokenizer
from vidworld.world.build import merged
from vidworld.world.ensemble import Ensemble
from vidworld.world.load import ENSEMBLE, ENSEMBLE_VERSION, Files, find, folders, load, open_world
from vidworld.world.shipped import prompts_of
from vidworld.world.world import WorldModel

WEIGHTS, MANIFEST, PROMPTS = "model.safetensors", "manifest.json", "prompts"


@dataclass(frozen=True)
class Options:
    """Pack a run, or several as an ensemble, into a small folder to share.

    It holds world.json, tokenizer/, model.safetensors (the averaged weights), a manifest with checksums and a
    README, no pickle and no code. `vidworld.load(folder)` opens it. A pretrained tokenizer goes along as the
    path and digest of its weights, or whole; our own is rounded as the network is. Of an
    ensemble it holds ensemble.json, one tokenizer/, and a folder for each member; members that share a
    network stay in its one file.
    """

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Directory of a trained world; several that differ in their seed make an ensemble."""
    out: Path
    """Directory to write; it must not exist."""
    precision: Precision = "fp32"
    """fp32 repeats the run's numbers exactly. bf16 is half the size and rounds weights by up to 0.4 %, as
    a GPU does anyway when it multiplies. int8 is a quarter, with a scale for each row of a matrix."""
    prompts: Path | None = None
    """Dataset of a few episodes to pack along, whose first begins a rollout that names none."""
    with_tokenizer: bool = False
    """Copy the weights of a pretrained tokenizer too; mind their license. Our own always go along."""
    embodiment: str | None = None
    """Pack the world of this robot alone, where the run knows several."""
    member: int | None = None
    """Pack this member of an ensemble alone, counted from 0, as a world without members."""
    overwrite: bool = False
    """Replace an earlier export in --out."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Entry point of `vidworld export`."""
    options = parse(Options, arguments, prog=prog)
    record = ENSEMBLE if len(folders(options.run)) > 1 and options.member is None else WEIGHTS
    with output_directory(options.out, record, overwrite=options.overwrite) as folder:
        size = export(
            options.run,
            folder,
            options.precision,
            prompts=options.prompts,
            with_tokenizer=options.with_tokenizer,
            embodiment=options.embodiment,
            member=options.member,
        )
        whole = has_weights(folder / "tokenizer")
    print(f'{options.out}: {size / 2**20:.1f} MiB. Open it with vidworld.load("{options.out}")')
    if not whole:
        print(
            "It needs the weights of its pretrained tokenizer where they are now; "
            "--with-tokenizer brings them along"
        )


def export(
    runs: Path | Sequence[Path],
    folder: Path,
    precision: Precision = "fp32",
    *,
    prompts: Path | None = None,
    with_tokenizer: bool = False,
    embodiment: str | None = None,
    member: int | None = None,
) -> int:
    """Write an export into an empty folder; returns its bytes.

    Prompts of an export go along to its own exports. Raises CheckpointError as `load` does, DataError or
    ContractError for prompts that the world cannot begin with, ConfigError for a member that is not there.
    """
    paths = folders(runs)
    files = find(paths[0])
    # Members that share a network stay in it: they are small beside it.
    alone = len(paths) == 1
    world = (
        open_world(paths[0], embodiment=embodiment) if alone else load(paths, "cpu", embodiment=embodiment)
    )
    if member is not None:
        world = _member(world, member)
    if prompts := prompts or prompts_of(files.tokenizer.parent):
        _copy_prompts(world, prompts, folder / PROMPTS)
    tokenizer_digest = world.spec.tokenizer_digest
    if isinstance(world.tokenizer, ConvTokenizer) and precision != "fp32":
        tokenizer_digest = save_tokenizer(world.tokenizer, folder / "tokenizer", precision=precision)
    else:
        copy_tokenizer(files.tokenizer, folder / "tokenizer", with_weights=with_tokenizer)
    if isinstance(world, Ensemble):
        names = [f"member-{index}" for index in range(world.num_members)]
        for name, one in zip(names, world.members, strict=True):
            (folder / name).mkdir()
            _write_world(one, folder / name, precision, tokenizer_digest)
            write_manifest(folder / name)
        listing = {"schema_version": ENSEMBLE_VERSION, "members": names}
        (folder / ENSEMBLE).write_text(json.dumps(listing, indent=1) + "\n")
    else:
        _write_world(world, folder, precision, tokenizer_digest)
    (folder / "README.md").write_text(model_card(world, files, precision, has_prompts=prompts is not None))
    write_manifest(folder)
    load(folder, "cpu", members="all")  # an export that does not open is no export
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _member(world: WorldModel, member: int) -> WorldModel:
    """One member of an ensemble, or of a world whose members share a network."""
    count = world.spec.model.members or world.num_members
    if count == 1 or not 0 <= member < count:
        expected = f"0 to {count - 1}" if count > 1 else "an ensemble, to have members"
        raise ConfigError("--member", got=member, expected=expected)
    return world.members[member] if isinstance(world, Ensemble) else merged(world, member)


def _write_world(world: WorldModel, folder: Path, precision: Precision, tokenizer_digest: str) -> None:
    """Weights, spec and calibration."""
    # One entry only: safetensors writes several in an order that changes from run to run.
    weights = compress(world.model.state_dict(), precision)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it, and it is there to be shared
    spec = replace(world.spec, tokenizer_digest=tokenizer_digest)
    spec.write(folder)
    if world.calibration is not None:
        world.calibration.for_weights(sha256_of(folder / WEIGHTS), spec.digest).write(folder)


def write_manifest(folder: Path) -> None:
    """List every file of an export with its size and checksum."""
    listed = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": listed}, indent=1) + "\n")


def _copy_prompts(world: WorldModel, prompts: Path, out: Path) -> None:
    """Copy a dataset, once its first episode has turned out to be a prompt of this world."""
    dataset = ShardDataset.open(prompts)
    dataset.verify_all()
    ground_episode(dataset, dataset.manifest.samples()[0].key, world.spec, context=1)
    shutil.copytree(prompts, out, ignore=shutil.ignore_patterns("*.png"))


def model_card(world: WorldModel, files: Files, precision: Precision, *, has_prompts: bool) -> str:
    """The README of an export: what it is, how to use it, what its numbers mean, where it came from."""
    spec, sampler = world.spec, world.spec.sampler
    first = spec.contracts[0].embodiment
    shown = spec.only([first]) if spec.layouts else spec
    opened = f', embodiment="{first}"' if spec.layouts else ""
    pictures = "; ".join(
        f"{', '.join(layout.views)}; {layout.width}x{layout.height} at {layout.fps:g} frames/s"
        for layout in dict.fromkeys(spec.layout(contract.embodiment) for contract in spec.contracts)
    )
    parameters = sum(parameter.numel() for parameter in world.model.parameters()) / 1e6
    shared = spec.model.members
    size = f"{world.num_members} members of " if world.num_members > 1 else ""
    size += f"{shared} members in one network of " if shared else ""
    size += f"{parameters:.1f}M"
    zeros = ", ".join("0.0" for _ in spec.contracts[0].action)
    embodiment = f', embodiment="{first}"' if len(shown.contracts) > 1 else ""
    views = "" if len(shown.views) == 1 else f"{len(shown.views)}, "
    contracts = "\n".join(_contract_section(contract) for contract in spec.contracts)
    opened_all = (
        f'\nensemble = vidworld.load("path/to/this/folder"{opened}, members={shared})' if shared else ""
    )
    roll = "\n`vidworld rollout path/to/this/folder --out rollout` begins with an episode of `prompts/`.\n"
    return f"""---
library_name: vidworld
tags: [robotics, world-model, video-diffusion, simulation]
---

# A robot's world, learnt from its logs

A [vidworld](https://github.com/vidworld/vidworld) world model: give it frames of the robot's camera and
commands, and it imagines what the camera would see next and what the robot's sensors would say.

```python
import numpy as np
import torch
import vidworld
from vidworld.world.prompt import Prompt

world = vidworld.load("path/to/this/folder"{opened}){opened_all}
frames = np.zeros((1, {views}{shown.height}, {shown.width}, 3), np.uint8)  # your own frames, oldest first
with torch.no_grad():
    state = world.reset(Prompt(frames{embodiment}), num_samples=4, seed=0)
    state, seen = world.step(state, [{zeros}])
print(seen.video_BVHWC.shape, seen.proprio_BS.shape)
```
{roll if has_prompts else ""}
| | |
|---|---|
| pictures | {pictures} |
| network | {size} parameters, {spec.model.width} wide, {spec.model.depth} deep, in {precision} |
| sampler | {sampler.steps} {sampler.method} steps a frame, window of {sampler.window} frames |
| checkpoint | `{files.checkpoint}`, vidworld {__version__} |
| dataset | digest `{spec.dataset_digest or "not recorded"}` |
| tokenizer | digest `{spec.tokenizer_digest or world.tokenizer.digest}` |

{contracts}
## Limits

It knows the robot, cameras, objects and range of commands of its training data and nothing beyond; commands
outside the recorded range are refused. Imagined futures are samples, not guarantees: check what matters on
the robot.
"""


def _contract_section(contract: ActionContract) -> str:
    rows = [
        f"| {role} | {dimension.name} | {dimension.unit} | {dimension.kind} | {low:.4g} to {high:.4g} |"
        for role, dimensions, statistics in (
            ("action", contract.action, contract.action_statistics),
            ("proprio", contract.proprio, contract.proprio_statistics),
        )
        for dimension, low, high in zip(dimensions, statistics.minimum, statistics.maximum, strict=True)
    ]
    note = f"\n{contract.note}\n" if contract.note else ""
    return (
        f"## Robot `{contract.embodiment}`, {contract.rate_hz:g} commands/s, frame {contract.control_frame}\n"
        f"{note}\n| | name | unit | kind | recorded range |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
