"""Evaluations: what exists is measured, what does not is said, bad input is named."""
import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from scipy import ndimage

from anomnb.core.errors import AnomnbError
from anomnb.core.types import Prediction, Predictions
from anomnb.metrics.binned import BinnedPixelScores
from anomnb.metrics.classes import AUPIMO, AUPRO, AUROC, AUsPRO, F1Max, IoU, as_probability
from anomnb.metrics.evaluator import Evaluator, at_size, evaluate
from anomnb.metrics.intervals import auroc_interval, proportion_interval
from anomnb.metrics.overlap import OVERLAP_METRICS, OverlapCounts, count_overlap, overlap_metrics
from anomnb.metrics.pixel import PIXEL_METRICS, PixelScores
from anomnb.metrics.ranking import auroc, roc_curve

KINDS = ("good", "crack", "good", "stain")


def drawn(i, size=32, category="", **kw):
    g, kind = np.random.default_rng(i), KINDS[i % 4]
    map, mask = g.normal(size=(size, size)).astype(np.float32), np.zeros((2*size, 2*size), np.int32)
    if kind != "good":
        y, x = g.integers(2, size - 10, 2)
        map[y:y+8, x:x+4] += 1.5
        mask[2*y:2*y+16, 2*x:2*x+8] = 1
    score = float(map.max())
    return replace(Prediction(i, f"{i}.png", mask.shape, score, map, score > 4, 4., 3., label=int(kind != "good"), mask=mask if kind != "good" else None,
                              kind=kind, category=category), **kw)


def predictions(n=24, **kw):
    return Predictions(drawn(i, **kw) for i in range(n))


def test_what_is_measured_is_what_the_functions_say():
    ps = predictions()
    found, pixels = evaluate(ps), PixelScores()
    for p in ps:
        pixels.update(p.map, np.zeros(p.size, int) if p.mask is None else p.mask)
    for k, v in pixels.compute().items():
        assert found[k] == v
    assert found["image_AUROC"] == auroc([p.score for p in ps], [p.label for p in ps])
    counts = sum((count_overlap(p.map, p.mask, p.map_threshold) for p in ps), OverlapCounts())
    assert {k: found[k] for k in OVERLAP_METRICS} == overlap_metrics(counts)
    good, bad = ([p.is_anomalous for p in ps if p.label == k] for k in (0, 1))
    assert (found["image_false_alarm_rate"], found["image_recall"]) == (np.mean(good), np.mean(bad))
    assert [r["kind"] for r in found.table("by kind")] == ["crack", "stain"]
    assert sum(r["defects"] for r in found.table("by size")) == 12
    assert evaluate(ps) == found and repr(evaluate(ps)) == repr(found)


@pytest.mark.parametrize("seed", range(20))
def test_overlap_against_naive(seed):
    g = np.random.default_rng(seed)
    map, mask = g.normal(size=(15, 18)), (g.random((15, 18)) < .2).astype(int)
    mask[g.random(mask.shape) < .1] = -1
    c = count_overlap(map, mask, .8)
    marked, defect = {(y, x) for y, x in np.argwhere((map > .8) & (mask >= 0))}, {(y, x) for y, x in np.argwhere(mask > 0)}
    assert (c.both, c.marked, c.defect) == (len(marked & defect), len(marked), len(defect))
    for these, others, n, hit in ((defect, marked, c.defects, c.hit), (marked, defect, c.regions, c.right)):
        grid = np.zeros(mask.shape, int)
        for o in these:
            grid[tuple(o)] = 1
        labels, count = ndimage.label(grid, np.ones((3, 3)))
        assert n == count and hit == len({labels[o] for o in these & others})


def test_good_images_alone_and_defects_alone():
    good = evaluate([p for p in predictions() if not p.label])
    assert set(good) == {"image_false_alarm_rate"} and any("add anomalous images" in n for n in good.notes)
    bad = evaluate([p for p in predictions() if p.label])
    assert "image_AUROC" not in bad and "pixel_AUROC" in bad and "pixel_AUPIMO" not in bad
    assert any("no pixel_AUPIMO: no image is good throughout" in n for n in bad.notes) and not any(np.isnan(v) for v in bad.values())


def test_one_image():
    found = evaluate(predictions(2)[1:])
    assert "image_AUROC" not in found and found["pixel_AUROC"] > .5
    assert found.intervals["pixel_AUROC"].low is None and "not estimable" in repr(found)


