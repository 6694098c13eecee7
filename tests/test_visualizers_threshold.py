"""The threshold explorer: facts against naive counts, flips, costs, what is refused, what is written."""
from dataclasses import replace

import numpy as np
import pytest

from anomnb.core.errors import AnomnbError
from anomnb.core.types import Prediction, Predictions
from anomnb.visualizers.draw import ALARM, BLANK, CALM, DOUBT, INK
from anomnb.visualizers.threshold import (
    ThresholdPictures,
    explore_threshold,
    histogram_picture,
    measure_threshold_moves,
    threshold_strip,
)
from anomnb.visualizers.threshold_costs import Scores, ThresholdState, cheapest, facts_of, facts_text

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


def test_rates_stand_with_their_exact_intervals():
    from scipy.stats import binomtest
    found = drawn(good=40, bad=12)
    text = facts_text(Scores(found), ThresholdState(2.))
    for k, n in ((sum(p.score > 2 for p in found if p.label == y), (40, 12)[y]) for y in (0, 1)):
        sure = binomtest(k, n).proportion_ci(0.95, "exact")
        assert f"<b>{k} of {n}</b>, {100*k/n:.3g} % (95 %: {100*sure.low:.3g} to {100*sure.high:.3g} %)" in text


def test_bars_stand_where_the_scores_are():
    found = [replace(p, label=(0, 1, None)[p.index % 3]) for p in drawn()]
    scores, width, bins = Scores(found), 640, 64
    edges = np.linspace(scores.low, scores.high, bins + 1)
    for label, ink in ((0, CALM), (1, ALARM), (None, DOUBT)):
        alone = histogram_picture(Scores([p for p in found if p.label == label] + [replace(found[0], label=9, score=s) for s in scores.all[[0, -1]]]), width)
        filled = (alone[:-1] == (np.array(ink) + 255)//2).all(-1).sum(0).reshape(bins, -1)
        counts = np.array([sum(a <= p.score < b for p in found if p.label == label) for a, b in zip(edges, edges[1:])])
        assert (filled == filled[:, :1]).all() and ((filled[:, 0] > 0) == (counts > 0)).all()
        assert (np.argsort(filled[:, 0], kind="stable") == np.argsort(counts, kind="stable")).all()


def test_lines_stand_at_the_thresholds():
    frames = ThresholdPictures(drawn())
    scores, rows = frames.scores[""], slice(60, 120)  # inside the histogram
    dark = (frames.picture(ThresholdState(3.))[rows] == INK).all(-1)
    at = [round((t - scores.low)/(scores.high - scores.low)*559) for t in (2., 3.)]
    lines = np.flatnonzero(dark.any(0))
    assert all(min(abs(x - a) for a in at) <= 2 for x in lines) and all(abs(lines - a).min() <= 2 for a in at)
    assert dark[:, lines[-1]].all() and 0.4 < dark[:, lines[0]].mean() < 0.6  # the new one solid, the old one dashed


def test_back_at_the_start_by_steps_is_no_move():
    found = [replace(p, threshold=p_.score) for p_ in [sorted(drawn(), key=lambda p: p.score)[20]] for p in drawn(promised_rate=.05, good_images=30)]
    e = explore_threshold(found)  # as conformal thresholds do, the start equals a score
    start, step = e.scores.start, e.threshold.step
    for t in (start - 3*step + step + step + step, start - 1e-9*step, start + 1e-9*step):
        e.threshold.value = t
        assert e.state.threshold == start and not e.scores.flipped(e.state.threshold) and "takes back" not in e.facts.value
    e.threshold.value = start - step
    assert e.state.threshold < start and "takes back the promised rate of 5 %, which 30 good images stand for" in e.facts.value


def test_the_cheapest_threshold_is_a_stop_and_the_stop_nearest_to_the_start_stands_for_it():
    e = explore_threshold(drawn())
    e.go_cheapest()
    best, t = cheapest(e.scores, e.state), e.threshold
    assert e.state.threshold == t.value == best != 2. and t.min <= 2. <= t.max
    for k in range(-3, 4):
        t.value = best + k*t.step
        assert e.state.threshold == best + k*t.step
    t.value = best + round((2. - best)/t.step)*t.step
    assert e.state.threshold == 2. and not e.scores.flipped(e.state.threshold)
    t.value += t.step
    assert e.state.threshold == t.value != 2.


def test_large_scores_close_together_are_read_apart():
    e = explore_threshold([replace(p, score=1e5 + p.score, threshold=1e5 + 2) for p in drawn()])
    assert e.threshold.readout_format == ".8g" and e.scores.read(1e5 + 2.25) == "100002.25"
    assert e.threshold.step < 0.1 and "at 10000" in e.facts.value


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
    steps = (e.state.threshold - e.threshold.min)/e.threshold.step
    assert abs(steps - round(steps)) < 1e-6  # the new start is a stop
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
    assert model.rules == {"right": (3., "other side")} and "written for right:" in e.status.value
    e.threshold.value, e.category.value = 3.5, "left"
    assert e.state.threshold == 2. and e.threshold.min < 2. < e.threshold.max


def test_what_the_model_refuses_is_said():
    class Refusing:
        def set_threshold(self, *args): raise AnomnbError("a bundle <read only>")

    e = explore_threshold(drawn(), Refusing())
    e.threshold.value, e.reason.value = 2.6, "agreed"
    e.apply()
    assert e.status.value == "a bundle &lt;read only&gt;" and e.scores.start == 2.


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


def test_images_without_labels_have_no_rates():
    unlabelled = [replace(p, label=None) for p in drawn()]
    text = facts_text(Scores(unlabelled), ThresholdState(2.))
    assert f"<b>{sum(p.score > 2 for p in unlabelled)} of 45</b> stopped; no rate, confusion or cost is known" in text
    assert not any(o in text for o in ("false alarms", "cost a part", "<table", "chosen on these"))
    some = facts_text(Scores(unlabelled[:5] + drawn()[5:]), ThresholdState(2.))
    assert "of 5</b> stopped; count in no rate" in some and "of 25</b>" in some and "cost a part" in some


@pytest.mark.parametrize("error", [AnomnbError("gone"), FileNotFoundError("gone"), ValueError("not an image")])
def test_images_that_are_gone_are_said_in_the_strip(error):
    def loader(): raise error

    grey = lambda found: int((ThresholdPictures(found).picture(ThresholdState(-5.))[-96:] == BLANK).all(-1).sum())  # more than 8 flip
    assert grey(drawn()) == 0 and grey(drawn(loader=loader)) > 8*60*62 and grey(drawn(loader=None)) == grey(drawn(loader=loader))


def test_only_images_that_are_shown_are_read():
    read = []
    found = [replace(p, loader=lambda i=p.index: read.append(i) or PICTURE) for p in drawn()]
    e = explore_threshold(found)
    assert not read
    e.threshold.value = e.threshold.max
    e.threshold.value = e.threshold.min
    e.threshold.value = e.threshold.max
    above, below = (sorted((p for p in found if (p.score > 2) == k), key=lambda p: abs(p.score - 2)) for k in (True, False))
    assert len(read) == len(set(read)) == 16
    assert {found[i].score for i in read} == {p.score for p in above[:8] + below[:8]}


def test_a_move_among_a_thousand_predictions_takes_under_200_ms():
    e = explore_threshold(drawn(good=700, bad=300))
    assert np.median(measure_threshold_moves(e, 30)) < 0.2


def test_strips_and_times():
    assert threshold_strip(drawn(), [1., 3.]).size[0] > 800
    assert len(measure_threshold_moves(explore_threshold(drawn()), 6)) == 6
