"""The threshold explorer in a notebook served by Voila: dragged, priced and applied by keys in Chromium."""
import json

from test_visualizers_browser import chromium, opened, press, slider, voila  # noqa: F401

CELL = """from dataclasses import replace
from anomnb.models.padim import Padim
from anomnb.processing.decision import DecisionRule
from anomnb.visualizers.draw import draw_predictions
from anomnb.visualizers.threshold import explore_threshold
found = [replace(p, score=float(p.raw_map.max()), threshold=1.3, category="", is_anomalous=bool(p.raw_map.max() > 1.3)) for p in draw_predictions(42, size=96)]
model = Padim(backbone="resnet18", weights="random")
model.rules = {"": DecisionRule().at(1.3)}
explore_threshold(found, model)"""


def write_notebook(path):
    cell = dict(cell_type="code", id="explorer", execution_count=None, metadata={}, outputs=[], source=CELL)
    kernel = dict(display_name="python3", language="python", name="python3")
    path.write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return path


def test_drag_price_and_apply(chromium, tmp_path):  # noqa: F811
    with voila(write_notebook(tmp_path / "explorer.ipynb")) as url, opened(chromium, url, height=820) as page:
        text = lambda: page.locator("body").inner_text()
        for _ in range(3):
            press(page, slider(page, "threshold"), "ArrowRight")
        dragged = text()
        slider(page, "miss").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("t => document.body.innerText != t", arg=dragged, timeout=20_000)
        assert "cheapest here" in text() and "false alarms" in text() and "promised" not in text()
        apply = page.get_by_role("button", name="apply to the model")
        apply.click()
        page.wait_for_function("() => document.body.innerText.includes('say why')", timeout=20_000)
        page.get_by_placeholder("why this threshold").fill("agreed on the line")
        page.keyboard.press("Tab")
        apply.click()
        page.wait_for_function("() => document.body.innerText.includes('written: threshold')", timeout=20_000)
        assert "agreed on the line" in text()
        seen = page.screenshot(path=tmp_path / "explorer.png")
    assert seen.startswith(b"\x89PNG")
