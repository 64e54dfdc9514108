"""A headless Chromium of Debian's packages, driven by Selenium; it must not reach for anything from elsewhere."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

DRIVER = shutil.which("chromedriver")
PATIENCE_S = 60.0
WIDTH, HEIGHT = 1280, 900
PHONE_WIDTH, PHONE_HEIGHT = 390, 844


@contextmanager
def browser(*, dark: bool = False, phone: bool = False) -> Iterator[webdriver.Chrome]:
    """A browser that prefers the light or the dark scheme and keeps its log; `phone`: of a phone's size."""
    options = Options()
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--no-first-run", "--lang=en-GB"),
        f"--window-size={WIDTH},{HEIGHT}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        if phone:
            set_phone_height(driver, PHONE_HEIGHT)
        yield driver
    finally:
        driver.quit()


def set_phone_height(driver: webdriver.Chrome, height: int) -> None:
    """Shows the page as a phone does; a window of Chromium itself cannot be so narrow."""
    size = {"width": PHONE_WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The value of the condition as soon as it is true."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"{what} did not come about"
        time.sleep(0.1)
    return value


def text_of(driver: webdriver.Chrome, selector: str = "body") -> str:
    """The visible text of an element; empty while there is none."""
    found = driver.find_elements(By.CSS_SELECTOR, selector)
    return str(driver.execute_script("return arguments[0].innerText", found[0])) if found else ""


def take_picture(driver: webdriver.Chrome, path: str, *, phone: bool = False) -> None:
    """Writes the page as a PNG."""
    driver.execute_script("window.scrollTo(0, 0)")
    whole = int(driver.execute_script("return document.documentElement.scrollHeight"))
    _set_height(driver, whole, phone=phone)
    time.sleep(0.5)
    driver.save_screenshot(path)
    # A third of the size, and the same to the eye.
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    _set_height(driver, PHONE_HEIGHT if phone else HEIGHT, phone=phone)


def _set_height(driver: webdriver.Chrome, height: int, *, phone: bool) -> None:
    if phone:
        set_phone_height(driver, height)
    else:
        driver.set_window_size(WIDTH, height)
