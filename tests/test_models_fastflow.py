"FastFlow against the Jacobian of its flows and its equations in numpy, as a learner, saved, exported, and on bad input"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unit

from anomnb.core.errors import AnomnbError
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.models.fastflow import Fastflow
from anomnb.models.flows import CouplingStep, Flow

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
TINY = dict(backbone="resnet18", weights="random", image_size=64, steps=2)
GOOD = [draw_good(0, "fastflow", i, 96) for i in range(8)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, epochs=3, engine={}, **kw):
    return Engine(quiet=True, num_workers=0, batch_size=4, max_epochs=epochs, **engine).fit(Fastflow(**{**TINY, **kw}), images, calibrate=False)


@pytest.fixture(scope="module")
def fitted():
    return fit()


def shaken(flow, seed=0):
    "A flow as after some learning: nothing is left at zero"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2*torch.randn(p.shape, generator=g, dtype=p.dtype))
    return flow


@pytest.mark.parametrize("channels, kernels", [(6, (3,)), (5, (3, 1)), (2, (1,))])
def test_log_determinant_is_that_of_the_jacobian(channels, kernels):
    flow = shaken(Flow(channels, 3, 1.0, kernels).double())
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for o in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0].flatten(), o).reshape(o.numel(), o.numel())
        sign, log = torch.linalg.slogdet(jacobian)
        assert abs(float(sign)) == 1 and float(log) == pytest.approx(float(flow(o[None])[1].sum().detach()), abs=1e-9)
    assert flow(x)[1].shape == (2, 3, 4)


@pytest.mark.parametrize("channels", [2, 7, 64])
def test_a_flow_can_be_undone(channels):
    flow, x = shaken(Flow(channels, 8, 0.5, (3, 1))), torch.randn(2, channels, 5, 6, generator=torch.Generator().manual_seed(2))
    if channels == 64:  # wide sums would stretch too far
        for step in flow.steps:
            step.subnet[2].weight.data *= 0.1
    with torch.no_grad():
        z = flow(x)[0]
        assert (z - x).abs().max() > 0.1
        assert (flow.double().inverse(flow(x.double())[0]) - x).abs().max() < 1e-5
        flow.float()
        assert (flow.inverse(z) - x).abs().max() < 1e-3*max(1, float(z.abs().max()))  # float32 through 8 steps


def test_untrained_a_flow_only_permutes():
    x = torch.randn(2, 10, 4, 4)
    with torch.no_grad():
        z, log_det = Flow(10, 8)(x)
    assert torch.equal(z.sort(1).values, x.sort(1).values) and not log_det.any()


def test_the_stretch_is_bounded():
    step = shaken(CouplingStep(6, 4, clamp=2.0))
    step.subnet[2].bias.data[:3] = 100
    with torch.no_grad():
        s, _ = step._stretch(torch.randn(1, 3, 4, 4))
    assert s.max() <= 2.0 and float(s.max()) == pytest.approx(2.0)


