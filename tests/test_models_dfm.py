"DFM against numpy, in parts, out again, saved and resumed, exported, and on bad input"
import numpy as np
import pytest
import torch
from pictures import unit
from scipy.stats import multivariate_normal

from anomnb.core.errors import AnomnbError
from anomnb.core.names import create_model
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.export.bundle import load
from anomnb.export.openvino import to_openvino
from anomnb.export.parity import export_model, verify
from anomnb.models.base import merge
from anomnb.models.components import pca_memory
from anomnb.models.dfm import Dfm, VectorAxes

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
GOOD = [draw_good(0, "dfm", i, 96) for i in range(14)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]
TINY = dict(backbone="resnet18", weights="random", image_size=64)


def fit(images=GOOD, **kwargs):
    return Engine(quiet=True, num_workers=0, batch_size=4).fit(create_model("dfm", **{**TINY, **kwargs}), images, calibrate=False)


def axes(model):
    "What the axes span, and how much along it: no sign or order of equals in it"
    basis = model.net.basis.double()
    return basis @ basis.T, (basis*model.net.values) @ basis.T, model.net.mean.double()


def same(a, b, tol=1e-6):
    for x, y in zip(axes(a), axes(b), strict=True):
        assert x.shape == y.shape and (x - y).abs().max() <= tol*y.abs().max()


@pytest.fixture(scope="module", params=["fre", "nll"])
def fitted(request):
    return fit(score=request.param, image_size=128, pool=4), request.param


