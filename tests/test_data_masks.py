"""Masks from files: several an image, saturation areas, pixels that don't count, and what is refused."""
import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label

from anomnb.core.errors import AnomnbError
from anomnb.data.folder import Folder, Images, contact_sheet
from anomnb.data.loader import make_loader
from anomnb.data.masks import DefectType, read_defect_types, read_item_truth, read_mask, read_masks
from anomnb.data.read import Item
from anomnb.engine.engine import Engine
from anomnb.models.padim import Padim

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'resnet18' has random weights")
CONFIG = [dict(defect_name="missing", pixel_value=255, saturation_threshold=0.5, relative_saturation=True),
          dict(defect_name="extra", pixel_value=254, saturation_threshold=40, relative_saturation=False)]
BOXES = [(np.s_[10:30, 10:30], 255), (np.s_[25:45, 25:50], 254)]  # they overlap
APART = [(np.s_[4:8, 4:30], 254), (np.s_[40:50, 8:20], 255)]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def one(box, grey, size=64):
    m = np.zeros((size, size), np.uint8)
    m[box] = grey
    return m


def grey(g): return g.integers(100, 140, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def loco(tmp_path):
    "A small data set as MVTec LOCO keeps it"
    g, root = np.random.default_rng(0), tmp_path / "part"
    for i in range(12):
        save(root / f"train/good/{i:03d}.png", grey(g))
    for i in range(3):
        save(root / f"validation/good/{i:03d}.png", grey(g))
        save(root / f"test/good/{i:03d}.png", grey(g))
        for kind, boxes in (("logical_anomalies", BOXES), ("structural_anomalies", APART)):
            image = grey(g)
            for k, (box, value) in enumerate(boxes):
                image[box] += 60
                save(root / f"ground_truth/{kind}/{i:03d}/{k:03d}.png", one(box, value))
            save(root / f"test/{kind}/{i:03d}.png", image)
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


@pytest.fixture
def doubtful(loco):
    "The same with one mask an image, which a strip of grey 128 cuts in two"
    shutil.rmtree(loco / "ground_truth")
    shutil.rmtree(loco / "test/structural_anomalies")
    for i in range(3):
        m = one(*BOXES[0])
        m[18:24] = 128
        save(loco / f"ground_truth/logical_anomalies/{i:03d}_mask.png", m)
    return loco


def fitted(data):
    engine = Engine(quiet=True)
    return engine, engine.fit(Padim(backbone="resnet18", weights="random", image_size=64, channels=10), data)


def test_regions_of_several_masks(loco):
    data = Folder(loco)
    assert len(data.train_items) == 15 and any("3 images of validation/good are read as good images" in o for o in data.problems)
    assert [r[3] for r in data.describe().rows] == [0, 0, 3, 3]
    for kind, boxes, areas in (("logical_anomalies", BOXES, (200, 40)), ("structural_anomalies", APART, (40, 60))):
        item = next(o for o in data.test_items if o.kind == kind)
        mask, defects = read_item_truth(pickle.loads(pickle.dumps(item)), (64, 64))
        first, second = (one(*o) > 0 for o in boxes)
        assert (mask == np.where(second, 2, np.where(first, 1, 0))).all()
        assert [(d.kind, d.saturation) for d in defects.values()] == [
            (dict(((255, "missing"), (254, "extra")))[value], area) for (_, value), area in zip(boxes, areas)]
        for d, own in zip(defects.values(), (first, second)):
            assert (d.mask is None) if boxes is APART else (d.mask == own).all()
    assert len(pickle.dumps(defects)) < 500  # nothing of the size of an image travels where regions are apart


@pytest.mark.parametrize("workers", [0, 2])
def test_regions_come_through_the_loader(loco, workers):
    items = Folder(loco).test_items
    got = [(m, r) for b in make_loader(items, 4, workers, masks=True) for m, r in zip(b.masks, b.regions)]
    for item, (mask, regions) in zip(items, got, strict=True):
        want, defects = item.truth((64, 64))
        assert (mask == want).all() and regions.keys() == defects.keys() and len(regions) == 2*item.label
        assert all(r.saturation == d.saturation and np.array_equal(r.mask, d.mask) for r, d in zip(regions.values(), defects.values()))


def test_files_are_numbered_as_people_count(tmp_path):
    for i, name in enumerate(("1", "2", "10")):
        save(tmp_path / f"{name}.png", one(np.s_[10*i:10*i + 5, :5], 255))
    mask, defects = read_masks(tmp_path)
    assert list(defects) == [1, 2, 3] and [mask[0, 0], mask[10, 0], mask[20, 0]] == [1, 2, 3]
    assert all((d.kind, d.saturation, d.mask) == ("", None, None) for d in defects.values())


def test_doubt_in_one_file_holds_for_all(tmp_path):
    first, second = one(np.s_[:10, :10], 255), one(np.s_[20:30, :10], 255)
    second[:5, :10] = 128
    for i, m in enumerate((first, second)):
        save(tmp_path / f"{i}.png", m)
    mask, defects = read_masks(tmp_path, types={255: DefectType("dent", 0.5, True)}, ignore=128)
    assert (mask[:5, :10] == -1).all() and (mask[5:10, :10] == 1).all() and (mask < 0).sum() == 50
    assert [d.saturation for d in defects.values()] == [25, 50]  # half of the pixels that count


def plain_area(x, y, limit):
    "Below straight lines from point to point, cut at the limit"
    x, y, area = np.r_[0, x], np.r_[0, y], 0
    for a, b, lower, upper in zip(x, x[1:], y, y[1:]):
        if a < limit and b > a:
            end = min(b, limit)
            area += (end - a)*(lower + lower + (upper - lower)*(end - a)/(b - a))/2
    return area/limit


def plain_overlap(preds, regions, limit):
    "Mean saturated overlap of (scores, pixels that are enough) over the false positive rate, at every threshold, as it is defined"
    good = np.sort(np.concatenate([p.map[p.mask == 0] for p in preds]))[::-1]
    cuts = np.unique(np.concatenate([p.map.ravel() for p in preds]))[::-1]
    found = np.mean([np.minimum(np.searchsorted(np.sort(-m), -cuts, "right")/s, 1) for m, s in regions], 0)
    return plain_area(np.searchsorted(-good, -cuts, "right")/len(good), found, limit)


def test_a_test_measures_saturated_overlap(loco):
    engine, model = fitted(Folder(loco))
    found, preds = engine.test(model, Folder(loco), intervals=False), engine.predict(model, Folder(loco))
    enough = [(one(*b) > 0, s) for _ in range(3) for b, s in zip(BOXES, (200, 40))] + [(one(*b) > 0, s) for _ in range(3) for b, s in zip(APART, (40, 60))]
    bad = [p for p in preds if p.label for _ in range(2)]
    want = plain_overlap(preds, [(p.map[own], s) for p, (own, s) in zip(bad, enough, strict=True)], .05)
    assert 0 < want < 1 and found["pixel_AUsPRO"] == pytest.approx(want, abs=1e-9)  # sums of float64 in another order


def test_ignored_pixels_count_in_no_metric(doubtful):
    data = Folder(doubtful, ignore=128)
    assert "mask pixels of grey 128 count in no metric" in data.problems
    check_without_doubt(data)
    engine, model = fitted(data)
    assert engine.test(model, Folder(doubtful), intervals=False)["pixel_AP"] != engine.test(model, data, intervals=False)["pixel_AP"]


def test_ignored_pixels_of_masks_in_memory(doubtful):
    data = Folder(doubtful, ignore=128)
    held = Images([Item(o.source, image=o.read(), label=1, mask_image=o.mask((64, 64)).astype(np.int8)) for o in data.test_items if o.label])
    assert sum(r[3] for r in held.describe().rows) == held.summary()["masks"] == 3 and "no masks for" not in str(held.describe())
    check_without_doubt(held, *fitted(data))


def check_without_doubt(data, engine=None, model=None):
    "The metrics of a test are those of the pixels that are not in doubt"
    engine, model = (engine, model) if model else fitted(data)
    found, preds = engine.test(model, data, intervals=False), engine.predict(model, data)
    assert all((p.mask[18:24] == -1).all() and (p.mask < 0).sum() == 6*64 for p in preds if p.label) and not any(p.defects for p in preds)
    keep = [p.mask >= 0 for p in preds]
    s, y = (np.concatenate([a[k] for a, k in zip(many, keep)]) for many in ([p.map for p in preds], [p.mask > 0 for p in preds]))
    bad, good = s[y], s[~y]
    below = np.mean([(good < o).mean() + (good == o).mean()/2 for o in bad])
    order = np.argsort(-s, kind="stable")
    last = np.r_[s[order][1:] != s[order][:-1], True]  # of equal scores
    hits, taken = np.cumsum(y[order])[last], (np.arange(len(s)) + 1)[last]
    parts = [p.map[numbered == i] for p in preds for numbered, n in [label(p.mask > 0, np.ones((3, 3)))] for i in range(1, n + 1)]
    assert len(parts) == 6
    assert found["pixel_AUROC"] == pytest.approx(below, abs=1e-9)  # sums of float64 in another order
    assert found["pixel_AP"] == pytest.approx(np.sum(np.diff(hits, prepend=0)/len(bad)*hits/taken), abs=1e-9)
    assert found["pixel_AUPRO"] == pytest.approx(plain_overlap(preds, [(m, len(m)) for m in parts], .3), abs=1e-9)
    assert "pixel_AUsPRO" not in found


@pytest.mark.parametrize("change, why", [
    (lambda o: [p.unlink() for p in o.iterdir()], "no image"),
    (lambda o: save(o / "002.png", one(np.s_[:4, :4], 0)), "002.png' marks nothing"),
    (lambda o: save(o / "002.png", one(np.s_[:4, :4], 255, 32)), r"002.png' is 32×32 .*, its image 'part.png' is 64×64"),
    (lambda o: save(o / "002.png", one(np.s_[:4, :4], 9)), "grey 9, which defects_config.json does not list .254, 255"),
    (lambda o: save(o / "002.png", one(np.s_[:4, :4], 255) + one(np.s_[9:12, :4], 254)), r"greys \[254, 255\]")])
def test_folders_of_masks_that_are_refused(loco, change, why):
    folder = loco / "ground_truth/logical_anomalies/000"
    change(folder)
    with pytest.raises(AnomnbError, match=why):
        read_masks(folder, (64, 64), "part.png", read_defect_types(loco / "defects_config.json"))


@pytest.mark.parametrize("change, why", [
    (lambda o: (o / "000/000.png").unlink() or (o / "000/001.png").unlink(), "folder of masks .*000' holds no image"),
    (lambda o: shutil.rmtree(o / "000"), "1 of 3 images of kind 'logical_anomalies' have no mask: test/logical_anomalies/000.png"),
    (lambda o: (o / "000").rename(o / "017"), "017.* belongs to no image"),
    (lambda o: save(o / "000.png", one(*BOXES[0])), "000' and '000.png' are masks for one image")])
def test_folders_of_masks_that_do_not_fit(loco, change, why):
    change(loco / "ground_truth/logical_anomalies")
    with pytest.raises(AnomnbError, match=why):
        Folder(loco)


def test_a_folder_of_masks_may_end_in_mask(loco):
    for o in sorted((loco / "ground_truth").glob("*/*")):
        o.rename(o.with_name(o.name + "_mask"))
    assert sorted(o.mask_path.name for o in Folder(loco).test_items if o.label) == sorted(f"00{i}_mask" for i in range(3) for _ in range(2))


def test_masks_of_a_good_image(loco):
    (loco / "ground_truth/logical_anomalies/000").rename(loco / "spare")
    shutil.copytree(loco / "spare", loco / "ground_truth/good/001")
    (loco / "spare").rename(loco / "ground_truth/logical_anomalies/000")
    data = Folder(loco)
    item = next(o for o in data.test_items if o.source == "test/good/001.png")
    with pytest.raises(AnomnbError, match="test/good/001.png' is a good image, but its mask .*marked pixels"):
        item.truth((64, 64))


def test_validation_without_good(loco):
    (loco / "validation/good").rename(loco / "validation/fine")
    data = Folder(loco)
    assert len(data.train_items) == 12 and "validation has no folder 'good' and is not read" in data.problems


@pytest.mark.parametrize("text, why", [
    ("[", "is no JSON"), ("{}", "a list of defects"), ('[{"defect_name": "a"}]', "is no defect"),
    (json.dumps(CONFIG[:1]*2), "grey 255 to 'missing' and to 'missing'"),
    (json.dumps([{**CONFIG[0], "pixel_value": 0}]), "no grey from 1"), (json.dumps([{**CONFIG[0], "saturation_threshold": 2}]), "at most 1"),
    (json.dumps([{**CONFIG[1], "saturation_threshold": 0}]), "above 0"), (json.dumps([{**CONFIG[1], "saturation_threshold": float("nan")}]), "above 0"),
    (json.dumps([{**CONFIG[1], "saturation_threshold": float("inf")}]), "above 0"), ("["*100_000, "is no JSON"), ("3", "a list of defects"),
    (json.dumps([3]), "3 is no defect"), (json.dumps([{**CONFIG[0], "defect_name": 3}]), "defect_name is 3: give a text"),
    (json.dumps([{**CONFIG[0], "pixel_value": "255"}]), 'pixel_value is "255": give a whole number'),
    (json.dumps([{**CONFIG[0], "pixel_value": True}]), "pixel_value is true: give a whole number"),
    (json.dumps([{**CONFIG[0], "saturation_threshold": "0.5"}]), 'saturation_threshold is "0.5": give a number'),
    (json.dumps([{**CONFIG[0], "relative_saturation": "false"}]), 'relative_saturation is "false": give true or false'),
    (json.dumps([{**CONFIG[0], "relative_saturation": 1}]), "relative_saturation is 1: give true or false")])
def test_configs_that_are_refused(tmp_path, text, why):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(AnomnbError, match=why):
        read_defect_types(tmp_path / "c.json")


def test_what_else_is_refused(loco):
    for bad in (-1, 256, True, "128", 127.5):
        with pytest.raises(AnomnbError, match="ignore="):
            Folder(loco, ignore=bad)
    save(loco / "m.jpg", one(*BOXES[0]))
    with pytest.raises(AnomnbError, match="is lossy"):
        read_mask(loco / "m.jpg", ignore=128)
    image = np.zeros((64, 64, 3), np.uint8)
    for item, why in ((Item("ok.png", image=image, label=0, mask_path=loco / "ground_truth/logical_anomalies/000"), "ok.png' is a good image"),
                      (Item("ok.png", image=image, label=0, mask_image=one(*BOXES[0])), "ok.png' is a good image"),
                      (Item("a.png", image=image, label=1, mask_image=np.zeros((9, 9), int)), "9×9"),
                      (Item("a.png", image=image, label=1, mask_image=np.zeros((64, 64))), "float64: give integers"),
                      (Item("a.png", image=image, label=1, mask_image=np.full((64, 64), -2)), "values from -2 to -2"),
                      (Item("a.png", image=image, label=1, mask_image=np.full((64, 64), 2**31)), "values from 2147483648"),
                      (Item("a.png", image=image, label=1, mask_image=np.zeros((64, 64, 1), int)), r"shape \(64, 64, 1\): give H×W")):
        with pytest.raises(AnomnbError, match=why):
            item.truth((64, 64))


def test_masks_in_memory_are_as_good_as_files(loco):
    image, mask = np.zeros((64, 64, 3), np.uint8), one(*BOXES[0]).astype(int) - one(BOXES[1][0], 1)
    got = Item("a", image=image, label=1, mask_image=mask).mask((64, 64))
    assert (got == mask).all() and got.dtype == np.int32 and (got < 0).any()


@pytest.mark.filterwarnings("error")
def test_a_contact_sheet_outlines_no_doubt():
    image = np.zeros((64, 64, 3), np.uint8)
    sheet = contact_sheet([Item("a", image=image, label=1, mask_image=m) for m in (-(one(*BOXES[0]) > 0).astype(int), one(*BOXES[0]))])
    assert [len(ax.collections) for ax in sheet.axes] == [0, 1]


def test_areas_that_are_enough():
    half, fixed = DefectType("a", 0.5, True), DefectType("b", 40, False)
    assert [half.area(n) for n in (1, 2, 3, 400)] == [1, 1, 1, 200] and [fixed.area(n) for n in (7, 40, 400)] == [7, 40, 40]
