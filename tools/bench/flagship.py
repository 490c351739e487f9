"""Measure a world of the lab's kinds on held-out seeds: skill by the readout ruler, pictures, actions.

    python tools/bench/flagship.py --run runs/lab --data data/lab --readout runs/readout --device cuda

Every kind's held-out episodes are imagined from their first frames under their own commands, and read by the
ruler beside the last known frame held still and beside the oracle: the true simulator with hidden values
drawn from what the context leaves open (`vidworld/evaluation/oracle.py`), played on all cores meanwhile and
kept in --oracle. Rows: `flagship.skill.<kind>[.<quantity>].h<frames>` and the errors that they are made of;
PSNR, SSIM and LPIPS with their bounds; `flagship.shuffle_ratio.<kind>`. Each is written as soon as it is
measured. With --docs also a contact sheet a kind, and a sheet of 40 clips, true and imagined, for a blind
look, its key apart (`tools/bench/blind.py` scores it).
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import flagship_pictures
import numpy as np
import torch
from flagship_measures import Case, Imagined, moving_error, picture_rows
from flagship_oracle import finished, oracle_of
from table import add_rows, cpu_name

from vidworld.config import parse
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError, DataError
from vidworld.evaluation.fidelity import hold
from vidworld.evaluation.grounding import ground_episode
from vidworld.evaluation.lab_frames import scene
from vidworld.evaluation.lab_truth import kind_of, read_truth
from vidworld.evaluation.metrics import psnr
from vidworld.evaluation.oracle import Foreseen, OracleConfig, Recorded
from vidworld.evaluation.perceptual import Lpips
from vidworld.evaluation.readout import Readout, load_readout
from vidworld.evaluation.skill import Skill, headline_errors, in_words, ruler_error, skills, too_blunt
from vidworld.evaluation.windows import spaced
from vidworld.lab.effect import EFFECTS
from vidworld.world.engine import RolloutEngine
from vidworld.world.load import load
from vidworld.world.spec import Method, SamplerConfig
from vidworld.world.world import WorldModel

Errors = list[dict[str, np.ndarray]]
SLOWEST_FIRST = ("liquid", "smoke", "container", "paint", "rigid")
"""Kinds by how long the oracle takes to play an episode."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a world of the lab's kinds."""

    run: Path
    """The world: a run, an export, or a name."""
    data: Path
    """Folder with a dataset a kind, or one dataset."""
    readout: Path
    """Directory that `vidworld readout train` wrote."""
    kinds: tuple[str, ...] = ()
    """Default: all that are there."""
    episodes: int = 40
    """Of a kind, evenly spaced over its held-out ones."""
    samples: int = 4
    horizons: tuple[int, ...] = (8, 24, 48)
    """Frames after the context."""
    oracle: Path = Path("outputs/oracle")
    """Where the oracle's futures are kept."""
    future: OracleConfig = field(default_factory=OracleConfig)
    steps: int | None = None
    """Denoising steps a frame, in place of the world's own."""
    temperature: float | None = None
    """Factor on the noise, in place of the world's own; 0 imagines the mean."""
    compare: tuple[str, ...] = ()
    """Other samplers on the same episodes, METHOD.kSTEPS such as euler.k4, or with a temperature in percent
    euler.k1.t50: rows `sampler.<that>.*`."""
    batch: int = 60
    """Rollouts side by side."""
    seed: int = 0
    device: str | None = None
    workers: int = os.cpu_count() or 1
    """Processes for the oracle."""
    budget_s: float = 540.0
    """Nothing new begins after so many seconds."""
    lpips: Path | None = None
    """Weights that tools/lpips_weights.py wrote; without them LPIPS is left out."""
    docs: Path | None = None
    """Where images/flagship-*.jpg and flagship-blind-key.json go."""
    record: Path = Path("outputs/flagship")
    """Errors of every episode, by kind."""
    out: Path = Path("benchmarks/flagship.json")
    """Rows are added here."""

    def __post_init__(self) -> None:
        for name in ("episodes", "samples", "batch", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}", got=getattr(self, name), expected="at least 1")
        if not self.horizons or min(self.horizons) < 1 or list(self.horizons) != sorted(set(self.horizons)):
            raise ConfigError("--horizons", got=self.horizons, expected="rising frames from 1 on")
        if self.batch <= self.samples:
            raise ConfigError("--batch", got=self.batch, expected=f"above --samples {self.samples}")
        for text in self.compare:
            other_sampler(SamplerConfig(), text)


