"""A report in one HTML file: nothing is fetched, it opens from disk, it reads well by day and by night.

report = Report("Banana, held out", "run cr5").cards(Card("PSNR gain", "+3.4 dB"))
report.section("Clips").video(frames_THWC, fps, "truth and sample").write(folder / "report.html")
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vidworld import __version__, media, plots

Cell = str | int | float | None


@dataclass(frozen=True)
class Card:
    """One headline figure: what, how much, and what that means in a few words."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None
    """Whether its target was met; None where there is none."""


@dataclass(frozen=True)
class Item:
    """Something to look into: a heading, labelled facts, and what to do about it."""

    heading: str
    facts: Mapping[str, str]
    advice: str = ""


class Report:
    """Sections, text, tables, pictures, videos and figures in the order of the calls; every call returns
    self.

    All text is escaped. Pictures are uint8 RGB [H, W, 3], videos [T, H, W, 3].
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._num_figures = 0

    def section(self, heading: str, text: str = "") -> "Report":
        """Begin a section; blank lines in the text part paragraphs."""
        anchor = f"section-{len(self._sections) + 1}"
        self._sections.append((anchor, heading))
        self._parts.append(f'<h2 id="{anchor}">{_escape(heading)}</h2>')
        return self.text(text) if text else self

    def text(self, text: str) -> "Report":
        """Add paragraphs, parted by blank lines."""
        self._parts += [f"<p>{_escape(part)}</p>" for part in text.split("\n\n") if part.strip()]
        return self

    def cards(self, *cards: Card) -> "Report":
        """Add headline figures side by side."""
        marks = {None: "", True: " good", False: " bad"}
        body = "".join(
            f'<div class="card{marks[card.good]}"><div class="name">{_escape(card.name)}</div>'
            f'<div class="value">{_escape(card.value)}</div>'
            f'<div class="note">{_escape(card.note)}</div></div>'
            for card in cards
        )
        self._parts.append(f'<div class="cards">{body}</div>')
        return self

    def items(self, *items: Item) -> "Report":
        """Add things to look into, one below the other."""
        for item in items:
            facts = "".join(
                f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>" for name, value in item.facts.items()
            )
            advice = f"<p>{_escape(item.advice)}</p>" if item.advice else ""
            self._parts.append(
                f'<div class="item"><h3>{_escape(item.heading)}</h3><dl>{facts}</dl>{advice}</div>'
            )
        return self

    def heading(self, text: str) -> "Report":
        """Add a heading within a section."""
        self._parts.append(f"<h3>{_escape(text)}</h3>")
        return self

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str = "", digits: int = 2
    ) -> "Report":
        """Add a table; floats get `digits` decimals, None is a dash, numbers stand to the right."""
        for row in rows:
            if len(row) != len(headers):
                raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {list(row)}")
        numeric = [
            bool(rows) and all(row[column] is None or not isinstance(row[column], str) for row in rows)
            for column in range(len(headers))
        ]

        def cells(tag: str, values: Sequence[Cell]) -> str:
            marked = zip(values, numeric, strict=True)
            return "".join(
                f"<{tag}{' class=number' if right else ''}>{_escape(_cell(value, digits))}</{tag}>"
                for value, right in marked
            )

        head = f"<thead><tr>{cells('th', headers)}</tr></thead>"
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        table = f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
        self._parts.append(_figure(table, caption))
        return self

    def image(self, image_HWC: np.ndarray, caption: str = "", *, lossy: bool = False) -> "Report":
        """Add a picture, as it is or as a JPEG that is several times smaller."""
        height, width = image_HWC.shape[:2]
        source = (
            _data_url("image/jpeg", media.encode_jpeg(image_HWC))
            if lossy
            else _data_url("image/png", media.encode_png(image_HWC))
        )
        picture = f'<img src="{source}" width="{width}" height="{height}" alt="{_escape(caption)}">'
        self._parts.append(_figure(picture, caption))
        return self

    def video(self, frames_THWC: np.ndarray, fps: float, caption: str = "") -> "Report":
        """Add a video that plays by itself, in a loop."""
        self._parts.append(_video(frames_THWC, fps, caption))
        return self

    def videos(self, videos: Mapping[str, np.ndarray], fps: float) -> "Report":
        """Add videos side by side, by caption."""
        body = "".join(_video(frames, fps, caption) for caption, frames in videos.items())
        self._parts.append(f'<div class="gallery">{body}</div>')
        return self

    def figure(self, figure: Figure, caption: str = "") -> "Report":
        """Add a figure of `plots.draw`, or any matplotlib figure."""
        self._num_figures += 1
        self._parts.append(_figure(plots.to_svg(figure, f"figure-{self._num_figures}"), caption, "plot"))
        return self

    def details(self, summary: str, text: str) -> "Report":
        """Add preformatted text, such as a configuration, that opens on a click."""
        self._parts.append(
            f"<details><summary>{_escape(summary)}</summary><pre>{_escape(text)}</pre></details>"
        )
        return self

    def render(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#{anchor}">{_escape(heading)}</a>' for anchor, heading in self._sections)
        navigation = f"<nav>{links}</nav>" if len(self._sections) > 2 else ""
        subtitle = f'<p class="subtitle">{_escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{_escape(self.title)}</title><style>{_CSS}</style></head>\n<body><main>"
            f"<header><h1>{_escape(self.title)}</h1>{subtitle}{navigation}</header>\n"
            + "\n".join(self._parts)
            + f"\n<footer>vidworld {_escape(__version__)}</footer></main></body></html>\n"
        )

    def write(self, path: Path | str) -> Path:
        """Write the page, whole or not at all."""
        media.write_bytes(path, self.render().encode(errors="xmlcharrefreplace"))
        return Path(path)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _cell(value: Cell, digits: int) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _figure(content: str, caption: str, kind: str = "") -> str:
    below = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{content}{below}</figure>'


def _video(frames_THWC: np.ndarray, fps: float, caption: str) -> str:
    height, width = frames_THWC.shape[1:3]
    shown = max(width, _LEAST_VIDEO_WIDTH)
    source = _data_url("video/mp4", media.encode_mp4(frames_THWC, fps))
    attributes = "autoplay loop muted playsinline controls"
    size = f'width="{shown}" height="{round(height * shown / width)}"'
    return _figure(f'<video src="{source}" {size} {attributes}></video>', caption)


_LEAST_VIDEO_WIDTH = 240
"""Pixels on the page; the player's controls would hide a smaller video."""

