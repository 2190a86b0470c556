"""A page in a headless Chromium, where there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What reaches over the window's edge outside of what scrolls, as an expression in the page.
OVER = """all("body *").filter((e) => !e.closest(".scroll") && e.clientWidth
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map((e) => e.tagName + e.id + e.className)"""


def in_browser(page: Path, script: str, width: int = 1300) -> Any:
    """Open the page, run `script` in it, which ends in `return`; what it returns. `all(selector)`
    is the list of a selector's elements.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here: sorting, toggling and hovering of the page stay unproven")
    probe = page.with_name("probe.html")
    told = """<script>window.errors = []; addEventListener("error", (e) => errors.push(e.message));
    </script>"""
    answer = f"""<script>addEventListener("load", () => {{
      const all = (selector) => [...document.querySelectorAll(selector)];
      let told; try {{ told = (() => {{ {script} }})(); }} catch (e) {{ errors.push(String(e)); }}
      const out = document.createElement("pre"); out.id = "answer";
      out.textContent = JSON.stringify({{ told, errors }}); document.body.append(out); }});
    </script>"""
    text = page.read_text().replace("<meta charset", told + "<meta charset", 1)
    text = text.replace("</html>", answer + "</html>")
    if width < 500:  # no window is narrower: a frame within it
        text = f"""<iframe id="frame" style="border: 0; width: {width}px; height: 900px"
          srcdoc="{html.escape(text)}"></iframe><script>frame.onload = () => document.body.append(
          frame.contentDocument.getElementById("answer"));</script>"""
    probe.write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    flags += ["--hide-scrollbars", "--no-first-run", "--disable-background-networking"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [browser, *flags, profile, "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    answered = json.loads(html.unescape(found[1]))
    assert answered["errors"] == []
    return answered.get("told")