class Rows:
    """Prints and saves each figure at once, and knows when time is up."""

    def __init__(self, options: Options, arguments: Sequence[str]) -> None:
        self.options, self.began = options, time.monotonic()
        gpu = (options.device or "").startswith("cuda")
        self.device = torch.cuda.get_device_name() if gpu else cpu_name()
        self.command = " ".join(["python", "tools/bench/flagship.py", *arguments])

    def add(self, rows: Mapping[str, tuple[float, str]]) -> None:
        """Some figures."""
        for name, (value, unit) in rows.items():
            print(f"{name:<56} {value:9.4g} {unit}", flush=True)
        kept = {name: (float(f"{value:.4g}"), unit) for name, (value, unit) in rows.items()}
        add_rows(self.options.out, kept, device=self.device, command=self.command, packages=("torch",))

    @property
    def left_s(self) -> float:
        """Seconds until nothing new begins."""
        return self.options.budget_s - (time.monotonic() - self.began)


def main(arguments: Sequence[str], prog: str) -> None:
    """Measure kind by kind; what time does not suffice for is said."""
    options = parse(Options, arguments, prog=prog)
    rows = Rows(options, arguments)
    world, readout = load(options.run, options.device), load_readout(options.readout, options.device or "cpu")
    perceptual = None if options.lpips is None else Lpips.read(options.lpips, world.device).of_pictures
    cases = {kind: read_cases(world, data, kind, options) for kind, data in datasets(options).items()}
    missing = [kind for kind in cases if kind not in readout.kinds]
    if missing:
        raise ConfigError("kinds of the readout", got=", ".join(readout.kinds), expected=", ".join(missing))
    # The oracle's processes are the parallelism: threads in them would only fight. This one has its threads.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        futures: dict[str, list[concurrent.futures.Future[Foreseen]]] = {}
        for kind in sorted(cases, key=SLOWEST_FIRST.index):
            futures[kind] = [
                oracle_of(pool, case, options.horizons, options.future, options.oracle)
                for case in cases[kind]
            ]
        ways = {"flagship": sampler(world, options)}
        ways |= {f"sampler.{text}": other_sampler(world.spec.sampler, text) for text in options.compare}
        imagined: dict[str, dict[str, list[Imagined]]] = {}
        for prefix, chosen in ways.items():
            engine, imagined[prefix] = RolloutEngine(world, sampler=chosen), {}
            measure = perceptual if prefix == "flagship" else None
            for kind, of_kind in cases.items():
                if rows.left_s < 0:
                    print(f"left out for want of time: {kind} of {prefix}", flush=True)
                    continue
                began = time.monotonic()
                found = imagined[prefix][kind] = list(imagine(world, engine, of_kind, options))
                print(f"{kind}: imagined in {time.monotonic() - began:.0f} s", flush=True)
                rows.add(picture_rows(kind, world, of_kind, found, options.horizons, measure, prefix))
        if options.docs is not None:
            flagship_pictures.write(
                options.docs, cases, imagined["flagship"], seed=options.seed, run=str(options.run)
            )
        for kind in imagined["flagship"]:
            known = finished(futures[kind], rows.left_s)
            print(f"oracle of {kind}: {len(known)} of {len(cases[kind])} episodes in time", flush=True)
            for prefix, of_way in imagined.items():
                if len(known) > 1 and kind in of_way:
                    judge(kind, readout, cases[kind], of_way[kind], known, options, rows, prefix)
        for job in (job for of_kind in futures.values() for job in of_kind):
            job.cancel()


def datasets(options: Options) -> dict[str, ShardDataset]:
    """Kind -> dataset, in the lab's order; one dataset may hold several kinds."""
    paths = [options.data] if (options.data / "manifest.json").is_file() else sorted(options.data.iterdir())
    found: dict[str, ShardDataset] = {}
    for path in paths:
        if not (path / "manifest.json").is_file():
            continue
        dataset = ShardDataset.open(path)
        for sample in dataset.manifest.samples("val"):
            found.setdefault(kind_of(dataset.meta(sample.key), where=path), dataset)
            if len(paths) > 1:
                break
    asked = options.kinds or tuple(EFFECTS)
    chosen = {kind: found[kind] for kind in EFFECTS if kind in found and kind in asked}
    if not chosen or any(kind not in chosen for kind in options.kinds):
        raise ConfigError(
            "--data", got=f"{options.data} with {', '.join(found) or 'no kind'}", expected=asked
        )
    return chosen


