"FRE against its equations in numpy and against PCA, as a learner, saved, exported, and on bad input"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unit

from anomnb.core.errors import AnomnbError
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.models.fre import Fre, TiedAutoencoder

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
TINY = dict(backbone="resnet18", weights="random", image_size=64, latent=8)
GOOD = [draw_good(0, "fre", i, 96) for i in range(8)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, epochs=10, engine={}, **kw):
    return Engine(quiet=True, num_workers=0, batch_size=4, max_epochs=epochs, **engine).fit(Fre(**{**TINY, **kw}), images, calibrate=False)


@pytest.fixture(scope="module")
def fitted():
    return fit()


def pooled(model, x, pool=2):
    "Block means of the features, float64"
    with torch.no_grad():
        f = model.net.backbone(model.pre(x))[0].double().numpy()
    b, c, h, w = f.shape
    return f[:, :, :h//pool*pool, :w//pool*pool].reshape(b, c, h//pool, pool, w//pool, pool).mean((3, 5))


def paper(model, x, pool=2):
    "Squared error of what two linear layers with one matrix draw again, B×C×h×w"
    f, a = pooled(model, x, pool), model.net.autoencoder
    w, inner, outer = (o.detach().double().numpy() for o in (a.weight, a.inner, a.outer))
    flat = f.reshape(len(f), -1)
    return np.square(flat - ((flat @ w.T + inner) @ w + outer)).reshape(f.shape)


def test_map_and_score_are_the_error(fitted):
    e = paper(fitted, unit(ODD))
    assert e.shape == (3, 256, 2, 2)
    with torch.inference_mode():
        raw = fitted(unit(ODD))
    map = F.interpolate(torch.from_numpy(e.sum(1))[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(raw.map, map, rtol=1e-3, atol=1e-4*float(map.max()))  # a float32 network
    np.testing.assert_allclose(raw.score, e.sum((1, 2, 3)), rtol=1e-3)


def test_loss_is_the_mean_error(fitted):
    with torch.no_grad():
        loss = fitted.eval().loss(fitted.features(unit(ODD)), None)
    assert float(loss) == pytest.approx(paper(fitted, unit(ODD)).mean(), rel=1e-3)


def test_a_long_fit_comes_near_pca():
    noise = np.random.default_rng(0)
    x = noise.normal(size=(60, 5)) @ noise.normal(size=(5, 40)) + 0.3*noise.normal(size=(60, 40)) + 2
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    best = np.square(values[3:]).sum()/x.size  # what no linear autoencoder with 3 numbers between can fall below
    net, x = TiedAutoencoder(40, 3), torch.from_numpy(x).float()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(3000):
        optimiser.zero_grad()
        loss = (x - net(x)).square().mean()
        loss.backward()
        optimiser.step()
    assert best*(1 - 1e-4) < float(loss.detach()) < 1.01*best
    found = np.linalg.qr(net.weight.detach().numpy().T)[0]
    main = np.linalg.svd(x.numpy() - x.numpy().mean(0), full_matrices=False)[2][:3].T
    assert np.linalg.svd(found.T @ main, compute_uv=False).min() > 0.99  # cosines between the two subspaces


def test_any_batch_and_any_shape(fitted):
    with torch.inference_mode():
        whole = fitted(unit(ODD))
        for i, o in enumerate(ODD):
            alone = fitted(unit([o]))
            assert (whole.map[i] - alone.map[0]).abs().max() <= 1e-5*whole.map.max()
            assert (whole.score[i] - alone.score[0]).abs() <= 1e-5*whole.score.max()
    wide = fit(image_size=(64, 100), epochs=1, pool=3)  # the grid is 4×7, pooled 1×2
    assert wide.pooled_grid() == (1, 2) and paper(wide, unit(ODD), 3).shape == (3, 256, 1, 2)
    with torch.inference_mode():
        assert wide(unit(ODD)).map.shape == (3, 64, 100)


def test_only_the_autoencoder_learns():
    model = Fre(**TINY).build()
    frozen = {k: v.clone() for k, v in model.net.backbone.state_dict().items()}
    x, optimiser, losses = model.train().features(unit(GOOD)), model.configure_optimizers(), []
    for _ in range(30):
        losses.append(model.loss(x, None))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert all(p.grad.abs().sum() > 0 for p in model.net.autoencoder.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in model.net.backbone.state_dict().items())
    assert float(losses[-1].detach()) < 0.7*float(losses[0].detach())


def test_the_published_schedule():
    model = Fre(**TINY).build()
    (group,) = model.configure_optimizers().param_groups
    assert group["lr"] == 0.001 and {id(p) for p in group["params"]} == {id(p) for p in model.net.autoencoder.parameters()}
    assert (model.trainer_defaults, model.batch_size, model.keep) == (dict(max_epochs=220), 32, "last")
    published = Fre()
    assert (published.backbone.channels, published.backbone.strides, published.pooled_grid(), published.args["latent"]) == ([1024], [16], (8, 8), 220)


def test_one_seed_one_model(fitted):
    again, other, plain = fit(), fit(seed=1), fit(engine=dict(cache_features=None))
    assert all(torch.equal(x, y) for x, y in zip(fitted.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(other.net.autoencoder.weight, again.net.autoencoder.weight)
    assert torch.allclose(plain.net.autoencoder.weight, again.net.autoencoder.weight, atol=1e-4)  # Adam magnifies the rounding of another batch


def test_bad_input():
    with pytest.raises(AnomnbError, match="latent=1024: from 1 to less than the 1024 numbers"):
        Fre(**{**TINY, "latent": 1024})
    for bad in (dict(latent=0), dict(latent=-1), dict(latent=2.5), dict(pool=0), dict(pool=1.5), dict(pool=True)):
        with pytest.raises(AnomnbError, match="=.*: a whole number of at least 1"):
            Fre(**{**TINY, **bad})
    assert Fre(**{**TINY, "latent": 1023}).args["latent"] == 1023
    with pytest.raises(AnomnbError, match=r"pool=5 on a grid of \(4, 4\): pool less"):
        Fre(**TINY, pool=5)
    with pytest.raises(AnomnbError, match="one layer, 2 were given"):
        Fre(**TINY, layers=["layer2", "layer3"])
    with pytest.raises(AnomnbError, match="did you mean 'layer3'"):
        Fre(**TINY, layers="layer33")
    with pytest.raises(AnomnbError, match="not fitted"):
        Fre(**TINY)(torch.rand(1, 3, 64, 64))
    with pytest.raises(AnomnbError, match="lower the learning rate"):
        fit(lr=1e30)
