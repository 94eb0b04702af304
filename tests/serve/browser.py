"""A headless Chromium of this machine, for tests of the page. Nothing is downloaded: without one they are skipped."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb",
)  # fmt: skip

# Texts that are seen and have too little contrast with what is behind them (WCAG 2, AA), as [text, ratio].
CONTRAST = """
const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
const over = (colors) => {
  context.clearRect(0, 0, 1, 1);
  for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const luminance = (rgb) => rgb.map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const place = walker.currentNode.parentElement;
  const isSeen = place.checkVisibility({visibilityProperty: true, opacityProperty: true});
  if (!walker.currentNode.data.trim() || !isSeen) continue;
  const box = place.getBoundingClientRect();
  if (box.width < 2 || box.right < 0) continue;
  const behind = [];
  for (let at = place; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
  const [a, b] = [over(behind), over([...behind, getComputedStyle(place).color])].map(luminance);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const size = parseFloat(getComputedStyle(place).fontSize);
  if (ratio < (size >= 24 ? 3 : 4.5)) found.push([walker.currentNode.data.slice(0, 30), place.className, ratio]);
}
return found;
"""


@contextmanager
def chromium(profile: Path, size: tuple[int, int] = (1280, 800)) -> Iterator[Any]:
    """A driver; `profile` is a new folder. Skips the test where there is no Chromium or no driver of it."""
    selenium = pytest.importorskip("selenium.webdriver")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver on this machine (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    if os.geteuid() == 0:  # Chromium has no sandbox for root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(executable_path=driver)
    made = selenium.Chrome(options=options, service=service)
    try:
        yield made
    finally:
        made.quit()


def emulate(driver: Any, *, width: int, height: int, scheme: str = "light", scale: float = 1) -> None:
    """A screen of these CSS pixels, and what the user prefers."""
    mobile = width < 600
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
