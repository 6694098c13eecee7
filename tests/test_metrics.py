"""The ranking metrics against naive code: random input with ties, ignored pixels, single classes, shards, bad input."""
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from anomnb.core.errors import AnomnbError
from anomnb.metrics.binned import BinnedPixelScores
from anomnb.metrics.keys import ordered
from anomnb.metrics.pixel import PIXEL_METRICS, PixelScores, au_spro, aupimo, aupro, pixel_auroc, pixel_average_precision, pixel_f1_max
from anomnb.metrics.ranking import auroc, f1_max, roc_curve

CLOSE = dict(rel=0, abs=1e-12)  # float64 sums of some thousand terms in [0, 1]


def images(seed):
    "Scores in float32, from many ties to none, and labels with both classes"
    g = np.random.default_rng(seed)
    n = int(g.integers(2, 60))
    scores = np.round(g.normal(size=n), int(g.integers(0, 5))).astype(np.float32)
    labels = g.integers(0, 2, n)
    labels[:2] = 0, 1
    return scores, labels


def f1_at(scores, labels, t):
    above = scores > t
    return 2 * (above & (labels == 1)).sum() / max(above.sum() + labels.sum(), 1)


@pytest.mark.parametrize("seed", range(40))
def test_ranking_against_naive(seed):
    s, y = images(seed)
    pairs = [(b > g) + (b == g) / 2 for b in s[y == 1] for g in s[y == 0]]
    assert auroc(s, y) == sum(pairs) / len(pairs)  # halves add up exactly
    assert auroc(-s, y) == pytest.approx(1 - auroc(s, y), **CLOSE)

    fpr, tpr, ts = roc_curve(s, y)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and (np.diff(ts) < 0).all()
    for x, h, t in zip(fpr, tpr, ts):
        assert x == (s[y == 0] > t).mean() and h == (s[y == 1] > t).mean()
    assert np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2) == pytest.approx(auroc(s, y), **CLOSE)

    f1, t = f1_max(s, y)
    assert f1 == max(f1_at(s, y, o) for o in [-np.inf, *s])
    for form in (t, np.float32(t), np.float64(t)):  # a threshold may be stored in either precision
        assert f1_at(s, y, form) == f1


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1.0, 1e30])
def test_f1_threshold_between_neighbours(scale):
    low = np.float32(scale)
    high = np.nextafter(low, np.float32(np.inf))
    for s in ([low, high], [-high, -low]):
        s, y = np.array(s), np.array([0, 1])
        f1, t = f1_max(s, y)
        assert f1 == 1 and f1_at(s, y, t) == 1 and f1_at(s, y, np.float32(t)) == 1


def test_f1_takes_the_highest_of_equal_thresholds():
    assert f1_max([3, 2, 1, 0], [1, 0, 1, 1])[0] == pytest.approx(6 / 7)
    f1, t = f1_max([4, 3, 2, 1], [1, 0, 0, 1])  # above 3: 2/3, above all: 2/3
    assert f1 == pytest.approx(2 / 3) and 3 <= t < 4
    f1, t = f1_max(np.array([1e300, 2e300]), [0, 1])  # beyond float32
    assert f1 == 1 and 1e300 <= t < 2e300


def test_ranking_takes_lists_and_booleans():
    assert auroc([1, 2], [False, True]) == auroc((1.0, 2.0), np.array([0.0, 1.0])) == 1.0
    assert auroc([-0.0, 0.0], [0, 1]) == 0.5


@pytest.mark.parametrize("metric", [roc_curve, auroc, f1_max])
@pytest.mark.parametrize("scores, labels, text", [
    ([1, np.nan, 3], [0, 1, 1], "nan at index 1"), ([1, 2, np.inf], [0, 1, 1], "inf at index 2"),
    ([1, 2], [0, 1, 1], "2 scores and 3 labels"),
    ([1, 2], [0, 0], "2 good, 0 anomalous: add anomalous"),
    ([1, 2], [1, 1], "0 good, 2 anomalous: add good"), ([], [], "0 good, 0 anomalous"),
    ([1, 2], [0, None], "label is None"), ([1, 2], [0, 2], "label is 2"), ([1, 2], ["good", "bad"], "label is 'good'"),
    (["a", "b"], [0, 1], "numbers"), ([None, 1], [0, 1], "nan at index 0")])
