"""Masks from files: several an image, saturation areas, pixels that don't count, and what is refused."""
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from anomnb.core.errors import AnomnbError
from anomnb.data.folder import Folder
from anomnb.data.loader import make_loader
from anomnb.data.masks import read_defect_types, read_item_truth, read_mask, read_masks
from anomnb.data.read import Item
from anomnb.engine.engine import Engine
from anomnb.metrics.pixel import PixelScores
from anomnb.models.padim import Padim

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'resnet18' has random weights")
CONFIG = [dict(defect_name="missing", pixel_value=255, saturation_threshold=0.5, relative_saturation=True),
          dict(defect_name="extra", pixel_value=254, saturation_threshold=40, relative_saturation=False)]
BOXES = [(np.s_[10:30, 10:30], 255), (np.s_[25:45, 25:50], 254)]  # they overlap


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def one(box, grey, size=64):
    m = np.zeros((size, size), np.uint8)
    m[box] = grey
    return m


@pytest.fixture
def loco(tmp_path):
    "A small data set as MVTec LOCO keeps it"
    g, root = np.random.default_rng(0), tmp_path / "part"
    for i in range(12):
        save(root / f"train/good/{i:03d}.png", g.integers(100, 140, (64, 64, 3), dtype=np.uint8))
    for i in range(3):
        save(root / f"validation/good/{i:03d}.png", g.integers(100, 140, (64, 64, 3), dtype=np.uint8))
        save(root / f"test/good/{i:03d}.png", g.integers(100, 140, (64, 64, 3), dtype=np.uint8))
        image = g.integers(100, 140, (64, 64, 3), dtype=np.uint8)
        for k, (box, grey) in enumerate(BOXES):
            image[box] += 60
            save(root / f"ground_truth/logical_anomalies/{i:03d}/{k:03d}.png", one(box, grey))
        save(root / f"test/logical_anomalies/{i:03d}.png", image)
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def test_regions_of_several_masks(loco):
    data = Folder(loco)
    assert len(data.train_items) == 15 and any("validation/good" in o for o in data.problems)
    item = next(o for o in data.test_items if o.label)
    mask, defects = read_item_truth(pickle.loads(pickle.dumps(item)), (64, 64))
    a, b = (one(*o) > 0 for o in BOXES)
    assert (mask == np.where(b, 2, np.where(a, 1, 0))).all()
    assert {k: (d.kind, d.saturation) for k, d in defects.items()} == {1: ("missing", 200), 2: ("extra", 40)}
    assert (defects[1].mask == a).all() and (defects[2].mask == b).all()
    for workers in (0, 2):
        batch = next(iter(make_loader(data.test_items, 6, workers, masks=True)))
        assert [len(o) for o in batch.regions] == [2 if o.label else 0 for o in data.test_items]


def test_a_test_measures_saturated_overlap(loco):
    engine = Engine(quiet=True)
    model = engine.fit(Padim(backbone="resnet18", weights="random", image_size=64, channels=10), Folder(loco))
    found, naive = engine.test(model, Folder(loco), intervals=False), PixelScores()
    preds = engine.predict(model, Folder(loco))
    for p in preds:
        naive.update(p.map, p.mask, p.defects)
    assert found["pixel_AUsPRO"] == pytest.approx(naive.compute()["pixel_AUsPRO"], abs=1e-12)
    assert found["pixel_AUsPRO"] == pytest.approx(plain_spro(preds), abs=1e-9)


def plain_spro(preds, limit=.05):
    "Saturated overlap of each region at every threshold, as it is defined"
    good = np.sort(np.concatenate([p.map[p.mask == 0] for p in preds]))[::-1]
    regions = [(p.map[d.mask if d.mask is not None else p.mask == k], d.saturation) for p in preds for k, d in p.defects.items()]
    cuts = np.unique(np.concatenate([p.map.ravel() for p in preds]))[::-1]
    fpr = np.searchsorted(-good, -cuts, "right")/len(good)
    spro = np.mean([np.minimum(np.searchsorted(np.sort(-m), -cuts, "right")/s, 1) for m, s in regions], 0)
    x, y, area = np.r_[0, fpr], np.r_[0, spro], 0
    for a, b, lower, upper in zip(x, x[1:], y, y[1:]):  # a line from point to point, cut at the limit
        if a < limit and b > a:
            end = min(b, limit)
            area += (end - a)*(lower + lower + (upper - lower)*(end - a)/(b - a))/2
    return area/limit


