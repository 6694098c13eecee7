"GANomaly against plain code, as a learner of two optimisers, resumed, saved, exported, and on bad input"
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unit
from torch import nn

import anomnb.models.ganomaly as page
from anomnb.core.errors import AnomnbError
from anomnb.core.seeds import rng
from anomnb.core.types import Batch
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.export.parity import export_model
from anomnb.models.decoders import decoder, draw_dcgan, encoder, halvings
from anomnb.models.ganomaly import Ganomaly, GanomalyNet, discriminator_loss, feature_matching

TINY = dict(image_size=32, latent=16, width=8, lr=0.002)
GOOD = [draw_good(0, "ganomaly", i, 96) for i in range(10)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, epochs=3, engine={}, **kw):
    run = Engine(**dict(quiet=True, num_workers=0, batch_size=4, max_epochs=epochs) | engine)
    return run.fit(Ganomaly(**{**TINY, **kw}), images, calibrate=False)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def fitted():
    return fit(epochs=40)


def weights(net):
    return [tuple(o.weight.shape) for o in net if isinstance(o, (nn.Conv2d, nn.ConvTranspose2d))]


def test_the_published_form():
    with torch.device("meta"):
        down, up, last = encoder((256, 256), 100), decoder((256, 256), 100), encoder((256, 256), 1)
    c = [64, 128, 256, 512, 1024, 2048]
    assert weights(down) == [(64, 3, 4, 4), *[(b, a, 4, 4) for a, b in zip(c, c[1:])], (100, 2048, 4, 4)]
    assert weights(up) == [(100, 2048, 4, 4), *[(b, a, 4, 4) for a, b in zip(c[:-1], c[1:])][::-1], (64, 3, 4, 4)]
    assert weights(last)[-1] == (1, 2048, 4, 4)
    assert [type(o) for o in down[:5]] == [nn.Conv2d, nn.LeakyReLU, nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert [type(o) for o in up[:3]] == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU] and [type(o) for o in up[-2:]] == [nn.ConvTranspose2d, nn.Tanh]
    assert {o.negative_slope for o in down if isinstance(o, nn.LeakyReLU)} == {0.2}
    assert all(o.bias is None for net in (down, up, last) for o in net if isinstance(o, (nn.Conv2d, nn.ConvTranspose2d)))
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert round((2*count(down) + count(up) + count(last))/1e6) == 189  # Anomalib's page says 188 million, rounded down
    with torch.device("meta"):
        assert weights(encoder((32, 32), 100)) == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (100, 256, 4, 4)]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (75, 101), (130, 36), (240, 320)])
def test_any_size_comes_back(size):
    net = GanomalyNet(size, latent=7, width=2).eval()
    with torch.no_grad():
        y, z, again = net.drawn(torch.rand(2, 3, *size))
        assert y.shape == (2, 3, *size) and z.shape == again.shape == (2, 7, 1, 1)
        assert net.verdict(net.seen(y)).shape == (2,) and net.seen(y).shape[2:] == halvings(size)[-1]
    assert 4 <= min(halvings(size)[-1]) < 8


def plain_encoder(net, x):
    "Layer by layer from the weights, float64"
    layers = [o for o in net if isinstance(o, (nn.Conv2d, nn.BatchNorm2d))]
    x, w = x.double(), lambda o: o.weight.double()
    for i, o in enumerate(layers[:-1]):
        if isinstance(o, nn.Conv2d):
            x = F.conv2d(x, w(o), stride=2, padding=1)
        else:
            mean, var = (v.double()[:, None, None] for v in (o.running_mean, o.running_var))
            x = (x - mean)/(var + 1e-5).sqrt()*w(o)[:, None, None] + o.bias.double()[:, None, None]
        if i == 0 or isinstance(o, nn.BatchNorm2d):
            x = torch.where(x > 0, x, 0.2*x)
    return x, (x[:, None]*w(layers[-1])).sum((2, 3, 4))


def test_score_is_the_mean_square_of_the_latents(fitted):
    encode, decode, again = fitted.net.generator
    with torch.no_grad():
        x = fitted.pre(unit(ODD))
        z, ours = plain_encoder(encode, x)[1], fitted.net(x)
        other = plain_encoder(again, decode(z.float()[..., None, None]))[1]
    np.testing.assert_allclose(ours.score, (z - other).square().mean(1), rtol=1e-4)  # float32 nets
    assert ours.map is None and x.min() >= -1 and x.max() <= 1


