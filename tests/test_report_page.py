"""The HTML page of evm-report in a browser: no error, charts there and visible, light and dark, self-contained."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from evm_deploy.report.candidate import Candidate
from evm_deploy.report.page import page
from evm_deploy.report.scatter import Point, scatter, ticks
from evm_deploy.report.svg import Bar, bars
from evm_deploy.report.table import grouped
from tests.records import JUDGED, LAYERS, record
from tests.toolchains import CHROMIUM, need

WIDTH, HEIGHT = 1200, 2400
BAR = {"light": (0x00, 0x72, 0xB2), "dark": (0x56, 0xB4, 0xE9)}  # --ship of page.css
PAPER = {"light": (0xFC, 0xFC, 0xFB), "dark": (0x14, 0x16, 0x18)}
SCAN = {"light": (0xD5, 0x5E, 0x00), "dark": (0xE8, 0x78, 0x2A)}
SCHEME = {"dark": 0, "light": 1}  # Blink's numbers
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Seen:
    """Result of opening a page in the browser: console lines, DOM, and a screenshot."""

    console: list[str]
    dom: str
    image: Path


@pytest.fixture(scope="module")
def html() -> str:
    records = (
        record("onnx", "fp32", 1.0, layers=LAYERS, warnings=["other work on the machine"]),
        record("openvino", "int8", 0.5, 0.05, accuracy=JUDGED, layers=LAYERS),
        record("torch", "fp32", 3.0),
    )
    return page(grouped([Candidate.of_record(each) for each in records]))


def see(html: str, folder: Path, scheme: str = "light") -> Seen:
    """Open a page in headless Chromium."""
    need("chromium")
    file, image = folder / "page.html", folder / f"{scheme}.png"
    file.write_text(html, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={SCHEME[scheme]}"]
    flags += [f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=2000"]
    flags += [f"--screenshot={image}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and image.exists(), done.stderr[-2000:]
    return Seen(re.findall(r".*:CONSOLE[:(].*", done.stderr), done.stdout, image)


def share(image: Path, colour: tuple[int, int, int]) -> float:
    """Return the share of an image's pixels that have this colour."""
    with Image.open(image) as opened:
        counts = opened.convert("RGB").getcolors(opened.width * opened.height)
    return sum(count for count, found in counts if found == colour) / (WIDTH * HEIGHT)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(html, tmp_path, scheme):
    seen = see(html, tmp_path, scheme)
    assert seen.console == []
    assert seen.dom.count("<svg") == 4 and "Ship openvino int8: 2.00x faster than onnx fp32" in seen.dom
    assert share(seen.image, PAPER[scheme]) > 0.5
    other = "dark" if scheme == "light" else "light"
    assert share(seen.image, PAPER[other]) == 0
    # the bars of what is shipped: a sixth of the latency chart's width and a third of the size chart's, 14 px high
    assert share(seen.image, BAR[scheme]) > (0.16 + 0.3) * 450 * 14 / (WIDTH * HEIGHT)
    assert share(seen.image, SCAN[scheme]) > 2 * 0.35 * 450 * 14 / (WIDTH * HEIGHT)


@pytest.mark.browser
def test_the_browser_would_have_said(html, tmp_path):
    """The negative control: a script is refused by the page's own policy, and a page without bars shows none."""
    seen = see(html.replace("</body>", "<script>document.title = 1</script></body>"), tmp_path)
    assert any("Content Security Policy" in line for line in seen.console)
    bare = see(re.sub(r"<svg.*?</svg>", "", html, flags=re.S), tmp_path)
    assert share(bare.image, SCAN["light"]) < 0.35 * 450 * 14 / (WIDTH * HEIGHT)


class Addresses(HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        loads = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.found += [f"{tag} {name}" for name, _ in attrs if name in loads or name.startswith("on")]
        self.found += [tag] if tag in ("script", "link", "iframe", "object", "embed", "base", "img") else []


def test_the_page_needs_nothing_else(html):
    parser = Addresses()
    parser.feed(html)
    assert parser.found == [] and "url(" not in html and "@import" not in html
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    parser.feed('<script src="x"></script>')
    assert parser.found == ["script src", "script"]


def test_many_candidates_stay_below_a_megabyte():
    many = [
        record("onnx", "int8", 1 + i, accuracy=JUDGED, layers=LAYERS, changes={"settings": {"scan": f"s{i}"}})
        for i in range(60)
    ]
    assert len(page(grouped([Candidate.of_record(each) for each in many])).encode()) < MAX_BYTES


def test_charts_are_described_and_to_scale():
    drawn = bars("Latency", [Bar("a & <b>", 1.0, "1 ms", low=0.9, high=1.1), Bar("c", 0.55, "0.55 ms")])
    assert 'role="img"' in drawn and "<title>Latency</title>" in drawn
    assert "<desc>a &amp; &lt;b&gt;: 1 ms; c: 0.55 ms</desc>" in drawn
    assert re.findall(r'width="([\d.]+)%" height="14" class="bar ', drawn) == ["90.91", "50.00"]


def test_points_are_to_scale_and_their_labels_apart():
    points = [Point(f"candidate {i}", 1.0 + i / 100, 99.0, (1.0, 1.1)) for i in range(4)]
    drawn = scatter("t", points, "ms", "%", 100.0)
    spots = re.findall(r'<text x="([\d.]+)%" y="([\d.]+)" dx="(-?\d+)" class="label ', drawn)
    assert len(set(spots)) == len(spots) == 4 and len({y for _, y, _ in spots}) > 1
    assert ticks(0.0, 3.1) == [0.0, 1.0, 2.0, 3.0, 4.0] and ticks(98.9, 99.1)[0] <= 98.9
