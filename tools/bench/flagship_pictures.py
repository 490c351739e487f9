"""Pictures of a measured world: contact sheets, and a blind look at true and imagined clips."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vidworld import media

if TYPE_CHECKING:
    from flagship import Case, Imagined

EPISODES_SHOWN, COLUMNS = 4, 8
BLIND_CLIPS, BLIND_COLUMNS, BLIND_HEIGHT = 40, 6, 96
KEY = "flagship-blind-key.json"
SHEET = "flagship-blind.jpg"


def write(
    docs: Path,
    cases: Mapping[str, Sequence["Case"]],
    imagined: Mapping[str, Sequence["Imagined"]],
    *,
    seed: int,
    run: str,
) -> None:
    """A contact sheet a kind, and the blind look with its key."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    for kind, found in imagined.items():
        path = images / f"flagship-{kind}.jpg"
        media.write_bytes(path, media.encode_jpeg(contact_sheet(cases[kind], found)))
        print(path, flush=True)
    shown = {kind: cases[kind] for kind in imagined}
    sheet, key = blind_look(shown, imagined, seed=seed)
    media.write_bytes(images / SHEET, media.encode_jpeg(sheet))
    (docs / KEY).write_text(json.dumps({"run": run, "seed": seed, "clips": key}, indent=1) + "\n")
    print(images / SHEET, docs / KEY, flush=True)


def contact_sheet(cases: Sequence["Case"], imagined: Sequence["Imagined"]) -> np.ndarray:
    """Some episodes, what happened above what was imagined, from the last known frame on."""
    rows: dict[str, np.ndarray] = {}
    places = np.linspace(0, len(cases) - 1, min(EPISODES_SHOWN, len(cases))).round().astype(int)
    for number, place in enumerate(dict.fromkeys(places.tolist()), 1):
        case, found = cases[place], imagined[place]
        rows[f"truth {number}"] = _whole(case, true_video(case))
        rows[f"imagined {number}"] = _whole(case, found.video_THWC)
    last = len(imagined[0].video_THWC)
    times = np.linspace(0, last, COLUMNS).round().astype(int).tolist()
    return media.strip(rows, times, labels=["known", *(f"+{time} frames" for time in times[1:])])


def blind_look(
    cases: Mapping[str, Sequence["Case"]], imagined: Mapping[str, Sequence["Imagined"]], *, seed: int
) -> tuple[np.ndarray, list[dict[str, object]]]:
    """A sheet of clips in an order that only the key tells: half true, half imagined, no episode twice.

    Kinds take turns. Clips show what follows the context, so that both begin with something known.
    """
    rng = np.random.default_rng(seed)
    order = {kind: rng.permutation(len(of_kind)).tolist() for kind, of_kind in cases.items()}
    clips: list[tuple[dict[str, object], np.ndarray]] = []
    while len(clips) < BLIND_CLIPS and any(len(left) > 1 for left in order.values()):
        for kind, left in order.items():
            if len(left) < 2 or len(clips) >= BLIND_CLIPS:
                continue
            for is_imagined in (False, True):
                place = left.pop()
                case, found = cases[kind][place], imagined[kind][place]
                facts: dict[str, object] = {"kind": kind, "episode": case.key, "imagined": is_imagined}
                clips.append((facts, found.video_THWC if is_imagined else true_video(case)))
    shuffled = [clips[place] for place in rng.permutation(len(clips))]
    key = [{"number": number, **facts} for number, (facts, _) in enumerate(shuffled, 1)]
    rows = {f"{number:2d}": video for number, (_, video) in enumerate(shuffled, 1)}
    half = -(-len(rows) // 2)
    last = min(len(video) for video in rows.values()) - 1
    times = np.linspace(0, last, BLIND_COLUMNS).round().astype(int).tolist()
    labels = [f"+{time + 1}" for time in times]
    names = list(rows)
    parts = [
        media.strip({name: rows[name] for name in some}, times, labels=labels, height=BLIND_HEIGHT)
        for some in (names[:half], names[half:])
        if some
    ]
    height = max(part.shape[0] for part in parts)
    padded = [
        np.pad(part, ((0, height - part.shape[0]), (0, 0), (0, 0)), constant_values=255) for part in parts
    ]
    return np.concatenate(padded, axis=1), key


def true_video(case: "Case") -> np.ndarray:
    """What followed the context [T, H, W, 3]."""
    assert case.grounding.recording is not None
    return case.grounding.recording.frames_TVHWC[:, 0]


def _whole(case: "Case", video_THWC: np.ndarray) -> np.ndarray:
    return np.concatenate([case.last_HWC[None], video_THWC])
