"""What every test has: no network, the drawn toy set, and real data where it lies beside the checkout."""
import pytest
from offline import refuse_network


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "One process of `pytest -n` takes a test file as a whole, and of the contract a model, so that nothing is fitted twice"
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrModel(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid.split("-")[0] if "test_contract[" in nodeid else nodeid.split("::")[0]

    return ByFileOrModel(config, log)


@pytest.fixture(autouse=True)
def no_network(request):
    "Nothing is downloaded: connections to other machines raise an OSError, and the summary names the tests that tried"
    undo = refuse_network(attempts := [])
    yield attempts
    undo()
    if attempts:
        request.node.user_properties.append(("refused", ", ".join(str(a) for a in attempts[:3])))


def pytest_terminal_summary(terminalreporter):
    reports = [o for kind in terminalreporter.stats.values() for o in kind if getattr(o, "when", "") == "teardown"]
    if refused := [f"{o.nodeid}: {v}" for o in reports for k, v in o.user_properties if k == "refused"]:
        terminalreporter.section("connections refused")
        for line in refused:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def needs_data():
    "`needs_data('hazelnut_toy')` gives the folder, or skips the test"
    from anomnb.core.paths import shared_data

    def found(name):
        return shared_data(name) or pytest.skip(f"the data set {name} is not here: set ANOMNB_DATA to the folder that holds it")
    return found


@pytest.fixture(scope="session")
def needs_weights():
    "`needs_weights()` gives the ResNet-18 weights file, or skips the test"
    from anomnb.core.paths import shared_weights

    def found(name="resnet18_conv1_to_layer3.safetensors"):
        return shared_weights(name) or pytest.skip(f"the weights {name} are not here: set ANOMNB_WEIGHTS to the folder that holds them")
    return found


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    "A small drawn data set in the MVTec layout; read it, don't change it"
    from anomnb.data.toy import draw_toy
    return draw_toy(tmp_path_factory.mktemp("toy") / "toy", n_train=20, n_good=6, n_defects=1, size=128)
