"""Pages in headless Chromium by playwright: their errors and requests are recorded, and their contrast is measured."""

import shutil
from contextlib import contextmanager

import pytest

BINARY = shutil.which("chromium")
# Every text on the page with its colour, what it lies on (down to the page), and their contrast by WCAG 2.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((k) => top[3] * top[k] + (1 - top[3]) * under[k]).concat(1);
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const page = rgba(getComputedStyle(document.body).backgroundColor);
  const grounds = (node) => { // with a pattern, each of its colours is a ground of its own
    if (!node) return [page[3] ? page : [255, 255, 255, 1]];
    const style = getComputedStyle(node);
    const plain = grounds(node.parentElement).map((under) => over(rgba(style.backgroundColor), under));
    const drawn = [...style.backgroundImage.matchAll(/(?:rgba?|color|oklab|hsla?)\\([^()]*\\)|transparent/g)]
      .map((found) => rgba(found[0]));
    return plain.flatMap((under) => [under, ...drawn.map((colour) => over(colour, under))]);
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walk.nextNode(); text; text = walk.nextNode()) {
    const node = text.parentElement;
    if (!text.data.trim() || node.closest("script, style, noscript, datalist") || !node.checkVisibility()) continue;
    for (const ground of grounds(node)) {
      const ink = over(rgba(getComputedStyle(node).color), ground);
      const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
      found.push([(high + 0.05) / (low + 0.05), text.data.trim().slice(0, 30), node.tagName + "." + node.className]);
    }
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@contextmanager
def launched():
    """A headless Chromium; without playwright or Chromium, the tests that want one are skipped."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
    if BINARY is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BINARY, args=["--headless", "--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class RecordedPage:
    """A page that records its console messages and requests, and asserts at its end that there were none."""

    def __init__(self, browser, path, window):
        self.url, self.messages, self.requests = path.as_uri(), [], []
        self.context = browser.new_context(**window)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.messages.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.url)

    def close(self):
        """Close it, and check that it logged nothing and requested nothing else."""
        self.context.close()
        beyond = [url for url in self.requests if url != self.url and not url.startswith("data:image/png;base64,")]
        assert not self.messages, self.messages
        assert not beyond, beyond


def worst(page, number=5):
    """The texts with the least contrast: (contrast, text, where)."""
    return page.evaluate(CONTRASTS)[:number]
