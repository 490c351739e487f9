"""Which of several ends is the cause, and what is shown of it."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from vidworld.trainer.launch.failure import exit_code, first_failure, last_words
from vidworld.trainer.launch.rank import Record, read_records

GLOO = "Traceback (most recent call last):\n  File x\nRuntimeError: [pair.cc] Connection closed by peer\n"


def end(folder: Path, rank: int, code: int | None, log: str, *, at_s: int, asked: str | None = None) -> None:
    """Record the end of a rank, by the clock of the file server."""
    record = Record(rank, "ab"[rank // 2], "node", 1, code, asked)
    record.file(folder, "log").write_text(log)
    path = record.file(folder, "json")
    path.write_text(json.dumps(asdict(record)))
    os.utime(path, ns=(at_s * 10**9, at_s * 10**9))


def first(folder: Path, ranks: int = 4):
    return first_failure(folder, read_records(folder), range(ranks), {"a": (1, [0, 1]), "b": (1, [2, 3])})


def test_the_cause_is_not_the_first_to_say_so(tmp_path: Path) -> None:
    """A rank whose neighbour died may write its end before the neighbour's process is gone."""
    end(tmp_path, 0, 1, GLOO, at_s=10)
    end(tmp_path, 1, -9, "", at_s=5, asked="kill")
    end(tmp_path, 2, -15, GLOO, at_s=6, asked="SIGTERM")
    end(tmp_path, 3, 1, "Traceback (most recent call last):\n  File y\nValueError: mine\n", at_s=12)
    failure = first(tmp_path)
    assert failure is not None
    assert (failure.name, failure.exit_code) == ("rank 3 on b", 1)
    assert failure.last_words.endswith("ValueError: mine")
    assert exit_code(read_records(tmp_path), range(4), failure) == 1


def test_among_causes_the_first_counts(tmp_path: Path) -> None:
    end(tmp_path, 0, 4, "diverged", at_s=11)
    end(tmp_path, 1, 4, "diverged", at_s=10)
    end(tmp_path, 2, 0, "", at_s=5)
    end(tmp_path, 3, 1, GLOO, at_s=9)
    failure = first(tmp_path)
    assert failure is not None
    assert failure.name == "rank 1 on a"
    assert exit_code(read_records(tmp_path), range(4), failure) == 4


def test_only_consequences(tmp_path: Path) -> None:
    """A network that fails leaves no better word than that."""
    for rank, at_s in enumerate([12, 11, 13, 14]):
        end(tmp_path, rank, 1, GLOO, at_s=at_s)
    failure = first(tmp_path)
    assert failure is not None
    assert failure.name == "rank 1 on a"


def test_silent_and_missing_ranks(tmp_path: Path) -> None:
    for rank in range(3):
        end(tmp_path, rank, 0, "", at_s=1)
    failure = first(tmp_path)
    assert failure is not None
    assert failure.how == "it never started"
    end(tmp_path, 3, None, "step 7", at_s=1)
    failure = first(tmp_path)
    assert failure is not None
    assert (failure.name, failure.how, failure.last_words) == (
        "rank 3 on b",
        "its host went silent",
        "step 7",
    )
    end(tmp_path, 3, 0, "", at_s=1)
    assert first(tmp_path) is None
    assert exit_code(read_records(tmp_path), range(4), None) == 0


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    chain = (
        "Traceback (most recent call last):\n  one\nKeyError: cause\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n  two\nValueError: end\n"
    )
    log.write_text("step 1\nTraceback (most recent call last):\nOSError: was caught\nstep 2\n" + chain)
    words = last_words(log)
    assert words.startswith("Traceback")
    assert "KeyError: cause" in words
    assert "was caught" not in words
    assert words.endswith("ValueError: end")
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert last_words(log).splitlines() == [f"line {number}" for number in range(88, 100)]
    log.write_text("Traceback (most recent call last):\n" + "  frame\n" * 500 + "RecursionError: deep\n")
    assert len(last_words(log).splitlines()) == 61
    assert last_words(log).endswith("RecursionError: deep")
    assert last_words(tmp_path / "none") == ""
