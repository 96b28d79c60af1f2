"""Does the report show what was measured, by itself, in a real browser?

The browser is Chromium, driven through chromedriver's WebDriver interface; these tests are skipped where it is missing.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("bjontegaard")
pytest.importorskip("matplotlib")

from hpcmref.bench import codecs, measure, search, viewer
from hpcmref.bench import report as report_page
from hpcmref.bench.curves import Curve, Point
from hpcmref.bench.metrics import METRICS
from hpcmref.bench.output import Results
from hpcmref.bench.report import html
from hpcmref.bench.run import Outcome
from hpcmref.cli import app


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Smooth colours with a detailed part at the bottom right."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    detail = random.integers(0, 256, (size[1] // 2 // 4, size[0] // 2 // 4, 3), dtype=np.uint8)
    pixels[-detail.shape[0] * 4 :, -detail.shape[1] * 4 :] = detail.repeat(4, axis=0).repeat(4, axis=1)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on two images and three codecs, with the fixed results of Kodak."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "<b> in").mkdir()
    for seed in range(2):
        picture(seed).save(folder / "<b> in" / f"{seed}.png")
    (folder / "<b> in" / "bad.png").write_text("no image")
    arguments = [
        "bench",
        str(folder / "<b> in"),
        "--codecs",
        "webp,jpeg,jpeg:subsampling=4:4:4",
        "--anchor",
        "JPEG",
        "--metrics",
        "ms-ssim,ssimulacra2",
    ]
    result = CliRunner().invoke(app, [*arguments, "--results", "kodak", "--report", str(folder / "out")])
    assert result.exit_code == 1, result.output  # because of bad.png
    assert f"The report is {folder / 'out' / 'index.html'}" in result.stdout
    return folder / "out"


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r"^const data = (.*);$", page, re.MULTILINE)
    assert found
    return json.loads(found[1])


class TestPage:
    def test_needs_nothing_but_itself(self, report: Path) -> None:
        page = (report / "index.html").read_text()
        assert "default-src 'none'" in page
        for address in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page):
            assert address.startswith("data:")
        assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}
        assert "@import" not in page

    def test_files(self, report: Path) -> None:
        names = {path.name for path in report.iterdir()}
        assert names == {"index.html", *PLOTS, "results.json", "results.csv"}
        for name in PLOTS:
            colours = Image.open(report / name).convert("RGB").getcolors(1 << 20)
            assert colours is not None
            assert len(colours) > 100
        assert json.loads((report / "results.json").read_text())["images"] == 2

    def test_the_viewer_shows_the_very_pixels(self, report: Path) -> None:
        crop_sets = data_of((report / "index.html").read_text())["crop_sets"]
        assert {each["image"] for each in crop_sets} == {"0.png", "1.png"}
        for crop_set in crop_sets:
            original = pixels_of(crop_set["original"])
            assert np.array_equal(original, np.asarray(picture(int(crop_set["image"][0]))))  # smaller than a crop
            for view in crop_set["views"]:
                assert 0.5 < view["bpp"] / crop_set["bpp"] < 2
                codec = next(each for each in CODECS if each.name == view["codec"])
                data = codec.encode(Image.fromarray(original), view["quality"])
                assert np.array_equal(pixels_of(view["src"]), np.asarray(codec.decode(data).convert("RGB")))

    def test_nothing_to_show(self) -> None:
        page = html({"dataset": "</script><!--"}, [])
        assert page.count("</script>") == 1  # names in the data cannot end it
        assert data_of(page)["dataset"] == "</script><!--"
        assert data_of(page)["crop_sets"] == []


def test_no_two_of_thirty_fixed_curves_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    looks: list[tuple[Any, str]] = []

    def kept(figure: Figure, *_: Any, **__: Any) -> None:
        looks.extend((line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines)

    monkeypatch.setattr(Figure, "savefig", kept)
    curves = [Curve(str(index), (Point(0.1, 30 + index), Point(0.5, 35 + index)), source="x") for index in range(30)]
    report_page._png(Results("set", curves, (), Outcome(), None, [], None, {}), METRICS[0])
    assert len(set(looks)) == len(curves)


PLOTS = ("rd-psnr.png", "rd-ms-ssim.png", "rd-ssimulacra2.png")
CODECS = codecs.codecs_of(["webp", "jpeg", "jpeg:subsampling=4:4:4"], [], "cpu")


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


class TestViewer:
    @pytest.mark.parametrize("rate", [0.6, 1.1, 2.3])
    def test_nearest_quality(self, rate: float) -> None:
        codec, image = codecs.PILLOW_CODECS["jpeg"], picture(3)
        every = {quality: 8 * len(codec.encode(image, quality)) / (320 * 240) for quality in codec.qualities}
        best = min(every, key=lambda quality: abs(np.log(every[quality] / rate)))
        found = search.nearest(codec, image, rate, {20: every[20], 60: every[60]})
        assert abs(every[found] / every[best] - 1) < 0.02

    def test_out_of_reach(self) -> None:
        codec, image = codecs.PILLOW_CODECS["jpeg"], picture(3)
        assert search.nearest(codec, image, 1e-3, {}) in (1, 2)  # files of the same size
        assert search.nearest(codec, image, 99, {}) == 100

    def test_the_crop_is_where_the_detail_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(viewer, "CROP", (160, 120))
        picture(4).save(tmp_path / "4.png")
        codec = codecs.PILLOW_CODECS["jpeg"]
        data = (tmp_path / "4.png").read_bytes()
        measured, _ = measure.measure(measure.Task("4.png", data, [(codec, [20, 50])]))
        crop_sets = viewer.crop_sets({"4.png": tmp_path / "4.png"}, [codec], measured)
        crop = np.asarray(picture(4))[120:, 160:]
        assert np.array_equal(pixels_of(crop_sets[0].original), crop)
        assert viewer.crop_sets({}, [codec], []) == []


# --- in a browser --------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


class Browser:
    """The little of WebDriver that is needed."""

    def __init__(self, port: int, profile: Path) -> None:
        self._root = f"http://127.0.0.1:{port}"
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
            "--window-size=1280,1500",
        ]
        options = {"binary": CHROMIUM, "args": [*flags, f"--user-data-dir={profile}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{session['sessionId']}"

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self._send("POST", f"{self._session}/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        return self._send("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def drag(self, selector: str, start: float, end: float) -> None:
        """Press, move and release the pointer at shares of the element's width, half-way down."""
        self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        x, y, width, height = self.run(
            f"const box = document.querySelector('{selector}').getBoundingClientRect();"
            "return [box.x, box.y, box.width, box.height]"
        )

        def to(share: float) -> dict[str, Any]:
            return {"type": "pointerMove", "x": round(x + share * width), "y": round(y + height / 2), "duration": 50}

        press, release = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        steps = [to(start), press, to((start + end) / 2), to(end), release]
        self._send("POST", f"{self._session}/actions", {"actions": [{"type": "pointer", "id": "p", "actions": steps}]})

    def screenshot(self) -> np.ndarray:
        png = base64.b64decode(self._send("GET", f"{self._session}/screenshot"))
        if folder := os.environ.get("HPCMREF_SCREENSHOTS"):
            Path(folder, f"{time.time():.2f}.png").write_bytes(png)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    @contextlib.contextmanager
    def phone(self, width: int) -> Iterator[None]:
        """A screen of this many CSS pixels, which is narrower than a window may be."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        command = f"{self._session}/goog/cdp/execute"
        self._send("POST", command, {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        try:
            yield
        finally:
            self._send("POST", command, {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self._send("POST", f"{self._session}/se/log", {"type": "browser"})]

    def quit(self) -> None:
        self._send("DELETE", self._session)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("there is no Chromium with chromedriver here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        opened = Browser(port, tmp_path_factory.mktemp("profile"))
        yield opened
        opened.quit()
    finally:
        driver.terminate()
        driver.wait()


@pytest.fixture
def page(browser: Browser, report: Path) -> Browser:
    browser.open(report / "index.html")
    assert browser.run("return document.documentElement.dataset.ready") == "yes"
    return browser


PATHS = "[...document.querySelectorAll('#rd-plot path.curve')]"


class TestBrowser:
    def test_no_errors_and_no_requests(self, page: Browser) -> None:
        assert page.complaints() == []
        loaded = page.run("return performance.getEntriesByType('resource').map((each) => each.name)")
        assert [name for name in loaded if not name.startswith("data:")] == []

    def test_the_curves_are_drawn(self, page: Browser) -> None:
        names = page.run(f"return {PATHS}.map((path) => path.dataset.name)")
        assert {"WebP", "JPEG", "JPEG subsampling=4:4:4", "VTM-9.1", "HPCM-Large"} <= set(names)
        lengths = page.run(f"return {PATHS}.map((path) => path.getTotalLength())")
        assert min(lengths) > 100
        shown = page.screenshot()
        for colour in page.run(f"return {PATHS}.filter((path) => !path.hasAttribute('stroke-dasharray'))"
                               ".map((path) => getComputedStyle(path).stroke)"):  # fmt: skip
            rgb = np.array([int(value) for value in re.findall(r"\d+", colour)])
            assert (np.abs(shown.astype(int) - rgb).max(axis=2) < 12).sum() > 300

    def test_the_curves_can_be_chosen(self, page: Browser) -> None:
        before = page.run(f"return {PATHS}.length")
        page.run(
            "[...document.querySelectorAll('#rd-legend label')].find((each) => each.textContent === 'VTM-9.1').click()"
        )
        assert page.run(f"return {PATHS}.length") == before - 1
        page.run(
            "[...document.querySelectorAll('#rd-metric button')].find((each) => each.textContent === 'MS-SSIM').click()"
        )
        assert page.run(f"return {PATHS}.length") == 3  # fixed results have none
        assert page.run("return [...document.querySelectorAll('#rd-plot .axis')].pop().textContent") == "MS-SSIM (dB)"

    def test_the_slider_moves(self, page: Browser) -> None:
        split = "return getComputedStyle(document.getElementById('stage')).getPropertyValue('--split')"
        assert page.run(split) == "50%"
        page.drag("#slider", 0.5, 0.5)
        middle = page.screenshot()
        page.drag("#slider", 0.5, 0.2)
        assert float(page.run(split).rstrip("%")) == pytest.approx(20, abs=1)
        moved = page.screenshot()
        box = page.run(
            "const box = document.getElementById('stage').getBoundingClientRect();"
            "return [box.left, box.top, box.right, box.bottom].map(Math.round)"
        )
        left, top, right, bottom = box
        assert (right - left, bottom - top) == (320, 240)  # a pixel of the image is one of the screen
        difference = np.abs(middle.astype(int) - moved)[top:bottom, left:right].max(axis=(0, 2))
        assert difference[:32].max() == 0  # left of the new place: the original as before
        assert difference[80:140].mean() > 2  # between the places: now the codec's

    def test_the_slider_shows_both_images_exactly(self, page: Browser) -> None:
        crop_set = page.run("return data.crop_sets[0]")
        page.drag("#slider", 0.5, 0.5)
        shown = page.screenshot()
        left, top = page.run(
            "const box = document.getElementById('stage').getBoundingClientRect(); return [box.left, box.top]"
        )
        crop = shown[round(top) : round(top) + 100, round(left) : round(left) + 320]
        assert np.array_equal(crop[:, 20:120], pixels_of(crop_set["original"])[:100, 20:120])
        assert np.array_equal(crop[:, 200:300], pixels_of(crop_set["views"][0]["src"])[:100, 200:300])

    def test_tables_and_words(self, page: Browser) -> None:
        assert page.run("return document.querySelectorAll('#numbers-table tbody tr').length") == 7 + 7 + 6
        assert "<b> in" in page.run("return document.querySelector('h1').textContent")
        assert "bad.png" in page.run("return document.getElementById('failed').textContent")
        assert page.run("return document.querySelectorAll('#time-plot circle.dot').length") == 3
        assert "of 24 images, and not of 2" in page.run("return document.getElementById('notes').textContent")

    def test_a_phone_shows_it_whole(self, browser: Browser, report: Path) -> None:
        """Nothing but tables is wider than 300 pixels, and the picture is as wide as its frame, as the button says."""
        with browser.phone(300):
            browser.open(report / "index.html")
            assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [300, 300]
            pressed = "return document.querySelector('#look-zoom [aria-pressed=true]').textContent"
            assert browser.run(pressed) == "fit"
            stage, frame = browser.run(
                "const stage = document.getElementById('stage');"
                "return [stage.getBoundingClientRect().width, stage.parentElement.clientWidth]"
            )
            assert stage == pytest.approx(frame, abs=1)
            tags = browser.run(
                "return [...document.querySelectorAll('.tag')].map((e) => e.getBoundingClientRect().right)"
            )
            assert max(tags) < 300
            browser.screenshot()

    def test_columns_without_a_figure_are_left_out(self, browser: Browser, report: Path, tmp_path: Path) -> None:
        """Of single images there are none where the anchor is a fixed result."""
        found = data_of((report / "index.html").read_text())
        rows = "return [...document.querySelectorAll('#bd-table tr')].map((row) => row.children.length)"
        every = set()
        for name, images in (("with", True), ("without", False)):
            if not images:
                for each in found["comparison"]["curves"]:
                    each["images"] = None
            (tmp_path / f"{name}.html").write_text(html(found, []))
            browser.open(tmp_path / f"{name}.html")
            (columns,) = set(browser.run(rows))
            every.add(columns)
        assert max(every) - min(every) == 2
