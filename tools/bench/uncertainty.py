"""Does a world of the lab know what it does not know? Everything is held to the true simulator.

    python tools/bench/uncertainty.py --run runs/lab --data data/lab --readout runs/readout

The first member of the run is measured, and all are the ensemble whose E is; several runs are an ensemble
too. Calibrate first (vidworld calibrate).
Held-out episodes (the evaluation half of the val split), their first 8 frames known, 32 samples:

- `calibration`: spread-skill, 90 % coverage, rank tests and event reliability of every kind, leads 4 to 32,
  as calibrated and (`.uncalibrated`) as trained;
- `futures`: before contact, the container's outcomes against true ensembles of the same size (Wasserstein
  distance, energy test, CRPS against the oracle's, share outside the true support);
- `narrowing`: the spread at one frame as more frames are shown;
- `mass`: ranks of a mass that a probe reads off futures;
- `ood`: AUROC of E, flow loss and nearest neighbour on five shifts.

True ensembles are played on all cores meanwhile and kept in --cache (tools/bench/uncertainty_truth.py makes
them ahead). Rows are written as soon as they are measured; figures go to --figures, and what they are drawn
from to --figures/kept, where uncertainty_redraw.py takes it from: processes that each measure some --parts or
--kinds, one a GPU, are put together there.
"""

import concurrent.futures
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import uncertainty_figures as figures
import uncertainty_ood as ood
from table import add_rows, cpu_name
from uncertainty_calibration import Kind, calibrate_kind, event_rows, kind_rows
from uncertainty_container import Futures, Mass, Narrowing, compare_futures, narrow_spread, probe_mass
from uncertainty_redraw import EVENT_LEADS, keep
from uncertainty_truth import KIND, QUANTITIES, Pool, Truth, TruthConfig, fitting, load_truth
from uncertainty_worlds import Imaginer, Ruler, Window, read_windows

from vidworld.config import parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError, VidworldError
from vidworld.evaluation.lab_truth import kind_of
from vidworld.evaluation.oracle import OracleConfig
from vidworld.evaluation.readout import load_readout
from vidworld.lab.effect import EFFECTS
from vidworld.world.ensemble import Ensemble
from vidworld.world.load import load
from vidworld.world.world import WorldModel

