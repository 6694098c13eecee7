"""The engine's calibration: what it refuses, what it leaves alone, and that nothing else reads the images kept aside."""
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.core.names import create_model, list_models, model_arguments, model_class
from anomnb.data.folder import as_data
from anomnb.data.read import Item
from anomnb.engine.engine import Engine
from anomnb.export.inferencer import Inferencer
from anomnb.models.base import FitOnce
from anomnb.models.padim import Padim

SMALL = dict(backbone="resnet18", weights="random", image_size=24)
OWN = dict(dfm=dict(pool=1), patchcore=dict(coreset_ratio=0.5))
NAMES = [n for n in list_models() if issubclass(model_class(n), FitOnce) and "layers" in model_arguments(n)]  # those that stand on any backbone
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
    refused(model, noise(20), "20 of 20 images were in the fit: 0-0", false_alarm_rate=0.1)
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


def test_recall_by_kind_and_a_picture(model):
    engine.calibrate(model, noise(99, 1), false_alarm_rate=0.05)
    defects = engine.predict(model, noise(6, 7, label=1, kind="hole"))
    told = model.explain_threshold(defects)
    caught = sum(p.is_anomalous for p in defects)
    assert f"hole {caught} of 6" in told and "base64" in told._repr_html_() and len(told.figure().axes) == 3


def test_by_hand_and_how_it_reads(model):
    engine.calibrate(model, noise(60, 1), threshold="manual", value=5., why="agreed", normalisation="sigmoid", least_area=0.25)
    rule = model.rules[""]
    assert (rule.method, rule.threshold, rule.rate, rule.normalisation, rule.least_area) == ("manual", 5., None, "sigmoid", .25)
    assert "set by hand: agreed; of 60 good images" in rule.reason
    found = engine.predict(model, noise(20, 3))
    plain = model.set_threshold(5., "again").rules[""]
    assert plain.method == "manual" and plain.normalisation == "sigmoid" and plain.reason == "again"
    assert all(0 < p.normalised < 1 and (p.normalised > .5) == p.is_anomalous for p in found)
    assert [p.score for p in found] == [p.score for p in engine.predict(model, noise(20, 3))]
    assert all(r.area >= .25 for p in found for r in p.regions) and "no false-alarm rate promised" in repr(found)
    engine.calibrate(model, noise(60, 1), false_alarm_rate=0.1)
    assert model.rules[""].normalisation == "sigmoid" and "at most 9.84 % false alarms promised" in repr(engine.predict(model, noise(2, 3)))
    refused(model, noise(60, 1), "did you mean 'p_value'", normalisation="pvalue", false_alarm_rate=0.1)
    refused(model, noise(60, 1), "least_area=1", least_area=1, false_alarm_rate=0.1)
    refused(model, noise(60, 1), "needs the raw score", threshold="manual")


def test_regions_have_p_values_against_the_peaks_of_good_maps(model):
    engine.calibrate(model, noise(60, 1), false_alarm_rate=0.3, least_area=0)
    peaks = np.sort([p.raw_map.max() for p in engine.predict(model, noise(60, 1))])
    assert np.allclose(model.rules[""].peaks, peaks)
    regions = [r for p in engine.predict(model, noise(30, 3)) for r in p.regions]
    assert regions and all(r.p_value == (1 + (peaks >= r.score).sum())/61 for r in regions)


def test_too_few_images_are_refused_before_any_is_read(model):
    refused(model, [Item(f"{i}.png", path="nowhere.png", label=0) for i in range(9)], "can't be promised by 9", false_alarm_rate=0.05)
    two = [Item(f"{i}.png", path="nowhere.png", label=0, category="ab"[i > 3]) for i in range(40)]
    refused(model, two, "can't be promised by 4", false_alarm_rate=0.05, by_category=True)


def test_what_set_the_threshold_is_noted_and_a_test_on_it_says_so(model, tmp_path):
    engine.calibrate(model, noise(60, 1), false_alarm_rate=0.05)
    again = Inferencer(engine.export(model, "torch", tmp_path / "m.safetensors", data=[o.image for o in noise(2, 6)]))
    assert again.rules == model.rules
    from anomnb.data.folder import Images
    from anomnb.export.bundle import load
    assert load(tmp_path / "m.safetensors").calibration_images == model.calibration_images and len(model.calibration_images) == 60
    data = Images(noise(3, 2))
    data.test_items = noise(60, 1)[:4] + noise(20)[:3] + noise(2, 7, label=1)
    notes = " ".join(engine.test(model, data, intervals=False).notes)
    assert "4 of 9 test images set the threshold" in notes and "3 of 9 test images were in the fit" in notes