def test_losses_are_those_of_the_paper(fitted):
    net = copy.deepcopy(fitted.net).eval()
    with torch.no_grad():
        x = fitted.pre(unit(ODD))
        y, z, again = net.drawn(x)
        (fx, real), (fy, fake) = plain_encoder(net.discriminator, x), plain_encoder(net.discriminator, y)
        ours = feature_matching(net, y, x), discriminator_loss(net.verdict(net.seen(x)), net.verdict(net.seen(y)))
        whole, val = fitted.eval().loss(x, None), fitted.drawing_loss(x, y, z, again)
    adversarial, contextual, code = (fx - fy).square().mean(), (x - y).double().abs().mean(), (z - again).double().square().mean()
    assert float(ours[0]) == pytest.approx(float(adversarial), rel=1e-4)
    assert float(whole) == pytest.approx(float(adversarial + 50*contextual + code), rel=1e-4)
    assert float(val) == pytest.approx(float(50*contextual + code), rel=1e-4)
    p, q = 1/(1 + np.exp(-real.numpy())), 1/(1 + np.exp(-fake.numpy()))
    assert float(ours[1]) == pytest.approx(-(np.log(p).mean() + np.log(1 - q).mean())/2, rel=1e-3)


def stepping(model):
    "The model as a Trainer would have it, without one"
    first = model.configure_optimizers()
    model.optimizers, model.manual_backward, model.log = lambda: first, lambda loss: loss.backward(), lambda *a, **k: None
    return model.train()


def test_a_step_is_the_published_one():
    model, x = stepping(Ganomaly(**TINY).build()), unit(GOOD[:4])
    x = model.pre.resize(x)
    net = copy.deepcopy(model.net)
    g, d = (torch.optim.Adam(m.parameters(), 0.002, betas=(0.5, 0.999)) for m in (net.generator, net.discriminator))
    for i in range(3):
        batch = Batch(x, [f"{k}.png" for k in range(4)], [None]*4, index=list(range(4)))
        model.training_step(batch, i)
        u = (x - 0.5)/0.5
        y, z, again = net.drawn(u)
        both = net.seen(u), net.seen(y.detach())
        real, fake = (torch.sigmoid(net.verdict(o)) for o in both)
        bce = -(torch.log(real).mean() + torch.log(1 - fake).mean())/2
        step = (net.seen(u) - net.seen(y)).square().mean() + 50*(u - y).abs().mean() + (z - again).square().mean()
        on_d = torch.autograd.grad(bce, list(net.discriminator.parameters()))
        on_g = torch.autograd.grad(step, list(net.generator.parameters()))
        for optimiser, m, grads in ((g, net.generator, on_g), (d, net.discriminator, on_d)):
            for p, o in zip(m.parameters(), grads):
                p.grad = o
            optimiser.step()
    for a, b in zip(model.net.parameters(), net.parameters()):
        assert (a - b).abs().mean() < 1e-4  # Adam steps by 2e-3; it magnifies the rounding of gradients near 0
    assert model.epoch_losses().keys() == {"loss", "discriminator_loss"}


def test_a_discriminator_that_has_won_begins_anew(monkeypatch):
    model, x = stepping(Ganomaly(**TINY, seed=5).build()), torch.rand(4, 3, 32, 32)
    batch = Batch(x, ["a.png"]*4, [None]*4, index=list(range(4)))
    monkeypatch.setattr(page, "LOST", 100.)
    moments = model.optimizers()[1]
    for i in range(2):
        model.training_step(batch, i)
        fresh = draw_dcgan(encoder((32, 32), 1, 8), int(rng(5, "discriminator", 0, i).integers(2**31)))
        assert all(torch.equal(a, b) for a, b in zip(model.net.discriminator.parameters(), fresh.parameters()))
    assert all(s["step"] == 2 for s in moments.state.values())
    monkeypatch.setattr(page, "LOST", 0.)
    model.training_step(batch, 2)
    assert not torch.equal(model.net.discriminator[0].weight, fresh[0].weight)


def test_first_weights():
    before = torch.get_rng_state()
    model = Ganomaly(image_size=64, latent=32, width=32, seed=3).build()
    assert torch.equal(before, torch.get_rng_state())
    for m in model.net.requires_grad_(False).modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.weight.numel() > 5000:
            assert abs(float(m.weight.mean())) < 0.001 and abs(float(m.weight.std()) - 0.02) < 0.001
        if isinstance(m, nn.BatchNorm2d):
            assert abs(float(m.weight.mean()) - 1) < 0.02 and not m.bias.any()
    one, two, three = (model.net.generator[0][0], model.net.generator[2][0], model.net.discriminator[0])
    assert not torch.equal(one.weight, two.weight) and not torch.equal(one.weight, three.weight)


def val_loss(model, images):
    with torch.no_grad():
        x = model.eval().pre(unit(images))
        return float(model.drawing_loss(x, *model.net.drawn(x)))


def test_it_learns_to_draw(fitted):
    fresh = [draw_good(0, "fresh", i, 96) for i in range(6)]
    assert val_loss(fitted, fresh) < 0.7*val_loss(Ganomaly(**TINY).build(), fresh)
    assert set(fitted.history[0]) == {"epoch", "loss", "discriminator_loss", "val_loss"}
    assert fitted.history[-1]["val_loss"] < 0.7*fitted.history[0]["val_loss"]


