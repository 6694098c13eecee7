"""What happens around a fit: more images, fewer images, two models in one, and every way in which it can go wrong."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

from anomnb.core.errors import AnomnbError
from anomnb.data.folder import Folder, as_data
from anomnb.data.read import Item, content_hash
from anomnb.engine.engine import Engine
from anomnb.export import load
from anomnb.models import FitOnce, Padim, Patchcore, merge

TINY = dict(backbone="tf_efficientnet_lite0", image_size=64)
MODELS = [(Patchcore, {}), (Padim, dict(channels=20))]
BROKEN = np.full((8, 8), np.nan)


@pytest.fixture(scope="module")
def images(toy):
    return Folder(toy).train_items


def fit(cls, items, calibrate=False, batch_size=16, **kw):
    return Engine(quiet=True, batch_size=batch_size).fit(cls(**{**TINY, **kw}), items, calibrate=calibrate)


def everything(model):
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    gathered = {k: v.clone() for k, v in model.accumulator.state().items()} if model.accumulator is not None else {}
    return tensors, gathered, model.fitted, dict(model.rules), list(model.fitted_images), dict(model.metrics), model.model_hash


def same(a, b):
    for x, y in zip(a[:2], b[:2]):
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x): return False
    return a[2:] == b[2:]


def near(a, b, tol=1e-6):
    "Tensors agree to 1e-6 of their size"
    for x, y in ((a.accumulator.state(), b.accumulator.state()), (a.state_dict(), b.state_dict())):
        assert x.keys() == y.keys()
        for k in x:
            assert x[k].shape == y[k].shape
            if x[k].numel(): assert (x[k].double() - y[k].double()).abs().max() <= tol*max(1e-12, y[k].double().abs().max()), k


def near_sums(a, b, tol=1e-6):
    """The same where features came in other batches: float32 then differs in its seventh digit, and what that is to a scatter goes by the
    features themselves (n μμᵀ), not by their spread"""
    x, y = a.accumulator.state(), b.accumulator.state()
    size = y["mean"].abs().max()
    assert x["n"] == y["n"] and (x["mean"] - y["mean"]).abs().max() <= tol*size
    assert (x["scatter"] - y["scatter"]).abs().max() <= tol*(y["n"]*size**2 + y["scatter"].abs().max())


def refused(model, call, match):
    "The call fails with these words and the model is as it was; it still predicts"
    before, image = everything(model), np.full((64, 64, 3), 100, np.uint8)
    score = Engine(quiet=True).predict(model, image)[0].score
    with pytest.raises(AnomnbError, match=match) as e: call()
    assert same(everything(model), before) and Engine(quiet=True).predict(model, image)[0].score == score
    return str(e.value)


# forget

@pytest.fixture
def padim(images):
    return fit(Padim, images[:12], channels=20)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_forgetting_is_a_fit_without_them(images, batch_size):
    gone = [images[i] for i in (0, 3, 4, 11)]
    model, rest = (fit(Padim, o, channels=20, batch_size=batch_size) for o in (images[:12], [o for o in images[:12] if o not in gone]))
    assert Engine(quiet=True, batch_size=batch_size).forget(gone, model) is model
    near(model, rest) if batch_size == 1 else near_sums(model, rest)
    assert model.fitted_images == rest.fitted_images
    a, b = (Engine(quiet=True).predict(m, images[:16]) for m in (model, rest))
    # eight images leave directions in which the covariance is the 0.01 of its diagonal alone: there the seventh digit of a feature becomes the third
    assert max(abs(x.score - y.score) for x, y in zip(a, b)) < (1e-5 if batch_size == 1 else 1e-2)*max(y.score for y in b)


def test_an_image_is_known_by_its_pixels(padim, images, tmp_path):
    Image.fromarray(images[5].read()).save(tmp_path / "another name.bmp")
    padim.forget(tmp_path / "another name.bmp")
    assert len(padim.fitted_images) == 11 and content_hash(images[5].read()) not in {o["sha256"] for o in padim.fitted_images}
    padim.forget(torch.from_numpy(images[6].read()).permute(2, 0, 1))
    assert len(padim.fitted_images) == 10


def test_forgetting_and_learning_again_is_where_it_began(padim, images):
    before = fit(Padim, images[:12], channels=20)
    padim.forget(images[2:5])
    Engine(quiet=True).partial_fit(padim, images[2:5], calibrate=False)
    near_sums(padim, before)
    assert sorted(o["sha256"] for o in padim.fitted_images) == sorted(o["sha256"] for o in before.fitted_images)


def test_strangers_are_named_and_nothing_is_forgotten(padim, images):
    said = refused(padim, lambda: padim.forget([images[0], images[15]]), "1 of 2 images were not in the fit")
    assert str(images[15].source) in said and str(images[0].source) not in said
    refused(padim, lambda: padim.forget([images[0], images[0]]), "given twice")
    refused(padim, lambda: padim.forget([images[0].read() + 1]), "not in the fit")
    padim.forget(images[0])
    refused(padim, lambda: padim.forget(images[0]), "not in the fit")


def test_an_image_that_was_fitted_twice_can_be_forgotten_twice(images):
    model = fit(Padim, [*images[:4], images[0]], channels=5)
    model.forget(images[0])
    assert len(model.fitted_images) == 4
    near_sums(model, fit(Padim, images[:4], channels=5))
    model.forget(images[0])
    near_sums(model, fit(Padim, images[1:4], channels=5))


def test_the_last_images_stay(padim, images):
    refused(padim, lambda: padim.forget(images[:12]), "can't forget every image")
    refused(padim, lambda: padim.forget(images[:11]), "two images or more")  # a covariance needs them


def test_what_can_not_be_read_is_not_forgotten(padim, images):
    refused(padim, lambda: padim.forget([images[0], BROKEN]), "array 1 is NaN")


def test_a_bank_says_who_can(images):
    model = fit(Patchcore, images[:4])
    said = refused(model, lambda: model.forget(images[:1]), "Patchcore can't forget")
    assert "padim" in said and "patchcore" not in said
    with pytest.raises(AnomnbError, match="nothing to forget"): Padim(**TINY).forget(images[:1])


def test_forgetting_after_loading(padim, images, tmp_path):
    padim.save(tmp_path / "sums.safetensors", resumable=True)
    padim.save(tmp_path / "plain.safetensors")
    model = load(tmp_path / "sums.safetensors")
    model.forget(images[:3])
    near_sums(model, fit(Padim, images[3:12], channels=20))
    with pytest.raises(AnomnbError, match="resumable=True"): load(tmp_path / "plain.safetensors").forget(images[:3])


def test_the_threshold_after_forgetting(images):
    model = fit(Padim, images, calibrate=True, channels=20)
    model.metrics = dict(image_AUROC=1.0)
    known = {o["sha256"] for o in model.fitted_images}
    inside = [o for o in images if content_hash(o.read()) in known]
    aside, rule = [o for o in images if o not in inside], model.rules[""]
    for i in range(2): model.forget(inside[i])
    assert model.rules[""].threshold == rule.threshold and model.rules[""].reason == rule.reason + "; chosen before images were forgotten"
    assert not model.metrics and not model.model_hash
    Engine(quiet=True).forget(model, inside[2], calibrate=aside)
    assert model.rules[""].threshold != rule.threshold and model.rules[""].reason == rule.reason
    assert model.rules[""].threshold == pytest.approx(max(p.score for p in Engine(quiet=True).predict(model, aside)), rel=1e-6)


# a verb that fails

class Deadly(Item):
    "An image whose reading ends the process"
    def read(self):
        if torch.utils.data.get_worker_info(): os._exit(3)
        return super().read()


def ways_to_fail(images):
    bad = type("Unwell", (), {})
    bad.broken = [*images[12:14], BROKEN]
    bad.deadly = [images[12], Deadly("deadly.png", images[13].path)]
    return bad


@pytest.mark.parametrize("cls, kw", MODELS)
@pytest.mark.parametrize("verb", ["fit", "partial_fit"])
def test_a_verb_that_fails_leaves_the_model_as_it_was(images, cls, kw, verb, monkeypatch):
    model, engine = fit(cls, images, calibrate=True, **kw), Engine(quiet=True, batch_size=1)
    call = lambda data, e=engine: getattr(e, verb)(model, data, calibrate=False)  # noqa: E731
    bad = ways_to_fail(images)
    refused(model, lambda: call(bad.broken), "1 of 3 images can't be read")
    refused(model, lambda: call([BROKEN]*2), "2 of 2 images can't be read")
    refused(model, lambda: getattr(engine, verb)(model, [BROKEN]*2, calibrate=False, on_error="skip"), "nothing was fitted")
    refused(model, lambda: call(bad.deadly, Engine(quiet=True, batch_size=1, num_workers=1)), r"process that reads images died after \d of 2 images")
    refused(model, lambda: call(images[:5], Engine(quiet=True, max_memory=100)), "needs at least")
    refused(model, lambda: call(images[:5], Engine(quiet=True, limit_train_batches=0)), "before anything was learnt")
    with monkeypatch.context() as m:
        m.setattr("anomnb.engine.engine.choose_rule", lambda *a, **k: (_ for _ in ()).throw(AnomnbError("no threshold")))
        refused(model, lambda: getattr(engine, verb)(model, images), "no threshold")
    with monkeypatch.context() as m:  # not an error of ours: it passes as it is, and changes nothing either
        before = everything(model)
        m.setattr(type(model.net), "learn", lambda self, found: 1/0)
        with pytest.raises(ZeroDivisionError): call(images[:5])
        assert same(everything(model), before)
    assert call(images[12:15]).fitted  # and it goes on


def test_a_first_fit_that_fails_leaves_an_unfitted_model(images):
    model = Patchcore(**TINY, num_neighbors=60, coreset_ratio=0.1)
    with pytest.raises(AnomnbError, match="num_neighbors=60"): Engine(quiet=True).fit(model, images[:2], calibrate=False)
    assert not model.fitted and model.accumulator is None and not model.rules and not len(model.net.bank)
    with pytest.raises(AnomnbError, match="not fitted"): model.predict(images[:1])
    Engine(quiet=True).fit(model, images, calibrate=False)


def test_a_model_keeps_the_images_of_its_last_good_fit_for_verification(images):
    engine = Engine(quiet=True)
    model = engine.fit(Padim(**TINY, channels=5), images[:3], calibrate=False)
    with pytest.raises(AnomnbError): engine.partial_fit(model, [BROKEN], calibrate=False)
    assert [o.source for o in engine.fit_items] == [o.source for o in images[:3]]


# images with which something is wrong

class Spoiled(Padim):
    "Features of dark images are not finite"
    value = float("nan")
    def features(self, images):
        e = super().features(images)
        e[images.mean((1, 2, 3)) < 0.01, 3, 2, 1] = self.value
        return e


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_name_the_image(images, value):
    model = Spoiled(**TINY, channels=5)
    model.value = value
    data = [*images[:6], Item("the dark one", image=np.zeros((8, 8, 3), np.uint8)), *images[6:9]]
    with pytest.raises(AnomnbError, match="features of the dark one are not finite"): Engine(quiet=True, batch_size=4).fit(model, data, calibrate=False)
    assert not model.fitted
    fit(Padim, data, channels=5)


def test_weights_that_are_not_finite_name_all(images):
    model = Patchcore(**TINY).build()
    model.net.backbone.net.conv_stem.weight.data[0] = float("nan")
    with pytest.raises(AnomnbError, match="and 3 more are not finite.*weights"): Engine(quiet=True).fit(model, images[:8], calibrate=False)


def test_one_image(images):
    assert len(fit(Patchcore, images[:1], image_size=128).fitted_images) == 1
    model = fit(Padim, images[:2], channels=5)
    assert len(Engine(quiet=True).partial_fit(model, images[2:3], calibrate=False).fitted_images) == 3
    with pytest.raises(AnomnbError, match="two images"): fit(Padim, images[:1], channels=5)


# more images

def test_a_model_without_its_sums_does_not_go_on(images, tmp_path):
    for cls, kw in MODELS:
        model = fit(cls, images[:4], **kw)
        model.save(tmp_path / "plain.safetensors")
        model = load(tmp_path / "plain.safetensors")
        before = everything(model)
        with pytest.raises(AnomnbError, match="save it with resumable=True"): model.partial_fit(images[4:6])
        assert same(everything(model), before)


@pytest.mark.parametrize("cls, kw", MODELS)
def test_partial_fit_after_loading(images, tmp_path, cls, kw):
    fit(cls, images[:6], **kw).save(tmp_path / "m.safetensors", resumable=True)
    model = Engine(quiet=True).partial_fit(load(tmp_path / "m.safetensors"), images[6:12], calibrate=False)
    assert len(model.fitted_images) == 12 and model.state_dict().keys() == fit(cls, images[:12], **kw).state_dict().keys()
    if cls is Padim: near(model, fit(cls, images[:12], **kw))


def test_sums_of_another_backbone_layers_or_size_are_refused(images):
    for other in (dict(backbone="resnet18", weights="random"), dict(layers=["blocks.2"]), dict(image_size=96)):
        with pytest.warns() if "backbone" in other else open(os.devnull):
            theirs = fit(Padim, images[:3], channels=10, **other)
        ours = fit(Padim, images[:3], channels=12)
        ours.accumulator = theirs.accumulator
        with pytest.raises(AnomnbError, match="can't join"): Engine(quiet=True).partial_fit(ours, images[3:6], calibrate=False)
        assert ours.accumulator is theirs.accumulator and ours.fitted and len(ours.fitted_images) == 3


# two models

def test_models_that_do_not_merge(images, tmp_path):
    a = fit(Padim, images[:4], channels=10)
    for other in (dict(channels=11), dict(image_size=96), dict(layers=["blocks.2", "blocks.4"]), dict(seed=1)):
        with pytest.raises(AnomnbError, match="same arguments"): merge(a, fit(Padim, images[4:8], **{"channels": 10, **other}))
    with pytest.raises(AnomnbError, match="one kind"): merge(a, fit(Patchcore, images[4:8]))
    with pytest.raises(AnomnbError, match="gathered"): merge(a, Padim(**TINY, channels=10))
    with pytest.raises(AnomnbError, match="trained, not gathered"): merge(a, torch.nn.Linear(1, 1))
    b = fit(Padim, images[4:8], channels=10)
    b.net.backbone.net.conv_stem.weight.data += 0.1
    with pytest.raises(AnomnbError, match="different weights"): merge(a, b)
    a.save(tmp_path / "plain.safetensors")
    with pytest.raises(AnomnbError, match="resumable"): merge(load(tmp_path / "plain.safetensors"), a)


def test_merging_leaves_both_as_they_were_and_does_not_ask_who_is_first(images):
    for cls, kw in MODELS:
        a, b = fit(cls, images[:5], **kw), fit(cls, images[5:12], **kw)
        before = everything(a), everything(b)
        ab, ba = merge(a, b), merge(b, a)
        assert same(everything(a), before[0]) and same(everything(b), before[1])
        assert len(ab.fitted_images) == 12 and not ab.rules
        if cls is Padim:
            near(ab, ba)
            near(ab, fit(cls, images[:12], **kw))


def test_the_file_of_the_weights_may_have_moved(images, tmp_path):
    from safetensors.torch import save_file

    net = Padim(**TINY, channels=10).build().net.backbone.net
    for name in ("a", "b"): save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / f"{name}.safetensors")
    a, b = (fit(Padim, part, channels=10, weights=tmp_path / f"{name}.safetensors") for name, part in (("a", images[:4]), ("b", images[4:8])))
    a.save(tmp_path / "model.safetensors", resumable=True)
    near(merge(load(tmp_path / "model.safetensors"), b), fit(Padim, images[:8], channels=10))


# before a fit

def test_the_estimate_counts_what_comes_after_the_last_image(images):
    class Slow(Patchcore):
        def finish_seconds(self, images): return 100.0*images

    plain, slow = (Engine(quiet=True).estimate(cls(**TINY), images) for cls in (Patchcore, Slow))
    n = len(as_data(images).split().fit)
    assert slow.images == n and slow.finish_seconds == 100.0*n and slow.seconds > 100.0*n > plain.seconds
    assert "after the last image" in str(slow) and FitOnce.finish_seconds(slow, 5) == 0.0
    padim = Engine(quiet=True).estimate(Padim(**TINY), images)
    assert padim.finish_seconds == 0.0 and 0 < padim.least_bytes <= padim.wanted_bytes


def test_memory_in_words(images):
    for bad in ("lots", "1 MB or so", "", -3, 0, True, "MB"):
        with pytest.raises(AnomnbError, match="max_memory"): Engine(max_memory=bad)
    model = Padim(**TINY, channels=40)
    least = Engine(quiet=True).estimate(model, images).least_bytes
    with pytest.raises(AnomnbError, match="max_memory=1.0 MB is too little.*needs at least") as e: Engine(quiet=True, max_memory="1MB").fit(model, images)
    assert not model.fitted and least > 1e6 and "gathered before" not in str(e.value)
    assert Engine(quiet=True, max_memory=least).fit(model, images).fitted
    refused(model, lambda: Engine(quiet=True, max_memory=least).partial_fit(model, images[:3]), "is what the model has gathered before")


def test_the_memory_of_a_partial_fit_is_bounded_too(images):
    model = fit(Patchcore, images[:4], coreset_ratio=0.05)
    assert model.accumulator.limit is None
    room = model.batch_bytes(1) + 600_000
    Engine(quiet=True, max_memory=room, batch_size=1).partial_fit(model, images[4:16], calibrate=False)
    assert model.accumulator.limit and model.accumulator.held <= model.accumulator.limit and len(model.fitted_images) == 16
