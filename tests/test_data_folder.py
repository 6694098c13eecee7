"Folders as people keep them, and every way of getting them wrong"
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from anomnb.core.errors import AnomnbError, AnomnbFileError
from anomnb.data.folder import Folder, Images, as_data, contact_sheet


def save(path, size=(12, 16), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


@pytest.fixture
def mvtec(tmp_path):
    root = tmp_path / "tile"
    for i in range(12):
        save(root / f"train/good/{i}.jpg")
    for i in range(3):
        save(root / f"test/good/{i}.jpg")
        for kind in ("crack", "stain"):
            save(root / f"test/{kind}/{i}.jpg")
            save(root / f"ground_truth/{kind}/{i}_mask.png", value=255)
    return root


@pytest.fixture
def shelf(tmp_path):
    root = tmp_path / "shelf"
    for i in range(20):
        save(root / f"Good/{i}.png")
    for i in range(4):
        save(root / f"defect/{'dent' if i % 2 else 'hole'}/{i}.png")
    return root


def test_mvtec(mvtec):
    data = Folder(mvtec)
    assert (len(data.train_items), len(data.test_items), data.name) == (12, 9, "tile")
    assert [o.kind for o in data.test_items] == ["crack"] * 3 + ["good"] * 3 + ["stain"] * 3
    assert [o.index for o in data.test_items] == list(range(9))
    assert data.test_items[0].source == "test/crack/0.jpg" and data.test_items[0].mask((12, 16)).all()
    assert not data.test_items[3].mask((12, 16)).any() and data.test_items[3].label == 0
    assert "12 × 16" in str(data.describe()) and not data.describe().problems
    assert json.dumps(data.summary()) and data.summary()["test"] == dict(crack=3, good=3, stain=3)


def test_listing_hash_sees_changes(mvtec):
    before = Folder(mvtec).summary()["listing"]
    assert before == Folder(mvtec).summary()["listing"]
    save(mvtec / "train/good/99.jpg")
    assert before != Folder(mvtec).summary()["listing"]


def test_masks_without_suffix_and_in_one_folder(mvtec):
    for i in range(3):
        (mvtec / f"ground_truth/crack/{i}_mask.png").rename(mvtec / f"ground_truth/crack/{i}.png")
    assert all(o.mask_path for o in Folder(mvtec).test_items if o.label)


def test_no_folder(mvtec):
    with pytest.raises(AnomnbFileError, match="no folder .*tiles.*did you mean .*tile"):
        Folder(mvtec.with_name("tiles"))


def test_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnomnbFileError, match=r"no image in .*empty.*\.jpg, "):
        Folder(tmp_path / "empty")


def test_train_good_without_images(mvtec):
    shutil.rmtree(mvtec / "train/good")
    (mvtec / "train/good").mkdir()
    with pytest.raises(AnomnbFileError, match="no image in .*good"):
        Folder(mvtec)


def test_train_without_good(mvtec):
    (mvtec / "train/good").rename(mvtec / "train/fine")
    with pytest.raises(AnomnbError, match="has no folder 'good'"):
        Folder(mvtec)


def test_one_image(tmp_path):
    save(tmp_path / "one/part.png")
    data = Folder(tmp_path / "one")
    assert len(data.train_items) == 1 and data.split().counts() == dict(fit=1, val=0, cal=0)


def test_good_images_only_in_test(mvtec):
    for kind in ("crack", "stain"):
        shutil.rmtree(mvtec / "test" / kind)
    shutil.rmtree(mvtec / "ground_truth")
    assert "no defects to test on" in str(Folder(mvtec).describe())


def test_test_without_good(mvtec):
    shutil.rmtree(mvtec / "test/good")
    assert "no good image: AUROC" in str(Folder(mvtec).describe())


def test_kind_without_masks_is_said(mvtec):
    shutil.rmtree(mvtec / "ground_truth/stain")
    data = Folder(mvtec)
    assert "no masks for stain: image metrics only" in str(data.describe())
    assert data.test_items[-1].mask((12, 16)) is None


def test_some_masks_missing(mvtec):
    (mvtec / "ground_truth/stain/1_mask.png").unlink()
    with pytest.raises(AnomnbError, match="1 of 3 images of kind 'stain' have no mask: test/stain/1.jpg"):
        Folder(mvtec)


def test_mask_for_a_wrong_file(mvtec):
    save(mvtec / "ground_truth/stain/17_mask.png")
    with pytest.raises(AnomnbError, match="17_mask.png.* belongs to no image: is it for 'stain/1.jpg'"):
        Folder(mvtec)


def test_masks_for_a_kind_that_is_not_there(mvtec):
    (mvtec / "ground_truth/stain").rename(mvtec / "ground_truth/stein")
    with pytest.raises(AnomnbError, match="stein.* belongs to no image: is it for 'stain/"):
        Folder(mvtec)


def test_two_masks_for_one_image(mvtec):
    save(mvtec / "ground_truth/stain/1_mask.bmp")
    with pytest.raises(AnomnbError, match="masks for one image"):
        Folder(mvtec)