def test_ignored_pixels_count_in_no_metric(loco):
    for i in range(3):
        m = one(*BOXES[0])
        m[30:40] = 128
        for o in (loco / f"ground_truth/logical_anomalies/{i:03d}").iterdir():
            o.unlink()
        (loco / f"ground_truth/logical_anomalies/{i:03d}").rmdir()
        save(loco / f"ground_truth/logical_anomalies/{i:03d}_mask.png", m)
    data, engine = Folder(loco, ignore=128), Engine(quiet=True)
    model = engine.fit(Padim(backbone="resnet18", weights="random", image_size=64, channels=10), data)
    found, by_hand = engine.test(model, data, intervals=False), PixelScores()
    for p in engine.predict(model, data):
        assert (p.mask[30:40] == -1).all() if p.label else not p.mask.any()
        keep = p.mask >= 0
        by_hand.update(p.map[keep][None], p.mask[keep][None])  # a line of what is left: ranking knows no places
    assert found["pixel_AUROC"] == pytest.approx(by_hand.compute()["pixel_AUROC"], abs=1e-12) and found["pixel_AP"] == pytest.approx(
        by_hand.compute()["pixel_AP"], abs=1e-12)
    assert "pixel_AUsPRO" not in found


@pytest.mark.parametrize("change, why", [
    (lambda o: [p.unlink() for p in o.iterdir()], "no image"),
    (lambda o: save(o / "002.png", one(np.s_[:4, :4], 255, 32)), r"002.png' is 32×32 .*, its image 'part.png' is 64×64"),
    (lambda o: save(o / "002.png", one(np.s_[:4, :4], 9)), "grey 9, which defects_config.json does not list .254, 255"),
    (lambda o: save(o / "002.png", one(np.s_[:4, :4], 255) + one(np.s_[9:12, :4], 254)), r"greys \[254, 255\]")])
def test_folders_of_masks_that_are_refused(loco, change, why):
    folder = loco / "ground_truth/logical_anomalies/000"
    change(folder)
    with pytest.raises(AnomnbError, match=why):
        read_masks(folder, (64, 64), "part.png", read_defect_types(loco / "defects_config.json"))


@pytest.mark.parametrize("text, why", [
    ("[", "is no JSON"), ("{}", "a list of defects"), ('[{"defect_name": "a"}]', "is no defect"),
    (json.dumps(CONFIG[:1]*2), "grey 255 to 'missing' and to 'missing'"),
    (json.dumps([{**CONFIG[0], "pixel_value": 0}]), "no grey from 1"), (json.dumps([{**CONFIG[0], "saturation_threshold": 2}]), "at most 1"),
    (json.dumps([{**CONFIG[1], "saturation_threshold": 0}]), "above 0")])
def test_configs_that_are_refused(tmp_path, text, why):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(AnomnbError, match=why):
        read_defect_types(tmp_path / "c.json")


def test_what_else_is_refused(loco):
    for bad in (-1, 256, True, "128"):
        with pytest.raises(AnomnbError, match="ignore="):
            Folder(loco, ignore=bad)
    save(loco / "m.jpg", one(*BOXES[0]))
    with pytest.raises(AnomnbError, match="is lossy"):
        read_mask(loco / "m.jpg", ignore=128)
    image = np.zeros((64, 64, 3), np.uint8)
    for item, why in ((Item("ok.png", image=image, label=0, mask_path=loco / "ground_truth/logical_anomalies/000"), "ok.png' is a good image"),
                      (Item("ok.png", image=image, label=0, mask_image=one(*BOXES[0])), "ok.png' is a good image"),
                      (Item("a.png", image=image, label=1, mask_image=np.zeros((9, 9), int)), "9×9"),
                      (Item("a.png", image=image, label=1, mask_image=np.zeros((64, 64))), "float64: give integers")):
        with pytest.raises(AnomnbError, match=why):
            item.truth((64, 64))


def test_masks_in_memory_are_as_good_as_files(loco):
    image, mask = np.zeros((64, 64, 3), np.uint8), one(*BOXES[0]).astype(int) - one(BOXES[1][0], 1)
    got = Item("a", image=image, label=1, mask_image=mask).mask((64, 64))
    assert (got == mask).all() and got.dtype == np.int32 and (got < 0).any()