Part = Literal["calibration", "futures", "narrowing", "mass", "ood"]
PARTS: tuple[Part, ...] = ("calibration", "futures", "narrowing", "mass", "ood")
SHARES: dict[Part, float] = {
    "calibration": 0.5,
    "futures": 0.15,
    "narrowing": 0.15,
    "mass": 0.1,
    "ood": 0.1,
}
"""Of the budget, where all parts are measured; what is left of one goes to the next."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what a world of the lab knows of what it does not know."""

    run: tuple[Path, ...]
    """Runs or exports; the first member is measured, and all are the ensemble whose E is."""
    together: bool = False
    """Take the samples of all members together in every part."""
    data: Path
    """Folder with a dataset a kind, or one dataset."""
    readout: Path | None = None
    """Directory that `vidworld readout train` wrote; without it no outcomes are read."""
    kinds: tuple[str, ...] = ()
    """Default: all that are there."""
    parts: tuple[Part, ...] = PARTS
    split: str = "val"
    half: Literal["evaluation", "both"] = "evaluation"
    episodes: int = 40
    """Of each kind at most."""
    truth_episodes: int = 24
    """Of the container, with true ensembles."""
    train_episodes: int = 400
    """Of the container's train split, for the probe of its mass and for nearest neighbours."""
    frames: int = 32
    """Frames to imagine."""
    samples: int = 32
    e_samples: int = 8
    """Of each member, for E."""
    ood_scores: tuple[str, ...] = ()
    """Of the shifts; default: all, some of which roll out many futures."""
    rows: int = 256
    """Rollouts side by side."""
    truth: TruthConfig = field(default_factory=TruthConfig)
    cache: Path = Path("outputs/truth")
    """Where true ensembles are kept."""
    workers: int = max(1, (os.cpu_count() or 2) - 2)
    seed: int = 0
    device: str | None = None
    budget_s: float = 540.0
    """Parts end early, with fewer episodes, to be done by then."""
    figures: Path = Path("outputs/uncertainty")
    out: Path = Path("benchmarks/uncertainty.json")
    """Rows are added here."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        if unknown := set(self.ood_scores) - set(ood.NAMES):
            raise ConfigError("--ood-scores", got=", ".join(sorted(unknown)), expected=", ".join(ood.NAMES))
        for name in (
            "episodes",
            "truth_episodes",
            "train_episodes",
            "samples",
            "e_samples",
            "rows",
            "workers",
            "frames",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')}", got=getattr(self, name), expected="1 or more"
                )
        if self.samples != self.truth.samples:
            raise ConfigError(
                "--samples", got=self.samples, expected=f"--truth.samples, {self.truth.samples}"
            )


class Bench:
    """What all parts share: data, worlds, the clock, and where rows go."""

    def __init__(self, options: Options, arguments: Sequence[str]) -> None:
        self.options, self.began = options, time.monotonic()
        self.datasets = datasets(options)
        runs = options.run[0] if len(options.run) == 1 else list(options.run)
        loaded = load(runs, options.device, members="all")
        self.ensemble = loaded if isinstance(loaded, Ensemble) else None
        alone = self.ensemble is not None and not options.together
        self.world: WorldModel = self.ensemble.members[0] if self.ensemble and alone else loaded
        if self.world.spec.frames_per_step != 1 or len(self.world.spec.views) != 1:
            raise ConfigError("a world of one view and no time stride", got=str(options.run))
        device = self.world.device
        self.ruler = None if options.readout is None else Ruler(load_readout(options.readout, device))
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        self.command = " ".join(["python", "tools/bench/uncertainty.py", *arguments])
        self.half = None if options.half == "both" else options.half

    def add(self, rows: Mapping[str, tuple[float, str]]) -> None:
        """Print and save figures."""
        for name, (value, unit) in rows.items():
            print(f"{name:<52} {value:9.4g}  {unit}", flush=True)
        kept = {
            name: (float(f"{value:.4g}"), unit)
            for name, (value, unit) in rows.items()
            if math.isfinite(value)  # too few episodes tell some figures nothing
        }
        add_rows(self.options.out, kept, device=self.device, command=self.command, packages=("torch",))

    def late(self, part: Part) -> Callable[[], bool]:
        """Whether a part has to end."""
        end = self.until(part)
        return lambda: time.monotonic() > end

    def until(self, part: Part) -> float:
        """When a part has to end, on the monotonic clock."""
        chosen: list[Part] = [one for one in PARTS if one in self.options.parts]
        whole = sum(SHARES[one] for one in chosen)
        before = sum(SHARES[one] for one in chosen if PARTS.index(one) <= PARTS.index(part))
        return self.began + before / whole * self.options.budget_s

    def keep(self, part: str, found: object) -> None:
        """Keep what figures are drawn from."""
        keep(self.options.figures, f"{part}-{'-'.join(self.datasets)}", found)

    def imaginer(self, *, calibrated: bool = True) -> Imaginer:
        """Rolls out with the world's own sampler, or with that of its training."""
        own = self.world.spec.sampler
        return Imaginer(
            self.world,
            samples=self.options.samples,
            rows=self.options.rows,
            seed=self.options.seed,
            sampler=own if calibrated else dataclasses.replace(own, noise_scale=None),
        )

    def windows(self, kind: str, *, split: str | None = None, count: int | None = None) -> list[Window]:
        """The first frames of held-out episodes, or of those of another split."""
        return read_windows(
            self.datasets[kind],
            kind,
            split=split or self.options.split,
            half=self.half if split is None else None,
            context=self.options.truth.context,
            frames=self.options.frames,
            count=count or self.options.episodes,
        )


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure part by part."""
    bench = Bench(parse(Options, arguments, prog=prog), arguments)
    options = bench.options
    needs_truth = {"futures", "narrowing"} & set(options.parts)
    if needs_truth and (KIND not in bench.datasets or bench.ruler is None):
        raise ConfigError(
            "--parts futures, narrowing",
            got=f"{', '.join(bench.datasets)}; {'no ' if bench.ruler is None else ''}readout",
            expected=f"a dataset of {KIND} and --readout",
            fix="give them, or leave these parts out with --parts",
        )
    with Pool(options.cache, options.truth, options.workers) as pool:
        jobs: list[tuple[Window, concurrent.futures.Future[Path]]] = []
        if needs_truth:
            dataset = bench.datasets[KIND]
            chosen = fitting(dataset, options.truth, options.truth_episodes, options.split, bench.half)
            jobs = [(window, pool.submit(window, dataset.manifest.height)) for window in chosen]
        if "calibration" in options.parts:
            measure_calibration(bench)
        futures = narrowing = mass = None
        pairs = finished(jobs, bench) if needs_truth else []
        if pairs:
            futures, narrowing = measure_container(bench, pairs)
        if "mass" in options.parts and KIND in bench.datasets:
            mass = measure_mass(bench)
        if futures or narrowing or mass:
            bench.keep("mass", (futures, narrowing, mass, options.truth.leads))
            figures.hidden_mass(
                futures, narrowing, mass, options.truth.leads, options.figures / "uncertainty-mass.png"
            )
        for _, job in jobs:
            job.cancel()
    if "ood" in options.parts and KIND in bench.datasets:
        measure_ood(bench)
    print(f"done in {time.monotonic() - bench.began:.0f} s; figures in {options.figures}", flush=True)


def datasets(options: Options) -> dict[str, ShardDataset]:
    """Kind -> dataset, in the lab's order."""
    single = (options.data / "manifest.json").is_file()
    folders = [options.data] if single else sorted(options.data.glob("*/manifest.json"))
    found: dict[str, ShardDataset] = {}
    for path in folders:
        dataset = ShardDataset.open(path if single else path.parent)
        samples = dataset.manifest.samples(options.split)
        if samples:
            found[kind_of(dataset.meta(samples[0].key), where=dataset.directory)] = dataset
    asked = options.kinds or tuple(EFFECTS)
    chosen = {kind: found[kind] for kind in EFFECTS if kind in found and kind in asked}
    if not chosen or any(kind not in chosen for kind in options.kinds):
        raise ConfigError(
            "--data", got=f"{options.data} with {', '.join(found) or 'no kind'}", expected=", ".join(asked)
        )
    return chosen


