"""The threshold explorer in a notebook served by Voila: dragged, priced and applied by keys in Chromium."""
import json

from test_visualizers_browser import PICTURE, chromium, opened, press, slider, voila  # noqa: F401

from anomnb.visualizers.threshold import explore_threshold
from anomnb.visualizers.threshold_costs import cheapest

FOUND = """from dataclasses import replace
from anomnb.visualizers.draw import draw_predictions
found = [replace(p, score=float(p.raw_map.max()), threshold=1.3, category="") for p in draw_predictions(42, size=96)]
"""
CELL = FOUND + """from anomnb.models.padim import Padim
from anomnb.processing.decision import DecisionRule
from anomnb.visualizers.threshold import explore_threshold
model = Padim(backbone="resnet18", weights="random")
model.rules = {"": DecisionRule().at(1.3)}
explore_threshold(found, model)"""


def write_notebook(path):
    cell = dict(cell_type="code", id="explorer", execution_count=None, metadata={}, outputs=[], source=CELL)
    kernel = dict(display_name="python3", language="python", name="python3")
    path.write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return path


def expected(steps, miss=10.):
    "What the explorer's own functions say of a slider moved by so many steps"
    exec(FOUND, names := {})
    e = explore_threshold(names["found"])
    e.threshold.value, e.miss.value = e.threshold.value + steps*e.threshold.step, miss
    return e


def cost(e): return e.facts.value.split("cost a part <b>")[1].split("<")[0]


def until(page, words): page.wait_for_function("o => document.body.innerText.includes(o)", arg=words, timeout=20_000)


def test_drag_price_and_apply(chromium, tmp_path):  # noqa: F811
    before, dragged, priced = expected(0), expected(3), expected(3, miss=1000.)
    assert len({cost(o) for o in (before, dragged, priced)}) == 3
    with voila(write_notebook(tmp_path / "explorer.ipynb")) as url, opened(chromium, url, height=820) as page:
        until(page, f"cost a part {cost(before)};")
        shown = {page.locator(PICTURE).screenshot()}
        for _ in range(3):
            press(page, slider(page, "threshold"), "ArrowRight")
            shown.add(page.locator(PICTURE).screenshot())
        assert len(shown) == 4, "each key gives another picture"
        until(page, f"cost a part {cost(dragged)};")
        slider(page, "miss").focus()
        page.keyboard.press("End")
        until(page, f"cost a part {cost(priced)};")
        apply = page.get_by_role("button", name="apply to the model")
        apply.click()
        until(page, "say why")
        page.get_by_placeholder("why this threshold").fill("agreed on the line")
        page.keyboard.press("Tab")
        apply.click()
        until(page, f"written: threshold {dragged.scores.read(dragged.state.threshold)}, agreed on the line")
        press(page, slider(page, "threshold"), "ArrowLeft")  # from the new start
        page.get_by_role("button", name="cheapest threshold").click()
        priced.go_cheapest()
        until(page, f"cost a part {cost(priced)}; cheapest here {cost(priced)}")
        readout = page.locator(".widget-slider").filter(has_text="threshold").locator(".widget-readout").inner_text()
        assert float(readout) == float(priced.scores.read(cheapest(priced.scores, priced.state)))  # a stop, kept by the browser
        seen = page.screenshot(path=tmp_path / "explorer.png")
    assert seen.startswith(b"\x89PNG")