def test_ranking_names_bad_input(metric, scores, labels, text):
    with pytest.raises(AnomnbError, match=text):
        metric(scores, labels)


def parts(seed, n=5, digits=None):
    "Maps and masks of several sizes with touching corners, ignored pixels, all-good, all-ignored and empty ones"
    g = np.random.default_rng(seed)
    digits = int(g.integers(0, 4)) if digits is None else digits
    maps, masks = [], []
    for k in range(n):
        shape = tuple(g.integers(3, 14, 2))
        mask = (g.random(shape) < g.choice([0, .1, .4, 1])).astype(np.int32) * g.integers(1, 9, shape, dtype=np.int32)
        mask[g.random(shape) < .1] = -1
        maps.append(np.round(g.normal(size=shape) + (mask > 0) * g.normal(), digits).astype(np.float32))
        masks.append(None if k == 2 else mask)
    masks[0][0, 0], masks[0][1:, 1:] = 1, 0
    return maps, masks


def slow(maps, masks, limit=.3):
    "Pixel AUROC by all pairs and AUPRO by thresholding at every distinct score"
    masks = [np.zeros(s.shape, int) if m is None else m for s, m in zip(maps, masks)]
    good, bad = (np.concatenate([s[f(m)] for s, m in zip(maps, masks)]) for f in (lambda m: m == 0, lambda m: m > 0))
    labelled = [(s, *ndimage.label(m > 0, np.ones((3, 3)))) for s, m in zip(maps, masks)]
    regions = [s[lab == k] for s, lab, n in labelled for k in range(1, n + 1)]
    at = [np.inf, *np.unique(np.r_[good, bad])[::-1]]
    x, y = np.array([(good >= t).mean() for t in at]), np.array([np.mean([(r >= t).mean() for r in regions]) for t in at])
    k = int((x <= limit).sum())
    if k < len(x):
        x, y = np.r_[x[:k], limit], np.r_[y[:k], y[k-1] + (y[k] - y[k-1]) * (limit - x[k-1]) / (x[k] - x[k-1])]
    pairs = (bad[:, None] > good).sum() + (bad[:, None] == good).sum() / 2
    precision = [(bad >= t).sum() / ((bad >= t).sum() + (good >= t).sum()) for t in bad]
    f1 = [2 * (bad >= t).sum() / ((bad >= t).sum() + (good >= t).sum() + bad.size) for t in np.r_[good, bad]]
    return {"pixel_AUROC": pairs / good.size / bad.size, "pixel_AP": np.mean(precision), "pixel_F1Max": max(f1),
            "pixel_AUPRO": np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit}


def gathered(maps, masks, limit=.3):
    pixels = PixelScores(limit)
    for s, m in zip(maps, masks):
        pixels.update(s, m)
    return pixels


def small_parts(monkeypatch, seed):
    for module in ("keys", "pimo"):  # tie groups cross the parts of a pass
        monkeypatch.setattr(f"anomnb.metrics.{module}.PART", (7, 64, 1 << 16)[seed % 3])
    monkeypatch.setattr("anomnb.metrics.keys._BLOCK", (100, 1 << 23)[seed % 2])


@pytest.mark.parametrize("seed", range(60))
def test_pixels_against_naive(seed, monkeypatch):
    maps, masks = parts(seed)
    limit = (.3, .05, 1., .01)[seed % 4]
    small_parts(monkeypatch, seed)
    found = gathered(maps, masks, limit).compute()
    found.pop("pixel_AUPIMO", None)
    assert found == pytest.approx(slow(maps, masks, limit), **CLOSE)
    alone = [pixel_auroc(maps, masks), pixel_average_precision(maps, masks), pixel_f1_max(maps, masks), aupro(maps, masks, limit)]
    assert alone == [found[k] for k in PIXEL_METRICS[:4]]


