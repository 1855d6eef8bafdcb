"""Opening a page in headless Chromium, and what a script found there."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH: the page was not opened in a browser"
)
WIDTHS = {"wide": 1280, "phone": 390}

_HARNESS = """<!DOCTYPE html><title>check</title>
%s
<pre id=result></pre><script>
addEventListener("load", () => {
  const check = (page, view, name) => { %s };
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    found[frame.id] = {
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      ...check(page, page.defaultView, frame.id),
    };
  }
  document.getElementById("result").textContent = JSON.stringify(found);
});
</script>"""


def inspect(page: str, folder: Path, script: str, scheme: str = "light") -> dict[str, dict[str, Any]]:
    """Open a page at desktop and phone width and return what `script` finds at each; fails on console messages.

    Args:
        page: its text.
        folder: an empty one to work in.
        script: the body of a JavaScript function of (page, view, name) that returns an object.
        scheme: light or dark.
    """
    frames = "".join(f"<iframe id={n} src=report.html width={w} height=900></iframe>" for n, w in WIDTHS.items())
    (folder / "report.html").write_text(page)
    (folder / "check.html").write_text(_HARNESS % (frames, script))
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}/profile"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    command += ["--dump-dom", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    done = subprocess.run(
        [*command, f"file://{folder}/check.html"], capture_output=True, text=True, timeout=1800, check=True
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result is not None
    found: dict[str, dict[str, Any]] = json.loads(html.unescape(result[1]))
    assert set(found) == set(WIDTHS)
    assert all(at["overflow"] == 0 for at in found.values())
    return found