_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"

_CSS = """
:root { --paper: #ffffff; --ink: #1c1e21; --soft: #5f6670; --line: #e3e5e9; --wash: #f6f7f9; --link: #2563eb;
  --good: #059669; --bad: #dc2626; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e6e8eb; --soft: #9aa3ad;
  --line: #2c3036; --wash: #1d2024; --link: #7aa7ff; --good: #34d399; --bad: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 32px; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 21px; line-height: 1.3; letter-spacing: -0.01em; margin: 48px 0 8px; }
h3 { font-size: 16px; line-height: 1.4; margin: 28px 0 4px; }
p { max-width: 72ch; margin: 8px 0; }
.subtitle { color: var(--soft); font-size: 17px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 16px; font-size: 14px; }
nav a { color: var(--link); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 24px 0; }
.card { background: var(--wash); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card .name { color: var(--soft); font-size: 13px; }
.card .value { font-size: 26px; font-weight: 650; line-height: 1.35; font-variant-numeric: tabular-nums; }
.card .note { color: var(--soft); font-size: 13px; line-height: 1.4; }
.card.good .value { color: var(--good); }
.card.bad .value { color: var(--bad); }
.item { border-left: 3px solid var(--bad); background: var(--wash); border-radius: 0 10px 10px 0;
  padding: 12px 18px 14px; margin: 12px 0; }
.item h3 { margin: 0 0 4px; }
.item dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; font-size: 14px; }
.item dt { color: var(--soft); }
.item dd { margin: 0; overflow-wrap: anywhere; }
.item p { margin: 6px 0 0; font-size: 14px; }
figure { margin: 20px 0; }
figcaption { color: var(--soft); font-size: 14px; line-height: 1.5; margin-top: 6px; max-width: 80ch; }
img, video { display: block; max-width: 100%; height: auto; border-radius: 6px; }
img { background: #ffffff; }
.plot { overflow-x: auto; }
.plot svg { display: block; min-width: 600px; max-width: 100%; height: auto; }
.plot svg text { font-family: inherit !important; }
.gallery { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.gallery figure { margin: 8px 0; max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; white-space: nowrap; }
th, td { padding: 6px 20px 6px 0; border-bottom: 1px solid var(--line); }
th.number, td.number { text-align: right; padding: 6px 10px 6px 20px; }
tbody tr:hover { background: var(--wash); }
details { margin: 16px 0; }
summary { cursor: pointer; color: var(--link); font-size: 14px; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 56px; padding-top: 12px; border-top: 1px solid var(--line); color: var(--soft);
  font-size: 13px; }
"""
