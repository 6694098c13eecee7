"""What a conformal threshold promises, on drawn scores: on average, for one threshold, with ties, by groups, and for p-values."""
import numpy as np
import pytest
from scipy import stats

from anomnb.core.errors import AnomnbError
from anomnb.processing.conformal import (
    benjamini_hochberg,
    conformal_rank,
    images_needed,
    least_discoveries,
    lowest_rate,
    p_values,
    promised_rate,
    rate_interval,
)
from anomnb.processing.decision import decide
from anomnb.processing.thresholds import conformal_rule, cost_rule, f1_rule, quantile_rule

PAIRS, SIZES, RATES = 20_000, (19, 50, 99, 500), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SURE = 1e-6  # of each binomial interval: a few hundred checks, all of them sure to hold where the promise does


def pairs(n, seed, ties=False):
    "20,000 calibration sets of n scores, ascending, and a new score for each"
    x = np.random.default_rng([seed, n]).gumbel(size=(PAIRS, n + 1))
    if ties: x = np.round(x)
    return np.sort(x[:, :n], 1), x[:, n]


def possible(ns, rates): return [(n, a) for n in ns for a in rates if conformal_rank(n, a)]


@pytest.mark.parametrize("n, rate", possible(SIZES, RATES))
def test_the_rate_on_average(n, rate):
    k = conformal_rank(n, rate)
    promised = int((n + 1)*rate + 1e-9)/(n + 1)
    assert promised_rate(n, k) == pytest.approx(promised) and promised <= rate + 1e-12
    good, new = pairs(n, 1)
    low, high = stats.binom.interval(1 - SURE, PAIRS, promised)
    assert low <= (new > good[:, k - 1]).sum() <= high
    good, new = pairs(n, 2, ties=True)  # scores that tie: never more
    assert (new > good[:, k - 1]).sum() <= stats.binom.isf(SURE, PAIRS, promised)


@pytest.mark.parametrize("n, rate", possible(SIZES, RATES))
def test_the_rate_of_one_threshold_follows_its_law(n, rate):
    k = conformal_rank(n, rate)
    good = np.sort(np.random.default_rng([3, n]).random((2000, n)), 1)
    rates = 1 - good[:, k - 1]  # of uniform scores
    assert stats.kstest(rates, stats.beta(n + 1 - k, k).cdf).pvalue > 1e-4
    low, high = rate_interval(n, k, 0.9)
    assert abs(((low <= rates) & (rates <= high)).mean() - 0.9) < 0.035


@pytest.mark.parametrize("n", [50, 99, 299, 500])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.2])
def test_a_confidence_is_kept(n, rate):
    k = conformal_rank(n, rate, 0.95)
    if k is None:
        assert lowest_rate(n, 0.95) > rate and n < images_needed(rate, 0.95)
        return
    rates = 1 - np.sort(np.random.default_rng([4, n]).random((PAIRS, n)), 1)[:, k - 1]
    assert (rates <= rate).sum() >= stats.binom.ppf(SURE, PAIRS, 0.95)
    assert promised_rate(n, k, 0.95) <= rate*(1 + 1e-9)
    if k > 1: assert stats.beta(n + 2 - k, k - 1).cdf(rate) < 0.95  # the lowest such rank


