"""What the pictures of a state depend on where the tokenizer compresses time: a value beside the KV cache.

Shapes: B samples, V views, T latent frames, k camera frames a latent frame, C h w of latents, H W of pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidworld.tokenizers.streaming import StreamState


@dataclass(frozen=True)
class Coding:
    """Where the tokenizer stands, views folded into the batch of its streams.

    Latents are decoded when somebody looks. Those that nobody looked at wait in `pending`, so that steps
    without pictures stay cheap and later pictures are the same. A tokenizer that cannot stream keeps all
    latents since the prompt began there, and decodes them all again each time.
    """

    pending_BTVChw: Tensor
    """Newest latents, not decoded yet."""
    decoder: StreamState | None = None
    """After the latents before them; None for a tokenizer that cannot stream."""
    encoder: StreamState | None = None
    """After the newest frame, as long as all frames were real ones."""
    shown_BkVHWC: Tensor | None = None
    """Uint8 pictures of the newest latent frame, if they were decoded already."""

    def imagined(self, latents_B1VChw: Tensor) -> "Coding":
        """After an imagined frame, of which the encoder knows nothing."""
        return dataclasses.replace(self._after(latents_B1VChw), encoder=None)

    def observed(self, latents_B1VChw: Tensor, encoder: StreamState) -> "Coding":
        """After a real frame."""
        return dataclasses.replace(self._after(latents_B1VChw), encoder=encoder)

    def select(self, index_B: Tensor) -> "Coding":
        """Rows in a new order."""
        views = self.pending_BTVChw.shape[2]
        index_N = (index_B[:, None] * views + torch.arange(views, device=index_B.device)).flatten()
        return Coding(
            self.pending_BTVChw[index_B],
            None if self.decoder is None else self.decoder.select(index_N),
            None if self.encoder is None else self.encoder.select(index_N),
            None if self.shown_BkVHWC is None else self.shown_BkVHWC[index_B],
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Coding":
        """Apply a function to every tensor."""
        return Coding(
            function(self.pending_BTVChw),
            None if self.decoder is None else self.decoder.map(function),
            None if self.encoder is None else self.encoder.map(function),
            None if self.shown_BkVHWC is None else function(self.shown_BkVHWC),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file; `header` holds the rest."""
        found = {"coding.pending": self.pending_BTVChw}
        if self.shown_BkVHWC is not None:
            found["coding.shown"] = self.shown_BkVHWC
        for role, stream in self._streams().items():
            found |= {f"coding.{role}.{name}": feature for name, feature in stream.features.items()}
        return found

    def header(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors, as plain JSON."""
        return {
            "shown": self.shown_BkVHWC is not None,
            "streams": {
                role: {"batch": stream.batch, "frames": stream.frames, "features": sorted(stream.features)}
                for role, stream in self._streams().items()
            },
        }

    @classmethod
    def restore(cls, header: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> "Coding":
        """Undo `tensors` and `header`."""
        streams = {
            role: StreamState(
                one["batch"],
                one["frames"],
                {name: tensor(f"coding.{role}.{name}") for name in one["features"]},
            )
            for role, one in header["streams"].items()
        }
        return cls(
            tensor("coding.pending"),
            streams.get("decoder"),
            streams.get("encoder"),
            tensor("coding.shown") if header["shown"] else None,
        )

    def _after(self, latents_B1VChw: Tensor) -> "Coding":
        pending = torch.cat([self.pending_BTVChw, latents_B1VChw.detach()], 1)
        return dataclasses.replace(self, pending_BTVChw=pending, shown_BkVHWC=None)

    def _streams(self) -> dict[str, StreamState]:
        streams = {"decoder": self.decoder, "encoder": self.encoder}
        return {role: stream.gathered() for role, stream in streams.items() if stream is not None}