def pimo_at(x, y, u, end=False):
    "The curve through points (x, y), x ascending, where an area up from u begins, or ends at u"
    k = int((x <= u).sum()) - 1
    if end and (near := np.isclose(x, u, rtol=0, atol=1e-12)).any():
        return y[near][0]
    return y[k] if k + 1 == len(x) or x[k] == u else y[k] + (y[k+1] - y[k]) * (u - x[k]) / (x[k+1] - x[k])


def slow_pimo(maps, masks, lower, upper):
    "AUPIMO of each anomalous image from a point at every distinct score; None where the bounds are not supported"
    masks = [np.zeros(s.shape, int) if m is None else m for s, m in zip(maps, masks)]
    good = [s[m == 0] for s, m in zip(maps, masks) if not (m > 0).any() and (m == 0).any()]
    if not good:
        return None
    at, out = np.unique(np.concatenate([s.ravel() for s in maps]))[::-1], []
    rate = np.array([np.mean([(g >= t).mean() for g in good]) for t in at])
    if rate[rate > 0][0] > lower:
        return None
    for hit in [s[m > 0] for s, m in zip(maps, masks) if (m > 0).any()]:
        y, last = np.array([(hit >= t).mean() for t in at]), np.flatnonzero(np.r_[np.diff(rate) > 0, True])  # the highest point at each rate
        first = np.flatnonzero(np.r_[True, np.diff(rate) > 0])
        x = np.log(np.maximum(np.stack([rate[first], rate[last]], 1).ravel(), 1e-300))  # up at one rate, then along the line
        x, y = x, np.stack([y[first], y[last]], 1).ravel()
        a, b = np.log(lower), np.log(upper)
        inside = (x > a) & (x < b - 1e-12)
        xs, ys = np.r_[a, x[inside], b], np.r_[pimo_at(x, y, a), y[inside], pimo_at(x, y, b, end=True)]
        out.append(np.sum(np.diff(xs) * (ys[1:] + ys[:-1]) / 2) / (b - a))
    return out


@pytest.mark.parametrize("seed", range(60))
def test_pimo_against_naive(seed, monkeypatch):
    maps, masks = parts(seed, n=7)
    small_parts(monkeypatch, seed)
    lower, upper = ((.02, .2), (.1, .5), (.05, .9), (.01, 1.))[seed % 4]
    pixels = PixelScores(pimo=(lower, upper))
    for s, m in zip(maps, masks):
        pixels.update(s, m)
    found, wanted = pixels.compute().get("pixel_AUPIMO"), slow_pimo(maps, masks, lower, upper)
    if wanted is None:
        assert found is None and "pixel_AUPIMO" in pixels.missing
    else:
        assert found == pytest.approx(np.mean(wanted), rel=0, abs=1e-12) and pixels.per_image == pytest.approx(np.array(wanted), rel=0, abs=1e-12)
        assert found == aupimo(maps, masks, lower, upper)


def regions_of(seed, maps, masks):
    "Annotated regions that overlap, with saturation areas, and masks that hold them all"
    g, defects, union = np.random.default_rng([seed, 1]), [], []
    for s, m in zip(maps, masks):
        m = np.zeros(s.shape, int) if m is None else m
        own = {k: SimpleNamespace(mask=(g.random(s.shape) < .4), saturation=[None, 1, 3, 500][g.integers(4)]) for k in range(int(g.integers(0, 4)))}
        defects.append(own)
        union.append(np.where(m < 0, -1, np.any([np.zeros(s.shape, bool), *(d.mask for d in own.values())], 0)).astype(int))
    return defects, union