def read_cases(world: WorldModel, dataset: ShardDataset, kind: str, options: Options) -> list[Case]:
    """The held-out episodes of a kind, and what is compared of them."""
    context, last = options.future.context, max(options.horizons)
    samples = [
        sample
        for sample in dataset.manifest.samples("val")
        if sample.frames >= context + last
        and kind_of(dataset.meta(sample.key), where=dataset.directory) == kind
    ]
    if not samples:
        raise DataError(
            f"held-out episodes of {kind} of {context} + {last} frames", where=dataset.directory, got="none"
        )
    chosen = [samples[place] for place in spaced(len(samples) - 1, min(len(samples), options.episodes))]
    at = [context - 1 + horizon for horizon in options.horizons]
    cases = []
    for sample in chosen:
        where = f"{sample.key} of {dataset.directory}"
        grounding = ground_episode(dataset, sample.key, world.spec, context=context, frames=last)
        episode = dataset.read(sample.key)
        frames_THWC = scene(episode)
        cases.append(
            Case(
                sample.key,
                grounding,
                read_truth(episode.meta, frames_THWC, where=where)[at],
                frames_THWC[at],
                frames_THWC[context - 1],
                Recorded.of(episode, dataset.manifest.height, where),
            )
        )
    return cases


def sampler(world: WorldModel, options: Options) -> SamplerConfig:
    """The world's own, with other steps and temperature if asked."""
    return world.spec.sampler.changed(steps=options.steps, temperature=options.temperature)


def other_sampler(own: SamplerConfig, text: str) -> SamplerConfig:
    """The world's own with method, steps and temperature of METHOD.kSTEPS[.tPERCENT]; raises ConfigError."""
    method, _, numbers = text.partition(".k")
    steps, _, percent = numbers.partition(".t")
    if method not in get_args(Method) or not (steps.isdigit() and (percent or "0").isdigit()):
        methods = ", ".join(get_args(Method))
        raise ConfigError("--compare", got=text, expected=f"METHOD.kSTEPS[.tPERCENT], METHOD of {methods}")
    heat = int(percent) / 100 if percent else own.temperature
    return dataclasses.replace(own, method=method, steps=int(steps), temperature=heat, noise_scale=None)


