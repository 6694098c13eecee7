"""Kernel density against scipy, and DFKDE from few images to exported files."""
import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde

from anomnb.core.errors import AnomnbError
from anomnb.data.folder import Folder
from anomnb.engine.engine import Engine
from anomnb.export import load
from anomnb.models import Dfkde, merge
from anomnb.models.density import GaussianKDE, bandwidth, fit_kernels
from anomnb.models.dfkde import PooledVectors

TINY = dict(backbone="tf_efficientnet_lite0", image_size=64)


def vectors(n, k, seed=0, offset=0.):
    g = np.random.default_rng(seed)
    return g.normal(size=(n, k)) @ g.normal(size=(k, k)) + offset


def exact(x, q, rule="scott"):
    "In float64, as the fit is"
    return GaussianKDE().double().learn(fit_kernels(torch.from_numpy(x), rule))(torch.from_numpy(q)).numpy()


# the density

@pytest.mark.parametrize("n, k", [(2, 1), (30, 1), (5, 4), (200, 3), (400, 16), (17, 16)])
@pytest.mark.parametrize("rule", ["scott", "silverman", 0.3])
def test_it_is_scipys(n, k, rule):
    x, q = vectors(n, k), vectors(50, k, 1)
    truth = gaussian_kde(x.T, rule).logpdf(q.T)
    found = exact(x, q, rule)
    np.testing.assert_allclose(found, truth, rtol=1e-6 if n - k < 2 else 1e-8)  # a simplex has a covariance that is nearly flat
    net = GaussianKDE().learn(fit_kernels(torch.from_numpy(x), rule))(torch.from_numpy(q).float()).numpy()
    assert net.dtype == np.float32
    if n - k > 2: np.testing.assert_allclose(net, truth, rtol=1e-4, atol=1e-3)
    assert bandwidth(n, k, rule) == pytest.approx(gaussian_kde(x.T, rule).factor)


def test_far_from_the_origin_and_far_from_all():
    x = vectors(300, 4, offset=1000.)
    q = x[:100] + np.random.default_rng(2).normal(size=(100, 4))
    truth = gaussian_kde(x.T - 1000).logpdf(q.T - 1000)
    np.testing.assert_allclose(exact(x, q), truth, rtol=1e-6)
    net = GaussianKDE().learn(fit_kernels(torch.from_numpy(x)))
    away = torch.stack([torch.full((4,), 1000. + 10.**i) for i in range(2, 7)])
    found = net(away)
    assert torch.isfinite(found).all() and (found.diff() < 0).all()  # long after the density itself is 0


def test_tiles_change_nothing(monkeypatch):
    x, q = vectors(100, 3), vectors(40, 3, 1)
    whole = exact(x, q)
    for tile in (1, 7, 99, 100):
        monkeypatch.setattr("anomnb.models.density.TILE", tile)
        np.testing.assert_allclose(exact(x, q), whole, rtol=1e-12)


def test_a_common_factor_is_a_common_shift():
    x, q = vectors(80, 5), vectors(40, 5, 1)
    np.testing.assert_allclose(exact(x/7, q/7) - exact(x, q), 5*np.log(7), rtol=1e-9)
    turn, shift = vectors(5, 5, 3), np.arange(5.)
    np.testing.assert_allclose(exact(x @ turn + shift, q @ turn + shift), exact(x, q) - np.linalg.slogdet(turn)[1], rtol=1e-6)


def test_duplicates_count_as_often_as_they_come():
    x = vectors(40, 2)
    x[20:] = x[:20]
    np.testing.assert_allclose(exact(x, x), gaussian_kde(x.T).logpdf(x.T), rtol=1e-9)


@pytest.mark.parametrize("x, why", [
    (torch.rand(1, 3), "two vectors or more, not 1"), (torch.rand(0, 3), "two vectors or more, not 0"), (torch.rand(9), "is wanted"),
    (torch.rand(9, 0), "is wanted"), (torch.ones(9, 3), "do not vary"), (torch.rand(3, 9), "do not vary"),
    (torch.full((9, 2), float("inf")), "NaN or infinity"), (torch.stack([torch.rand(9), torch.zeros(9)], 1), "do not vary")])
def test_what_has_no_density(x, why):
    with pytest.raises(AnomnbError, match=why): fit_kernels(x)


@pytest.mark.parametrize("rule", ["scot", 0, -1, float("inf"), float("nan"), True, None])
def test_bandwidths_that_are_none(rule):
    with pytest.raises(AnomnbError, match="bandwidth"): bandwidth(10, 2, rule)
    with pytest.raises(AnomnbError, match="bandwidth"): Dfkde(**TINY, bandwidth=rule)


# DFKDE

@pytest.fixture(scope="module")
def images(toy):
    return Folder(toy).train_items


def fit(items, **kw):
    return Engine(quiet=True).fit(Dfkde(**{**TINY, **kw}), items, calibrate=False)


def scores(model, images):
    return np.array([p.score for p in Engine(quiet=True).predict(model, images)])


def test_the_score_is_the_definition(images):
    model, many = fit(images, components=4), images[:8]
    x = model.accumulator.rows.double().numpy()
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    z = (x - x.mean(0)) @ axes[:4].T
    longest = np.linalg.norm(z, axis=1).max()
    from anomnb.data.loader import make_loader

    batch = next(iter(make_loader(many, resize=model.pre.resize)))
    q = (model.features(batch.images).double().numpy() - x.mean(0)) @ axes[:4].T
    np.testing.assert_allclose(scores(model, many), -gaussian_kde(z.T/longest).logpdf(q.T/longest), rtol=1e-3, atol=1e-3)