@pytest.mark.parametrize("seed", range(40))
def test_saturated_overlap_against_naive(seed):
    maps, masks = parts(seed)
    defects, masks = regions_of(seed, maps, masks)
    limit = (.05, .3, 1.)[seed % 3]
    good = np.concatenate([s[m == 0] for s, m in zip(maps, masks)])
    inside = [(s[d.mask & (m > 0)], d.saturation) for s, m, known in zip(maps, masks, defects) for d in known.values() if (d.mask & (m > 0)).any()]
    at = [np.inf, *np.unique(np.concatenate([s.ravel() for s in maps]))[::-1]]
    x = np.array([(good >= t).mean() for t in at])
    y = np.array([np.mean([min((r >= t).sum() / min(a or len(r), len(r)), 1) for r, a in inside]) for t in at])
    k = int((x <= limit).sum())
    if k < len(x):
        x, y = np.r_[x[:k], limit], np.r_[y[:k], y[k-1] + (y[k] - y[k-1]) * (limit - x[k-1]) / (x[k] - x[k-1])]
    assert au_spro(maps, masks, defects, limit) == pytest.approx(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit, **CLOSE)


@pytest.mark.parametrize("seed", range(10))
def test_shards_and_order(seed):
    maps, masks = parts(seed, n=6)
    whole = gathered(maps, masks).compute()
    shards = [pickle.loads(pickle.dumps(gathered(maps[k::3], masks[k::3]))) for k in range(3)]
    alone = [o.compute() for o in shards]  # computing sorts in place and spoils nothing
    total = PixelScores().merge(shards[2]).merge(shards[0]).merge(shards[1])
    assert total.compute() == pytest.approx(whole, **CLOSE) and total.compute() == total.compute()
    assert [o.compute() for o in shards] == alone
    more = gathered(maps[:3], masks[:3])
    more.compute()
    for s, m in zip(maps[3:], masks[3:]):
        more.update(s, m)
    assert more.compute() == pytest.approx(whole, **CLOSE)


def test_one_score_everywhere_is_chance():
    mask = np.zeros((300, 300), np.int32)
    mask[:10, :10] = 1
    mask[20:21, 20:21] = 2
    share = 101 / 300**2
    found = gathered([np.full(mask.shape, .7)], [mask]).compute()
    wanted = {"pixel_AUROC": .5, "pixel_AP": share, "pixel_F1Max": 2*share/(1 + share), "pixel_AUPRO": .15}  # the line PRO = rate
    assert found == pytest.approx(wanted, **CLOSE)


def test_a_perfect_map_and_its_opposite():
    mask = np.eye(20, dtype=np.uint8) * 255
    assert gathered([mask * 1.], [mask]).compute() == dict.fromkeys(PIXEL_METRICS[:4], 1.)
    least = gathered([mask * -1.], [mask > 0]).compute()
    assert least == pytest.approx({"pixel_AUROC": 0., "pixel_AP": 1/20, "pixel_F1Max": 2/21, "pixel_AUPRO": 0.}, **CLOSE)
    assert gathered([mask * 1.], [mask]).areas == [20]  # a diagonal is one region: corners touch


def test_touching_kinds_are_one_region():
    assert gathered([np.zeros((4, 4))], [np.arange(16).reshape(4, 4)]).areas == [15]


def test_keys_keep_the_order_of_floats():
    s = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    s = np.sort(np.r_[s[np.isfinite(s)], np.float32([0, -0.0])])
    k = ordered(s).astype(np.int64)
    assert ((np.diff(k) > 0) == (np.diff(s.astype(np.float64)) > 0)).all() and (np.diff(k) >= 0).all()


def test_strided_maps_are_read_as_they_look():
    g = np.random.default_rng(3)
    s, m = g.normal(size=(8, 12)).astype(np.float32), g.integers(-1, 2, (8, 12))
    plain = gathered([s], [m]).compute()
    assert gathered([np.asfortranarray(s)], [m]).compute() == plain
    assert gathered([np.repeat(s, 2, 1)[:, ::2]], [np.asfortranarray(m)]).compute() == plain