def test_the_published_schedule():
    model = Ganomaly(**{**TINY, "lr": 0.0002}).build()
    g, d = model.configure_optimizers()
    for o, m in ((g, model.net.generator), (d, model.net.discriminator)):
        (group,) = o.param_groups
        assert (group["lr"], group["betas"], type(o)) == (0.0002, (0.5, 0.999), torch.optim.Adam)
        assert {id(p) for p in group["params"]} == {id(p) for p in m.parameters()}
    assert (model.trainer_defaults, model.batch_size, model.keep, model.patience) == (dict(max_epochs=100), 32, "last", None)
    args = Ganomaly().args
    assert args == dict(image_size=256, latent=100, width=64, w_adv=1, w_con=50, w_enc=1, lr=0.0002, seed=0)


def test_batches_are_counted_not_steps():
    seen = []

    class Counted(Ganomaly):
        def training_step(self, batch, batch_idx):
            seen.append(len(batch))
            super().training_step(batch, batch_idx)

    engine = Engine(quiet=True, num_workers=0, batch_size=4, max_batches=7, max_epochs=50)
    model = engine.fit(Counted(**TINY), GOOD, calibrate=False)
    assert len(seen) == model.total_batches == 7 and engine.trainer.global_step == 14
    published = Engine(quiet=True, num_workers=0, batch_size=4, max_epochs=4).fit(Counted(**TINY), GOOD, calibrate=False)
    assert len(published.history) == 4 and published.total_batches == len(seen) - 7 == 12


def test_one_seed_one_model():
    a, b, other = fit(), fit(), fit(seed=1)
    assert same(a, b) and not same(a, other) and a.history == b.history


@pytest.mark.parametrize("lost", [1e-5, 100.])  # with 100 each step ends with a fresh discriminator
def test_resumed_is_the_same(lost, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LOST", lost)
    start = lambda epochs, **kw: Engine(quiet=True, num_workers=0, batch_size=4, max_epochs=epochs, **kw)
    one, two = start(4), start(4)
    whole = one.fit(Ganomaly(**TINY), GOOD, calibrate=False)
    half = start(2, checkpoints=tmp_path).fit(Ganomaly(**TINY), GOOD, calibrate=False)
    assert torch.load(tmp_path/"last.ckpt", weights_only=False)["global_step"] == 12 and not same(whole, half)  # 2 epochs of 3 batches, 2 steps each
    again = two.fit(Ganomaly(**TINY), GOOD, calibrate=False, resume=tmp_path/"last.ckpt")
    assert same(whole, again) and whole.history == again.history and len(again.history) == 4
    a, b = ([o.state_dict()["state"] for o in e.trainer.optimizers] for e in (one, two))
    assert len(a) == len(b) == 2
    assert all(torch.equal(x[i][k], y[i][k]) for x, y in zip(a, b) for i in x for k in ("step", "exp_avg", "exp_avg_sq"))


def test_any_batch(fitted):
    with torch.inference_mode():
        whole = fitted(unit(ODD)).score
        alone = torch.cat([fitted(unit([o])).score for o in ODD])
    assert (whole - alone).abs().max() <= 1e-5*whole.max()


def test_not_square():
    model = fit(image_size=(40, 70), epochs=1)
    found = Engine(quiet=True).predict(model, ODD)
    assert model.pre.size == (40, 70) and len(found) == 3 and all(np.isfinite(p.score) and p.raw_map is None for p in found)


def test_one_image_is_enough():
    model = fit(GOOD[:1], epochs=1, engine=dict(batch_size=1))  # the smallest map of a batch norm has 16 places
    assert model.fitted and list(model.history[0]) == ["epoch", "loss", "discriminator_loss"]


def test_parity_of_an_odd_size(tmp_path):
    _, parity = export_model(fit(image_size=(40, 70), epochs=30), tmp_path/"m", "openvino", images=ODD)
    assert parity.ok and all(r["map"] is None for r in parity.rows)
    assert {(r["size"], r["batch"]) for r in parity.rows} == {((96, 96), 1), ((96, 96), 3), ((64, 85), 1), ((64, 85), 3)}


def test_bad_input():
    for size in (16, 31, (64, 20)):
        with pytest.raises(AnomnbError, match="at least 32 pixels a side"):
            Ganomaly(image_size=size)
    with pytest.raises(AnomnbError, match="image_size='big'"):
        Ganomaly(image_size="big")
    for bad in (0, -3, 2.5, True):
        with pytest.raises(AnomnbError, match="latent=.* such as 100"):
            Ganomaly(latent=bad)
        with pytest.raises(AnomnbError, match="width=.* such as 64"):
            Ganomaly(width=bad)
    with pytest.raises(AnomnbError, match="not fitted"):
        Ganomaly(**TINY)(torch.rand(1, 3, 32, 32))
    with pytest.raises(AnomnbError, match="lower the learning rate"):
        fit(lr=1e30)
