"""Intervals, comparisons and operating points against naive code on random input with ties, groups and single classes."""
import numpy as np
import pytest

from anomnb.core.errors import AnomnbError
from anomnb.metrics.comparison import auroc_difference, compare, image_differences
from anomnb.metrics.intervals import WeightedRanks, auroc_interval, bootstrap_images, delong_variance, draw_weights
from anomnb.metrics.operating import average_precision, fpr_at_recall, recall_at_fpr
from anomnb.metrics.ranking import auroc, f1_max


def images(seed, least=2):
    g = np.random.default_rng(seed)
    n = int(g.integers(2*least, 60))
    labels = g.integers(0, 2, n)
    labels[:least], labels[least:2*least] = 0, 1
    return np.round(g.normal(size=n) + labels, int(g.integers(0, 4))), labels


@pytest.mark.parametrize("seed", range(30))
def test_operating_points_against_naive(seed):
    s, y = images(seed)
    cuts = [-np.inf, *s]
    rates = [((s[y == 0] > t).mean(), (s[y == 1] > t).mean()) for t in cuts]
    for bound in (0, 0.01, 0.1, 0.3, 0.5, 1):
        assert recall_at_fpr(s, y, bound) == max(r for f, r in rates if f <= bound + 1e-12)
        assert fpr_at_recall(s, y, bound) == min(f for f, r in rates if r >= bound - 1e-12)
    naive = np.mean([(y[s >= t] == 1).mean() for t in s[y == 1]])
    assert average_precision(s, y) == pytest.approx(naive, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_delong_against_all_pairs(seed):
    s, y = images(seed)
    won = (s[y == 1][:, None] > s[y == 0]) + 0.5*(s[y == 1][:, None] == s[y == 0])
    naive = won.mean(1).var(ddof=1)/len(won) + won.mean(0).var(ddof=1)/won.shape[1]
    assert delong_variance(s, y) == pytest.approx(naive, abs=1e-12)
    found = auroc_interval(s, y)
    assert 0 <= found.low <= found.value == auroc(s, y) <= found.high <= 1 and found.low < found.high
    worse = auroc_interval(-s, y)  # the mirror image
    assert worse.low == pytest.approx(1 - found.high, abs=1e-6) and worse.high == pytest.approx(1 - found.low, abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_draws_are_what_drawing_gives(seed):
    s, y = images(seed, 3)
    groups = [f"g{i//3}" if i % 2 else "" for i in range(len(s))]
    for names in (None, groups):
        w = draw_weights(len(s), 40, seed, names)
        ranks = WeightedRanks(s, y).metrics(w)
        for i in range(40):
            a, b = np.repeat(s, w[i]), np.repeat(y, w[i])
            if len(set(b)) < 2: assert np.isnan([v[i] for v in ranks.values()]).all()
            else: assert [v[i] for v in ranks.values()] == pytest.approx([auroc(a, b), average_precision(a, b), f1_max(a, b)[0]], abs=1e-12)
    together = draw_weights(len(s), 50, 0, groups)
    for g in set(groups) - {""}:
        at = [i for i, o in enumerate(groups) if o == g]
        assert (together[:, at] == together[:, at[:1]]).all()


def test_a_bootstrap_without_spread_is_not_estimable():
    found = bootstrap_images(np.arange(20), np.repeat([0, 1], 10))
    assert all(v.value == 1 and v.low is None and "not estimable" in str(v) for v in found.values())
    assert auroc_interval(np.arange(20), np.repeat([0, 1], 10)).low > 0.7


def test_groups_widen_an_interval():
    g = np.random.default_rng(0)
    part = g.normal(size=40) + np.repeat([0, 1], 20)
    s, y, groups = np.repeat(part, 5), np.repeat([0, 1], 100), np.repeat([f"part {i}" for i in range(40)], 5)
    wide, narrow = (bootstrap_images(s, y, o)["image_AUROC"] for o in (groups, None))
    assert wide.high - wide.low > 1.7*(narrow.high - narrow.low) and "groups" in wide.method


@pytest.mark.parametrize("call", [
    lambda: auroc_interval([1, 2], [0, 0]), lambda: auroc_interval([1, np.nan], [0, 1]), lambda: bootstrap_images([1, 2, 3], [0, 1]),
    lambda: auroc_interval([1, 2], [0, 1], level=95), lambda: auroc_difference([1, 2], [1], [0, 1]),
    lambda: recall_at_fpr([1, 2], [0, 1], -0.1), lambda: compare([], [])])
def test_bad_input_is_named(call):
    with pytest.raises(AnomnbError): call()


def test_a_difference_of_equals_is_not_estimable():
    s, y = images(3, 10)
    found = image_differences(s, 2*s + 1, y)
    assert all(v.value == 0 and v.low is None for v in found.values())