def test_is_numpy(fitted):
    model, score = fitted
    with torch.inference_mode():
        x, q = (model.features(unit(o)).flatten(1).double().numpy() for o in (GOOD, ODD))
        raw = model(unit(ODD))
    mean, y = x.mean(0), x - x.mean(0)
    _, s, vt = np.linalg.svd(y, full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2)/np.sum(s**2), 0.97)) + 1
    z = (q - mean) @ vt[:k].T
    left = (q - mean - z @ vt[:k]).reshape(3, 256, 2, 2)
    expected = np.square(left).sum((1, 2, 3)) if score == "fre" else -multivariate_normal(np.zeros(k), np.diag(s[:k]**2/13)).logpdf(z)
    assert model.net.basis.shape == (1024, k)
    np.testing.assert_allclose(raw.score, expected, rtol=1e-4)
    tiles = torch.from_numpy(np.square(left).sum(1))[:, None]
    up = torch.nn.functional.interpolate(tiles, size=(128, 128), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(raw.map, up, rtol=1e-3, atol=1e-4*float(up.max()))


def test_any_batch_gives_the_same(fitted):
    model, _ = fitted
    with torch.inference_mode():
        whole = model(unit(ODD))
        alone = [model(unit([o])) for o in ODD]
    assert (whole.score - torch.cat([o.score for o in alone])).abs().max() <= 1e-5*whole.score.abs().max()
    assert (whole.map - torch.cat([o.map for o in alone])).abs().max() <= 1e-5*whole.map.max()


def test_parts_make_the_whole():
    whole = fit()
    same(merge(fit(GOOD[:5]), fit(GOOD[5:])), whole)
    later = Engine(quiet=True, num_workers=0).partial_fit(fit(GOOD[:6]), GOOD[6:], calibrate=False)
    same(later, whole)
    assert len(later.fitted_images) == 14


def test_images_go_out_again():
    model, less = fit(), fit(GOOD[:9])
    model.accumulator.subtract(model.features(unit(GOOD[9:])))  # in another batch than they came
    same(model.finish(), less)
    with pytest.raises(AnomnbError, match="not added before"):
        model.accumulator.subtract(model.features(unit(ODD[2:])))
    same(model.finish(), less)


def test_the_engine_forgets():
    model = Engine(quiet=True, num_workers=0, batch_size=3).forget(fit(), GOOD[9:])
    same(model, fit(GOOD[:9]))
    assert len(model.fitted_images) == 9
    with pytest.raises(AnomnbError, match="were not in the fit"):
        Engine(quiet=True, num_workers=0).forget(model, GOOD[9:10])
    with pytest.raises(AnomnbError, match="two good images or more, not 1"):
        Engine(quiet=True, num_workers=0).forget(model, GOOD[1:9])
    same(model, fit(GOOD[:9]))


def test_images_go_out_of_sums_too():
    def small(images): return fit(images, backbone="resnet18", layers="layer1", image_size=32, pool=8)  # 64 numbers of 70 images
    many = [draw_good(0, "many", i, 32) for i in range(75)]
    model, less = small(many), small(many[:70])
    assert model.accumulator.pca.n > model.dims == 64
    model.accumulator.subtract(model.features(unit(many[70:])))
    same(model.finish(), less)


def test_saved_and_resumed(tmp_path, fitted):
    model, score = fitted
    again = load(model.save(tmp_path / "a.safetensors"))
    with torch.inference_mode():
        ours, theirs = model(unit(ODD)), again(unit(ODD))
    assert torch.equal(ours.score, theirs.score) and torch.equal(ours.map, theirs.map) and again.args == model.args
    with pytest.raises(AnomnbError, match="resumable=True"):
        Engine(quiet=True).partial_fit(again, GOOD[:2])
    half = load(fit(GOOD[:6], score=score).save(tmp_path / "b.safetensors", resumable=True))
    same(Engine(quiet=True, num_workers=0).partial_fit(half, GOOD[6:], calibrate=False), fit(score=score))
    same(merge(load(fit(GOOD[:6]).save(tmp_path / "c.safetensors", resumable=True)), fit(GOOD[6:])), fit())


@pytest.mark.parametrize("kwargs", [dict(score="fre"), dict(score="nll"), dict(image_size=(112, 80), pool=3)])  # 7×5 places: tiles that are not full
def test_parity_in_both_runtimes(tmp_path, kwargs):
    model = fit(**kwargs)
    path, parity = export_model(model, tmp_path / "dfm", "onnx", images=ODD)
    other = verify(model, to_openvino(path, tmp_path / "dfm.xml"), images=ODD)
    print(parity, other, sep="\n")
    assert parity.ok and other.ok and max(parity.worst, other.worst) < 2e-5
    assert len({r["size"] for r in parity.rows}) == len({r["batch"] for r in parity.rows}) == 2
    assert export_model(model, tmp_path / "dfm", "torch", images=ODD)[1].worst == 0


def test_map_sums_to_the_score_and_finds_its_tile():
    model = fit(image_size=128, pool=1)
    image = unit(GOOD[:1])
    image[:, :, 60:80, 10:30] = 1
    with torch.inference_mode():
        raw, tiles = model(image), model.net.eval()
        e = tiles.embed(model.pre(image))
    assert raw.map.shape == (1, 128, 128) and e.shape == (1, 256, 8, 8)
    y, x = divmod(int(raw.map[0].argmax()), 128)
    assert 64 <= y < 128 and 0 <= x < 64


def test_layers_and_backbones():
    assert Dfm().backbone.layers == ["layer3"] and Dfm().dims == 16384 == Dfm("resnet18").dims*4 and Dfm("tf_efficientnet_lite0").dims == 112*16
    assert Dfm("resnet18", layers="layer2", image_size=96).dims == 128*9 and Dfm("resnet18", image_size=200).dims == 256*16  # 13 places: 4 tiles
    for kwargs, words in ((dict(layers=["layer2", "layer3"]), "one layer, not layer2, layer3"), (dict(pool=0), "from 1 to 16"),
                          (dict(pool=2.5), "whole number"), (dict(pool=3, image_size=32), "2×2 places"), (dict(variance=0), "at most 1"),
                          (dict(variance=1.5), "at most 1"), (dict(score="mse"), "score .mse."), (dict(varaince=1), "did you mean 'variance'")):
        with pytest.raises(AnomnbError, match=words):
            Dfm(**{"backbone": "resnet18", **kwargs})


def test_bad_images():
    with pytest.raises(AnomnbError, match="two good images or more, not 1"):
        fit(GOOD[:1])
    with pytest.raises(AnomnbError, match="all 6 good images are the same"):
        fit([GOOD[0]]*6)
    model = fit()
    for bad in (float("nan"), float("inf")):
        e = model.features(unit(GOOD[:3]))
        e[1, 3] = bad
        before = model.accumulator.pca.n
        with pytest.raises(AnomnbError, match="row 1 of 3 holds NaN or infinity"):
            model.accumulator.update(e)
        assert model.accumulator.pca.n == before
    assert len(fit(GOOD[:2]).net.values) == 1  # two images differ in one direction


def test_two_images_score_zero_where_they_are():
    model = fit(GOOD[:2], variance=1.0)
    with torch.inference_mode():
        seen, odd = model(unit(GOOD[:2])).score, model(unit(ODD)).score
    assert seen.max() < 1e-6*odd.min()


def test_max_memory():
    least, wanted = Dfm("resnet18", weights="random", image_size=64).memory(100, 16)
    assert (least, wanted) == pca_memory(100, 256) and least < wanted
    with pytest.raises(AnomnbError, match="is too little: Dfm on 14 images needs at least"):
        Engine(quiet=True, max_memory=1000).fit(Dfm(**TINY), GOOD, calibrate=False)
    tight = VectorAxes(256, 0.5, least)
    for i in range(20):
        tight.update(torch.randn(8, 256, 1, 1, generator=torch.Generator().manual_seed(i)))
    with pytest.warns(UserWarning, match="allow more memory"):
        assert tight.finish().error > 0