@torch.no_grad()
def imagine(
    world: WorldModel, engine: RolloutEngine, cases: Sequence[Case], options: Options
) -> Iterator[Imagined]:
    """Futures of each case under its own commands, and one under those of the next case."""
    samples = options.samples
    together = min(len(cases), options.batch // (samples + 1))
    at = [horizon - 1 for horizon in options.horizons]
    for first in range(0, len(cases), together):
        # The last group is filled up: another batch size would be captured anew.
        places = [min(first + place, len(cases) - 1) for place in range(together)]
        state = world.reset(
            [cases[place].grounding.prompt for place in places],
            samples,
            options.seed,
            sample_ids=[place * samples + sample for place in places for sample in range(samples)],
            sampler=engine.sampler,
            allow_out_of_range=True,
        )
        own = [cases[place].actions_TA for place in places for _ in range(samples)]
        other = [cases[(place + 1) % len(cases)].actions_TA for place in places]
        rows = [*range(len(own)), *range(0, len(own), samples)]
        found = engine.rollout(state.select(rows), np.stack(own + other), allow_out_of_range=True)
        assert found.video_BTVHWC is not None
        video_BTHWC = found.video_BTVHWC[:, :, 0].cpu().numpy()
        for index, place in enumerate(dict.fromkeys(places)):
            mine = slice(index * samples, (index + 1) * samples)
            yield Imagined(
                video_BTHWC[mine][:, at],
                video_BTHWC[len(own) + index][at],
                video_BTHWC[index * samples],
            )
            assert place == first + index


def judge(
    kind: str,
    readout: Readout,
    cases: Sequence[Case],
    imagined: Sequence[Imagined],
    oracle: Mapping[int, Foreseen],
    options: Options,
    rows: Rows,
    prefix: str = "flagship",
) -> None:
    """Read everything with the ruler, and add the rows of skill."""
    columns = len(options.horizons)
    errors: dict[str, Errors] = {"imagined": [], "held": [], "oracle": [], "ruler": []}
    moving: dict[str, Errors] = {"imagined": [], "held": [], "oracle": []}
    oracle_psnr = []
    for place in oracle:
        case, seen = cases[place], oracle[place].frames_MTHWC
        last = hold(readout(case.last_HWC[None, None], kind), 0, columns)
        videos = {"imagined": imagined[place].frames_MTHWC, "oracle": seen, "ruler": case.frames_THWC[None]}
        for who, frames in videos.items():
            errors[who].append(headline_errors(readout(frames, kind), case.truth))
        errors["held"].append(headline_errors(last, case.truth))
        still = np.broadcast_to(case.last_HWC, (1, *case.frames_THWC.shape))
        for who, frames in (("imagined", videos["imagined"]), ("held", still), ("oracle", seen)):
            error_MT = moving_error(frames, case.frames_THWC, case.last_HWC)
            moving[who].append({"moving_pixels": error_MT})
        oracle_psnr.append(psnr(seen, np.broadcast_to(case.frames_THWC, seen.shape)).mean(0))
    card = readout.errors[kind]
    bad = too_blunt(kind, card)
    found: dict[str, tuple[float, str]] = {
        f"{prefix}.psnr.oracle.{kind}.h{horizon}": (value, f"dB, {len(oracle)} episodes")
        for horizon, value in zip(options.horizons, np.mean(oracle_psnr, 0), strict=True)
    }
    for column, horizon in enumerate(options.horizons):
        table = skills(
            errors["imagined"], errors["held"], errors["oracle"], column, leave_out=bad, seed=options.seed
        )
        # No ruler is needed for this one, and it is part of no mean.
        by_pixels = skills(moving["imagined"], moving["held"], moving["oracle"], column, seed=options.seed)
        table["moving_pixels"] = by_pixels["moving_pixels"]
        for name, skill in table.items():
            notes = f"1, {in_words(name, skill)}"
            if name == "moving_pixels":
                notes += "; squared errors, no ruler"
            elif name:
                notes += f"; {ruler_error(name, kind, card)}{': too blunt' if name in bad else ''}"
            else:
                notes += left_out(table, skill, bad)
            full = f"{prefix}.skill.{kind}.{name}.h{horizon}".replace("..", ".")
            if skill.value is None:
                print(f"{full:<56} nothing to foresee ({notes})", flush=True)
            else:
                found[full] = (skill.value, notes)
        told = [(name, who, one) for who, one in errors.items() for name in one[0]]
        told += [("moving_pixels", who, one) for who, one in moving.items()]
        for name, who, of_who in told:
            means = [float(np.nanmean(one[name][..., column])) for one in of_who if known(one, name, column)]
            if means:
                found[f"{prefix}.error.{kind}.{name}.{who}.h{horizon}"] = (
                    float(np.mean(means)), f"{len(means)} episodes",
                )  # fmt: skip
    worth = [one.effective_draws for one in oracle.values() if np.isfinite(one.effective_draws)]
    if worth:
        found[f"{prefix}.oracle_draws.{kind}"] = (
            float(np.median(worth)),
            f"effective of {options.future.draws}, median of {len(worth)} episodes",
        )
    rows.add(found)
    if prefix != "flagship":
        return
    options.record.mkdir(parents=True, exist_ok=True)
    raw = {
        who: [{name: np.round(value, 6).tolist() for name, value in one.items()} for one in of_who]
        for who, of_who in errors.items()
    }
    facts = {"kind": kind, "horizons": options.horizons, "episodes": [cases[place].key for place in oracle]}
    (options.record / f"errors-{kind}.json").write_text(json.dumps(facts | {"errors": raw}) + "\n")


def left_out(table: Mapping[str, Skill], mean: Skill, bad: Sequence[str]) -> str:
    """Why headline quantities are not in a kind's mean."""
    why = {
        name: "nothing to foresee" if one.value is None else "ruler too blunt"
        for name, one in table.items()
        if name and name not in (*mean.used, "moving_pixels")
    }
    words = "".join(f"; without {name}: {reason}" for name, reason in why.items())
    return words + ("; the ruler is too blunt for what is left" if set(mean.used) & set(bad) else "")


def known(errors: Mapping[str, np.ndarray], name: str, column: int) -> bool:
    """Whether the truth shows this quantity there."""
    return bool(np.isfinite(errors[name][..., column]).any())


if __name__ == "__main__":
    from vidworld.errors import VidworldError

    try:
        main(sys.argv[1:], "python tools/bench/flagship.py")
    except VidworldError as error:
        raise SystemExit(f"error: {error}") from None
