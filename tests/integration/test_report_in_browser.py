"""The report in headless Chromium: what is drawn, in light, in dark, and on a phone.

The page has no script and its policy forbids any. Where its charts are is asked by another page,
which holds the report in a frame.
"""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import result_documents as documents
from gnet_opt.bench import report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium"
    ),
]

SCREEN, PHONE = 1100, 390
DARK, LIGHT = "0", "1"

PROBE = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:WIDTHpx;height:800px" srcdoc="PAGE"></iframe>
<script>
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const box = element => {
    const r = element.getBoundingClientRect();
    return {x: r.x, y: r.y, width: r.width, height: r.height};
  };
  const seen = element => element.getBoundingClientRect().width > 0;
  const charts = [...page.querySelectorAll("svg")].filter(seen).map(svg => ({
    ...box(svg),
    title: svg.getAttribute("aria-label"),
    texts: [...svg.querySelectorAll("text")].map(box),
  }));
  const told = {
    charts, height: root.scrollHeight, width: root.scrollWidth, room: root.clientWidth,
    headings: [...page.querySelectorAll("h2")].map(h => h.textContent),
  };
  const answer = document.createElement("script");
  answer.type = "application/json";
  answer.textContent = JSON.stringify(told);
  document.body.append(answer);
};
</script>
"""

Shot = Callable[[int, str], np.ndarray[Any, Any]]


def chromium(folder: Path, *arguments: str) -> str:
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PAGES = {"full": [documents.full()], "two runs": [documents.full(), documents.full()]}
"""The second has eight results with long names, at the same places two by two."""


@pytest.fixture(scope="module", params=sorted(PAGES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("browser")
    (made / "report.html").write_text(report.render(PAGES[request.param]), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def probe(folder: Path) -> Callable[[int], dict[str, Any]]:
    """Where everything is on a page of a width."""

    @cache
    def ask(width: int) -> dict[str, Any]:
        page = html.escape((folder / "report.html").read_text(encoding="utf-8"))
        wrapper = folder / f"probe-{width}.html"
        wrapper.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", page), "utf-8")
        dom = chromium(folder, "--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri())
        _, _, answer = dom.rpartition('<script type="application/json">')
        told: dict[str, Any] = json.loads(html.unescape(answer.partition("</script>")[0]))
        return told

    return ask


@pytest.fixture(scope="module")
def screenshot(folder: Path, probe: Callable[[int], dict[str, Any]]) -> Shot:
    """The pixels of the whole page."""

    @cache
    def take(width: int, scheme: str) -> np.ndarray[Any, Any]:
        picture = folder / f"{width}-{scheme}.png"
        chromium(
            folder,
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},{probe(width)['height']}",
            f"--screenshot={picture}",
            (folder / "report.html").as_uri(),
        )
        return np.asarray(Image.open(picture, formats=["PNG"]).convert("RGB")).astype(int)

    return take


def coloured(pixels: np.ndarray[Any, Any]) -> int:
    """How many pixels are neither grey nor nearly so."""
    return int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum())


@pytest.mark.parametrize("width", [320, PHONE, 700, SCREEN])
def test_nothing_reaches_over_the_edge(width: int, probe: Callable[[int], dict[str, Any]]) -> None:
    told = probe(width)
    assert told["room"] == width
    assert told["width"] <= width
    assert told["charts"]
    for chart in told["charts"]:
        assert chart["x"] >= 0
        assert chart["x"] + chart["width"] <= width, chart["title"]
        for text in chart["texts"]:
            assert text["x"] >= 0, (chart["title"], text)
            assert text["x"] + text["width"] <= width, (chart["title"], text)


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_texts_of_a_chart_can_be_read(width: int, probe: Callable[[int], dict[str, Any]]) -> None:
    for chart in probe(width)["charts"]:
        texts = chart["texts"]
        assert min(text["height"] for text in texts) > 10, chart["title"]
        for index, one in enumerate(texts):
            for other in texts[index + 1 :]:
                across = min(one["x"] + one["width"], other["x"] + other["width"])
                across -= max(one["x"], other["x"])
                down = min(one["y"] + one["height"], other["y"] + other["height"])
                down -= max(one["y"], other["y"])
                # Boxes of lines of text touch without their letters touching.
                assert across <= 1 or down <= 4, (chart["title"], one, other)


def test_a_phone_shows_every_chart_once(probe: Callable[[int], dict[str, Any]]) -> None:
    screen, phone = probe(SCREEN), probe(PHONE)
    assert phone["headings"] == screen["headings"]
    titles = [chart["title"] for chart in screen["charts"]]
    assert [chart["title"] for chart in phone["charts"]] == titles
    assert len(titles) >= 12


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_every_chart_is_drawn_in_colour(
    width: int, scheme: str, screenshot: Shot, probe: Callable[[int], dict[str, Any]]
) -> None:
    pixels = screenshot(width, scheme)
    assert pixels.shape == (probe(width)["height"], width, 3)
    for chart in probe(width)["charts"]:
        left, top = round(chart["x"]), round(chart["y"])
        box = pixels[top : top + round(chart["height"]), left : left + round(chart["width"])]
        assert coloured(box) > 150, chart["title"]
        # The page around the figures is without strong colours.
        colours = {tuple(pixel) for pixel in box.reshape(-1, 3)[:: max(1, box.size // 30_000)]}
        assert len(colours) > 10, chart["title"]


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_light_and_dark(width: int, screenshot: Shot) -> None:
    light, dark = (screenshot(width, scheme) for scheme in (LIGHT, DARK))
    assert light.mean() > 215
    assert dark.mean() < 50
    # Letters stand out in both: some pixels are far from the ground.
    assert light.min() < 60
    assert dark.max() > 220
