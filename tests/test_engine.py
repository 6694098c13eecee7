"""The engine as a whole: sources, invariances, broken images, interruption."""
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from anomnb.core.errors import AnomnbError
from anomnb.data.folder import Folder
from anomnb.data.read import open_source
from anomnb.engine.engine import Engine
from anomnb.models.padim import Padim
from anomnb.models.patchcore import Patchcore

TINY = dict(backbone="tf_efficientnet_lite0", image_size=64)
MODELS = [(Patchcore, {}), (Padim, dict(channels=20))]


def fit(cls=Patchcore, data=None, engine=None, **kw):
    return (engine or Engine(quiet=True)).fit(cls(**{**TINY, **kw}), data)


@pytest.fixture(scope="module")
def data(toy):
    return Folder(toy)


@pytest.fixture(scope="module")
def fitted(data):
    return fit(data=data)


def test_every_source_of_the_same_pixels_gives_the_same_score(data, fitted, tmp_path):
    item, engine = data.test_items[0], Engine(quiet=True)
    image = item.read()
    folder = tmp_path / "one"
    folder.mkdir()
    Image.fromarray(image).save(folder / "a.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    loader = torch.utils.data.DataLoader([tensor], batch_size=1)
    sources = [item.path, str(item.path), folder, [item.path], image, image / np.float32(255), Image.fromarray(image), tensor, tensor[None], loader]
    scores = [engine.predict(fitted, s)[0].score for s in sources]
    assert len(set(scores)) == 1, scores


@pytest.mark.parametrize("cls, kw", MODELS)
def test_batch_size_and_workers_change_nothing(data, cls, kw):
    model = fit(cls, data, **kw)
    runs = [Engine(quiet=True, batch_size=b, num_workers=w).predict(model, data) for b, w in ((1, 0), (5, 0), (16, 2))]
    spread = max(p.score for p in runs[0]) - min(p.score for p in runs[0])
    for other in runs[1:]:
        assert max(abs(a.score - b.score) for a, b in zip(runs[0], other)) <= 1e-5 * spread
        assert max(np.abs(a.raw_map - b.raw_map).max() for a, b in zip(runs[0], other)) <= 1e-5 * max(p.raw_map.max() for p in runs[0])


@pytest.mark.parametrize("cls, kw", MODELS)
def test_a_seed_gives_the_same_model(data, cls, kw):
    a, b = fit(cls, data, **kw).state_dict(), fit(cls, data, **kw).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("cls, kw", MODELS)
def test_only_the_threshold_reads_the_images_kept_aside(data, tmp_path, cls, kw):
    import shutil

    from anomnb.data.splits import split_good

    shutil.copytree(data.root, tmp_path / "toy")
    noisy = Folder(tmp_path / "toy")
    cal = split_good(noisy.train_items, cal=0.2, seed=0).cal
    before = fit(cls, noisy, **kw)
    for n, item in enumerate(cal):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(item.path)
    after = fit(cls, Folder(tmp_path / "toy"), **kw)
    a, b = before.state_dict(), after.state_dict()
    assert cal and all(torch.equal(a[k], b[k]) for k in a)
    assert before.rules[""].threshold != after.rules[""].threshold


def test_the_threshold_is_the_largest_good_score_kept_aside(data, fitted):
    from anomnb.data.splits import split_good

    cal = split_good(data.train_items, cal=0.2, seed=0).cal
    scores = [p.score for p in Engine(quiet=True).predict(fitted, cal)]
    assert fitted.rules[""].threshold == pytest.approx(max(scores), rel=1e-6) and fitted.rules[""].n == len(cal)


def test_under_ten_good_images_nothing_is_decided(data):
    model = fit(data=data.train_items[:8])
    p = Engine(quiet=True).predict(model, data.test_items[:1])[0]
    assert p.score is not None and p.is_anomalous is None and "kept aside" in model.rules[""].reason


def test_one_good_image_is_enough_for_a_bank_and_too_few_for_a_covariance(data):
    assert fit(data=data.train_items[:1], image_size=128).fitted
    model = Padim(**TINY, channels=5)
    with pytest.raises(AnomnbError, match="two images"):
        Engine(quiet=True).fit(model, data.train_items[:1])
    assert not model.fitted


def test_good_images_only_in_test(data, fitted, toy):
    only = Folder(toy)
    only.test_items = [i for i in only.test_items if i.label == 0]
    found = Engine(quiet=True).test(fitted, only)
    assert "image_AUROC" not in found and "pixel_AUROC" not in found
    assert any("image_AUROC" in n for n in found.notes)


@pytest.fixture
def broken(data, tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    for i, item in enumerate(data.train_items[:6]):
        Image.fromarray(item.read()).save(folder / f"{i}.jpg")
    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "5.jpg").write_text("not an image")
    return folder


def test_broken_images_are_all_listed_and_the_fit_refused(broken):
    model = Patchcore(**TINY)
    with pytest.raises(AnomnbError, match=r"2 of 6 images can.t be read(.|\n)*3\.jpg(.|\n)*5\.jpg"):
        Engine(quiet=True).fit(model, broken)
    assert not model.fitted


def test_broken_images_are_skipped_when_asked(broken, capsys):
    model = Engine().fit(Patchcore(**TINY), broken, on_error="skip")
    assert model.fitted and len(model.fitted_images) == 4 and "left out" in capsys.readouterr().out
    with pytest.raises(AnomnbError, match="did you mean 'skip'"):
        Engine(quiet=True).fit(Patchcore(**TINY), broken, on_error="skp")


def test_one_broken_image_is_named_in_its_prediction(broken, fitted):
    preds = Engine(quiet=True).predict(fitted, broken)
    assert len(preds) == 6 and [p.error is None for p in preds] == [True, True, True, False, True, False]
    assert "3.jpg" in preds.errors[0].error and preds.errors[0].score is None


@pytest.mark.parametrize("bad", [np.full((8, 8, 3), np.nan, np.float32), np.full((8, 8, 3), np.inf, np.float32), np.zeros((8, 8, 5), np.uint8),
                                 np.zeros((8, 8, 3), np.int64) - 7, torch.full((3, 8, 8), float("nan"))])
def test_bad_arrays_are_named(fitted, bad):
    with pytest.raises(AnomnbError):
        Engine(quiet=True).predict(fitted, bad)


def test_features_that_are_not_finite_are_refused(data):
    model = Patchcore(**TINY).build()
    model.net.backbone.net.conv_stem.weight.data[0] = float("nan")
    with pytest.raises(AnomnbError, match="not finite"):
        Engine(quiet=True).fit(model, data.train_items[:3])


def test_ctrl_c_in_a_fit_leaves_an_unfitted_model_and_python_listening(data, monkeypatch):
    model, heard = Patchcore(**TINY), signal.getsignal(signal.SIGINT)

    def stop(self, x):
        raise KeyboardInterrupt

    monkeypatch.setattr("anomnb.models.bank.BankAccumulator.update", stop)
    with pytest.raises(KeyboardInterrupt):
        Engine(quiet=True).fit(model, data)
    assert not model.fitted and model.accumulator is None and signal.getsignal(signal.SIGINT) is heard


def test_memory_is_bounded_and_too_little_is_said_before(data):
    with pytest.raises(AnomnbError, match="needs at least"):
        Engine(quiet=True, max_memory="100KB").fit(Patchcore(**TINY), data)
    model = Patchcore(**TINY)
    needs = Engine(quiet=True, batch_size=2).estimate(model, data)
    engine = Engine(quiet=True, max_memory=needs.least_bytes + (needs.wanted_bytes - needs.least_bytes)//4, batch_size=2)
    engine.fit(model, data)
    limit = model.accumulator.limit
    assert limit and model.accumulator.held <= limit and model.accumulator.reductions > 1
    for bad in ("lots", -1, 0):
        with pytest.raises(AnomnbError, match="max_memory"):
            Engine(max_memory=bad)


@pytest.mark.parametrize("cls, kw", MODELS)
def test_partial_fit_goes_on_where_the_fit_ended(data, cls, kw):
    items, engine = data.train_items[:12], Engine(quiet=True)
    whole = engine.fit(cls(**TINY, **kw), items, calibrate=False)
    parts = engine.fit(cls(**TINY, **kw), items[:6], calibrate=False)
    engine.partial_fit(parts, items[6:], calibrate=False)
    assert len(parts.fitted_images) == 12
    a, b = whole.state_dict(), parts.state_dict()
    assert all(a[k].shape == b[k].shape for k in a)
    if cls is Padim:
        assert all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-6, atol=1e-6) for k in a)