def test_one_mask_for_two_images(mvtec):
    shutil.rmtree(mvtec / "ground_truth")
    save(mvtec / "masks/1.png")
    with pytest.raises(AnomnbError, match="named like two images, 'test/crack/1.jpg' and 'test/stain/1.jpg'"):
        Folder(mvtec)


def test_mask_of_another_size(mvtec):
    save(mvtec / "ground_truth/stain/1_mask.png", (12, 15))
    item = next(o for o in Folder(mvtec).test_items if o.source == "test/stain/1.jpg")
    with pytest.raises(AnomnbError, match=r"1_mask.png.* is 12×15 .*'test/stain/1.jpg' is 12×16"):
        item.mask(item.read().shape[:2])


def test_loose_images_in_test(mvtec):
    save(mvtec / "test/x.png")
    with pytest.raises(AnomnbError, match="images of no kind .'x.png'"):
        Folder(mvtec)


def test_several_data_sets(mvtec):
    with pytest.raises(AnomnbError, match=r"holds 1 data sets \(tile\): give one of them"):
        Folder(mvtec.parent)


def test_good_and_bad(shelf):
    data = Folder(shelf)
    assert (len(data.train_items), len(data.test_items)) == (16, 8)
    assert {o.kind for o in data.test_items} == {"good", "hole", "dent"}
    again = Folder(shelf)
    assert [o.source for o in data.train_items] == [o.source for o in again.train_items]
    assert [o.source for o in data.train_items] != [o.source for o in Folder(shelf, seed=1).train_items]


@pytest.mark.parametrize("layout", ["masks/{i}.png", "masks/{kind}/{i}_mask.png", "ground_truth/defect/{kind}/{i}.png"])
def test_good_and_bad_with_masks(shelf, layout):
    for i in range(4):
        save(shelf / layout.format(i=i, kind="dent" if i % 2 else "hole"), value=255)
    assert sum(bool(o.mask_path) for o in Folder(shelf).test_items) == 4


def test_groups_are_not_split_between_training_and_test(shelf):
    data = Folder(shelf, group=lambda p: f"lot {int(p.stem) // 4}" if p.parts[0] == "Good" else "")
    held = {o.group for o in data.test_items if o.label == 0}
    assert held and not held & {o.group for o in data.train_items}
    by_words = Folder(shelf, group=r"Good/(\d)")
    assert "group= finds no group for 4 images" in str(by_words.describe())
    with pytest.raises(AnomnbError, match="one pair of round brackets"):
        Folder(shelf, group=r"(\d)(\d)")
    with pytest.raises(AnomnbError, match="no regular expression"):
        Folder(shelf, group="(")


def test_names_of_ones_own(shelf):
    (shelf / "Good").rename(shelf / "a")
    (shelf / "defect").rename(shelf / "b")
    assert len(Folder(shelf, good="a", bad=["b/hole", "b/dent"]).test_items) == 8
    with pytest.raises(AnomnbFileError, match="no folder .*aa"):
        Folder(shelf, good="aa", bad="b")


def test_defects_without_good(shelf):
    shutil.rmtree(shelf / "Good")
    with pytest.raises(AnomnbError, match="has defects in 'defect' but no folder 'good'"):
        Folder(shelf)


def test_defects_deep_inside_are_not_taken_for_good(tmp_path):
    save(tmp_path / "line/monday/ok-1/1.png")
    save(tmp_path / "line/monday/ng/1.png")
    with pytest.raises(AnomnbError, match="monday/ng/1.png' does not look good"):
        Folder(tmp_path / "line")


def test_what_is_not_read_is_said(shelf):
    save(shelf / "unsure/1.png")
    assert "unsure is not read: if it holds defects, give bad='unsure'" in str(Folder(shelf).describe())


def test_describe_and_contact_sheet_survive_bad_files(shelf):
    (shelf / "Good/3.png").write_bytes(b"")
    save(shelf / "Good/4.png", (20, 30))
    data = Folder(shelf)
    text = str(data.describe())
    assert "3.png' is empty" in text and "12 × 16 to 20 × 30" in text
    assert "<table>" in data.describe()._repr_html_()
    assert len(contact_sheet(data.train_items + data.test_items).axes) == 24
    assert len(data.show_batch(3).axes) == 3


def test_shares_of_the_data_count_where_none_is_given(mvtec):
    assert Folder(mvtec).split().counts() == dict(fit=7, val=0, cal=5)
    assert Folder(mvtec, cal=0.0).split().counts() == dict(fit=12, val=0, cal=0)
    assert Folder(mvtec, cal=0.0).split(cal=0.5).counts() == dict(fit=6, val=0, cal=6)


def test_any_data(shelf):
    data = Folder(shelf)
    assert as_data(data) is data
    assert isinstance(as_data(str(shelf)), Folder)
    bare = as_data([np.zeros((4, 4), np.uint8)] * 12)
    assert isinstance(bare, Images) and {o.label for o in bare.train_items} == {0} and len(bare.split().cal) == 5
    assert as_data(str(shelf / "Good" / "1*.png")).describe().rows[0][2] == 11
    with pytest.raises(AnomnbFileError, match="no folder"):
        as_data(shelf / "nowhere")