def test_decimal_rates_are_meant_as_they_are_written():
    for n in range(1, 400):
        for percent in (1, 5, 10, 20, 25, 50):
            assert conformal_rank(n, percent/100) == (n + 1 - (n + 1)*percent//100 if (n + 1)*percent >= 100 else None)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan"), True, "0.1"])
def test_a_rate_that_is_none(rate):
    for call in (lambda: conformal_rank(99, rate), lambda: conformal_rule(np.arange(99), false_alarm_rate=rate), lambda: images_needed(rate)):
        with pytest.raises(AnomnbError, match="false_alarm_rate"): call()


def test_what_cannot_be_promised_is_said_with_numbers():
    with pytest.raises(AnomnbError, match=r"20 good images.*lowest that they can is 4.76 %.*1 % takes 99"): conformal_rule(np.arange(20))
    with pytest.raises(AnomnbError, match=r"confidence of 95 %.*takes 299"): conformal_rule(np.arange(200), confidence=0.95)
    rule = conformal_rule(np.arange(20), strict=False)
    assert (rule.threshold, rule.rate, rule.n, rule.rank) == (19, 1/21, 20, 20) and "4.76 %" in rule.reason
    with pytest.raises(AnomnbError, match="0 good images"): conformal_rule([], strict=False)
    with pytest.raises(AnomnbError, match="the score of b.png is nan"): conformal_rule([1, np.nan], names=["a.png", "b.png"])


def test_a_group_counts_once():
    g = np.random.default_rng(5)
    scores, groups = g.normal(size=60), [f"part {i % 20}" for i in range(60)]
    rule = conformal_rule(scores, 2*scores, groups, false_alarm_rate=0.1)
    twice = conformal_rule(np.tile(scores, 2), np.tile(2*scores, 2), groups*2, false_alarm_rate=0.1)
    assert rule == twice and rule.n == 20 and rule.threshold == np.sort(scores.reshape(3, 20).max(0))[rule.rank - 1] == rule.map_threshold/2


def test_p_values_of_good_images_are_not_too_small():
    good, new = pairs(50, 6, ties=True)
    p = np.array([p_values(x, s) for s, x in zip(good, new)])
    for rate in (0.02, 0.05, 0.1, 0.3, 0.6):
        assert (p <= rate + 1e-12).sum() <= stats.binom.isf(SURE, PAIRS, rate)
    rule = conformal_rule(good[0], false_alarm_rate=0.1)
    for x in (good[0, 0], good[0, 44], new[0], 99.):  # the decision and the p-value agree
        d = decide(x, None, rule)
        assert d.p_value == p_values(x, good[0]) and d.is_anomalous == (x > good[0, rule.rank - 1])
        assert not d.is_anomalous or d.p_value <= rule.rate


def test_false_discoveries_of_a_batch():
    g, share = np.random.default_rng(7), []
    for _ in range(600):
        good, batch = np.sort(g.normal(size=200)), np.concatenate([g.normal(size=40), g.normal(3, size=10)])
        found = benjamini_hochberg(p_values(batch, good), 0.1)
        share.append(found[:40].sum()/max(found.sum(), 1))
    assert np.mean(share) <= 0.1*40/50 + 4*np.std(share)/np.sqrt(len(share))
    p = g.random(30)**3
    oracle = max((sum(p <= q) for q in np.sort(p) if q <= 0.2*sum(p <= q)/30), default=0)
    assert benjamini_hochberg(p, 0.2).sum() == oracle
    few = least_discoveries(99, 100, 0.05)
    for m in (few - 1, few): assert benjamini_hochberg(np.r_[np.full(m, 0.01), np.ones(100 - m)]).sum() == (m if m == few else 0)


@pytest.mark.parametrize("seed", range(5))
def test_rules_from_labels_are_the_best_of_all_cuts(seed):
    g = np.random.default_rng(seed)
    s, y = np.round(np.r_[g.normal(size=40), g.normal(1.5, size=15)], seed), np.repeat([0, 1], (40, 15))
    rule = cost_rule(s, y, false_alarm=2, miss=7, defects=0.1)
    cost = lambda t: 2*0.9*(s[y == 0] > t).mean() + 7*0.1*(s[y == 1] <= t).mean()  # noqa: E731
    assert cost(rule.threshold) == pytest.approx(min(cost(t) for t in [-np.inf, *s]), abs=1e-12) and rule.rate is None
    hit = lambda t: 2*(s[y == 1] > t).sum()/((s > t).sum() + 15)  # noqa: E731
    assert hit(f1_rule(s, y).threshold) == max(hit(t) for t in [-np.inf, *s])
    assert quantile_rule(s, quantile=0.5).threshold == np.median(s)
