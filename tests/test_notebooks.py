"""Every page runs, and shows what it showed when it was stored."""
import os

import pytest
from project import page_name, pages
from runner import PageRunner

from anomnb.core.paths import shared_data, shared_weights

PAGES = {page_name(p): p for p in pages()}


@pytest.fixture(scope="session")
def reports(request):
    "All chosen pages, begun at once and two at a time (one, where `pytest -n` has other tests beside them); each test waits for its own"
    chosen = [i.callspec.params["name"] for i in request.session.items if getattr(i, "originalname", "") == "test_page"]
    runner = PageRunner(workers=1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield {name: runner.submit(PAGES[name]) for name in chosen}
    runner.close()


@pytest.mark.parametrize("name", PAGES)
def test_page(name, reports, no_network):
    report = reports[name].result()
    no_network.extend(map(tuple, report["attempts"]))  # for the summary
    if report["error"]:
        pytest.fail(report["error"] + report["log"], pytrace=False)
    unstored = [o for o in report["stale"] if o.endswith("the stored page nothing")]
    # a page may show more where ../shared lies beside the checkout, and was stored there
    stale = report["stale"] if shared_data("hazelnut_toy") and shared_weights() else unstored
    assert not stale, f"execute nbs/{name}.ipynb with tests/tools/execute.py:\n" + "\n".join(stale)
