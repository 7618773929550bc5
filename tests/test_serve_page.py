"""The page of `koff serve` in a real browser: it asks the server, shows coloured answers, and fits phone and laptop."""

import json
import re
import subprocess
import tempfile

import pytest
from served import served
from test_report_page import BROWSER, SWITCHES, WIDTHS, brightness
from tiny_artifact import tiny_artifact

from koff_lightning.serving import app
from koff_lightning.serving.own import OwnEngine

# Put behind the page's own script: asks for all memories, and measures when all have answered.
DRIVE = """<script>
const sleep = () => new Promise(go => setTimeout(go, 50));
// The browser's clock runs as fast as it can, but not while it waits for a request: so a slow server gets its time.
const wait = async until => { while (!until()) { await fetch("/health"); await sleep(); } };
(async () => {
  await wait(() => models.length === 4);
  at("model").value = "";
  at("tokens").value = 8;
  at("form").requestSubmit();
  await wait(() => stop === null);
  const style = getComputedStyle(document.body), root = document.documentElement;
  document.title = "measured " + JSON.stringify({
    names: [...document.querySelectorAll("article h2")].map(e => e.textContent),
    texts: [...document.querySelectorAll(".text")].map(e => e.textContent),
    coloured: [...document.querySelectorAll(".text")].map(e => [...e.children].filter(s => s.title).length),
    notes: [...document.querySelectorAll("article .small")].map(e => e.textContent),
    heights: [...document.querySelectorAll("form select, form input, form button")].map(e => e.offsetHeight),
    fault: at("fault").textContent, width: root.clientWidth, overflow: root.scrollWidth,
    size: parseFloat(style.fontSize), ink: style.color, paper: style.backgroundColor,
  });
})();
</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="NO BROWSER: the page of koff serve is NOT tested; install chromium"),
]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_in_a_browser(tmp_path, monkeypatch, dark, width):
    page = tmp_path / "page.html"
    page.write_text(app._PAGE.read_text(encoding="utf-8").replace("</body>", DRIVE), encoding="utf-8")
    monkeypatch.setattr(app, "_PAGE", page)
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    with (
        served(OwnEngine(tiny_artifact(tmp_path / "model").folder)) as address,
        tempfile.TemporaryDirectory() as profile,
    ):
        size = f"--window-size={width},2000"
        words = [BROWSER, *SWITCHES.split(), theme, f"--user-data-dir={profile}", size, "--virtual-time-budget=120000"]
        done = subprocess.run([*words, "--dump-dom", address], capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r"<title>measured (.*?)</title>", done.stdout)
    assert found, f"the page did not answer: {done.stderr[-2000:]}"
    assert "CONSOLE" not in done.stderr
    seen = json.loads(found[1])
    assert seen["names"] == ["no memory", "de", "fr", "law"] and seen["fault"] == ""
    assert all(seen["texts"]) and all("8 tokens" in note for note in seen["notes"])
    assert seen["coloured"][0] == 0 and all(seen["coloured"][1:])
    assert seen["overflow"] <= seen["width"] and seen["size"] >= 16
    assert len({height for height in seen["heights"] if height}) == 1, "fields of one row are equally high"
    ink, paper = brightness(seen["ink"]), brightness(seen["paper"])
    assert (ink > 200 > 60 > paper) if dark else (paper > 200 > 60 > ink)
