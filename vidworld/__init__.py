"""vidworld: robot logs in, simulator out."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidworld.world.load import load as load

try:
    __version__ = version("vidworld")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and `vidworld --help` needs none of it.
    if name == "load":
        from vidworld.world.load import load

        return load
    raise AttributeError(f"module 'vidworld' has no attribute {name!r}")
