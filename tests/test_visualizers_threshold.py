"""The threshold explorer: facts against naive counts, flips, costs, what is refused, what is written."""
from dataclasses import replace

import numpy as np
import pytest

from anomnb.core.errors import AnomnbError
from anomnb.core.types import Prediction, Predictions
from anomnb.visualizers.threshold import Scores, ThresholdState, cheapest, explore_threshold, facts_of, facts_text, measure_threshold_moves, threshold_strip

PICTURE = np.full((20, 30, 3), 90, np.uint8)


def prediction(i, score, label, **kw):
    return replace(Prediction(i, f"{i}.png", (20, 30), score, threshold=2., is_anomalous=score > 2, label=label, loader=lambda: PICTURE), **kw)


def drawn(seed=0, good=30, bad=15, **kw):
    g = np.random.default_rng(seed)
    s = np.round(np.r_[g.normal(1, 1, good), g.normal(3, 1, bad)], 1)  # ties
    return Predictions(prediction(i, float(x), int(i >= good), **kw) for i, x in enumerate(s))


class Model:
    rules = {}

    def set_threshold(self, threshold, reason, category=""):
        self.rules = {**self.rules, category: (threshold, reason)}


@pytest.mark.parametrize("seed", range(10))
def test_facts_and_the_cheapest_threshold_against_naive_counts(seed):
    found, g = drawn(seed), np.random.default_rng(seed)
    scores, state = Scores(found), ThresholdState(float(g.normal(2)), g.uniform(.1, 5), g.uniform(1, 50), g.uniform(.001, .5))

    def cost(t):
        fpr, miss = (np.mean([(p.score > t) == k for p in found if p.label == 1 - k]) for k in (True, False))
        return state.false_alarm*(1 - state.defects)*fpr + state.miss*state.defects*miss

    f = facts_of(scores, state)
    assert (f.stopped, f.caught) == tuple(sum(p.score > state.threshold for p in found if p.label == k) for k in (0, 1))
    assert f.cost == pytest.approx(cost(state.threshold), abs=1e-12)
    assert cost(cheapest(scores, state)) == pytest.approx(min(cost(t) for t in [-99, *(p.score for p in found)]), abs=1e-12)


@pytest.mark.parametrize("to", [-5., 1.5, 2., 2.05, 3., 9.])
def test_the_images_that_flip(to):
    found = drawn()
    flipped = Scores(found).flipped(to)
    assert {p.index for p in flipped} == {p.index for p in found if (p.score > 2) != (p.score > to)}
    gaps = [abs(p.score - 2) for p in flipped]
    assert gaps == sorted(gaps)


def test_every_control_changes_what_is_shown():
    e = explore_threshold(drawn())
    for control, value in ((e.threshold, 2.5), (e.miss, 90.), (e.false_alarm, 4.), (e.defects, .3)):
        before = e.picture.value, e.facts.value
        control.value = value
        assert (e.picture.value, e.facts.value) != before and e.picture.value == e.render(e.state)
    assert "image/png" in e._repr_mimebundle_()


def test_apply_writes_and_moves_the_start():
    model = Model()
    e = explore_threshold(drawn(promised_rate=.05), model)
    assert "takes back" not in e.facts.value
    e.threshold.value = 2.6
    assert "takes back the promised rate of 5 %" in e.facts.value
    e.apply()
    assert "say why" in e.status.value and not model.rules
    e.reason.value = "<b>week 12"
    e.apply()
    assert model.rules == {"": (e.state.threshold, "<b>week 12")} and "&lt;b&gt;week 12" in e.status.value
    assert e.scores.start == e.state.threshold and not e.scores.flipped(e.state.threshold) and "takes back" not in e.facts.value


def test_a_real_model_decides_by_it():
    from anomnb.models.padim import Padim
    from anomnb.processing.decision import DecisionRule
    model = Padim(backbone="resnet18", weights="random")
    model.rules = {"": DecisionRule().at(2.)}
    e = explore_threshold(drawn(), model)
    e.threshold.value, e.reason.value = 2.6, "agreed"
    e.apply()
    rule = model.rules[""]
    assert (rule.threshold, rule.method, rule.reason, rule.rate) == (e.state.threshold, "manual", "agreed", None)


def test_without_a_model_nothing_is_written():
    e = explore_threshold(drawn())
    assert e.button.disabled and "give the model" in e.status.value
    e.apply()
    assert "no model to write to" in e.status.value


def test_categories_have_thresholds_of_their_own():
    found = drawn(category="left") + [replace(p, threshold=3., category="right") for p in drawn(1)]
    e = explore_threshold(found, model := Model())
    assert e.state == ThresholdState(2., category="left")
    e.category.value = "right"
    assert e.state.threshold == 3.
    e.reason.value = "other side"
    e.apply()
    assert model.rules == {"right": (3., "other side")}


@pytest.mark.parametrize("found, why", [
    ([], "the list is empty"), ([Prediction(0, "a.png", error="cut short")], "all 1 are unreadable, the first because cut short"),
    ([prediction(0, float("nan"), 0)], r"'0.png' \(nan\)"), ([prediction(0, 1., 0), prediction(1, 1., 0, threshold=3.)], "decided by 2 thresholds")])
def test_what_is_refused(found, why):
    with pytest.raises(AnomnbError, match=why):
        explore_threshold(found)


def test_constant_scores_one_class_no_labels_no_threshold_no_image():
    for found in (drawn(good=9, bad=0), drawn(good=0, bad=9), [prediction(i, 1., i % 2) for i in range(6)],
                  [replace(p, label=None) for p in drawn()], [replace(p, threshold=None) for p in drawn()],
                  [replace(p, loader=None) for p in drawn()], [*drawn(), Prediction(99, "x.png", error="broken")]):
        e = explore_threshold(found)
        shown = set()
        for t in np.linspace(e.threshold.min, e.threshold.max, 4):
            e.threshold.value = float(t)
            shown.add(e.picture.value)
        e.go_cheapest()
        assert len(shown) >= 3 and e.picture.value == e.render(e.state)
    assert e.left_out == 1
    assert "not known" in facts_text(Scores(drawn(good=9, bad=0)), ThresholdState(2.))
    only = explore_threshold(drawn(good=9, bad=0))
    only.go_cheapest()
    assert "needs good and anomalous" in only.status.value


def test_strips_and_times():
    assert threshold_strip(drawn(), [1., 3.]).size[0] > 800
    assert len(measure_threshold_moves(explore_threshold(drawn()), 6)) == 6
