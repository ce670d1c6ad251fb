"""Pages in a browser: no error, no request and no sideways scroll, on a telephone and on a desk."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import codistill as cd
from codistill.report.comparison import write_comparison

from .. import tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = "default-src 'none'; "
# Opens what is folded, then tells the page around it what the browser saw.
PROBE = """
<script>
const found = {errors: [], wide: []};
addEventListener("error", event => found.errors.push(String(event.message || event.target.outerHTML)), true);
addEventListener("securitypolicyviolation", event => found.errors.push("refused: " + event.blockedURI));
addEventListener("load", () => {
  const root = document.documentElement;
  found.folded = root.scrollWidth;
  document.querySelectorAll("details").forEach(each => each.open = true);
  found.open = root.scrollWidth;
  found.width = root.clientWidth;
  for (const each of document.querySelectorAll("body *")) {
    if (each.closest(".scroll, svg, .stack thead")) continue;  // they scroll, stretch, or are for readers alone
    if (each.getBoundingClientRect().right > root.clientWidth + 1) found.wide.push(each.outerHTML.slice(0, 80));
  }
  found.broken = [...document.images].filter(each => !each.naturalWidth).length;
  found.images = document.images.length;
  const loaded = performance.getEntriesByType("resource").map(each => each.name);
  found.requests = loaded.filter(each => !each.startsWith("data:"));
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
# A window has at least 500 pixels; a frame within it has any width.
AROUND = """<!doctype html><title></title>
<script>addEventListener("message", event => document.title = event.data);</script>
<iframe src="copy.html" width="{width}" height="900" style="border: 0"></iframe>
"""


def browse(page: Path, folder: Path, width: int, dark: bool) -> tuple[dict, list[str]]:
    """Open a page, and return what the probe found and what the browser wrote to its console."""
    text = page.read_text(encoding="utf-8")
    assert text.count(POLICY) == 1
    text = text.replace(POLICY, POLICY + "script-src 'unsafe-inline'; ").replace("<title>", PROBE + "<title>", 1)
    if dark:
        text = text.replace("@media (prefers-color-scheme: dark)", "@media all")
    (folder / "copy.html").write_text(text, encoding="utf-8")
    around = folder / "around.html"
    around.write_text(AROUND.format(width=width))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--window-size=1400,1000"]
    done = subprocess.run([*command, "--dump-dom", around.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.+?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")), console


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run with all sections and long names, and that of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    names = ("a class with quite a long name", "another_one_without_any_space_in_its_name", "blue")
    plain = tiny.data(name="colours")
    data = cd.Dataset("a data set of colours", plain.train, plain.test, names)
    runs = [
        cd.train(
            tiny.method(kind), data, out=folder / f"run{seed}{kind.name}", settings=tiny.settings(seed=seed), show=False
        )
        for kind, seed in ((cd.MFEF, 0), (cd.MFEF, 1), (cd.DML, 0))
    ]
    return {"run": runs[0].path / "report.html", "comparison": write_comparison([folder])}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_it_opens_without_error_request_or_sideways_scroll(pages, tmp_path, kind, width, dark):
    found, console = browse(pages[kind], tmp_path, width, dark)
    assert console == [] and found["errors"] == [] and found["requests"] == []
    assert found["width"] == width and max(found["folded"], found["open"]) <= width and found["wide"] == []
    assert found["broken"] == 0 and (found["images"] > 0) == (kind == "run")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ('<img src="https://example.com/a.png" alt="">', "errors"),
        ('<p style="width: 2000px">wide</p>', "wide"),
        ('<link rel="stylesheet" href="https://example.com/a.css">', "errors"),
    ],
)
def test_the_probe_would_notice(pages, tmp_path, harm, told):
    page = tmp_path / "harmed.html"
    page.write_text(pages["run"].read_text(encoding="utf-8").replace("<main>", f"<main>{harm}"), encoding="utf-8")
    found, _ = browse(page, tmp_path, 390, False)
    assert found[told]
