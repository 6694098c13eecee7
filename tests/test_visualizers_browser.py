"""The explorer where it lives: a notebook served by Voila, moved by keys in Chromium."""
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

CELL = """from anomnb.visualizers.draw import draw_predictions
from anomnb.visualizers.heatmap import explore_heatmap
explore_heatmap(draw_predictions({n}, size={size}))"""
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-proxy-server"]
PICTURE = "img.widget-image"


def write_notebook(path, n=7, size=128):
    cell = dict(cell_type="code", id="explorer", execution_count=None, metadata={}, outputs=[], source=CELL.format(n=n, size=size))
    kernel = dict(display_name="python3", language="python", name="python3")
    path.write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return path


@pytest.fixture
def chromium():
    "Chromium's path; without the tools the test is skipped, and on a CI machine it fails"
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    missing = [o for o in ("voila", "playwright", "ipykernel") if importlib.util.find_spec(o) is None] + ([] if found else ["chromium"])
    if missing:
        why = f"the browser test needs {', '.join(missing)}: pip install -e '.[dev]', and the system's chromium"
        pytest.fail(why) if os.environ.get("CI") or os.environ.get("ANOMNB_CI") else pytest.skip(why)
    return found


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_served(server, url, log, seconds=90):
    for _ in range(seconds*5):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url + "voila/static/", timeout=2):
                return url
        except urllib.error.HTTPError:  # any answer means that it listens
            return url
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"Voila did not start:\n{log.read_text()[-2000:]}")


@contextmanager
def voila(notebook):
    "Serve a notebook on a free port of this machine; the whole process group ends with the block"
    url, log = f"http://127.0.0.1:{(port := free_port())}/", notebook.with_suffix(".log")
    env = {**os.environ, "JUPYTER_RUNTIME_DIR": str(notebook.parent / "runtime"), "IPYTHONDIR": str(notebook.parent / "ipython"),
           "JUPYTER_CONFIG_DIR": str(notebook.parent / "config"), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "voila", str(notebook), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=notebook.parent, start_new_session=True)
    try:
        yield wait_until_served(server, url, log)
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(server.pid, sign)
                server.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


@contextmanager
def opened(chromium, url, width=1000, height=760):
    "A page with the explorer on it"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            page = browser.new_page(viewport=dict(width=width, height=height))
            local = (url, "data:", "blob:")  # no fonts from afar
            page.route("**/*", lambda r: r.continue_() if r.request.url.startswith(local) else r.abort())
            page.goto(url, timeout=120_000, wait_until="domcontentloaded")
            page.wait_for_selector(PICTURE, timeout=120_000)
            page.wait_for_function(f"document.querySelector('{PICTURE}').naturalWidth > 0", timeout=60_000)
            yield page
        finally:
            browser.close()


def press(page, handle, key):
    "Press a key on a control and return the seconds until another picture is shown"
    before = page.eval_on_selector(PICTURE, "o => o.src")
    handle.focus()
    start = time.perf_counter()
    page.keyboard.press(key)
    page.wait_for_function("([q, src]) => { const o = document.querySelector(q); return o.src != src && o.complete && o.naturalWidth > 0 }",
                           arg=[PICTURE, before], timeout=20_000, polling=5)
    return time.perf_counter() - start


def slider(page, name):
    row = page.locator(".widget-hbox.widget-slider, .widget-slider").filter(has_text=name)
    return row.first.locator(".noUi-handle")


def test_the_picture_follows_the_keys(chromium, tmp_path):
    with voila(write_notebook(tmp_path / "explorer.ipynb")) as url, opened(chromium, url) as page:
        shown = [page.locator(PICTURE).screenshot()]
        for name, key in [("opacity", "ArrowRight"), ("threshold", "ArrowRight"), ("image", "ArrowRight")]:
            press(page, slider(page, name), key)
            shown.append(page.locator(PICTURE).screenshot())
        assert len(set(shown)) == 4, "each key gives another picture"
        title = page.locator(".widget-html").first.inner_text()
        kind = page.locator(".widget-dropdown").filter(has_text="kind").locator("select")
        kind.select_option("good")
        page.wait_for_function("t => document.querySelector('.widget-html').innerText != t", arg=title, timeout=20_000)
        assert "good/0" in page.locator(".widget-html").first.inner_text()
        seen = page.screenshot(path=tmp_path / "explorer.png")
    assert seen.startswith(b"\x89PNG")
