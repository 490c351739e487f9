"""What a host says of itself before a run starts: `python -m vidworld.trainer.launch.facts REQUEST`.

It prints one line: a mark, then JSON. Whatever else a login prints stands on other lines.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import vidworld
from vidworld.config import digest
from vidworld.errors import UserError

MARK = "vidworld-facts "
PACKAGES = ("torch", "accelerate", "deepspeed", "numpy")


@dataclass(frozen=True)
class Request:
    """What a host is asked. With `world_size` it is to meet the others, otherwise to tell of itself."""

    config: str
    run: str
    token: str
    """Name of a file in the run directory that the launcher wrote, and what it holds."""
    token_path: str
    toward: str | None = None
    """Address of the first host."""
    port: int | None = None
    """Port that is to be free, 0 for any; for the first host alone."""
    rank: int = 0
    world_size: int = 0
    limit_s: float = 60.0


@dataclass(frozen=True)
class Facts:
    """What a host says of itself."""

    hostname: str = ""
    python: str = ""
    vidworld: str = ""
    code: str = ""
    """Digest of the package's source."""
    versions: dict[str, str] = field(default_factory=dict)
    cuda: str = ""
    gpus: tuple[str, ...] = ()
    config: str = ""
    """Digest of the settings as this host's code reads them, or why it cannot."""
    data: dict[str, str] = field(default_factory=dict)
    """Digest of each dataset's manifest; empty when it is not there."""
    same_run: bool = False
    """Whether the run directory is the launcher's."""
    free_gb: float = 0.0
    interface: str = ""
    """Network interface with the route to the first host."""
    port: int = 0
    """The free port that was asked for."""
    port_error: str = ""
    time: float = 0.0


def gather(request: Request) -> Facts:
    """Look at this host."""
    import torch

    from vidworld.files import url_of
    from vidworld.trainer.config import read_training

    try:
        training = read_training(Path(request.config))
        config, paths = digest(training), training.datasets
    except UserError as error:
        config, paths = f"unreadable: {error}", ()
    data = {str(path): _digest_of(path / "manifest.json") for path in paths if url_of(path) is None}
    port, port_error = _free_port(request)
    return Facts(
        hostname=socket.gethostname(),
        python=platform.python_version(),
        vidworld=vidworld.__version__,
        code=code_digest(),
        versions={name: _version(name) for name in PACKAGES},
        cuda=torch.version.cuda or "",
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        config=config,
        data=data,
        same_run=_reads(Path(request.token_path), request.token),
        free_gb=_free_gb(Path(request.run)),
        interface=_interface_toward(request.toward) if request.toward else "",
        port=port,
        port_error=port_error,
        time=time.time(),
    )


def code_digest(package: Path | None = None) -> str:
    """Short sha256 over the names and contents of the package's source."""
    root = package or Path(vidworld.__file__).parent
    hashed = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        hashed.update(f"{path.relative_to(root)}\0".encode())
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:12]


def meet(request: Request) -> dict[str, Any]:
    """Find the other hosts at the rendezvous and add up a number with them, as training will.

    Gives what was reached, and why not more.
    """
    from torch import distributed

    found: dict[str, Any] = {"store": False, "gloo": False, "nccl": None, "error": ""}
    try:
        store = distributed.TCPStore(
            request.toward or "127.0.0.1",
            request.port or 0,
            request.world_size,
            is_master=request.rank == 0,
            timeout=timedelta(seconds=request.limit_s),
            wait_for_workers=False,
        )
        found["store"] = True
        add_up(store, request.rank, request.world_size, request.limit_s, found)
        leave_together(store, "left", request.rank, request.world_size, request.limit_s)
    except (RuntimeError, ValueError, OSError) as error:
        found["error"] = " ".join(str(error).split())[:300]
    return found


def add_up(store: Any, rank: int, world_size: int, limit_s: float, found: dict[str, Any]) -> None:
    """One sum over gloo, and one over NCCL where there are GPUs; `found` says how far it came."""
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=distributed.PrefixStore("meet", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=limit_s),
    )
    try:
        for backend, device in (("gloo", "cpu"), ("nccl", "cuda"))[: 2 if cuda else 1]:
            one = torch.ones(1, device=device)
            distributed.all_reduce(one)
            found[backend] = float(one) == world_size
    finally:
        distributed.destroy_process_group()


def leave_together(store: Any, name: str, rank: int, world_size: int, limit_s: float) -> None:
    """The first host holds the store: it leaves when the others have what they want of it."""
    store.add(name, 1)
    until = time.monotonic() + limit_s
    while rank == 0 and store.add(name, 0) < world_size and time.monotonic() < until:
        time.sleep(0.05)


def _free_port(request: Request) -> tuple[int, str]:
    if request.port is None:
        return 0, ""
    with socket.socket() as probe:
        # As the rendezvous will: a port that an earlier run has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", request.port))
        except OSError as error:
            return 0, f"port {request.port}: {error.strerror}"
        return probe.getsockname()[1], ""


def _interface_toward(address: str) -> str:
    """The interface whose address this host would use toward another; nothing is sent."""
    from vidworld.errors import require

    psutil = require("psutil", "train")
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            mine = probe.getsockname()[0]
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == mine for each in addresses):
            return name
    return ""


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False


def _free_gb(directory: Path) -> float:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(directory).free / 1e9
    return 0.0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main(line: str) -> None:
    """Answer one request."""
    request = Request(**json.loads(line))
    answer = meet(request) if request.world_size else asdict(gather(request))
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    # Without the interpreter's end: a broken network library may wait there for ever.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
