import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vidworld import media
from vidworld.page import Card, Report
from vidworld.plots import Line, Panel, draw


class Page(HTMLParser):
    """Checks nesting, and collects the text, the ids and whatever a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.sources: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.sources.append((tag, value or ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def clip() -> np.ndarray:
    y, x = np.mgrid[:32, :48]
    return np.stack([np.stack([x * 5, y * 7, 0 * x + 20 * t], -1) for t in range(8)]).astype(np.uint8)


@pytest.fixture
def report(clip) -> Report:
    figure = draw([Panel((Line("model", [1, 2], [3.0, 4.0]),), "PSNR")])
    return (
        Report("Held-out episodes", "run cr5")
        .cards(Card("gain", "+3.4 dB", "at frame 16", good=True), Card("speed", "41 fps"))
        .section("Pictures", "First.\n\nSecond.")
        .table(["frame", "model", "copy"], [[1, 30.123, 20.0], [8, float("nan"), None]], caption="PSNR in dB")
        .figure(figure, "curves")
        .figure(draw([Panel((Line("other", [1, 2], [3.0, 4.0]),), "SSIM")]))
        .section("Clips")
        .image(clip[0], "the prompt")
        .video(clip, 10, "the truth")
        .videos({"sample 0": clip, "sample 1": clip[::-1]}, 10)
        .section("Settings")
        .details("configuration", "a: 1\nb: 2")
    )


def test_everything_is_in_order_and_well_formed(report):
    text = " ".join(Page(report.render()).text)
    words = ["run cr5", "+3.4 dB", "First.", "Second.", "30.12", "PSNR in dB", "curves", "the prompt",
             "the truth", "sample 0", "sample 1", "configuration", "b: 2"]  # fmt: skip
    body = text[text.index("run cr5") - 40 :]
    places = [body.index(word) for word in words]
    assert places == sorted(places)
    assert re.search(r"8\s+–\s+–", re.sub(r"\s+", " ", text)), "nothing measured is a dash"


def test_nothing_is_fetched(report):
    page = Page(report.render())
    for tag, source in page.sources:
        assert source.startswith(("data:", "#")), (tag, source[:60])
    assert "default-src 'none'" in report.render()
    assert "<script" not in report.render()
    assert len(page.ids) == len(set(page.ids))
    anchors = {source[1:] for tag, source in page.sources if tag == "a" and source.startswith("#")}
    assert anchors == {"section-1", "section-2", "section-3"}
    assert anchors <= set(page.ids)


def test_embedded_media_decode_to_what_was_given(report, clip, tmp_path):
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)"', report.render())
    assert len(videos) == 3
    for index, (video, truth) in enumerate(zip(videos, (clip, clip, clip[::-1]), strict=True)):
        (tmp_path / f"{index}.mp4").write_bytes(base64.b64decode(video))
        frames, fps = media.read_video(tmp_path / f"{index}.mp4")
        assert fps == 10
        assert abs(frames.astype(int) - truth).mean() < 6
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', report.render())
    assert picture is not None
    (tmp_path / "p.png").write_bytes(base64.b64decode(picture[1]))
    assert np.array_equal(media.read_image(tmp_path / "p.png"), clip[0])


def test_text_cannot_become_markup(clip):
    evil = '</style><script>alert(1)</script><img src="http://x/" onerror=alert(1)>'
    page = (
        Report(evil, evil)
        .cards(Card(evil, evil, evil))
        .section(evil, evil)
        .table([evil], [[evil]], caption=evil)
        .image(clip[0], evil)
        .video(clip[:1], 10, evil)
        .figure(draw([Panel((Line(evil, [1, 2], [1, 2]),), evil, evil, evil)]), evil)
        .details(evil, evil)
        .render()
    )
    assert "<script" not in page
    assert page.count("<img") == 1
    assert all(source.startswith(("data:", "#")) for _, source in Page(page).sources)


def test_it_follows_the_readers_light_or_dark(report):
    page = report.render()
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page


def test_writing_is_repeatable_and_whole(report, tmp_path):
    path = report.write(tmp_path / "deep" / "report.html")
    assert path.read_text() == report.render()
    assert report.render() == report.render()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_numbers_stand_to_the_right_and_rows_must_fit():
    page = Report("t").table(["name", "value"], [["a", 1.0], ["b", None]], digits=3).render()
    assert "<td>a</td><td class=number>1.000</td>" in page
    with pytest.raises(ValueError, match="a row of 1 cells under 2 headers"):
        Report("t").table(["name", "value"], [["a"]])
    assert "<table>" in Report("t").table(["name"], []).render()