def test_a_stream_is_lazy_and_maps_can_be_left_out(data, fitted):
    found = Engine(quiet=True, batch_size=2).predict(fitted, data, stream=True, keep_maps=False)
    first = next(found)
    assert first.score is not None and first.raw_map is None


def test_words_that_are_not_known():
    with pytest.raises(AnomnbError, match="did you mean 'max_memory'"):
        Engine(max_memry=1)
    with pytest.raises(AnomnbError, match="did you mean"):
        Patchcore(backbone="resnet81")
    with pytest.raises(AnomnbError, match="did you mean 'layer3'"):
        Patchcore(backbone="resnet18", layers=["layer33"])


def test_predict_before_fit_names_the_cure(data):
    for verb in ("predict", "test"):
        with pytest.raises(AnomnbError, match="engine.fit"):
            getattr(Engine(quiet=True), verb)(Patchcore(**TINY), data)
    with pytest.raises(AnomnbError, match="not fitted"):
        Engine(quiet=True).export(Patchcore(**TINY), "onnx")


def test_a_folder_is_data_too(data, fitted, toy):
    assert Engine(quiet=True).test(fitted, str(toy)) == Engine(quiet=True).test(fitted, data)


def test_the_model_calls_the_engine(data, fitted, tmp_path):
    assert fitted.predict(data.test_items[:1])[0].score is not None
    assert fitted.save(tmp_path / "m.safetensors").exists()


