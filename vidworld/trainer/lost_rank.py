"""How a rank tells that another one is gone."""

import re
from typing import Self

import torch

from vidworld.errors import VidworldError


class LostRankError(VidworldError):
    """Another process of the run is gone."""

    @classmethod
    def of(cls, error: RuntimeError, rank: int, step: int) -> Self:
        """What `rank` says of a collective that failed in a step."""
        # The first sentence, without the place in gloo's source.
        reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0].splitlines()[0][:120]
        return cls(
            f"rank {rank} lost another in step {step} ({reason}): see what that one said, and "
            "RUN/heartbeats. The last checkpoint is whole: --resume"
        )


def of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo has no exception class of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
