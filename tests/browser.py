"""A page in headless Chromium: where that is, and checks of what everybody must be able to use."""

from __future__ import annotations

import shutil
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

_NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea, [role], a')]
.filter((e) => e.checkVisibility())
.filter((e) => !['presentation', 'row', 'rowgroup', 'status', 'alert'].includes(e.role))
.filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim()
    || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent.trim()))
.map((e) => e.outerHTML)"""

_WORST_CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ''];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!text || !e.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 200)];
  }
  return worst;
}"""


def nameless(page: Any) -> list[str]:
    """What a person can operate or is told of, and a screen reader has no name for."""
    found: list[str] = page.evaluate(_NAMELESS)
    return found


def worst_contrast(page: Any) -> tuple[float, str]:
    """The lowest contrast of any text that is shown, and its element.

    Source: WCAG 2.2, contrast ratio.
    """
    ratio, element = page.evaluate(_WORST_CONTRAST)
    return ratio, element
