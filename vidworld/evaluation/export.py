"""`vidworld export`: pack a run into a small folder to share, which `vidworld.load` opens."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save_file

from vidworld import __version__
from vidworld.config import parse
from vidworld.contract import ActionContract
from vidworld.output import output_directory
from vidworld.tokenizers.store import copy_tokenizer, has_weights
from vidworld.world.load import Files, find, load
from vidworld.world.world import WorldModel

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Options:
    """Pack a run into a small folder to share.

    It holds world.json, tokenizer/, model.safetensors (the averaged weights), a manifest with checksums and a
    README, no pickle and no code. `vidworld.load(folder)` opens it. A pretrained tokenizer goes along as the
    path and digest of its weights, or whole.
    """

    run: tyro.conf.Positional[Path]
    """Directory of a trained world."""
    out: Path
    """Directory to write; it must not exist."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """fp32 repeats the run's numbers exactly. bf16 is half the size and rounds weights by up to 0.4 %, as
    a GPU does anyway when it multiplies."""
    with_tokenizer: bool = False
    """Copy the weights of a pretrained tokenizer too; mind their license. Our own always go along."""
    embodiment: str | None = None
    """Pack the world of this robot alone, where the run knows several."""
    overwrite: bool = False
    """Replace an earlier export in --out."""


def main(arguments: Sequence[str], prog: str) -> None:
    """Entry point of `vidworld export`."""
    options = parse(Options, arguments, prog=prog)
    with output_directory(options.out, WEIGHTS, overwrite=options.overwrite) as folder:
        size = export(
            options.run,
            folder,
            options.dtype,
            with_tokenizer=options.with_tokenizer,
            embodiment=options.embodiment,
        )
        whole = has_weights(folder / "tokenizer")
    print(f'{options.out}: {size / 2**20:.1f} MiB. Open it with vidworld.load("{options.out}")')
    if not whole:
        print(
            "It needs the weights of its pretrained tokenizer where they are now; "
            "--with-tokenizer brings them along"
        )


def export(
    run: Path,
    folder: Path,
    dtype: Literal["fp32", "bf16"] = "fp32",
    *,
    with_tokenizer: bool = False,
    embodiment: str | None = None,
) -> int:
    """Write an export into an empty folder; returns its bytes. Raises CheckpointError as `load` does."""
    files = find(run)
    world = load(run, "cpu", embodiment=embodiment)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    weights = {
        name: tensor.to(precision if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in world.model.state_dict().items()
    }
    # One entry only: safetensors writes several in an order that changes from run to run.
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    world.spec.write(folder)
    copy_tokenizer(files.tokenizer, folder / "tokenizer", with_weights=with_tokenizer)
    (folder / "README.md").write_text(model_card(world, files, dtype))
    listed = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": listed}, indent=1) + "\n")
    load(folder, "cpu")  # an export that does not open is no export
    return sum(file["bytes"] for file in listed.values())


def model_card(world: WorldModel, files: Files, dtype: str) -> str:
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
    zeros = ", ".join("0.0" for _ in spec.contracts[0].action)
    embodiment = f', embodiment="{first}"' if len(shown.contracts) > 1 else ""
    views = "" if len(shown.views) == 1 else f"{len(shown.views)}, "
    contracts = "\n".join(_contract_section(contract) for contract in spec.contracts)
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

world = vidworld.load("path/to/this/folder"{opened})
frames = np.zeros((1, {views}{shown.height}, {shown.width}, 3), np.uint8)  # your own frames, oldest first
with torch.no_grad():
    state = world.reset(Prompt(frames{embodiment}), num_samples=4, seed=0)
    state, seen = world.step(state, [{zeros}])
print(seen.video_BVHWC.shape, seen.proprio_BS.shape)
```

| | |
|---|---|
| pictures | {pictures} |
| network | {parameters:.1f}M parameters, {spec.model.width} wide, {spec.model.depth} deep, in {dtype} |
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