def test_refit_learns_all_and_says_that_the_promise_holds_about():
    items = noise(30, 8)
    once, both = (Engine(quiet=True).fit(Padim(**SMALL, channels=8), items, refit=r) for r in (None, "all"))
    assert (len(once.fitted_images), len(both.fitted_images), len(both.calibration_images)) == (24, 30, 6)
    rule = both.rules[""]
    assert rule.threshold == once.rules[""].threshold and rule.rate == 1/7 and rule.approximate and "holds about" in rule.reason
    whole = Engine(quiet=True).fit(Padim(**SMALL, channels=8), items, calibrate=False)
    a, b = ([p.score for p in engine.predict(m, noise(4, 3))] for m in (whole, both))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert "all of this holds about" in both.explain_threshold()
    refused(both, items, "30 of 30 images were in the fit", false_alarm_rate=0.1)
    with pytest.raises(AnomnbError, match="refit='everything'"):
        Engine(quiet=True).fit(Padim(**SMALL, channels=8), items, refit="everything")


@pytest.mark.parametrize("name", NAMES)
def test_a_false_alarm_is_learned_and_no_rate_is_stated_until_calibration(name):
    model = Engine(quiet=True).fit(create_model(name, **SMALL, **OWN.get(name, {})), noise(30, 8))
    new = engine.predict(model, noise(1, 3))
    before, rule = new[0].score, model.rules[""]
    model.mark_false_alarm(new[0])
    stale = model.rules[""]
    assert (stale.threshold, stale.rate, stale.rank) == (rule.threshold, None, None) and "false alarms were learned" in stale.reason
    assert len(model.fitted_images) == 25 and engine.predict(model, noise(1, 3))[0].score < before
    assert engine.predict(model, noise(1, 3))[0].p_value is None
    with pytest.raises(AnomnbError, match="were in the fit: 3-0"):
        engine.calibrate(model, noise(1, 3) + noise(30, 4), false_alarm_rate=0.1)
    engine.calibrate(model, noise(30, 4), false_alarm_rate=0.1)
    assert model.rules[""].rate == 3/31
    with pytest.raises(AnomnbError, match="labelled anomalous"):
        engine.mark_false_alarm(model, engine.predict(model, noise(2, 7, label=1)))


def test_a_false_alarm_that_cannot_be_learned_changes_nothing(model, tmp_path):
    engine.calibrate(model, noise(60, 1), false_alarm_rate=0.05)
    rules, images = dict(model.rules), list(model.fitted_images)
    from anomnb.export.bundle import load
    found = engine.predict(model, noise(1, 3))
    loaded = load(model.save(tmp_path / "m.safetensors"))
    for m, p, why in ((model, [], "no prediction"), (loaded, found, "resumable=True"), (Padim(**SMALL), found, "not fitted")):
        with pytest.raises(AnomnbError, match=why):
            engine.mark_false_alarm(m, p)
    assert model.rules == rules and model.fitted_images == images


def test_a_batch_judged_together(model):
    engine.calibrate(model, noise(99, 1), false_alarm_rate=0.05)
    found = engine.predict(model, noise(10, 3) + noise(2, 7, label=1)).discover(0.2)
    assert "p-values from 99 good images, a batch of 12" in found.notes[0]
    assert "nothing can be discovered" in engine.predict(model, noise(10, 3)).discover(0.001).notes[1]


def test_a_group_planted_twice_counts_once_on_real_images(needs_data, needs_weights):
    from anomnb.data.folder import Folder
    from anomnb.models.patchcore import Patchcore
    data = Folder(needs_data("magnetic_tile"))
    model = Engine(quiet=True).fit(Patchcore(backbone="resnet18", weights=needs_weights(), image_size=64), data.train_items[:20], calibrate=False)
    good = [o for o in data.test_items if o.label == 0][:40]
    grouped = [Item(o.source, path=o.path, label=0, group=f"lot {i//2}") for i, o in enumerate(good)]
    twice = [*grouped, *(Item("again " + o.source, path=o.path, label=0, group=o.group) for o in grouped)]
    rules = []
    for items in (grouped, twice):
        rules.append(model.calibrate(items, false_alarm_rate=0.1).rules[""])
    assert rules[0].n == rules[1].n == 20 and rules[0].scores == rules[1].scores and rules[0].threshold == rules[1].threshold