def measure_calibration(bench: Bench) -> None:
    """Every kind, as calibrated, then as trained where that differs."""
    ways = [""] if bench.world.spec.sampler.noise_scale is None else ["", ".uncalibrated"]
    late = bench.late("calibration")
    slots = len(ways) * len(bench.datasets)
    for way in ways:
        imaginer, found = bench.imaginer(calibrated=not way), list[Kind]()
        for kind in bench.datasets:
            slots -= 1
            if late() and found:
                print(f"left out for want of time: {kind}{way}", flush=True)
                continue
            began, whole = time.monotonic(), bench.until("calibration")
            # What is left is shared by all that is still to come.
            end = began + (whole - began) / (slots + 1)
            windows = bench.windows(kind)
            one = calibrate_kind(kind, windows, imaginer, bench.ruler, lambda end=end: time.monotonic() > end)
            found.append(one)
            bench.add(kind_rows(one, way))
            bench.keep(f"calibration{way}", found)
            print(f"{kind}{way}: {len(one.verified)} episodes, {time.monotonic() - began:.0f} s", flush=True)
        leads = [lead for lead in EVENT_LEADS if lead <= bench.options.frames] or [bench.options.frames]
        rows, told = event_rows(found, leads, way)
        bench.add(rows)
        name = f"uncertainty-reliability{way.replace('.', '-')}.png"
        figures.reliability(found, told, bench.options.figures / name)
        if not way:
            figures.fans(found, bench.options.figures / "uncertainty-fans.png")


