"""Ask a policy over a websocket, in the protocol of openpi's policy servers.

The server sends its metadata on connection; then each observation is answered by a dict with `actions`
[H, A]. Messages are msgpack, arrays in openpi's convention: a map of b"__ndarray__", b"data", b"dtype" and
b"shape". A reply that is text is the server's traceback.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from vidworld.errors import UserError, require

CONNECT_SECONDS = 10.0
MAX_BYTES = 256 * 2**20


class PolicyError(UserError):
    """A policy could not be reached or did not answer with actions."""


class OpenpiClient:
    """A policy behind a websocket, as a callable of one observation; close it, or use it in a `with`.

    url: ws://HOST:PORT or wss://HOST. api_key: sent as `Authorization: Api-Key ...`. timeout_s: for each
    answer. Raises PolicyError naming the URL.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        client = require("websockets.sync.client", "serve")
        require("msgpack", "serve")
        self.url, self.timeout_s = url, timeout_s
        headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        try:
            self._socket: Any = client.connect(
                url,
                additional_headers=headers,
                compression=None,
                max_size=MAX_BYTES,
                open_timeout=CONNECT_SECONDS,
            )
            self.metadata = self._receive()
        except PolicyError:
            raise
        except Exception as error:
            raise PolicyError(
                "cannot reach the policy",
                where=url,
                got=" ".join(str(error).split()) or type(error).__name__,
                fix="start the policy server, and give its address as ws://HOST:PORT",
            ) from None

    def __call__(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        """The server's answer to one observation."""
        try:
            self._socket.send(pack(dict(observation)))
            return self._receive()
        except PolicyError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PolicyError("the policy does not answer", where=self.url, got=reason) from None

    def close(self) -> None:
        """Leave the server."""
        self._socket.close()

    def __enter__(self) -> "OpenpiClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self) -> Mapping[str, Any]:
        message = self._socket.recv(timeout=self.timeout_s)
        if isinstance(message, str):
            last = message.strip().splitlines()[-1:] or ["nothing"]
            raise PolicyError("the policy failed", where=self.url, got=last[0][:300])
        try:
            answer = unpack(message)
        except Exception as error:
            raise PolicyError(
                "answer of the policy", where=self.url, got=error, expected="msgpack, as openpi packs it"
            ) from None
        if not isinstance(answer, Mapping):
            raise PolicyError(
                "answer of the policy", where=self.url, got=type(answer).__name__, expected="a dict"
            )
        return answer


def pack(content: Any) -> bytes:
    """Msgpack with numpy arrays and scalars as openpi packs them."""
    return require("msgpack", "serve").packb(content, default=_to_plain)


def unpack(message: bytes) -> Any:
    """The inverse of `pack`; raises ValueError for arrays of Python objects."""
    return require("msgpack", "serve").unpackb(message, object_hook=_from_plain)


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "VOc":
            raise ValueError(f"an array of {value.dtype} cannot be sent")
        array = np.ascontiguousarray(value)
        return {
            b"__ndarray__": True,
            b"data": array.tobytes(),
            b"dtype": array.dtype.str,
            b"shape": array.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _from_plain(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        dtype = np.dtype(value[b"dtype"])
        if dtype.hasobject:
            raise ValueError("an array of Python objects is refused")
        return np.frombuffer(value[b"data"], dtype).reshape(value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value