def test_rules_are_json(fitted):
    assert json.loads(json.dumps({k: r.to_dict() for k, r in fitted.rules.items()}))[""]["method"] == "conformal"


def test_sources_are_opened_once_as_items(data):
    assert [i.source for i in open_source(data.test_items)] == [i.source for i in data.test_items]


def test_validation_needs_no_defects(data, fitted):
    found = Engine(quiet=True).validate(fitted, data)
    assert found["val_images"] >= 1 and found["val_score_max"] >= found["val_score_mean"] > 0
    assert any("part of it" in n for n in found.notes)


@pytest.mark.parametrize("cls, kw", MODELS)
def test_an_estimate_comes_before_the_fit(data, capsys, cls, kw):
    model = cls(**TINY, **kw)
    estimate = Engine(quiet=True).estimate(data, model)
    assert estimate.images == len(data.split().fit) and estimate.seconds > 0 and 0 < estimate.least_bytes <= estimate.wanted_bytes
    assert not model.fitted
    Engine().fit(model, data)
    assert f"on {estimate.images} images: about" in capsys.readouterr().out


def test_the_memory_of_padim_does_not_depend_on_the_number_of_images(data):
    model = Padim(**TINY, channels=20)
    assert model.memory(10, 16) == model.memory(10_000, 16)


def test_merged_models_may_come_from_files(data, tmp_path):
    from anomnb.export import load
    from anomnb.models import merge

    kw = dict(channels=20, image_size=(64, 96))
    one, two = fit(Padim, data.train_items[:6], **kw), fit(Padim, data.train_items[6:12], **kw)
    one.save(tmp_path / "one.safetensors", resumable=True)
    both = merge(load(tmp_path / "one.safetensors"), two)
    whole = fit(Padim, data.train_items[:12], Engine(quiet=True), **kw)
    assert both.grid() == whole.grid() and len(both.fitted_images) == len(one.fitted_images) + len(two.fitted_images)
    plain = tmp_path / "plain.safetensors"
    one.save(plain)
    with pytest.raises(AnomnbError, match="resumable"):
        merge(load(plain), two)
    with pytest.raises(AnomnbError, match="same arguments"):
        merge(one, fit(Padim, data.train_items[:6], channels=10))


def test_the_seed_reaches_the_split(data):
    items, kept = data.train_items, []
    for seed in (0, 0, 3):
        model = Engine(quiet=True, seed=seed).fit(Patchcore(**TINY), items)
        kept.append({f["sha256"] for f in model.fitted_images})
    assert kept[0] == kept[1] != kept[2]
