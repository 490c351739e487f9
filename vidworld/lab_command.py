"""`vidworld lab`: make episodes with a ground-truth simulator, as shards; or look at one.

vidworld lab rigid --episodes 200 --seed 0 --out data/rigid
vidworld lab show container --seed 3 --out outputs/show
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro

from vidworld import media
from vidworld.config import digest, parse, to_mapping
from vidworld.errors import ConfigError, DataError
from vidworld.output import output_directory
from vidworld.types import EmbodimentSpec, Episode, Video

if TYPE_CHECKING:
    from vidworld.lab.episode import LabConfig, LabEpisode

PLANAR = "planar"
SHEET_ROWS, SHEET_COLUMNS = 8, 8
SHEET = "contact_sheet.png"
SHOWN = "episode.json"


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Make episodes with a ground-truth simulator and write them as shards (`show KIND`: look at one)."""

    kind: tyro.conf.Positional[str]
    """`planar` (no renderer needed), `rigid`, `container`, ..., or `all` for every kind that MuJoCo plays."""
    out: Path
    """Directory of the dataset; `all` makes one folder a kind in it."""
    episodes: int = 240
    frames: int | None = None
    """Frames of an episode; default 64 at 12.5 Hz (planar: 48 at 10 Hz)."""
    size: int | None = None
    """Pixels of a side: 64, 128 or 256; default 128 (planar: 64, any that 16 divides)."""
    seed: int = 0
    """Seed of the first episode; the next ones count up from it."""
    variety: Literal["one", "core", "full"] = "core"
    """`one`: one camera, table and light; `core`: four cameras and few backgrounds; `full`: all of them."""
    exploration: float = 0.35
    """Share of episodes that explore instead of following a script."""
    control: Literal["joint", "ee_delta"] = "joint"
    """What actions are: joint targets, or changes of the tool's pose."""
    forces: bool = False
    """Joint torques in the proprioception; they tell hidden masses."""
    masks: bool = True
    """Masks of what is seen where in the truth of an episode; without them it is made a quarter faster."""
    robot: Path | None = None
    """MJCF of another arm, see docs/lab.md."""
    workers: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Make one episode and save it as a clip, a film strip with masks, and its readouts."""

    kind: tyro.conf.Positional[str]
    seed: int = 0
    out: Path
    """Directory that is made."""
    frames: int = 64
    size: int = 128
    variety: Literal["one", "core", "full"] = "core"
    exploration: float = 0.35
    robot: Path | None = None
    overwrite: bool = False


def main(arguments: Sequence[str], prog: str) -> None:
    """The command `vidworld lab`."""
    if arguments and arguments[0] == "show":
        _show(parse(ShowOptions, arguments[1:], prog=f"{prog} show"))
        return
    options = parse(LabOptions, arguments, prog=prog)
    if options.episodes < 2:
        raise ConfigError("--episodes", got=options.episodes, expected="at least 2")
    if options.frames is not None and options.frames < 2:
        raise ConfigError("--frames", got=options.frames, expected="at least 2")
    kinds = kinds_known()
    if options.kind == "all":
        for kind in kinds[1:]:
            _make(dataclasses.replace(options, kind=kind, out=options.out / kind))
    elif options.kind in kinds:
        _make(options)
    else:
        raise ConfigError("simulated world", got=options.kind, expected=f"{', '.join(kinds)} or all")


def kinds_known() -> list[str]:
    """Every kind, `planar` first."""
    from vidworld.lab.effect import EFFECTS

    return [PLANAR, *EFFECTS]


@dataclass(frozen=True)
class LabSource:
    """Episodes of the lab behind the same door as robot logs; ids are `<kind>-<seed>`."""

    kind: str
    episodes: int
    seed: int
    config: "LabConfig"

    @property
    def name(self) -> str:
        """Name of the dataset that is made."""
        return f"lab_{self.kind}"

    @property
    def embodiments(self) -> tuple[EmbodimentSpec, ...]:
        """The one arm and control mode."""
        from vidworld.lab.episode import embodiment_of

        return (embodiment_of(self.config),)

    @property
    def views(self) -> tuple[str, ...]:
        """One camera."""
        return ("scene",)

    @property
    def fps(self) -> float:
        """Frames per second."""
        from vidworld.lab.effect import FRAME_S

        return 1 / FRAME_S

    @property
    def fingerprint(self) -> str:
        """Digest of what determines the bytes, the versions of the simulator included."""
        from vidworld.lab.arm import fingerprint_of
        from vidworld.lab.episode import versions

        settings = to_mapping(dataclasses.replace(self.config, robot=None))
        arm = fingerprint_of(self.config.robot) if self.config.robot else ""
        return digest([versions(), self.kind, self.episodes, self.seed, settings, arm])

    def episode_ids(self) -> list[str]:
        """Ids in order."""
        return [f"{self.kind}-{self.seed + index:06d}" for index in range(self.episodes)]

    def read(self, episode_id: str) -> Episode:
        """Simulate one episode."""
        from vidworld.lab.episode import generate

        kind, _, number = episode_id.rpartition("-")
        if kind != self.kind or not number.isdigit():
            raise DataError("no such episode", where=self.name, got=episode_id)
        return recorded(generate(kind, int(number), self.config), episode_id)


def recorded(episode: "LabEpisode", episode_id: str) -> Episode:
    """A lab episode as a source gives it: what is hidden and what came of it go into the outcome."""
    from vidworld.lab.effect import FRAME_S
    from vidworld.lab.episode import embodiment_of
    from vidworld.lab.truth import truth_of

    frames_THWC = episode.frames_THWC
    assert frames_THWC is not None, "an episode without pictures cannot be recorded"
    count = len(frames_THWC)
    return Episode(
        episode_id=episode_id,
        embodiment=embodiment_of(episode.config).embodiment,
        fps=1 / FRAME_S,
        views={"scene": Video(count, partial(_frames, frames_THWC))},
        actions_TA=episode.actions_TA,
        proprio_TS=episode.proprio_TS,
        timestamps_T=np.arange(count) * FRAME_S,
        text=episode.plan.text,
        outcome=truth_of(episode),
        source={
            "world": f"lab_{episode.kind}",
            "seed": episode.seed,
            "policy": episode.plan.policy,
            "versions": dict(episode.versions),
        },
    )


def _frames(frames_THWC: np.ndarray) -> Iterator[np.ndarray]:
    yield from frames_THWC


def _make(options: LabOptions) -> None:
    """Write one kind as shards, with a contact sheet next to them."""
    from vidworld.data.convert import ConvertOptions, convert

    source: Any
    if options.kind == PLANAR:
        from vidworld.lab.planar import PlanarConfig, PlanarSource

        size = options.size or 64
        source = PlanarSource(options.episodes, options.seed, PlanarConfig(options.frames or 48, size))
    else:
        source = LabSource(options.kind, options.episodes, options.seed, config_of(options))
        size = source.config.size
        _prepare(options.kind, source.config)
    settings = ConvertOptions(
        out=options.out, size=f"{size}x{size}", workers=options.workers, overwrite=options.overwrite
    )
    manifest = convert(source, settings)
    where = f"{options.out}: {len(manifest.samples())} episodes"
    if options.kind != PLANAR and options.out.is_dir():
        _write_sheet(source, options.out / SHEET)
        where += f", {SHEET}"
    print(f"{where}; next: vidworld inspect {options.out}")


def config_of(options: LabOptions) -> "LabConfig":
    """What the options ask of the lab. Raises ConfigError for sizes and lengths that it does not have."""
    from vidworld.lab.episode import LabConfig

    return LabConfig(
        frames=options.frames or 64,
        size=options.size or 128,
        variety=options.variety,
        exploration=options.exploration,
        control=options.control,
        forces=options.forces,
        robot=options.robot,
        masks=options.masks,
    )


def _prepare(kind: str, config: "LabConfig") -> None:
    """Fail before any episode when the arm does not load or nothing can be drawn; compile what is not yet."""
    from vidworld.lab.arm import load_arm
    from vidworld.lab.gl import offscreen
    from vidworld.lab.kernels import warm_up

    load_arm(config.robot)
    offscreen(2 * config.size)

    def announce() -> None:
        print(f"compiling what {kind} needs: a minute, once an installation", file=sys.stderr, flush=True)

    warm_up(kind, config, announce)


def _write_sheet(source: LabSource, path: Path) -> None:
    """A film strip of the first episodes, drawn again: a few seconds."""
    if path.exists():
        return
    rows: dict[str, np.ndarray] = {}
    for episode_id in source.episode_ids()[:SHEET_ROWS]:
        frames_THWC = np.stack(list(source.read(episode_id).views["scene"].frames()))
        rows[episode_id.rpartition("-")[2]] = frames_THWC
    times = np.linspace(0, source.config.frames - 1, SHEET_COLUMNS).round().astype(int)
    try:
        media.write_png(path, media.strip(rows, times.tolist()))
    except OSError as error:
        raise ConfigError(
            "the shards are complete, the contact sheet cannot be written",
            where=path,
            got=error.strerror,
            fix="free some space and run again: only the sheet is made",
        ) from None


def _show(options: ShowOptions) -> None:
    """Save a clip, a strip with masks and the readouts of one episode."""
    if options.kind not in kinds_known()[1:]:
        raise ConfigError("simulated world", got=options.kind, expected=" or ".join(kinds_known()[1:]))
    from vidworld.lab.effect import FRAME_S
    from vidworld.lab.episode import LabConfig, generate
    from vidworld.lab.truth import truth_of

    config = LabConfig(
        frames=options.frames,
        size=options.size,
        variety=options.variety,
        exploration=options.exploration,
        robot=options.robot,
    )
    _prepare(options.kind, config)
    with output_directory(options.out, SHOWN, overwrite=options.overwrite) as folder:
        episode = generate(options.kind, options.seed, config)
        frames_THWC = episode.frames_THWC
        assert frames_THWC is not None
        media.write_mp4(folder / "clip.mp4", frames_THWC, 1 / FRAME_S)
        rows = {"picture": frames_THWC}
        for name, mask in episode.masks_THW.items():
            rows[name] = _lit(frames_THWC, mask)
        times = np.linspace(0, config.frames - 1, SHEET_COLUMNS).round().astype(int)
        media.write_png(folder / "strip.png", media.strip(rows, times.tolist()))
        media.write_png(folder / "readouts.png", _readouts(episode.outcomes_T, FRAME_S))
        facts = {
            "kind": episode.kind,
            "seed": episode.seed,
            "text": episode.plan.text,
            "policy": episode.plan.policy,
            "look": dict(episode.look),
            "visible": dict(episode.visible),
            "versions": dict(episode.versions),
            "hidden": dict(episode.hidden),
            "readouts": truth_of(episode)["readouts"],
        }
        (folder / SHOWN).write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{options.out}: {episode.plan.text} ({episode.plan.policy}); clip.mp4, strip.png, readouts.png")


def _lit(frames_THWC: np.ndarray, mask_THW: np.ndarray) -> np.ndarray:
    """Pictures that are dark outside a mask."""
    share = np.where(mask_THW[..., None], 1.0, 0.25)
    return (frames_THWC * share).astype(np.uint8)


def _readouts(outcomes_T: Mapping[str, np.ndarray], step_s: float) -> np.ndarray:
    """Small line plots of every readout over time, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3
    lines = -(-len(outcomes_T) // columns)
    figure = Figure(figsize=(9, 1.6 * lines), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, (name, column) in enumerate(outcomes_T.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.plot(np.arange(len(column)) * step_s, column, color="#2a6f97", linewidth=1.4)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
