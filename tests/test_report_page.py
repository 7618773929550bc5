"""The page of `koff analyze` in a real browser: nothing goes wrong, all is seen, nothing runs over the edge."""

import json
import re
import shutil
import subprocess
import tempfile
from html import escape
from pathlib import Path

import pytest
from test_analyze import home, whole  # noqa: F401  fixtures

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr"
WIDTHS = (390, 1280)  # of a phone and a laptop
# The page in a frame of each width, and a script outside of it that measures. A window is never as narrow as a phone.
MEASURE = """<script>
onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
    return {
      width: frame.clientWidth, overflow: root.scrollWidth, figures: [...page.querySelectorAll("figure svg")].map(box),
      size: parseFloat(frame.contentWindow.getComputedStyle(page.body).fontSize),
      ink: frame.contentWindow.getComputedStyle(page.body).color,
      paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      bad: [...page.images].filter(i => !i.naturalWidth).length,
    };
  });
  document.title = "measured " + JSON.stringify(seen);
};
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="NO BROWSER: the report page is NOT tested; apt-get install -y chromium"
    ),
]


def opened(page: Path, folder: Path, dark: bool) -> tuple[list[dict], str]:
    """What the browser measures of the page at each width, and what it says on its console."""
    inner = escape(page.read_text(encoding="utf-8"), quote=True)
    styles = [f"width:{width}px;height:3000px;border:0" for width in WIDTHS]
    frames = "".join(f'<iframe style="{style}" srcdoc="{inner}"></iframe>' for style in styles)
    outer = folder / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8>{MEASURE}{frames}", encoding="utf-8")
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    with tempfile.TemporaryDirectory() as profile:
        words = [
            BROWSER,
            *SWITCHES.split(),
            theme,
            f"--user-data-dir={profile}",
            "--window-size=1400,3000",
            "--dump-dom",
        ]
        done = subprocess.run([*words, outer.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r"<title>measured (.*?)</title>", done.stdout)
    assert found, f"the page did not load: {done.stderr[-2000:]}"
    return json.loads(found[1]), done.stderr


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(whole, tmp_path, dark):  # noqa: F811
    seen, said = opened(whole / "report.html", tmp_path, dark)
    assert "CONSOLE" not in said, [line for line in said.splitlines() if "CONSOLE" in line]
    assert [frame["width"] for frame in seen] == list(WIDTHS)
    for frame in seen:
        assert frame["overflow"] <= frame["width"], "only tables and figures scroll sideways, in their own boxes"
        assert len(frame["figures"]) >= 9
        assert all(width > 200 and height > 80 for width, height in frame["figures"])
        assert frame["size"] >= 16
        assert frame["bad"] == 0
        ink, paper = brightness(frame["ink"]), brightness(frame["paper"])
        assert (ink > 200 > 60 > paper) if dark else (paper > 200 > 60 > ink)


def test_a_page_that_is_broken_is_noticed(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<meta name=viewport><body><div style='width:900px'>x</div><script>missing()</script>")
    seen, said = opened(page, tmp_path, dark=False)
    assert "CONSOLE" in said
    assert seen[0]["overflow"] > seen[0]["width"]
