"""Loss spikes: when the loss jumps, and from where to go on.

PaLM (Chowdhery et al. 2022, section 5.1) met about twenty of them, and went around each by going back some
hundred steps and skipping the batches that had come since.
"""

import statistics
from collections import deque

from vidworld.errors import DivergedError

WINDOW = 20
LEAST = 5
MOST_REWINDS = 3
"""From one checkpoint; then it is no matter of batches."""


class SpikeWatch:
    """Judges the mean loss of each log line by those before it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.good_step = -1
        """The last log line whose loss was as before."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._rewinds: dict[int, int] = {}

    def jumped(self, step: int, loss: float) -> float | None:
        """The median that the loss at `step` is too far above; None when all is well.

        A loss that is not finite is a matter of skipped steps, not of spikes.
        """
        if not self.factor or loss != loss:
            return None
        if len(self._losses) >= LEAST:
            median = statistics.median(self._losses)
            if loss > median + (self.factor - 1) * abs(median):
                return median
        self._losses.append(loss)
        self.good_step = step
        return None

    def rewound(self, step: int) -> None:
        """Count a rewind to a checkpoint; raises DivergedError when it was one too many."""
        self._rewinds[step] = self._rewinds.get(step, 0) + 1
        if self._rewinds[step] > MOST_REWINDS:
            raise DivergedError(
                f"the loss jumped again after {MOST_REWINDS} rewinds to step {step}, past other batches each "
                "time: it is not the data. Lower optim.lr, or raise loop.spike_factor if they do no harm"
            )
        self.good_step = step
