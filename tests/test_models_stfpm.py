"STFPM against its equations in numpy, as a learner, saved, exported, and on bad input"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unit

from anomnb.core.errors import AnomnbError
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.models.stfpm import Stfpm

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
TINY = dict(backbone="resnet18", weights="random", image_size=64)
GOOD = [draw_good(0, "stfpm", i, 96) for i in range(8)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, epochs=3, engine={}, **kw):
    return Engine(quiet=True, num_workers=0, batch_size=4, max_epochs=epochs, **engine).fit(Stfpm(**{**TINY, **kw}), images, calibrate=False)


@pytest.fixture(scope="module")
def fitted():
    return fit()


def both(model, x):
    "What teacher and student say, float64"
    with torch.no_grad():
        x = model.pre(x)
        return [[o.double().numpy() for o in net(x)] for net in (model.net.backbone.net, model.net.student)]


def paper(model, x):
    "Equation 1 at each place of each level"
    unit = lambda f: f/np.linalg.norm(f, axis=1, keepdims=True)
    return [0.5*np.square(unit(t) - unit(s)).sum(1) for t, s in zip(*both(model, x))]


def test_map_is_the_product_of_the_levels(fitted):
    maps = paper(fitted, unit(ODD))
    assert [o.shape[1:] for o in maps] == [(16, 16), (8, 8), (4, 4)]
    up = [F.interpolate(torch.from_numpy(m)[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0] for m in maps]
    with torch.inference_mode():
        raw = fitted(unit(ODD))
    np.testing.assert_allclose(raw.map, up[0]*up[1]*up[2], rtol=1e-3, atol=1e-4*float(raw.map.max()))  # three float32 networks
    assert torch.equal(raw.score, raw.map.flatten(1).max(1).values)


def test_loss_is_the_sum_of_the_means(fitted):
    x = unit(ODD)
    with torch.no_grad():
        loss = fitted.eval().loss(fitted.features(x), None)
    assert abs(float(loss) - sum(m.mean() for m in paper(fitted, x))) < 1e-4*float(loss)


def test_any_batch_and_any_shape(fitted):
    with torch.inference_mode():
        whole = fitted(unit(ODD))
        for i, o in enumerate(ODD):
            alone = fitted(unit([o]))
            assert (whole.map[i] - alone.map[0]).abs().max() <= 1e-5*whole.map.max()
        assert fitted.net(torch.rand(2, 3, 50, 90)).map.shape == (2, 50, 90)


def test_the_student_learns_and_the_teacher_does_not():
    model = Stfpm(**TINY).build()
    teacher = {k: v.clone() for k, v in model.net.backbone.state_dict().items()}
    model.train()
    assert model.net.student.training and not any(m.training for m in model.net.backbone.modules())
    x = model.features(unit(GOOD))
    optimiser, losses = model.configure_optimizers(), []
    for _ in range(12):
        losses.append(model.loss(x, None))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.net.student.parameters())
    assert all(torch.equal(v, teacher[k]) for k, v in model.net.backbone.state_dict().items())
    assert float(losses[-1].detach()) < 0.8*float(losses[0].detach())


def test_the_published_schedule():
    model = Stfpm(**TINY).build()
    (group,) = model.configure_optimizers().param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.4, 0.9, 1e-4)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.net.student.parameters()}
    assert (model.trainer_defaults, model.batch_size, model.keep, model.patience) == (dict(max_epochs=100), 32, "best", None)
    assert Stfpm().backbone.channels == [64, 128, 256] and Stfpm().backbone.strides == [4, 8, 16]


def test_kept_features_change_nothing():
    a, b = fit(), fit(engine=dict(cache_features=None))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.net.student.parameters(), b.net.student.parameters()))
    assert [list(o) for o in a.history] == [list(o) for o in b.history]


def test_one_seed_one_student(fitted):
    again, other = fit(), fit(seed=1)
    assert all(torch.equal(x, y) for x, y in zip(fitted.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(other.net.student.layer1[0].conv1.weight, again.net.student.layer1[0].conv1.weight)


@pytest.mark.parametrize("backbone", ["swin_s3_tiny_224", "test_vit"])
def test_transformers(backbone):
    model = Stfpm(backbone=backbone, layers=[0, 1], weights="random", image_size=224 if "swin" in backbone else 160).build()
    side = model.pre.size[0]
    assert model.net.eval()(torch.rand(1, 3, side, side)).map.shape == (1, side, side)


def test_bad_input():
    with pytest.raises(AnomnbError, match="image_size of at least 17"):
        fit(GOOD[:1], image_size=16)
    assert fit(GOOD[:2], image_size=16, epochs=1).fitted
    with pytest.raises(AnomnbError, match="did you mean 'layer3'"):
        Stfpm(layers=["layer33"])
    with pytest.raises(AnomnbError, match="multiples of 16"):
        Stfpm(backbone="test_vit", layers=[0], image_size=100)
    with pytest.raises(AnomnbError, match="not fitted"):
        Stfpm(**TINY)(torch.rand(1, 3, 64, 64))
    with pytest.raises(AnomnbError, match="lower the learning rate"):
        fit(lr=1e30)