def test_constant_scores_are_chance_and_not_sure():
    ps = [replace(p, score=1., raw_map=np.ones((8, 8), np.float32)) for p in predictions(24)]
    found = evaluate(ps)
    assert found["image_AUROC"] == .5 and found["pixel_AUROC"] == .5
    assert found.intervals["image_AUROC"].low is None and "not estimable" in found.intervals["image_AUROC"].words()


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_a_threshold_outside_all_scores(threshold):
    found = evaluate([replace(p, threshold=threshold, map_threshold=threshold, is_anomalous=p.score > threshold) for p in predictions()])
    stopped = float(threshold < 0)
    assert (found["image_false_alarm_rate"], found["image_recall"], found["defect_recall"]) == (stopped,)*3
    assert found.intervals["image_recall"].low < 1 or threshold > 0


@pytest.mark.parametrize("change, text", [
    (dict(score=float("nan")), "the score of '1.png' is nan"), (dict(score=float("inf")), "'1.png' is inf"),
    (dict(label=0), "'1.png' is labelled good and its mask marks 128")])
def test_a_prediction_that_contradicts_itself_is_named(change, text):
    with pytest.raises(AnomnbError, match=text):
        evaluate([drawn(0), replace(drawn(1), **change)])


def test_an_empty_mask_of_an_anomalous_image_is_named_and_its_pixels_left_out():
    ps = predictions()
    found = evaluate([replace(p, mask=np.zeros((64, 64), int)) if p.index == 1 else p for p in ps])
    without = evaluate([replace(p, mask=None) if p.index == 1 else p for p in ps])
    assert dict(found) == dict(without) and any("mark no pixel" in n and "1.png" in n for n in found.notes)


def test_what_is_left_out_is_counted():
    ps = [*predictions(), Prediction(24, "broken.png", error="cut short", label=1), replace(drawn(25), label=None), replace(drawn(27), mask=None)]
    notes = " | ".join(evaluate(ps).notes)
    assert "1 unreadable: broken.png" in notes and "1 images of unknown label" in notes and "1 defect images have no mask" in notes
    with pytest.raises(AnomnbError, match="none of 1 predictions has a label"):
        evaluate(ps[24:25])


def test_ignored_pixels_and_a_mask_of_them_alone():
    ps = predictions()
    doubtful = [replace(p, mask=np.where(p.mask > 0, -1, 0)) if p.index == 1 else p for p in ps]
    found = evaluate(doubtful)  # image 1 is anomalous, where is not known
    assert found["image_AUROC"] == evaluate(ps)["image_AUROC"] and any("1 images vanish" in n or "of 1 images" in n for n in found.notes)


def test_small_defects_vanish_by_name_and_no_image_turns_good():
    p = drawn(1)
    tiny = np.zeros((64, 64), np.int32)
    tiny[3, 3] = 1
    found = evaluate([*predictions(), replace(p, source="tiny.png", mask=tiny)], pixel_size=8)
    assert any("the defects of 1 images vanish at 8×8" in n for n in found.notes) and any("8×8" in k for k in found.tables)
    map, mask, known = at_size(replace(p, mask=p.mask), 16)
    assert map.shape == mask.shape == (16, 16) and known == {}


def test_image_level_models_have_no_pixel_metrics():
    found = evaluate([replace(p, raw_map=None, map_threshold=None) for p in predictions()])
    assert not [k for k in found if "pixel" in k or "defect" in k] and "image_AUROC" in found


def test_categories_have_a_row_each_and_a_named_mean():
    ps = Predictions([*predictions(), *(drawn(i + 100, category="b") for i in range(16))])
    rows = evaluate(ps).table("by category")
    assert [r["category"] for r in rows] == ["not named", "b", "mean over 2 categories"]
    assert rows[2]["pixel_AUPRO"] == pytest.approx((rows[0]["pixel_AUPRO"] + rows[1]["pixel_AUPRO"])/2)
    whole = PixelScores()
    for p in ps:
        whole.update(p.map, np.zeros(p.size, int) if p.mask is None else p.mask)
    assert evaluate(ps)["pixel_AUPRO"] == pytest.approx(whole.compute()["pixel_AUPRO"], abs=1e-12)


def test_groups_are_drawn_together():
    alone, together = (evaluate([replace(p, group=g) for p in predictions(40)]) for g in ("", "lot"))
    assert alone == together and "DeLong" in alone.intervals["image_AUROC"].method
    assert together.intervals["pixel_AUROC"].low is None  # one lot: nothing is known of its spread


def test_files(tmp_path):
    found = evaluate(predictions(), title="a <b>")
    read = json.loads(found.to_json())
    assert read["metrics"] == dict(found) and read["intervals"]["image_AUROC"]["method"] and "images" not in read and set(read["curves"]) == {
        "image_ROC", "image_PR", "pixel_ROC", "pixel_PRO"}
    assert len(json.loads(found.to_json(tmp_path / "e.json", images=True).read_text())["images"]) == 24
    page = found.to_html(tmp_path / "e.html").read_text()
    assert "a &lt;b&gt;" in page and "data:image/png;base64," in page and "pixel_AUPRO" in page
    assert list(found.to_df()["metric"]) == list(found)
    with pytest.raises(AnomnbError, match="by kind"):
        found.table("by colour")


