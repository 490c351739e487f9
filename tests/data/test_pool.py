import os
import signal

import pytest

from vidworld.data.manifest import Quarantined
from vidworld.data.pool import results


@pytest.fixture(autouse=True)
def _handler():
    """Interrupts raise, as in a program at a terminal; test runners may have changed that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


class Freed:
    """Interrupted while it is freed, where Python swallows the exception."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


class Making:
    def __init__(self) -> None:
        self.made = []

    def run(self, episode_id: str) -> Quarantined:
        if episode_id == "b":
            Freed()
        self.made.append(episode_id)
        return Quarantined(episode_id, "made")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_loses_still_stops_the_work():
    job, ids = Making(), list("abcd")
    with pytest.raises(KeyboardInterrupt), results(job, ids, workers=1) as made:
        for _ in made:
            pass
    assert job.made == ["a", "b"]
    # The negative control: without the watch the work goes on to the end.
    assert [result.episode_id for result in map(Making().run, ids)] == ids


def test_results_come_in_order_and_the_handler_is_put_back():
    with results(Making(), list("acd"), workers=1) as made:
        assert [result.episode_id for result in made] == list("acd")
