"""The report in a real browser: it draws, fits a phone, and asks the network for nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from report_runs import make_run
from trellis import report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the dev extra has it)")

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium and its driver are not installed: no `chromium` or no `chromedriver` on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    started = webdriver.Chrome(options=options, service=service)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Sixty clients: the partition is a heat map, the one picture that is a data: image.
    folder = make_run(tmp_path_factory.mktemp("runs") / "digits", clients=60, rounds=20)
    report.build(folder)
    report.compare([folder, folder], folder / "compare.html")
    return folder


def show(browser: webdriver.Chrome, page: Path, width: int = 1200, *, dark: bool = False) -> list[str]:
    """Open a page in a viewport of this width and return the addresses it asked for, data: among them."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("name", ["report.html", "compare.html"])
def test_it_asks_for_nothing_and_complains_of_nothing(browser: webdriver.Chrome, run: Path, name: str) -> None:
    page = run / name
    asked = show(browser, page)
    assert page.as_uri() in asked, "the log of requests is empty: it would prove nothing"
    assert [url for url in asked if url != page.as_uri() and not url.startswith("data:")] == []
    assert browser.get_log("browser") == []
    # The style was let through by its hash, so the policy is not merely unread.
    assert browser.execute_script("return getComputedStyle(document.querySelector('main')).maxWidth") == "1080px"


@pytest.mark.parametrize("name", ["report.html", "compare.html"])
@pytest.mark.parametrize("width", [420, 1200])
def test_every_chart_has_a_size_and_nothing_runs_over(
    browser: webdriver.Chrome, run: Path, name: str, width: int
) -> None:
    show(browser, run / name, width)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg.chart')].map(s => {"
        "const b = s.getBoundingClientRect(), drawn = s.getBBox();"
        "return [b.left, b.right, b.width, b.height, drawn.width, drawn.height, s.getAttribute('aria-label').length]})"
    )
    assert len(boxes) >= 5
    for left, right, *sizes in boxes:
        assert left >= 0
        assert right <= width
        assert min(sizes) > 10
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return innerWidth") == width


def test_the_headline_and_the_picture_of_the_data_are_there(browser: webdriver.Chrome, run: Path) -> None:
    show(browser, run / "report.html")
    shown = [tile.text for tile in browser.find_elements("css selector", ".tile")]
    for variant, text in zip(("fedavg", "fedprox"), shown, strict=True):
        final = [
            json.loads((run / f"cells/{variant}-seed{seed}/summary.json").read_text())["final"]["central"]["accuracy"]
            for seed in (0, 1, 2)
        ]
        assert variant in text
        assert f"{100 * np.mean(final):.2f}" in text
        assert f"± {100 * np.std(final, ddof=1):.2f}" in text
    heat = browser.find_element("css selector", "image.heat")
    loaded = "const i = new Image(); i.onload = () => arguments[1](i.naturalHeight); i.onerror = () => arguments[1](0);"
    assert browser.execute_async_script(loaded + "i.src = arguments[0]", heat.get_attribute("href")) == 60


def test_the_scenario_opens(browser: webdriver.Chrome, run: Path) -> None:
    show(browser, run / "report.html")
    block = browser.find_element("css selector", "details pre")
    assert not block.is_displayed()
    browser.find_element("css selector", "summary").click()
    assert block.is_displayed()
    assert block.text.strip() == (run / "scenario.yaml").read_text().strip()


def test_light_and_dark_both_have_contrast(browser: webdriver.Chrome, run: Path) -> None:
    brightness = (
        "return ['backgroundColor', 'color'].map(k => getComputedStyle(document.body)[k]"
        ".match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765)"
    )
    show(browser, run / "report.html")
    paper, ink = browser.execute_script(brightness)
    assert paper - ink > 0.7
    show(browser, run / "report.html", dark=True)
    paper, ink = browser.execute_script(brightness)
    assert ink - paper > 0.7
