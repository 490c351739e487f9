"""What `peers.py` measures of every contender alike: quality, faithfulness to commands, sharpness, speed.

Shapes: B cases, T frames, C channels, H W pixels, A action dims.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from peers_data import Case
from torch import Tensor

from vidworld import media
from vidworld.evaluation.metrics import appearance, psnr
from vidworld.evaluation.windows import spaced
from vidworld.world.world import WorldModel

if TYPE_CHECKING:
    from peers import Bench

Roll = Callable[[Sequence[Case], Sequence[np.ndarray]], np.ndarray]
"""Videos uint8 [B, T, H, W, 3] of cases under commands [T, A] each."""
SHARP_FROM = 0.75
"""Sharpness is that of the last quarter."""
SHOWN_CASES, SHOWN_FRAMES = 5, 6
"""Of the picture."""


def normalised(world: WorldModel, actions: Sequence[np.ndarray]) -> Tensor:
    """Commands [B, T, A] as all contenders are told them."""
    raw = torch.as_tensor(np.stack(actions), dtype=world.dtype, device=world.device)
    return world.normalizer.actions(raw, torch.zeros(len(raw), dtype=torch.long, device=world.device))


def pixels(pictures_BTCHW: Tensor) -> np.ndarray:
    """uint8 [B, T, H, W, 3] of pictures in [-1, 1]."""
    scaled = ((pictures_BTCHW.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).movedim(2, -1).cpu().numpy()


def measured(bench: "Bench", who: str, roll: Roll, cases: Sequence[Case]) -> dict[str, tuple[float, str]]:
    """All figures of one contender, written at once."""
    options = bench.options
    rows: dict[str, tuple[float, str]] = {}
    actions = [case.actions_TA for case in cases]
    own, wrong = (rolled(roll, cases, given, options.batch) for given in (actions, actions[1:] + actions[:1]))
    truth = np.stack([case.true_THWC for case in cases])
    keep_shown(options.work / f"{who}.shown.npz", own, truth)
    held = np.broadcast_to(np.stack([case.last_HWC for case in cases])[:, None], truth.shape)
    for horizon in options.horizons:
        at = horizon - 1
        of_model, of_copy = (float(psnr(video[:, at], truth[:, at]).mean()) for video in (own, held))
        rows[f"psnr.h{horizon}"] = (of_model, "dB")
        rows[f"gain.h{horizon}"] = (of_model - of_copy, "dB above the last frame held")
    at_horizons = [horizon - 1 for horizon in options.horizons]
    errors = [
        float(np.square((video - truth.astype(np.float32))[:, at_horizons]).mean()) for video in (own, wrong)
    ]
    rows["shuffle_ratio"] = (errors[1] / errors[0], f"1, frames {options.horizons}")
    late = slice(int(SHARP_FROM * truth.shape[1]), None)
    sharp = [sharpness(video[:, late]) for video in (own, truth)]
    rows["sharpness"] = (sharp[0] / sharp[1], "of the truth's, last quarter")
    for batch in dict.fromkeys((1, options.batch)):
        some = [cases[place % len(cases)] for place in range(batch)]
        fps = speed(bench, lambda some=some: roll(some, [case.actions_TA for case in some]))
        rows[f"fps.b{batch}"] = (batch * truth.shape[1] * fps, "frames/s, pixels included")
    bench.add({f"peers.{who}.{name}": row for name, row in rows.items()})
    return rows


def keep_shown(path: Path, own_BTHWC: np.ndarray, true_BTHWC: np.ndarray) -> None:
    """A few cases at a few times, for the picture of all contenders."""
    at = (spaced(len(own_BTHWC) - 1, SHOWN_CASES), spaced(own_BTHWC.shape[1] - 1, SHOWN_FRAMES))
    np.savez_compressed(path, own=own_BTHWC[np.ix_(*at)], truth=true_BTHWC[np.ix_(*at)], times=at[1])


def picture(work: Path, path: Path) -> list[str]:
    """A block a case: the truth, below it every contender measured so far; returns their names."""
    shown = {one.name.removesuffix(".shown.npz"): np.load(one) for one in sorted(work.glob("*.shown.npz"))}
    if not shown:
        return []
    first = next(iter(shown.values()))
    alike = {name: one for name, one in shown.items() if np.array_equal(one["truth"], first["truth"])}
    blocks = []
    for case in range(len(first["truth"])):
        videos = {"truth": first["truth"][case]} | {name: one["own"][case] for name, one in alike.items()}
        labels = [f"frame {time + 1}" for time in first["times"]]
        blocks.append(media.strip(videos, list(range(len(labels))), labels=labels))
    blank = [np.full_like(blocks[0], 255)] * (len(blocks) % 2)
    columns = [np.concatenate([*blocks, *blank][side::2]) for side in (0, 1)]
    media.write_png(path, np.concatenate(columns, 1))
    return list(alike)


def rolled(roll: Roll, cases: Sequence[Case], actions: Sequence[np.ndarray], batch: int) -> np.ndarray:
    """All cases, so many at once; the last batch is filled up, since another size is compiled anew."""
    videos = []
    for first in range(0, len(cases), batch):
        places = [min(place, len(cases) - 1) for place in range(first, first + min(batch, len(cases)))]
        videos.append(roll([cases[place] for place in places], [actions[place] for place in places]))
    return np.concatenate(videos)[: len(cases)]


def sharpness(video_BTHWC: np.ndarray) -> float:
    """Energy of edges."""
    unit = video_BTHWC.astype(np.float32) / 255
    return float(np.mean([appearance(one[None], one[0])["sharpness"].mean() for one in unit]))


def speed(bench: "Bench", run: Callable[[], object], repeats: int = 3) -> float:
    """Calls a second: the median, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        bench.wait()
        began = time.perf_counter()
        run()
        bench.wait()
        taken.append(time.perf_counter() - began)
    return 1 / statistics.median(taken[1:])


def compare(bench: "Bench", found: Mapping[str, Mapping[str, tuple[float, str]]]) -> None:
    """Our speed at the fewest steps that reach a peer's PSNR, and what we are ahead by at our best."""
    options = bench.options
    last = f"psnr.h{max(options.horizons)}"
    ours = {name: rows for name, rows in found.items() if name.startswith("ours")}
    peers = {name: rows for name, rows in found.items() if name not in ours}
    rows: dict[str, tuple[float, str]] = {}
    for peer, theirs in peers.items():
        if not ours:
            break
        best = max(ours.values(), key=lambda one: one[last][0])
        for horizon in options.horizons:
            name = f"psnr.h{horizon}"
            rows[f"peers.ahead.{peer}.h{horizon}"] = (best[name][0] - theirs[name][0], "dB, ours at its best")
        reach = [name for name in ours if ours[name][last][0] >= theirs[last][0]]
        if not reach:
            print(f"no number of our steps reaches {peer}'s {last} of {theirs[last][0]:.2f} dB", flush=True)
            continue
        for batch in dict.fromkeys((1, options.batch)):
            fastest = max(reach, key=lambda name: ours[name][f"fps.b{batch}"][0])
            ratio = ours[fastest][f"fps.b{batch}"][0] / theirs[f"fps.b{batch}"][0]
            rows[f"peers.speed_at_equal_quality.{peer}.b{batch}"] = (ratio, f"times its frames/s, {fastest}")
    if rows:
        bench.add(rows)
