"""Settings of a toy run, a launcher in a process of its own, and hosts that are network namespaces."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[3]
ODD = "run; $(touch pwned) $$x ${local_rank} %h \"q\" 's'"
"""A folder that a shell, torchrun, pdsh and SLURM would each read in their own way."""


@pytest.fixture
def odd() -> str:
    return ODD


@pytest.fixture(scope="session")
def toy_settings(planar: Path) -> dict:
    """A tokenizer run of eight steps, sensitive to its seed, for one to four ranks."""
    return {
        "kind": "tokenizer",
        "data": str(planar),
        "tokenizer": {"widths": [16, 16, 16], "encoder_blocks": [0, 0, 1], "decoder_blocks": [0, 0, 1]},
        "loader": {"batch_size": 12, "workers": 0},
        "optim": {"lr": 3e-3, "warmup_steps": 1},
        "loop": {"steps": 8, "log_every": 1},
        "look": {"validate_clips": 4, "validate_batches": 1, "validate_every": 0},
        "wandb": "off",
    }


@pytest.fixture(scope="session")
def toy_config(toy_settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_settings))
    return path


@dataclass(frozen=True)
class Ended:
    code: int
    said: str


Launcher = Callable[..., Ended]


@pytest.fixture
def environment() -> dict[str, str]:
    """One thread a process, and this source tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def vidworld(environment: dict[str, str], tmp_path: Path) -> Launcher:
    """Run `vidworld ARGUMENTS` in an empty folder."""

    def run(*arguments: object, **more: str) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", "vidworld", *map(str, arguments)],
            env={**environment, **more},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert not (tmp_path / "pwned").exists(), "an argument was read by a shell"
        return Ended(done.returncode, done.stdout + done.stderr)

    return run


@dataclass(frozen=True)
class Namespaces:
    """Hosts that are network namespaces, joined by a bridge."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    rsh: str = "ip netns exec {host}"

    def hostfile(self, folder: Path, count: int, slots: int = 1) -> Path:
        """A hosts file with the first `count` of them."""
        path = folder / "hostfile"
        pairs = list(zip(self.names, self.addresses, strict=True))[:count]
        path.write_text("".join(f"{name} slots={slots} addr={address}\n" for name, address in pairs))
        return path


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Namespaces]:
    """Three hosts that see each other and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = f"{os.getpid() % 100000:x}"
    bridge, names = f"vwb{tag}", tuple(f"vw{tag}{letter}" for letter in "abc")
    addresses = tuple(f"198.18.{os.getpid() % 250}.{number}" for number in (1, 2, 3))
    try:
        made = _ip(["link", "add", bridge, "type", "bridge"])
        if made.returncode:
            pytest.skip(f"no bridge can be made here: {made.stderr.strip()}")
        _must(["link", "set", bridge, "up"])
        for name, address in zip(names, addresses, strict=True):
            _must(["netns", "add", name])
            _must(["-n", name, "link", "set", "lo", "up"])
            _must(["link", "add", f"{name}o", "type", "veth", "peer", "name", "eth9", "netns", name])
            _must(["link", "set", f"{name}o", "master", bridge, "up"])
            _must(["-n", name, "addr", "add", f"{address}/24", "dev", "eth9"])
            _must(["-n", name, "link", "set", "eth9", "up"])
        yield Namespaces(names, addresses)
    finally:
        for name in names:
            _ip(["netns", "del", name])
        _ip(["link", "del", bridge])


def _ip(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


def _must(arguments: Sequence[str]) -> None:
    done = _ip(arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[[str], Path]:
    """A folder for PYTHONPATH that runs a line of code when a rank imports the training loop."""

    def make(code: str) -> Path:
        folder = tmp_path / "faulty"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            "import os, signal, sys, time\n"
            "class Fault:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'vidworld.trainer.loop' and 'train' in sys.orig_argv:\n"
            f"            rank = int(os.environ['RANK']); {code}\n"
            "sys.meta_path.insert(0, Fault())\n"
        )
        return folder

    return make


@pytest.fixture
def require_same() -> Callable[[Path, Path, Path], None]:
    """Assert that a run is another one up to rounding, in the measure of a third with another seed.

    The first step's losses and gradient norm agree to 1e-5. Later AdamW turns the rounding of gradients near
    zero into steps of full size: the weights at the end lie within 1 % of the distance to the other seed.
    """

    def require(run: Path, one: Path, other: Path) -> None:
        mine, same, different = (_first_row(each) for each in (run, one, other))
        for name in ("loss", "latent", "grad_norm"):
            assert mine[name] == pytest.approx(same[name], rel=1e-5), name
            assert mine[name] != pytest.approx(different[name], rel=1e-3), name
        assert _distance(run, one) < 1e-2 * _distance(run, other)

    return require


def _first_row(run: Path) -> dict[str, float]:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 1
    return row


def _distance(one: Path, other: Path) -> float:
    """Euclidean distance of the weights of two runs' newest checkpoints."""
    first, second = (
        load_file(
            run / "checkpoints" / (run / "checkpoints/latest").read_text().strip() / "model.safetensors"
        )
        for run in (one, other)
    )
    assert first.keys() == second.keys()
    return sum((first[name] - second[name]).double().square().sum().item() for name in first) ** 0.5
