"Loaders: order, workers, bad images"
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from anomnb.core.errors import AnomnbError
from anomnb.data.loader import ImageItems, as_batches, bad_images, good_positions, make_loader, readable_items, scan, select
from anomnb.data.read import Item, open_source


@pytest.fixture
def files(tmp_path):
    g = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(g.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def shrink(x):
    return x[:, ::2, ::2]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_values_do_not_depend_on_workers_or_batch(files, workers):
    want = [torch.from_numpy(o.read()).permute(2, 0, 1).float() / 255 for o in open_source(files)]
    for size in (1, 3, 16):
        batches = list(make_loader(files, batch_size=size, num_workers=workers))
        assert [i for b in batches for i in b.index] == list(range(7))
        assert torch.equal(torch.cat([b.images for b in batches]), torch.stack(want))
    assert list(make_loader(files, num_workers=workers, resize=shrink))[0].images.shape == (7, 3, 5, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_kept_or_raised_with_its_own_words(files, workers):
    (files / "3.png").write_bytes(b"")
    batches = list(make_loader(files, batch_size=4, num_workers=workers, on_error="keep"))
    assert [good_positions(b) for b in batches] == [[0, 1, 2], [0, 1, 2]]
    assert isinstance(batches[0].images, list) and batches[0].images[3] is None and batches[0].sizes[3] is None
    assert "3.png' is empty" in batches[0].errors[3]
    good = select(batches[0], good_positions(batches[0]))
    assert good.images.shape == (3, 3, 10, 12) and good.index == [0, 1, 2] and len(good) == 3
    with pytest.raises(AnomnbError, match=r"^'.*3.png' is empty") as e:
        list(make_loader(files, batch_size=4, num_workers=workers))
    assert "Traceback" not in str(e.value)


def test_mixed_sizes_stay_a_list():
    batch = next(iter(make_loader([np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)])))
    assert isinstance(batch.images, list) and batch.sizes == [(4, 4), (5, 4)]


def test_masks_only_when_asked(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "m.png")
    items = [Item("a", image=np.zeros((4, 4), np.uint8), label=1, mask_path=tmp_path / "m.png"),
             Item("b", image=np.zeros((4, 5), np.uint8), label=0)]
    assert [s.mask for s in (ImageItems(items)[0], ImageItems(items)[1])] == [None, None]
    masks = next(iter(make_loader(items, masks=True))).masks
    assert [m.shape for m in masks] == [(4, 4), (4, 5)] and all(m.dtype == np.int32 for m in masks)
    wrong = [Item("c", image=np.zeros((4, 5), np.uint8), label=1, mask_path=tmp_path / "m.png")]
    with pytest.raises(AnomnbError, match="m.png"):
        list(make_loader(wrong, masks=True))


def test_scan_lists_ten_bad_files_and_the_cure(files):
    for i in range(12):
        (files / f"bad{i}.png").write_text("no image")
    items = open_source(files)
    bad = scan(items)
    assert [o.source for o, _ in bad] == [str(files / f"bad{i}.png") for i in range(12)]
    text = str(bad_images(bad, len(items)))
    assert text.startswith("12 of 19 images") and "and 2 more" in text and 'on_error="skip"' in text and text.count("no JPEG") == 10
    assert len(readable_items(items, on_error="skip")) == 7
    with pytest.raises(AnomnbError, match="12 of 19"):
        readable_items(items)
    with pytest.raises(AnomnbError, match="2 of 2"):
        readable_items([o for o, _ in bad[:2]], on_error="skip")
    with pytest.raises(AnomnbError, match="give 'raise' or 'skip'"):
        readable_items(items, on_error="ignore")


def test_shuffle_belongs_to_seed_and_epoch(files):
    def order(loader): return [i for b in loader for i in b.index]
    loader = make_loader(files, batch_size=2, shuffle=True, seed=3)
    first = order(loader)
    assert sorted(first) == list(range(7)) and first == order(make_loader(files, batch_size=5, shuffle=True, seed=3))
    loader.sampler.set_epoch(1)
    assert order(loader) != first


def test_other_loaders():
    images = torch.rand(5, 3, 4, 6)
    for data in (images, [(o, 0) for o in images], [dict(image=o, label=1) for o in images]):
        batches = list(as_batches(DataLoader(data, batch_size=2)))
        assert torch.equal(torch.cat([b.images for b in batches]), images)
        assert [s for b in batches for s in b.sources] == [f"image {i}" for i in range(5)]
    assert torch.equal(next(as_batches([images])).images, images)
    images[3, 0, 0, 0] = float("inf")
    assert "image 3" in [e for b in as_batches(DataLoader(images, batch_size=2)) for e in b.errors][3]
    with pytest.raises(AnomnbError, match="label 7 of image 0"):
        list(as_batches(DataLoader([(torch.rand(3, 4, 4), 7)])))
    with pytest.raises(AnomnbError, match="the loader gives str"):
        list(as_batches(["x"]))


@pytest.mark.parametrize("args,words", [(dict(on_error="skip"), "'raise' or 'keep'"), (dict(batch_size=0), "at least 1")])
def test_bad_arguments(files, args, words):
    with pytest.raises(AnomnbError, match=words):
        make_loader(files, **args)