def test_torchmetrics_beside_ours():
    ps = predictions()
    theirs = torchmetrics.classification
    found = evaluate(ps, metrics={"image_again": torchmetrics.AUROC(task="binary"), "pixel_F1": theirs.BinaryF1Score(), "pixel_again": AUROC,
                                  "pixel_PRO5": AUPRO(.05), "image_curve": theirs.BinaryROC()})
    assert found["image_again"] == pytest.approx(found["image_AUROC"], abs=1e-6)
    assert found["pixel_again"] == found["pixel_AUROC"] and found["pixel_F1"] == pytest.approx(found["pixel_Dice"], abs=1e-6)
    assert len(found["image_curve"]) == 3 and 0 < found["pixel_PRO5"] < 1
    alone = evaluate([p for p in ps if not p.label], metrics=[AUROC])
    assert any("no image_AUROC: ranking needs" in n for n in alone.notes)


def test_classes_merge_reset_and_refuse():
    ps, whole = predictions(), AUPIMO(1e-3, 1e-2)
    truth = [np.zeros(p.size, int) if p.mask is None else p.mask for p in ps]
    parts = [AUPIMO(1e-3, 1e-2) for _ in range(2)]
    for i, (p, m) in enumerate(zip(ps, truth)):
        whole.update(p.map, m)
        parts[i % 2].update(torch.tensor(p.map), torch.tensor(m))
    parts[0].merge_state(parts[1])
    assert float(parts[0].compute()) == pytest.approx(float(whole.compute()), abs=1e-12)
    whole.reset()
    with warnings.catch_warnings(), pytest.raises(AnomnbError, match="was given nothing"):
        warnings.simplefilter("ignore")
        whole.compute()
    for metric, args, text in [(AUROC(), (np.zeros((2, 3, 4, 4)), np.zeros((2, 3, 4, 4), int)), "H×W"),
                               (IoU(1.), (np.zeros((4, 4)), np.zeros((4, 4))), "integers"),
                               (AUsPRO(), (np.zeros((4, 4)), np.zeros((4, 4), int), np.zeros((2, 4, 4)), [1.]), "R areas")]:
        with pytest.raises(AnomnbError, match=text):
            metric.update(*args)
    both = F1Max()
    both.update([1., 2.], [0, 1])
    both.update(np.zeros((4, 4)), np.zeros((4, 4), int))
    with pytest.raises(AnomnbError, match="both scores of images and maps"):
        both.compute()


@pytest.mark.parametrize("threshold", [None, 0., 1e-45, -3., 1.1, 3e38])
def test_as_probability_keeps_order_and_decision(threshold):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    s = np.sort(np.r_[bits[np.isfinite(bits)], np.float32([0, -0., threshold or 0])])
    p = as_probability(s, threshold)
    assert (np.sign(np.diff(p)) == np.sign(np.diff(s.astype(np.float64)))).all() and p.min() >= 0 and p.max() <= 1
    if threshold is not None:
        assert ((p > .5) == np.array([float(o) > threshold for o in s])).all()


def test_pixel_ranking_of_maps_ignores_what_is_not_judged():
    g = np.random.default_rng(0)
    maps, masks = g.normal(size=(3, 9, 9)), g.integers(-1, 3, (3, 9, 9))
    a, b = roc_curve(maps, masks), roc_curve(maps[masks >= 0], (masks > 0)[masks >= 0])
    assert all((x == y).all() for x, y in zip(a, b))


def test_rates_and_their_intervals():
    for k, n in ((0, 1), (1, 1), (3, 17), (17, 17)):
        o = proportion_interval(k, n)
        assert 0 <= o.low <= k/n <= o.high <= 1 and o.low < o.high
    assert auroc_interval(np.zeros(40), np.repeat([0, 1], 20)).low is None


def test_binned_evaluation_states_its_error():
    exact, cut = evaluate(predictions()), evaluate(predictions(), pixel_bits=16)
    note = next(n for n in cut.notes if "cut to 16 bits" in n)
    assert "pixel_AUPRO" in note and "pixel_AUROC" not in cut.intervals
    b = BinnedPixelScores(16)
    for p in predictions():
        b.update(p.map, p.mask)
    b.compute()
    for k in set(PIXEL_METRICS) & set(exact):
        assert abs(exact[k] - cut[k]) <= b.errors[k] + 1e-12


def test_annotated_regions_reach_the_evaluation():
    ps = predictions()
    for p in ps:
        p.defects = {1: SimpleNamespace(kind="", saturation=10., mask=None)} if p.label else {}
    e = Evaluator()
    for p in ps:
        e.update(p)
    assert 0 < e.compute()["pixel_AUsPRO"] <= 1