def test_missing_says_why():
    flat, none, full = np.zeros((4, 4), np.float32), np.zeros((4, 4), int), np.ones((4, 4), int)
    for pixels, text in [(PixelScores(), "no map"), (gathered([flat] * 2, [None, none]), "no pixel is marked as a defect in any of 2"),
                         (gathered([flat], [full]), "no pixel is good"), (gathered([flat], [-full]), "no pixel is marked")]:
        assert pixels.compute() == {} and set(pixels.missing) == set(PIXEL_METRICS[:5])
        assert all(text in o for o in pixels.missing.values())
        pixels.update(flat, np.eye(4, dtype=int))
        assert len(pixels.compute()) == 4 and set(pixels.missing) == {"pixel_AUPIMO"}


@pytest.mark.parametrize("score, mask, text", [
    (np.full((3, 4), np.nan), None, "12 pixels that are not finite"), (np.full((3, 4), 1e39), None, "not finite in float32"),
    (np.zeros((3, 4)), np.zeros((4, 3), int), r"map is \(3, 4\) and its mask \(4, 3\)"),
    (np.zeros((3, 4)), np.zeros((1, 3, 4), int), r"\(1, 3, 4\)"),
    (np.zeros((1, 3, 4)), None, r"shape \(1, 3, 4\)"), (np.zeros((3, 4)), np.zeros((3, 4)), "float64"),
    (None, None, "a map"), ([["x"]], None, "a map")])
def test_pixels_name_bad_input(score, mask, text):
    pixels = PixelScores()
    with pytest.raises(AnomnbError, match=text):
        pixels.update(score, mask)
    assert pixels.areas == [] and pixels.compute() == {}  # nothing half-added


def test_bad_limits_and_lengths():
    for limit in (0, -.1, 1.1, 30, float("nan")):
        with pytest.raises(AnomnbError, match="limit"):
            PixelScores(limit)
    for maps, masks in [([np.zeros((2, 2))], []), ([], [None])]:
        with pytest.raises(AnomnbError, match="there are more"):
            aupro(maps, masks)


def test_no_torch():
    code = "import sys; sys.modules['torch'] = None; import anomnb.metrics.ranking, anomnb.metrics.pixel"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("seed", range(30))
def test_binned_is_within_its_bound(seed, monkeypatch):
    maps, masks = parts(seed, n=7, digits=(2, 7)[seed % 2])
    defects, union = regions_of(seed, maps, masks)
    monkeypatch.setattr("anomnb.metrics.binned._COLLAPSE", (50, 1 << 24)[seed % 2])
    limits, bits = dict(pimo=(.05, .5), spro_limit=.3), (9, 11, 14, 20, 32)[seed % 5]
    exact, cut, left, right = PixelScores(**limits), *(BinnedPixelScores(bits, **limits) for _ in range(3))
    for k, (s, m, d) in enumerate(zip(maps, union, defects)):
        for o in (exact, cut, right if k > 3 else left):
            o.update(s, m, d)
    wanted, found = exact.compute(), cut.compute()
    assert set(found) <= set(wanted) and set(cut.errors) == set(found)
    for name, value in found.items():
        assert abs(value - wanted[name]) <= cut.errors[name] + 1e-12, name
        assert bits < 32 or cut.errors[name] <= wanted[name] * 1e-12 + _tied(maps, union, name)
    assert left.merge(right).compute() == pytest.approx(found, **CLOSE)


def _tied(maps, masks, name):
    "With all bits kept an error is left only where good and defect pixels tie, and there the lines between points are exact"
    scores = [(s[m == 0], s[m > 0]) for s, m in zip(maps, masks)]
    good, bad = (np.concatenate(o) for o in zip(*scores))
    return 1. if np.isin(good, bad).any() else 0.