def finished(
    jobs: Sequence[tuple[Window, "concurrent.futures.Future[Path]"]], bench: Bench
) -> list[tuple[Window, Truth]]:
    """Episodes whose truth is made by the time that there is for it; at least one."""
    if not jobs:
        return []
    left = 0.9 * (bench.until("futures") - bench.began) + bench.began - time.monotonic()
    concurrent.futures.wait([job for _, job in jobs], timeout=max(left, 1.0))
    jobs[0][1].result()  # what cannot be made again here says so
    pairs = [(window, load_truth(job.result())) for window, job in jobs if job.done()]
    print(f"true ensembles: {len(pairs)} of {len(jobs)} episodes in time", flush=True)
    return pairs


def measure_container(
    bench: Bench, pairs: Sequence[tuple[Window, Truth]]
) -> tuple[Futures | None, Narrowing | None]:
    """Futures before contact, and how their spread narrows."""
    config, ruler = bench.options.truth, bench.ruler
    assert ruler is not None
    if bad := [name for name in QUANTITIES if name not in ruler.names(KIND)]:
        print(f"warning: by its own card the readout is too blunt for {', '.join(bad)}", flush=True)
    imaginer = bench.imaginer()
    futures = compare_futures(pairs, imaginer, ruler, config, bench.late("futures"))
    bench.add(futures.rows())
    narrowing = None
    if "narrowing" in bench.options.parts:
        import numpy as np

        residuals_NQ = np.concatenate(futures.noise_Q)
        late = bench.late("narrowing")
        narrowing = narrow_spread(pairs, imaginer, ruler, config, residuals_NQ, late)
        bench.add(narrowing.rows())
    return futures, narrowing


def measure_mass(bench: Bench) -> Mass | None:
    """Simulation-based calibration of a probed mass."""
    late = bench.late("mass")
    train = bench.windows(KIND, split="train", count=bench.options.train_episodes)
    held = bench.windows(KIND, count=4 * bench.options.episodes)
    found = probe_mass(train, held, bench.imaginer(), bench.ruler, late)
    if found is None:
        print("left out for want of time or training episodes: the probe of the mass", flush=True)
        return None
    bench.add(found.rows())
    return found


def measure_ood(bench: Bench) -> None:
    """AUROC on shifted episodes."""
    options = bench.options
    ordinary = bench.windows(KIND)
    config = OracleConfig(
        options.truth.context,
        variety=options.truth.variety,  # type: ignore[arg-type]
        exploration=options.truth.exploration,
    )
    size = bench.datasets[KIND].manifest.height
    shifted = ood.make_shifts(ordinary, ood.SHIFTS, config, size, options.workers)
    known = bench.windows(KIND, split="train", count=options.train_episodes)
    scores: dict[str, ood.Score] = {}
    first = bench.world
    scores |= ood.novel(bench.ensemble or first)
    if bench.ensemble is not None:
        first = bench.ensemble.members[0]
        count = options.e_samples * bench.ensemble.num_members
        rows = max(options.rows, count)
        scores |= ood.parts_of(Imaginer(bench.ensemble, samples=count, rows=rows, seed=options.seed))
    else:
        print("no E: it takes two runs or more", flush=True)
    scores["flow"] = ood.flow_loss(first, frames=2 * options.truth.context)
    scores["nearest"] = ood.nearest(first, known)
    if options.ood_scores:
        scores = {name: score for name, score in scores.items() if name in options.ood_scores}
    rows, told = ood.rows_of(scores, ordinary, shifted, bench.add, bench.late("ood"))
    bench.keep("ood", (told, rows))
    figures.shifted(told, rows, options.figures / "uncertainty-ood.png")
    figures.shift_pictures(ordinary, shifted, options.figures / "uncertainty-shifts.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:], "python tools/bench/uncertainty.py")
    except (ConfigError, DataError, VidworldError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
