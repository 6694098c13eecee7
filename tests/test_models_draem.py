"DRAEM: its losses against naive ones, as a learner, at any size, saved, exported, and on bad input"
import copy

import numpy as np
import pytest
import torch
from pictures import unit
from PIL import Image

from anomnb.core.errors import AnomnbError
from anomnb.core.seeds import rng
from anomnb.core.types import Batch
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.export.bundle import load
from anomnb.export.parity import export_model
from anomnb.metrics.ranking import auroc
from anomnb.models.decoders import reconstructive
from anomnb.models.draem import Discriminative, Draem, DraemNet, focal_loss, ssim

TINY = dict(image_size=64, width=4, segment_width=4, lr=0.003)
GOOD = [draw_good(0, "draem", i, 64) for i in range(12)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def batch(images):
    x = unit(images)
    return x, Batch(x, [str(i) for i in range(len(x))], [(64, 64)]*len(x), index=list(range(len(x))))


def fit(images=GOOD, epochs=3, engine={}, **kw):
    return Engine(quiet=True, num_workers=0, batch_size=4, max_epochs=epochs, **engine).fit(Draem(**{**TINY, **kw}), images, calibrate=False)


@pytest.fixture(scope="module")
def fitted():
    return fit(epochs=20)


def test_ssim_is_that_of_each_window():
    g = rng(0)
    a, b = g.random((2, 3, 20, 17)), g.random((2, 3, 20, 17))
    b[1] = 0.9*a[1] + 0.05
    t = np.arange(11) - 5
    k = np.exp(-(t[:, None]**2 + t**2)/(2*1.5**2))
    k /= k.sum()
    expected = np.zeros_like(a)
    wide = [np.pad(o, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect") for o in (a, b)]
    for i in np.ndindex(*a.shape):
        p, q = (o[i[0], i[1], i[2]:i[2] + 11, i[3]:i[3] + 11] for o in wide)
        mp, mq = (k*p).sum(), (k*q).sum()
        vp, vq, c = (k*(p - mp)**2).sum(), (k*(q - mq)**2).sum(), (k*(p - mp)*(q - mq)).sum()
        expected[i] = (2*mp*mq + 1e-4)*(2*c + 9e-4)/((mp**2 + mq**2 + 1e-4)*(vp + vq + 9e-4))
    np.testing.assert_allclose(ssim(torch.from_numpy(a), torch.from_numpy(b)), expected, atol=1e-10)  # float64
    np.testing.assert_allclose(ssim(torch.from_numpy(a).float(), torch.from_numpy(b).float()), expected, atol=1e-4)  # squares are subtracted in float32
    assert torch.allclose(ssim(unit(GOOD), unit(GOOD)), torch.ones(()), atol=1e-4)


def test_ssim_gradient():
    a, b = (torch.from_numpy(rng(0, o).random((1, 1, 8, 8))).requires_grad_() for o in "ab")
    assert torch.autograd.gradcheck(lambda a, b: ssim(a, b, 5).mean(), (a, b))
    flat = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    ssim(flat, torch.zeros(1, 3, 32, 32)).mean().backward()
    assert torch.isfinite(flat.grad).all()


def test_focal_loss():
    g = rng(1)
    logits, mask = g.normal(0, 3, (2, 2, 5, 7)), g.random((2, 5, 7)) < 0.3
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    right = np.where(mask, p[:, 1], p[:, 0])
    for gamma in (0, 2):
        expected = np.mean(-(1 - right)**gamma*np.log(right))
        assert abs(float(focal_loss(torch.from_numpy(logits), torch.from_numpy(mask), gamma)) - expected) < 1e-12
    far = torch.tensor([[200., -200], [-200, 200]]).view(1, 2, 1, 2).requires_grad_()
    for wrong in (False, True):
        loss = focal_loss(far, torch.tensor([[[wrong, not wrong]]]))
        (grad,) = torch.autograd.grad(loss, far)
        assert torch.isfinite(loss) and torch.isfinite(grad).all() and float(loss.detach()) == pytest.approx(400*wrong)


def test_the_published_networks():
    with torch.device("meta"):
        nets = reconstructive(), Discriminative()
        assert nets[0](torch.rand(1, 3, 64, 96)).shape == (1, 3, 64, 96) and nets[1](torch.rand(1, 6, 64, 96)).shape == (1, 2, 64, 96)
    wide = [m.out_channels for m in nets[0].modules() if isinstance(m, torch.nn.Conv2d)]
    down, up = [128, 128, 256, 256, 512, 512] + [1024]*4, [1024, 1024, 512, 512, 512, 256, 256, 256] + [128]*4
    assert wide == down + up + [3]
    assert [m.kernel_size for m in nets[1].modules() if isinstance(m, torch.nn.MaxPool2d)] == [2]*5
    assert [m[0].in_channels for m in nets[1].join] == [1024, 768, 384, 192, 128]
    assert sum(p.numel() for net in nets for p in net.parameters()) == 97_422_725


def test_the_published_schedule():
    model = Draem(**TINY).build()
    model.total_batches = 100
    made = model.configure_optimizers()
    optimiser, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(100):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    np.testing.assert_allclose(rates, [0.003]*80 + [0.0006]*10 + [0.00012]*10)
    assert made["lr_scheduler"]["interval"] == "step" and isinstance(optimiser, torch.optim.Adam)
    assert (Draem.trainer_defaults, Draem.batch_size, Draem().args["lr"], Draem().pre.size) == (dict(max_epochs=700), 8, 1e-4, (256, 256))
    assert model.pre.mean.eq(0).all() and model.pre.std.eq(1).all()


def test_loss_is_the_sum_of_three():
    model = Draem(**TINY).build().eval()
    x, b = batch(GOOD)
    with torch.no_grad():
        seen, mask = model.damage_all(x, b.index)
        again, logits = model.net.both(seen)
        expected = (again - x).square().mean() + (1 - ssim(again, x)).mean() + focal_loss(logits, mask)
        assert torch.allclose(model.loss(x, b), expected)


def test_damage(monkeypatch):
    "Half of the images, exact, another one each epoch, for validation always the same; it belongs to seed, epoch and image alone"
    model, x = Draem(**TINY).build().train(), unit(GOOD)

    def at(epoch, indices=range(12), images=x):
        monkeypatch.setattr(Draem, "current_epoch", epoch, raising=False)
        return model.damage_all(images, indices)

    (a, ma), (b, _), (c, _), (alone, m) = at(0), at(1), at(0), at(0, [5], x[5:6])
    model.eval()
    (v, mv), (w, _) = at(0), at(1)
    share = np.mean([bool(at(0, [i], x[:1])[1].any()) for i in range(200)])
    assert a.shape == x.shape and ma.shape == (12, 64, 64) and ma.dtype == torch.bool
    assert torch.equal(ma, (a != x).any(1)) and torch.equal(mv, (v != x).any(1))
    assert torch.equal(a, c) and not torch.equal(a, b) and torch.equal(alone[0], a[5]) and torch.equal(m[0], ma[5])
    assert torch.equal(v, w) and not torch.equal(v, a)
    assert 0.4 < share < 0.6
    assert not torch.equal(Draem(**TINY, seed=1).build().eval().damage_all(x, range(12))[0], v)
    assert torch.equal(Draem(**TINY, damaged=0).build().damage_all(x, range(12))[0], x)
    assert Draem(**TINY, damaged=1).build().damage_all(x, range(12))[1].flatten(1).any(1).all()


def test_it_learns(fitted):
    assert fitted.history[-1]["loss"] < 0.8*fitted.history[0]["loss"]
    untrained = copy.deepcopy(Draem(**TINY).build()).eval()
    x, b = batch([draw_good(0, "validation", i, 64) for i in range(8)])
    with torch.no_grad():
        assert fitted.eval().loss(x, b) < 0.7*untrained.loss(x, b)


def test_damage_is_found():
    "On plain parts, a short fit sees new damage"
    model = Draem(image_size=32, width=8, segment_width=8, lr=0.003).build().train()
    model.total_batches = 240
    made, x = model.configure_optimizers(), torch.full((8, 3, 32, 32), 0.5)
    for step in range(240):
        loss = model.loss(x, Batch(x, [""]*8, [(32, 32)]*8, index=list(range(8*step, 8*step + 8))))
        made["optimizer"].zero_grad()
        loss.backward()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    seen, mask = model.eval().damage_all(x.repeat(4, 1, 1, 1), range(10_000, 10_032))
    with torch.inference_mode():
        assert auroc(model.net(seen).map.flatten(), mask.flatten()) > 0.9


def test_score_is_the_highest_mean(fitted):
    with torch.inference_mode():
        raw = fitted(unit(ODD))
    wide = np.pad(raw.map.numpy(), ((0, 0), (10, 10), (10, 10)))
    means = np.lib.stride_tricks.sliding_window_view(wide, (21, 21), (1, 2)).mean((3, 4))
    np.testing.assert_allclose(raw.score, means.max((1, 2)), rtol=1e-5)
    assert raw.map.min() >= 0 and raw.map.max() <= 1


def test_any_batch_and_any_shape(fitted):
    with torch.inference_mode():
        whole = fitted(unit(ODD))
        for i, o in enumerate(ODD):
            alone = fitted(unit([o]))
            assert (whole.map[i] - alone.map[0]).abs().max() <= 1e-5 and abs(whole.score[i] - alone.score[0]) <= 1e-5
        for size in ((50, 90), (16, 16), (33, 64), (96, 31)):
            x = torch.rand(2, 3, *size)
            raw, (again, _) = fitted.net(x), fitted.net.both(x)
            assert raw.map.shape == (2, *size) and again.shape == x.shape and torch.isfinite(raw.map).all()


def test_sizes_of_32_are_not_padded():
    net, x = DraemNet(4, 4).eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        again = net.reconstruct(x)
        logits = net.segment(torch.cat([again, x], 1))
        assert torch.equal(net.both(x)[0], again) and torch.equal(net.both(x)[1], logits)


def test_a_fit_at_another_size():
    model = fit(image_size=(50, 90), epochs=1)
    with torch.inference_mode():
        assert model(unit(ODD)).map.shape == (3, 50, 90)


def test_one_seed_one_model():
    a, b, other = fit(epochs=2), fit(epochs=2), fit(epochs=2, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert [o["val_loss"] for o in a.history] == [o["val_loss"] for o in b.history]
    assert not torch.equal(other.net.segment.out.weight, a.net.segment.out.weight)
    torch.manual_seed(5)
    assert torch.equal(DraemNet(4, 4, 3).segment.out.weight, DraemNet(4, 4, 3).segment.out.weight)


def test_parity_of_an_odd_size(tmp_path):
    _, parity = export_model(fit(image_size=(50, 90), epochs=8), tmp_path / "m", "onnx", images=ODD)
    assert parity.ok


def test_sources(tmp_path):
    "A folder of textures shows in the damage, is asked for by a fit alone, and is not needed to load"
    folder = tmp_path / "textures" / "dotted"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30), (255, 0, 0)).save(folder / "a.png")
    Image.new("RGB", (20, 90), (0, 255, 0)).save(folder / "b.jpg")
    model = fit(epochs=1, sources=folder.parent)
    assert model.args["sources"] == str(folder.parent)
    path = model.save(tmp_path / "m.safetensors")
    for o in folder.iterdir():
        o.unlink()
    with torch.inference_mode():
        assert torch.equal(load(path)(unit(ODD)).map, model(unit(ODD)).map)
    with pytest.raises(AnomnbError, match="no image in .* leave `sources` out"):
        fit(epochs=1, sources=str(folder))
    with pytest.raises(AnomnbError, match="no folder .* leave `sources` out"):
        fit(epochs=1, sources=str(tmp_path / "missing"))


def test_bad_input():
    with pytest.raises(AnomnbError, match="from 0 to 1"):
        Draem(damaged=1.5)
    with pytest.raises(AnomnbError, match="whole numbers from 1 on"):
        Draem(width=0)
    with pytest.raises(AnomnbError, match="did you mean 'segment_width'"):
        Draem(segment_widths=4)
    with pytest.raises(AnomnbError, match="not fitted"):
        Draem(**TINY)(torch.rand(1, 3, 64, 64))
    with pytest.raises(AnomnbError, match="image_size of at least 33"):
        fit(GOOD[:1], image_size=32)
    with pytest.raises(AnomnbError, match="lower the learning rate"):
        fit(lr=1e30)