def flowed(model, x):
    "(z, log determinant) of each level by layers written out, float64"
    out = []
    with torch.no_grad():
        for m, flow in zip(model.net.backbone(model.pre(x)), model.net.flows):
            m = m.double()
            mean, var = m.mean((1, 2, 3), keepdim=True), m.var((1, 2, 3), keepdim=True, unbiased=False)
            v, total = (m - mean)/(var + 1e-5).sqrt(), 0
            for step in flow.steps:
                w = [o.double() for o in (step.subnet[0].weight, step.subnet[0].bias, step.subnet[2].weight, step.subnet[2].bias)]
                half = (v.shape[1] + 1)//2
                pad = w[0].shape[-1]//2
                both = F.conv2d(F.conv2d(v[:, :half], w[0], w[1], padding=pad).clamp(min=0), w[2], w[3], padding=pad)/10  # at a tenth, as in FrEIA
                s, t = 2*torch.tanh(both[:, :both.shape[1]//2]), both[:, both.shape[1]//2:]
                v = torch.cat([v[:, :half], v[:, half:]*s.exp() + t], 1)
                v = (v*step.log_scale.double().exp() + step.shift.double())[:, step.order]
                total = total + s.sum(1) + step.log_scale.double().sum()
            out.append((v.numpy(), total.numpy()))
    return out


def test_map_is_the_mean_likelihood(fitted):
    levels = [-np.exp(-0.5*np.square(z).mean(1)) for z, _ in flowed(fitted, unit(ODD))]
    assert [o.shape[1:] for o in levels] == [(16, 16), (8, 8), (4, 4)]
    up = [F.interpolate(torch.from_numpy(m)[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0] for m in levels]
    with torch.inference_mode():
        raw = fitted(unit(ODD))
    np.testing.assert_allclose(raw.map, sum(up)/3, atol=1e-4)  # a float32 network
    assert torch.equal(raw.score, raw.map.flatten(1).max(1).values) and -1 <= raw.map.min() <= raw.map.max() <= 0


def test_loss_is_the_negative_log_likelihood(fitted):
    with torch.no_grad():
        loss = fitted.eval().loss(fitted.features(unit(ODD)), None)
    wanted = sum((0.5*np.square(z).sum(1) - d).sum((1, 2)).mean() for z, d in flowed(fitted, unit(ODD)))
    assert float(loss) == pytest.approx(wanted, rel=1e-4, abs=1)


def test_any_batch_and_any_shape(fitted):
    with torch.inference_mode():
        whole = fitted(unit(ODD))
        for i, o in enumerate(ODD):
            assert (whole.map[i] - fitted(unit([o])).map[0]).abs().max() <= 1e-5
        assert fitted.net(torch.rand(2, 3, 50, 90)).map.shape == (2, 50, 90)


def test_only_the_flows_learn():
    model = Fastflow(**TINY).build()
    frozen = {k: v.clone() for k, v in model.net.backbone.state_dict().items()}
    x, optimiser, losses = model.train().features(unit(GOOD)), model.configure_optimizers(), []
    for _ in range(12):
        losses.append(model.loss(x, None))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert all(p.grad is not None for p in model.net.flows.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in model.net.backbone.state_dict().items())
    assert float(losses[-1].detach()) < 0.7*float(losses[0].detach())


def test_the_published_schedule():
    model = Fastflow(**TINY).build()
    (group,) = model.configure_optimizers().param_groups
    assert (group["lr"], group["weight_decay"]) == (0.001, 1e-5)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.net.flows.parameters()}
    assert (model.trainer_defaults, model.batch_size, model.keep) == (dict(max_epochs=500), 32, "last")
    kernels = lambda m: [[s.subnet[0].kernel_size[0] for s in f.steps] for f in m.net.flows]
    plain, turns = Fastflow(**{**TINY, "steps": None}).build(), Fastflow(**TINY, conv3x3_only=False).build()
    assert kernels(plain) == [[3]*8]*3 and kernels(turns) == [[3, 1]]*3
    assert [f.steps[0].subnet[0].out_channels for f in plain.net.flows] == [32, 64, 128]  # as many as decide


def test_one_seed_one_model(fitted):
    again, other = fit(), fit(seed=1)
    assert all(torch.equal(x, y) for x, y in zip(fitted.state_dict().values(), again.state_dict().values()))
    a, b = (m.net.flows[0].steps[0] for m in (other, again))
    assert not torch.equal(a.subnet[0].weight, b.subnet[0].weight) and not torch.equal(a.order, b.order)


def test_transformers():
    model = Fastflow(backbone="test_vit", layers=[0], weights="random", image_size=160).build()
    assert model.net.eval()(torch.rand(1, 3, 160, 160)).map.shape == (1, 160, 160)
    assert len(model.net.flows[0].steps) == 20
    c = model.backbone.channels[0]
    assert model.net.flows[0].steps[0].subnet[0].out_channels == int(0.16*((c + 1)//2))
    with pytest.raises(AnomnbError, match="multiples of 16"):
        Fastflow(backbone="test_vit", layers=[0], weights="random", image_size=100)


def test_bad_input():
    with pytest.raises(AnomnbError, match="did you mean 'layer3'"):
        Fastflow(**TINY, layers=["layer33"])
    with pytest.raises(AnomnbError, match="1 channels can't be split in two"):
        CouplingStep(1, 4)
    with pytest.raises(AnomnbError, match="not fitted"):
        Fastflow(**TINY)(torch.rand(1, 3, 64, 64))
    with pytest.raises(AnomnbError, match="lower the learning rate"):
        fit(lr=1e30)


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=-1), dict(steps=2.5), dict(hidden_ratio=0)])
def test_arguments_that_make_no_flow(bad):
    with pytest.raises(AnomnbError, match="whole number of at least 1|a number above 0"):
        Fastflow(backbone="resnet18", weights="random", image_size=64, **bad)
