"""A real Chromium for tests of pages: one driver per browser, screenshots, the page's own errors.

A file of such tests says `pytestmark = pytest.mark.browser`. `RLHF_REQUIRE_BROWSER=1` turns a missing browser into a
failure; `RLHF_SCREENSHOTS=FOLDER` keeps the pictures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def _missing(what: str) -> None:
    """Skip, or fail where a browser is required."""
    advice = f"{what}; Debian: apt-get install chromium chromium-driver, then pip install -e '.[browser]'"
    if os.environ.get("RLHF_REQUIRE_BROWSER") == "1":
        pytest.fail(f"RLHF_REQUIRE_BROWSER=1, and {advice}")
    pytest.skip(advice)


@pytest.fixture
def new_browser(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return the function that starts a browser with a profile of its own; all are closed at the end.

    touch: the browser says that it has a touch screen and is a phone.
    """
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        _missing("selenium is not installed")
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not browser or not driver:
        _missing("no chromium and chromedriver")
    started: list[Any] = []

    def start(width: int = 1280, height: int = 900, touch: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={tmp_path}/profile-{len(started)}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        one = webdriver.Chrome(options=options, service=Service(driver))
        started.append(one)
        one.set_page_load_timeout(30)
        # the window cannot be made narrower than about 500 px, the page's view can
        one.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch},
        )
        if touch:
            one.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        return one

    yield start
    for one in started:
        one.quit()


@pytest.fixture
def driver(new_browser: Callable[..., Any]) -> Any:
    """Return a browser whose view is 1280 px wide."""
    return new_browser()


@pytest.fixture
def screenshot(request: pytest.FixtureRequest) -> Callable[[Any, str], Path | None]:
    """Return the function that keeps a picture of the whole page, where RLHF_SCREENSHOTS names a folder."""
    folder = os.environ.get("RLHF_SCREENSHOTS")

    def take(browser: Any, name: str) -> Path | None:
        if not folder:
            return None
        import base64

        shown = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path = Path(folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shown["data"]))
        return path

    return take


@pytest.fixture
def complaints() -> Callable[[Any], list[str]]:
    """Return the function that lists what a browser complained of since the last call: errors of scripts, requests that
    failed, breaches of the page's content security policy."""

    def since(browser: Any) -> list[str]:
        return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    return since
