"""MuJoCo with an OpenGL that needs no display: OSMesa (software, same pixels everywhere) or EGL.

Import `mujoco` from here, so that the back end is chosen before MuJoCo is loaded. Physics works without any;
only `offscreen` needs one.
"""

import atexit
import ctypes
import functools
import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from vidworld.errors import ConfigError, require

LIBRARIES = {
    "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),
    "egl": ("libEGL.so.1", "libEGL.so"),
}
DEVICE = "MUJOCO_EGL_DEVICE_ID"
"""Which GPU MuJoCo draws on; among those of CUDA_VISIBLE_DEVICES, if that is set."""
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
INSTALL = "run: apt-get install libosmesa6 (as root), or install a GPU driver with EGL"


def available() -> list[str]:
    """Back ends that can be tried, the preferred one first; `MUJOCO_GL` narrows the choice to one."""
    if sys.platform != "linux":
        return ["glfw"]
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    names = [chosen] if chosen in LIBRARIES else list(LIBRARIES)
    return [name for name in names if loads(name)]


def loads(name: str) -> bool:
    """Whether the library of a back end is there."""
    for library in LIBRARIES[name]:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def _load() -> Any:
    """MuJoCo, told which back end to use; software rendering on one thread, as one episode has one core."""
    found = available()
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if found and "mujoco" not in sys.modules:
        os.environ["MUJOCO_GL"] = found[0]
    elif not found:
        # Physics alone: MuJoCo would otherwise fail at import where a back end is named and missing.
        os.environ["MUJOCO_GL"] = "disable"
    return require("mujoco", "lab")


mujoco: Any = _load()


@functools.lru_cache(maxsize=1)
def offscreen(size: int) -> Any:
    """A current OpenGL context for pictures of `size` pixels, one a process.

    Raises ConfigError that says what to install when no back end works.
    """
    reasons = []
    for name in available():
        try:
            context = _context(name, size)
            context.make_current()
        except Exception as error:  # each back end fails in its own way, all of them mean: not here
            reasons.append(f"{name}: {type(error).__name__}")
        else:
            # Freed here, because its own finaliser runs after OpenGL is gone and complains.
            atexit.register(context.free)
            return context
    raise ConfigError("no headless OpenGL", got="; ".join(reasons) or "neither OSMesa nor EGL", fix=INSTALL)


def _context(name: str, size: int) -> Any:
    """A context of a back end, on this process's share of the GPUs where that works."""
    make = importlib.import_module(f"mujoco.{name}").GLContext
    device = own_device() if name == "egl" else None
    if device is None:
        return make(size, size)
    os.environ[DEVICE] = device
    try:
        return make(size, size)
    except Exception:  # a GPU that CUDA has and EGL has not
        del os.environ[DEVICE]
        return make(size, size)
    finally:
        os.environ.pop(DEVICE, None)


def own_device() -> str | None:
    """The GPU that a worker draws on, so that many take turns over all; None leaves it to MuJoCo."""
    workers = multiprocessing.current_process()._identity  # type: ignore[attr-defined]
    if DEVICE in os.environ or not workers:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible:
        count = len(visible.split(","))
    else:
        count = len(list(NVIDIA_GPUS.iterdir())) if NVIDIA_GPUS.is_dir() else 0
    return str((workers[-1] - 1) % count) if count > 1 else None


def can_render() -> bool:
    """Whether pictures can be drawn here."""
    try:
        offscreen(64)
    except ConfigError:
        return False
    return True
