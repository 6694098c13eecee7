"""The engine's calibration: what it refuses, what it leaves alone, and that nothing else reads the images kept aside."""
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.core.names import create_model, list_models
from anomnb.data.folder import as_data
from anomnb.data.read import Item
from anomnb.engine.engine import Engine
from anomnb.export.inferencer import Inferencer
from anomnb.models.base import FitOnce
from anomnb.models.padim import Padim

SMALL = dict(backbone="resnet18", weights="random", image_size=24)
OWN = dict(dfm=dict(pool=1), patchcore=dict(coreset_ratio=0.5))
NAMES = [n for n in list_models() if issubclass(type(create_model(n, **SMALL, **OWN.get(n, {}))), FitOnce)]
pytestmark = pytest.mark.filterwarnings("ignore:backbone 'resnet18' has random weights")
engine = Engine(quiet=True)


def noise(n, seed=0, **kw):
    g = np.random.default_rng(seed)
    return [Item(f"{seed}-{i}", image=g.integers(0, 255, (24, 24, 3), dtype=np.uint8), **{"label": 0, **kw}) for i in range(n)]


@pytest.fixture(scope="module")
def fitted(): return engine.fit(Padim(**SMALL, channels=8), noise(20), calibrate=False)


@pytest.fixture
def model(fitted):
    fitted.rules = {"": fitted.rules[""]}
    return fitted


def refused(model, data, why, **kw):
    before = dict(model.rules)
    with pytest.raises(AnomnbError, match=why):
        engine.calibrate(model, data, **kw)
    assert model.rules == before


def test_a_promise_and_what_it_says(model):
    engine.calibrate(model, noise(60, 1), false_alarm_rate=0.05)
    rule = model.rules[""]
    assert (rule.method, rule.n, rule.rank, rule.rate, rule.confidence) == ("conformal", 60, 58, 3/61, None)
    found = engine.predict(model, noise(60, 1))
    assert sum(p.is_anomalous for p in found) == 2 and sorted(p.p_value for p in found)[0] == 2/61
    model.calibrate(noise(60, 1), false_alarm_rate=0.05, confidence=0.9)
    assert model.rules[""].rank == 60 and model.rules[""].rate < 0.05 and "90 %" in model.rules[""].reason


def test_what_is_refused(model):
    refused(model, noise(20), "20 of 20 images were in the fit: 0-0")
    again = [Item("another name", image=noise(20)[3].image, label=0)]
    refused(model, noise(120, 1) + again, "1 of 121 images were in the fit: another name")
    refused(model, noise(120, 1), r"0.5 % takes 199", false_alarm_rate=0.005)
    refused(model, noise(120, 1), "false_alarm_rate=1.2", false_alarm_rate=1.2)
    refused(model, noise(120, 1), "confidence=1", confidence=1)
    refused(model, [*noise(120, 1), Item("gone", path="nowhere.png", label=0)], "1 of 121 images can't be read.*nowhere.png")
    refused(model, noise(120, 1), "did you mean 'quantile'", threshold="quantil")
    refused(model, noise(120, 1), "good and anomalous", threshold="f1")
    with pytest.raises(AnomnbError, match="not fitted"): engine.calibrate(Padim(**SMALL), noise(3))


def test_defects_are_no_part_of_a_promise(model):
    from anomnb.engine.calibration import check_good, score_images
    found = score_images(model, noise(3, 2) + noise(2, 3, label=1))
    with pytest.raises(AnomnbError, match="2 of 5 images are labelled anomalous: 3-0, 3-1"): check_good(found)


def test_copies_of_an_image_count_once(model):
    engine.calibrate(model, noise(30, 1)*4, false_alarm_rate=0.1)
    once = model.rules[""]
    engine.calibrate(model, noise(30, 1), false_alarm_rate=0.1)
    assert (once.n, once.threshold, once.scores) == (30, model.rules[""].threshold, model.rules[""].scores)


def test_a_rule_for_each_category(model):
    items = noise(30, 4, category="left") + noise(40, 5, category="right")
    engine.calibrate(model, items, false_alarm_rate=0.1, by_category=True)
    assert {k: r.n for k, r in model.rules.items() if k} == {"left": 30, "right": 40}
    p, = engine.predict(model, noise(1, 4, category="left"))
    assert p.threshold == model.rules["left"].threshold


@pytest.mark.parametrize("kind", ["torch", "onnx", "openvino"])
def test_every_runtime_keeps_the_promise(model, kind, tmp_path):
    engine.calibrate(model, noise(60, 1), false_alarm_rate=0.05)
    path = engine.export(model, kind, tmp_path / "part", data=[o.image for o in noise(4, 6)])
    images = [o.image for o in noise(30, 6)]
    theirs = Inferencer(path)
    assert theirs.rules == model.rules
    for a, b in zip(engine.predict(model, images), theirs.predict(images)):
        assert a.is_anomalous == b.is_anomalous and abs(a.p_value - b.p_value) <= 1/61 + 1e-9 and b.threshold == a.threshold


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_calibration_reads_what_is_kept_aside(name):
    items = noise(30, 8)
    aside = {o.source for o in as_data(items, 0).split().cal}
    g = np.random.default_rng(9)
    other = [Item(o.source, image=g.integers(0, 255, (24, 24, 3), dtype=np.uint8), label=0) if o.source in aside else o for o in items]
    a, b = (Engine(quiet=True).fit(create_model(name, **SMALL, **OWN.get(name, {})), o) for o in (items, other))
    mine, theirs = a.state_dict(), b.state_dict()
    assert len(aside) == 6 and mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert a.rules[""].threshold != b.rules[""].threshold and a.rules[""].rate == 1/7


def test_a_threshold_explains_itself(model):
    engine.calibrate(model, noise(99, 1), false_alarm_rate=0.05)
    text = model.explain_threshold()
    assert "score 95 of 99" in text and "a thousand good images to come that is 50 stopped" in text and "higher" in text and "4 %" in text and "6 %" in text
    model.rules[""] = model.rules[""].at(2.5, "agreed")
    assert "No false-alarm rate is promised" in model.explain_threshold() and "Nothing is decided" in Padim(**SMALL).explain_threshold()
