"""What a rollout says of itself: how sure it is, where to stop, which future is the one to look at.

Shapes: N futures, T frames, S proprio dims.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vidworld import media, plots
from vidworld.data.shards import ShardDataset
from vidworld.errors import ConfigError
from vidworld.evaluation import unsure
from vidworld.evaluation.imagining import Imagined
from vidworld.evaluation.lab_truth import kind_of
from vidworld.evaluation.quantities import subject_of
from vidworld.evaluation.readout import Readout, load_readout
from vidworld.evaluation.reward import Expression, Function, parse_reward
from vidworld.evaluation.risk import Risk, Sought, judged, rewards, seek
from vidworld.evaluation.rollout_files import GRID_SAMPLES, PLAIN, RECORDED, Shown, side_by_side
from vidworld.evaluation.rollout_inputs import Scene
from vidworld.evaluation.rollout_options import Options
from vidworld.evaluation.unsure import Stop, Unsure
from vidworld.page import Card, Report
from vidworld.world.calibration import Calibration
from vidworld.world.spec import SamplerConfig
from vidworld.world.world import WorldModel

PAGE = "report.html"
FIGURE, MAPS, CURVES = "uncertainty.png", "uncertainty.mp4", "uncertainty.npz"
RISK = "risk.mp4"
CHOSEN_SHOWN = 4


@dataclass(frozen=True)
class Appraiser:
    """What is asked of every scene; made before anything is imagined, so that a mistake is said at once."""

    options: Options
    world: WorldModel
    sampler: SamplerConfig
    readout: Readout | None
    reward: Expression | Function | None
    risk: Risk | None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    calibration: Calibration | None = None

    @classmethod
    def make(cls, options: Options, world: WorldModel, sampler: SamplerConfig) -> "Appraiser | None":
        """None where nothing is asked. Raises ConfigError for what does not go together."""
        if not options.appraises:
            return None
        if (options.uncertainty or options.stop_when_unsure) and options.futures < 2:
            raise ConfigError(
                "--samples",
                got=options.futures,
                expected="2 or more of each member to tell how sure they are",
            )
        readout = None
        if options.readout is not None:
            if len(world.spec.views) != 1:
                raise ConfigError("--readout", got=f"{len(world.spec.views)} views", expected="one view")
            readout = load_readout(options.readout, world.device)
            if options.kind is not None:
                subject_of(options.kind, readout.net.subjects, where=options.readout)
        calibration, tolerances = None, {}
        if options.stop_when_unsure:
            tolerances = unsure.parse_tolerances(options.tolerance)
            calibration = world.calibration
            if calibration is None or not calibration.fits(sampler):
                raise ConfigError(
                    "--stop-when-unsure",
                    got="a world that is not calibrated"
                    if calibration is None
                    else "another way of sampling than was calibrated",
                    expected="calibration.json of these weights and this sampler",
                    fix="run vidworld calibrate",
                )
        return cls(
            options,
            world,
            sampler,
            readout,
            parse_reward(options.reward) if options.reward else None,
            Risk.parse(options.risk) if options.risk else None,
            tolerances,
            calibration,
        )

    def __call__(self, scene: Scene, found: Imagined) -> "Appraisal":
        """Appraise the futures of one scene. Raises ConfigError where not one frame can be trusted."""
        facts: dict[str, Any] = {}
        stop = None
        if self.calibration is not None:
            stop = unsure.stop(
                unsure.measure(found), self.calibration, scene.grounding.contract, self.tolerances
            )
            facts["stopped"] = None if stop is None else stop.facts
            if stop is not None and not stop.steps:
                raise ConfigError(
                    f"--stop-when-unsure of {scene.name}",
                    got=stop.facts["because"],
                    fix="allow a larger --tolerance",
                )
            if stop is not None:
                found = found.until(stop.steps)
        kind, readings = None, {}
        if self.readout is not None:
            kind = self._kind(scene)
            readings = dict(self.readout(found.video_NTVHWC[:, :, 0], kind).quantities)
        measured = None
        if self.options.uncertainty:
            measured = unsure.measure(found, readings)
            facts["uncertainty"] = measured.facts(scene.grounding.contract)
        sought = None
        if self.risk is not None and self.reward is not None:
            reward_N = rewards(self.reward, self.world.spec, scene, found, readings)
            facts["risk"] = {"reward": self.options.reward, **judged(self.risk, reward_N, found.member_N)}
            if self.options.search:
                sought = self._seek(scene, found)
                facts["risk"]["search"] = sought.facts
        return Appraisal(found, facts, measured, stop, readings, kind, sought, self)

    def _seek(self, scene: Scene, found: Imagined) -> Sought:
        assert self.reward is not None
        assert self.risk is not None
        options = self.options
        return seek(
            self.world,
            scene,
            self.reward,
            self.risk,
            found,
            steps=options.search,
            mass=options.search_mass,
            samples=min(options.futures, max(1, options.batch // self.world.num_members)),
            seed=options.seed,
            sampler=self.sampler,
            allow_out_of_range=options.allow_out_of_range,
        )

    def _kind(self, scene: Scene) -> str:
        """What the readout is to read: as asked, as the episode says, or the one kind that it knows."""
        assert self.readout is not None
        key = scene.grounding.source.get("key")
        if self.options.kind is not None:
            return self.options.kind
        if len(self.readout.kinds) == 1:
            return self.readout.kinds[0]
        if key is None or self.options.data is None:
            raise ConfigError("--kind", got="nothing", expected=" or ".join(self.readout.kinds))
        return kind_of(ShardDataset.open(self.options.data).read(key).meta, where=key)


@dataclass(frozen=True)
class Appraisal:
    """What was found of one scene."""

    found: Imagined
    """The futures, without frames that are not to be trusted."""
    facts: dict[str, Any]
    unsure: Unsure | None
    stop: Stop | None
    readings: Mapping[str, np.ndarray]
    kind: str | None
    sought: Sought | None
    appraiser: Appraiser

    def write(self, folder: Path, scene: Scene, shown: Shown) -> None:
        """Videos, figures and the page of one scene."""
        spec = shown.spec
        frames, known = self.found.video_NTVHWC.shape[1], len(shown.context_THWC)
        futures, members = len(self.found.member_N), len(set(self.found.member_N.tolist()))
        of_members = f"{members} members, " if members > 1 else ""
        subtitle = f"{of_members}{futures} futures of {frames} frames ({frames / spec.fps:.2g} s)"
        report = Report(f"Imagined: {scene.name}", subtitle)
        report.cards(*self._cards())
        cells = {} if shown.recorded_THWC is None else {RECORDED: shown.recorded_THWC}
        cells |= dict(list(shown.rows.items())[: GRID_SAMPLES - len(cells)])
        report.section("Futures", f"{known} known frames, then imagined ones.")
        report.video(media.grid(list(cells.values()), labels=list(cells)), spec.fps)
        if self.stop is not None:
            report.section("Where it stops", f"{self.stop.facts['because']}.")
        if self.unsure is not None:
            self._write_unsure(folder, report, scene, shown)
        if "risk" in self.facts:
            self._write_risk(folder, report, shown)
        report.details("all numbers", json.dumps(self.facts, indent=1))
        report.write(folder / PAGE)

    def _cards(self) -> list[Card]:
        cards = []
        if self.unsure is not None:
            words = {"open": "what the world leaves open", "unknown": "what the model does not know"}
            for name, curve in self.unsure.pixels.items():
                cards.append(Card(f"{name.capitalize()}, last frame", f"{curve[-1]:.3f}", words[name]))
        if self.stop is not None:
            cards.append(Card("Steps kept", str(self.stop.steps), f"then {self.stop.quantity} is unsure"))
        if risk := self.facts.get("risk"):
            cards.append(Card(f"Reward, {risk['kind']}", f"{risk['value']:.4g}", f"mean {risk['mean']:.4g}"))
            if found := risk.get("search"):
                note = f"chance of so far out {found['chance_of_so_far_out']:.2g}"
                cards.append(Card("Reward, searched", f"{found['reward']:.4g}", note))
        return cards

    @property
    def files(self) -> list[str]:
        """What was written, to look at."""
        unsure_files = [MAPS, FIGURE] if self.unsure is not None else []
        return [PAGE, *unsure_files, *([RISK] if "risk" in self.facts else [])]

    def _write_unsure(self, folder: Path, report: Report, scene: Scene, shown: Shown) -> None:
        assert self.unsure is not None
        spec, contract = shown.spec, scene.grounding.contract
        arrays: dict[str, Any] = unsure.arrays(self.unsure, contract)
        np.savez(folder / CURVES, **arrays)
        sample_TVHWC = self.found.video_NTVHWC[0]
        video = unsure.maps_video(self.unsure, shown.context_THWC, sample_TVHWC)
        media.write_mp4(folder / MAPS, video, spec.fps)
        panels = [
            unsure.spreads(self.unsure, spec.fps),
            *unsure.fans(self.found, contract, spec.fps, shown.truth),
            *self._fans_of_readings(shown),
        ]
        figure = plots.draw(panels, columns=min(3, len(panels)), panel_size=(4.2, 2.4))
        media.write_bytes(folder / FIGURE, plots.to_png(figure))
        text = "Amber: what the world leaves open, the spread of samples (aleatoric). "
        if self.unsure.unknown_TVHW is not None:
            text += "Magenta: what the model does not know, the disagreement of members (epistemic)."
        report.section("How sure it is", text)
        report.video(video, spec.fps)
        report.figure(figure)

    def _fans_of_readings(self, shown: Shown) -> list[plots.Panel]:
        if not self.readings or self.kind is None or self.appraiser.readout is None:
            return []
        readout, fps = self.appraiser.readout, shown.spec.fps
        recorded = {}
        if shown.truth is not None:
            recorded = readout(shown.truth.frames_TVHWC[None, :, 0], self.kind).quantities
        named = readout.net.subjects[self.kind].named
        time_T = np.arange(1, self.found.video_NTVHWC.shape[1] + 1) / fps
        return [
            unsure.fan(
                f"{name}, as read", named[name].unit, time_T, values, recorded[name][0] if recorded else None
            )
            for name, values in self.readings.items()
        ]

    def _write_risk(self, folder: Path, report: Report, shown: Shown) -> None:
        risk = self.facts["risk"]
        reward_N = np.array(risk["rewards"])
        middle = int(np.argsort(reward_N, kind="stable")[len(reward_N) // 2])
        cells = {} if shown.recorded_THWC is None else {RECORDED: shown.recorded_THWC}
        cells[f"median: {reward_N[middle]:.3g}"] = shown.row(PLAIN, middle)
        for sample in risk["samples"][:CHOSEN_SHOWN]:
            cells[f"sample {sample}: {reward_N[sample]:.3g}"] = shown.row(PLAIN, sample)
        if self.sought is not None:
            future = side_by_side(self.sought.imagined.video_NTVHWC[0])
            video = np.concatenate([shown.context_THWC, future])
            cells[f"searched: {self.sought.facts['reward']:.3g}"] = video
        video = media.grid(list(cells.values()), len(cells), labels=list(cells), height=192)
        media.write_mp4(folder / RISK, video, shown.spec.fps)
        text = f"Reward: {risk['reward']}. "
        if (found := risk.get("search")) is not None:
            text += (
                f"A search of {found['steps']} gradient steps over the network's noise went from "
                f"{found['began_at']:.4g} to {found['reward']:.4g}. Its noise has log-likelihood "
                f"{found['log_likelihood']:.1f} (drawn: {found['log_likelihood_expected']:.1f} +- "
                f"{found['log_likelihood_sd']:.1f}); a share {found['chance_of_so_far_out']:.2g} of futures "
                "is as far out."
            )
        report.section("Which future", text)
        report.video(video, shown.spec.fps)
        rows = [[str(n), int(self.found.member_N[n]), float(reward)] for n, reward in enumerate(reward_N)]
        rows.sort(key=lambda row: row[2])
        report.table(["sample", "member", "reward"], rows, digits=4)


def cut(shown: Shown, found: Imagined) -> Shown:
    """A scene without the frames that are not to be trusted."""
    frames = found.video_NTVHWC.shape[1]
    truth = None if shown.truth is None else shown.truth.first(frames)
    return replace(shown, imagined={PLAIN: found}, truth=truth, swept=shown.swept[:frames])