def test_it_is_of_the_image_as_a_whole(images):
    model = Engine(quiet=True).fit(Dfkde(**TINY), images)
    p = Engine(quiet=True).predict(model, images[:1])[0]
    assert p.raw_map is None and p.map is None and p.is_anomalous is not None and not p.regions
    assert model.rules[""].map_threshold is None


def test_batch_size_and_order_change_nothing(images):
    model = fit(images)
    a, b = (np.array([p.score for p in Engine(quiet=True, batch_size=k).predict(model, images)]) for k in (1, 16))
    assert abs(a - b).max() <= 1e-5*np.ptp(a)
    other = fit(images[::-1])
    assert abs(scores(other, images) - a).max() <= 1e-3*np.ptp(a)


def test_few_images(images):
    for n in (2, 3, 5, 17):
        model = fit(images[:n])
        assert model.net.density.points.shape == (n, min(16, n - 1)) and np.isfinite(scores(model, images)).all()
    with pytest.raises(AnomnbError, match="two good images or more, not 1"): fit(images[:1])
    with pytest.raises(AnomnbError, match="equal"): fit([images[0]]*4)
    twice = fit([images[0], images[1]]*3)
    assert twice.net.density.points.shape == (6, 1)
    plain = [np.full((16, 16, 3), v, np.uint8) for v in (10, 200)]
    assert np.isfinite(scores(fit(plain), images)).all()


def test_equal_images_in_different_batches_are_equal(images):
    with pytest.raises(AnomnbError, match="equal"): Engine(quiet=True, batch_size=4).fit(Dfkde(**TINY), [images[0]]*7, calibrate=False)


def test_save_and_load(images, tmp_path):
    model = fit(images[:12])
    for resumable in (False, True):
        model.save(tmp_path / "m.safetensors", resumable=resumable)
        again = load(tmp_path / "m.safetensors")
        assert (scores(again, images) == scores(model, images)).all() and repr(again) == repr(model)
    few = fit(images[:4])  # fewer axes than another fit has
    few.save(tmp_path / "few.safetensors")
    assert (scores(load(tmp_path / "few.safetensors"), images) == scores(few, images)).all()


def test_going_on_merging_and_forgetting_give_the_whole(images, tmp_path):
    whole, first, rest = fit(images[:16]), fit(images[:9]), fit(images[9:16])
    first.save(tmp_path / "m.safetensors", resumable=True)
    later = Engine(quiet=True).partial_fit(load(tmp_path / "m.safetensors"), images[9:16], calibrate=False)
    more = fit(images[:20])
    more.forget(images[16:20])
    truth = scores(whole, images)
    for model in (later, merge(first, rest), merge(rest, first), more):
        assert len(model.fitted_images) == model.accumulator.n == 16
        assert abs(scores(model, images) - truth).max() <= 1e-3*np.ptp(truth)
    with pytest.raises(AnomnbError, match="not in the fit"): more.forget(images[16])
    with pytest.raises(AnomnbError, match="two good images"): more.forget(images[1:16])
    assert len(more.fitted_images) == 16
    more.forget(images[2:16])
    assert more.net.density.points.shape == (2, 1)


def test_forgetting_takes_the_very_rows():
    x = torch.randn(30, 8)
    a, b = PooledVectors(8), PooledVectors(8)
    a.update(x)
    b.update(x[5:])
    a.subtract(x[:5]*(1 + 1e-7))
    assert torch.equal(a.rows, b.rows)
    before = a.rows.clone()
    for bad in (x[:1], torch.randn(1, 8)):
        with pytest.raises(AnomnbError, match="not added before"): a.copy().subtract(bad)
    assert torch.equal(a.rows, before)
    for bad in (torch.zeros(3, 7), torch.zeros(8), torch.zeros(2, 8, 1, 1)):
        with pytest.raises(AnomnbError, match="is wanted"): a.update(bad)
    with pytest.raises(AnomnbError, match="is wanted"): a.merge(PooledVectors(9))


@pytest.mark.parametrize("kind, name", [("onnx", "m.onnx"), ("openvino", "m.xml")])
def test_it_is_the_same_in_every_runtime(images, tmp_path, kind, name):
    from anomnb.export import Inferencer, verify

    model = Engine(quiet=True).fit(Dfkde(**TINY), images)
    engine = Engine(quiet=True)
    path = engine.export(model, kind, tmp_path / name, data=images[:4])  # refused unless it agrees at two sizes and two batches
    found = Inferencer(path).predict([str(o.path) for o in images[:5]])
    truth = Engine(quiet=True).predict(model, images[:5])
    spread = np.ptp(scores(model, images))
    assert verify and all(abs(a.score - b.score) <= 1e-4*spread and a.map is None for a, b in zip(found, truth))


def test_memory_and_arguments(images):
    model = Dfkde(**TINY)
    least, wanted = model.memory(100, 16)
    assert 0 < least <= wanted < model.memory(1000, 16)[1] < 60e6
    with pytest.raises(AnomnbError, match="needs at least"): Engine(quiet=True, max_memory=1000).fit(model, images)
    for bad in (0, -1, 2.5, True, "16"):
        with pytest.raises(AnomnbError, match="components"): Dfkde(**TINY, components=bad)
    assert Dfkde().backbone.layers == ["layer4"] and Dfkde(**TINY, layers=["blocks.2", "blocks.4"]).dims == 152
    two = fit(images, layers=["blocks.2", "blocks.4"])
    assert two.net.mean.shape == (152,)
