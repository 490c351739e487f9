"""The oracle's futures of the cases that flagship.py measures, played by processes and kept in files."""

import concurrent.futures
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flagship_measures import Case

from vidworld.config import digest
from vidworld.errors import DataError
from vidworld.evaluation.oracle import Foreseen, OracleConfig, Recorded, foresee, settings_of


def oracle_of(
    pool: concurrent.futures.ProcessPoolExecutor,
    case: Case,
    horizons: Sequence[int],
    config: OracleConfig,
    folder: Path,
) -> "concurrent.futures.Future[Foreseen]":
    """The oracle's futures of a case at horizons after the context, from `folder` where they are there."""
    at = [config.context - 1 + horizon for horizon in horizons]
    facts = [settings_of(config, at), case.recorded.meta["outcome"]["readouts"]]
    path = folder / f"{case.truth.kind}-{case.key}-{digest(facts)}"
    return pool.submit(kept, case.recorded, at, config, path)


def kept(recorded: Recorded, at: list[int], config: OracleConfig, path: Path) -> Foreseen:
    """`foresee` with a cache: PATH.mp4, and PATH.json written last."""
    note = path.with_name(f"{path.name}.json")
    if note.is_file():
        facts = json.loads(note.read_text())
        effective = float("inf") if facts["effective_draws"] is None else facts["effective_draws"]
        return Foreseen(path.with_name(f"{path.name}.mp4").read_bytes(), facts["samples"], effective)
    found = foresee(recorded, at, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.mp4").write_bytes(found.video)
    worth = found.effective_draws if np.isfinite(found.effective_draws) else None
    note.write_text(json.dumps({"samples": found.samples, "effective_draws": worth}) + "\n")
    return found


def finished(jobs: Sequence["concurrent.futures.Future[Foreseen]"], wait_s: float) -> dict[int, Foreseen]:
    """Results by place of what is done in time; an episode that cannot be made again is left out aloud."""
    done, _ = concurrent.futures.wait(jobs, timeout=max(wait_s, 0))
    found: dict[int, Foreseen] = {}
    for place, job in enumerate(jobs):
        if job in done:
            try:
                found[place] = job.result()
            except DataError as error:
                print(f"left out: {error}", flush=True)
    return found
