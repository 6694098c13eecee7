"Dinomaly and its optimiser: against naive code, as a learner, saved, exported, and on bad input. No transformer's weights are needed"
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import unit
from scipy import ndimage
from torch import nn

from anomnb.core.errors import AnomnbError
from anomnb.data.toy import draw_defect, draw_good
from anomnb.engine.engine import Engine
from anomnb.export.bundle import load
from anomnb.export.parity import export_model
from anomnb.models.decoders import linear_attention
from anomnb.models.dinomaly import Dinomaly, middle_levels
from anomnb.models.stable_adamw import StableAdamW, warm_cosine, warm_cosine_at

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
TINY = dict(backbone="vit_tiny_patch16_224", levels=2, weights="random", image_size=64)
WIDE = {**TINY, "levels": 4, "image_size": [64, 96]}
GOOD = [draw_good(0, "dinomaly", i, 96) for i in range(12)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, batches=12, engine={}, **kw):
    return Engine(quiet=True, num_workers=0, batch_size=4, max_batches=batches, **engine).fit(Dinomaly(**{**TINY, **kw}), images, calibrate=False)


def built(**kw):
    return Dinomaly(**{**TINY, **kw}).build().eval()


@pytest.fixture(scope="module")
def fitted():
    return fit(batches=30)


@pytest.fixture(scope="module")
def wide():
    return fit(batches=12, **WIDE)


# The optimiser

def naive_step(w, g, s, lr, b1, b2, eps, decay, amsgrad):
    "AdamW clipped by its RMS, float64"
    s["t"], s["m"], s["v"] = s["t"] + 1, b1*s["m"] + (1 - b1)*g, b2*s["v"] + (1 - b2)*g*g
    s["top"] = np.maximum(s["top"], s["v"]) if amsgrad else s["v"]
    size = np.sqrt(s["top"]/(1 - b2**s["t"])) + eps
    rms = math.sqrt(np.mean((g/size)**2))
    return w - lr*decay*w - lr/max(1, rms)*s["m"]/(1 - b1**s["t"])/size, rms


def gradients(shape, steps, growth, seed=0):
    draws = np.random.default_rng(seed)
    return [draws.normal(size=shape)*growth**i for i in range(steps)]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("growth", [0.7, 1.3])
def test_the_optimiser_is_the_naive_one(amsgrad, growth):
    kw, each, seen = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, amsgrad=amsgrad), [], []
    weights = [torch.tensor(w, requires_grad=True) for w in gradients((3, 4), 2, 1, 7)]  # float64
    naive = [(w.detach().numpy().copy(), dict(t=0, m=0, v=0, top=0)) for w in weights]
    optimizer = StableAdamW(weights, **kw)
    for step in zip(*[gradients((3, 4), 25, growth, i) for i in range(2)]):
        for w, g in zip(weights, step):
            w.grad = torch.from_numpy(g.copy())
        optimizer.step()
        moved = [naive_step(w, g, s, 0.03, 0.8, 0.95, 1e-6, 0.1, amsgrad) for (w, s), g in zip(naive, step)]
        naive = [(w, s) for (w, _), (_, s) in zip(moved, naive)]
        seen += [rms for _, rms in moved]
        each.append(max(np.abs(w.detach().numpy() - n).max() for w, (n, _) in zip(weights, naive)))
    assert max(each) < 1e-12 and (max(seen) > 1.5) == (growth > 1)  # the case that clips does clip


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_optimiser_is_adamw_where_nothing_is_clipped(amsgrad):
    kw = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-10, weight_decay=1e-2, amsgrad=amsgrad)
    a, b = (torch.ones(50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, theirs, sign = StableAdamW([a], **kw), torch.optim.AdamW([b], **kw), np.random.default_rng(0).choice([-1, 1], (40, 50))
    for i in range(40):  # ever smaller gradients: none exceeds its running mean
        a.grad = torch.from_numpy(sign[i]*0.9**i)
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
    assert torch.allclose(a, b, rtol=1e-12, atol=0)


def test_the_optimiser_goes_on_where_it_was_saved():
    def steps(w, optimizer, of):
        for g in of:
            w.grad = torch.from_numpy(g)
            optimizer.step()
        return w
    a, all_of = torch.ones(4, dtype=torch.float64, requires_grad=True), gradients(4, 10, 1.2)
    first = StableAdamW([a], amsgrad=True)
    steps(a, first, all_of[:5])
    b = a.detach().clone().requires_grad_()
    second = StableAdamW([b], amsgrad=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(steps(a, first, all_of[5:]), steps(b, second, all_of[5:]))


def test_the_optimiser_takes_closures_and_skips_what_has_no_gradient():
    w, idle = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = StableAdamW([w, idle], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).item() == 2 and w.max() < 1 and torch.equal(idle, torch.ones(2))


@pytest.mark.parametrize("base, final, total, warmup", [(2e-3, 2e-4, 5000, 100), (1, 0, 7, 0), (1, 0.1, 10, 1), (1, 0.5, 5, 5)])
def test_the_schedule(base, final, total, warmup):
    rest = np.arange(total - warmup)
    want = np.concatenate([np.linspace(0, base, warmup), final + 0.5*(base - final)*(1 + np.cos(np.pi*rest/max(len(rest), 1)))])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=7)
    schedule, rates = warm_cosine(optimizer, base, final, total, warmup), []
    for _ in range(total + 2):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), schedule.step()
    np.testing.assert_allclose(rates[:total], want, rtol=0, atol=1e-12)
    assert len(rest) == 0 or rates[total:] == pytest.approx([final]*2)


def test_bad_settings():
    w = [torch.zeros(1)]
    for kw in (dict(lr=-1), dict(lr=math.nan), dict(eps=-1), dict(weight_decay=math.inf), dict(betas=(1, 0.9))):
        with pytest.raises(AnomnbError, match=next(iter(kw))):
            StableAdamW(w, **kw)
    with pytest.raises(AnomnbError, match="from 0 to 3"):
        warm_cosine(StableAdamW(w), 1, 0, 3, 4)
    with pytest.raises(AnomnbError, match="above 0"):
        warm_cosine(StableAdamW(w), 0, 0, 3)


# The network

def test_linear_attention_is_the_quadratic_one():
    q, k, v = (torch.from_numpy(3*o) for o in gradients((2, 3, 7, 5), 3, 1))  # float64
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT  # (2, 3, 7, 7)
    want = np.stack([[sum(w*o for w, o in zip(row, values))/row.sum() for row in rows]
                     for rows, values in zip(weights.flatten(0, 1).numpy(), v.flatten(0, 1).numpy())]).reshape(2, 3, 7, 5)
    np.testing.assert_allclose(linear_attention(q, k, v), want, rtol=1e-10, atol=1e-12)
    assert torch.isfinite(linear_attention(-1e3 - q.abs(), k, v)).all()


def naive(model, x):
    "Groups of encoder and decoder as the paper has them, token by token"
    maps = model.net.backbone(model.pre(x))
    tokens = torch.stack(maps).mean(0).flatten(2).transpose(1, 2)  # (B, N, C)
    tokens, drawn, half = model.net.bottleneck(tokens), [], len(maps)//2
    for block in model.net.decoder:
        tokens = block(tokens)
        drawn.insert(0, tokens.transpose(1, 2).reshape(maps[0].shape))
    return [(sum(a)/half, sum(b)/half) for a, b in ((maps[:half], drawn[:half]), (maps[half:], drawn[half:]))]


def test_map_and_score_are_those_of_the_paper(wide):
    x = unit(ODD)
    with torch.inference_mode():
        raw, groups = wide(x), naive(wide, x)
    d = torch.stack([1 - F.cosine_similarity(a, b) for a, b in groups]).mean(0)
    assert d.shape == (3, 4, 6) and raw.map.shape == (3, 64, 96)
    up = F.interpolate(d[:, None], size=(64, 96), mode="bilinear", align_corners=False)[:, 0].double().numpy()
    want = np.stack([ndimage.gaussian_filter(o, 4, mode="mirror", truncate=4) for o in up])
    np.testing.assert_allclose(raw.map, want, atol=1e-5*want.max())  # float32
    top = np.sort(want.reshape(3, -1))[:, -(64*96//100):]
    np.testing.assert_allclose(raw.score, top.mean(1), atol=1e-5*want.max())


@pytest.mark.parametrize("batch", [0, 500, 4000])
def test_loss_and_its_gradients(wide, monkeypatch, batch):
    x, learned = unit(ODD), [p for p in wide.net.parameters() if p.requires_grad]
    monkeypatch.setattr(Dinomaly, "global_step", batch)
    share = min(0.9*batch/1000, 0.9)
    assert wide.easy() == pytest.approx(share)
    ours = wide.loss(wide.features(x), None)
    grads, losses = torch.autograd.grad(ours, learned), []
    for a, b in naive(wide, x):  # the gradient of the easy places of the batch, as a hook scales it
        d = (1 - F.cosine_similarity(a, b)).detach()
        edge = d.flatten().sort(descending=True)[0][int(d.numel()*(1 - share)) - 1]
        b.register_hook(lambda g, f=torch.where(d < edge, 0.1, 1.)[:, None]: g*f)
        losses.append((1 - F.cosine_similarity(a.flatten(1), b.flatten(1))).mean())
    want = sum(losses)/2
    assert abs(ours - want).item() < 1e-5
    for a, b in zip(grads, torch.autograd.grad(want, learned)):
        assert (a - b).abs().max() <= 1e-4*b.abs().max() + 1e-9  # float32


def test_everything_learns_but_the_encoder():
    model = Dinomaly(**WIDE).build().train()
    assert not any(m.training for m in model.net.backbone.modules()) and model.net.bottleneck[0].training
    model.loss(model.features(unit(GOOD[:4])), None).backward()
    learns = {n for n, p in model.net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learns == {n for n, _ in model.net.named_parameters() if not n.startswith("backbone.")}
    optimised = {id(p) for g in model.configure_optimizers()["optimizer"].param_groups for p in g["params"]}
    assert optimised == {id(p) for n, p in model.net.named_parameters() if n in learns}


def test_noise_in_training_alone():
    model = built()
    x = model.features(unit(ODD))
    draw = lambda: model.net.drawn(x)[0]
    with torch.no_grad():
        assert torch.equal(draw(), draw())
        model.train()
        assert not torch.equal(draw(), draw())
        same = []
        for _ in range(2):
            torch.manual_seed(3)
            same.append(draw())
    assert torch.equal(*same) and all(o.p == 0.2 for o in model.net.bottleneck if isinstance(o, nn.Dropout))


def test_first_weights_are_those_of_the_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = built()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    b, c = built(), built(seed=1)
    learned = {k: v for k, v in a.state_dict().items() if k.startswith(("net.bottleneck", "net.decoder"))}
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in learned.items())
    assert not torch.equal(learned["net.decoder.0.qkv.weight"], c.state_dict()["net.decoder.0.qkv.weight"])
    assert not torch.equal(learned["net.decoder.0.qkv.weight"], learned["net.decoder.1.qkv.weight"])
    assert max(v.abs().max() for k, v in learned.items() if v.ndim == 2) <= 0.03


@pytest.mark.parametrize("blocks, levels, want", [(12, 8, [2, 3, 4, 5, 6, 7, 8, 9]), (24, 8, [4, 6, 8, 10, 12, 14, 16, 18]), (12, 12, list(range(12))),
                                                  (12, 2, [4, 6]), (12, 4, [4, 5, 6, 7])])
def test_levels(blocks, levels, want):
    assert middle_levels(blocks, levels) == want


def test_levels_are_inside():
    for blocks in range(2, 50):
        for levels in range(2, blocks + 1, 2):
            found = middle_levels(blocks, levels)
            assert len(set(found)) == levels and found == sorted(found) and 0 <= found[0] and found[-1] < blocks


def test_registers_are_no_places():
    model = Dinomaly("vit_small_patch14_reg4_dinov2", levels=2, weights="random", image_size=(70, 84)).build().eval()
    assert [o.shape for o in model.features(unit(ODD[:1]))] == [(1, 384, 5, 6)]*2 and model.net.decoder[0].heads == 6
    with torch.no_grad():
        assert model.net(model.pre(unit(ODD))).map.shape == (3, 70, 84)


# As a learner

def test_as_published():
    model = Dinomaly()
    assert model.backbone.layers == [f"blocks.{i}" for i in range(2, 10)] and model.backbone.channels == [768]*8 and model.grid() == (28, 28)
    assert (model.trainer_defaults, model.batch_size) == (dict(max_batches=5000, gradient_clip_val=0.1), 16)
    made = built().configure_optimizers()
    (group,) = made["optimizer"].param_groups
    assert [group[k] for k in ("betas", "eps", "weight_decay", "amsgrad")] == [(0.9, 0.999), 1e-10, 1e-4, True]
    assert made["lr_scheduler"]["interval"] == "step" and group["initial_lr"] == 2e-3 and group["lr"] == 0


def test_the_schedules_of_a_fit(monkeypatch):
    rates, shares, norms, step = [], [], [], StableAdamW.step

    def watched(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        out = step(self, closure)
        norms.append(float(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm()))
        return out
    monkeypatch.setattr(StableAdamW, "step", watched)
    easy = Dinomaly.easy
    monkeypatch.setattr(Dinomaly, "easy", lambda self: (shares.append(easy(self)) if self.training else None) or easy(self))
    fit(batches=20)
    assert rates == pytest.approx([warm_cosine_at(i, 2e-3, 2e-4, 20, 2) for i in range(20)])
    assert sorted(set(shares)) == pytest.approx([0.9*i/1000 for i in range(20)])
    assert max(norms) <= 0.1 + 1e-6


def test_it_learns(fitted):
    fresh, x = built(), unit([draw_good(0, "dinomaly-val", i, 96) for i in range(6)])
    with torch.no_grad():
        before, after = (float(m.eval().loss(m.features(x), None)) for m in (fresh, fitted))
    assert after < 0.7*before
    assert all(torch.equal(v, fitted.state_dict()[k]) for k, v in fresh.state_dict().items() if "backbone" in k)


def test_kept_features_change_nothing():
    a, b = fit(), fit(engine=dict(cache_features=None))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.net.decoder.parameters(), b.net.decoder.parameters()))


def test_one_seed_one_decoder():
    a, b, c = fit(), fit(), fit(seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.net.decoder[0].proj.weight, c.net.decoder[0].proj.weight)


@pytest.mark.parametrize("name", ["fitted", "wide"])
def test_any_batch(name, request):
    model = request.getfixturevalue(name)
    with torch.inference_mode():
        whole = model(unit(ODD))
        for i, o in enumerate(ODD):
            alone = model(unit([o]))
            assert (whole.map[i] - alone.map[0]).abs().max() <= 1e-5*whole.map.max()
            assert (whole.score[i] - alone.score[0]).abs() <= 1e-5*whole.score.max()


def test_saved(wide, tmp_path):
    again = load(wide.save(tmp_path / "m.safetensors"))
    with torch.inference_mode():
        ours, theirs = wide(unit(ODD)), again(unit(ODD))
    assert torch.equal(ours.map, theirs.map) and torch.equal(ours.score, theirs.score) and again.args == wide.args


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_parity(kind, wide, tmp_path):
    _, parity = export_model(wide, tmp_path / "m", kind, images=ODD)
    assert parity.ok and {(r["size"], r["batch"]) for r in parity.rows} == {((96, 96), 1), ((96, 96), 3), ((64, 85), 1), ((64, 85), 3)}


def test_bad_input():
    for backbone in ("resnet18", "swin_s3_tiny_224", nn.Conv2d(3, 8, 3)):
        with pytest.raises(AnomnbError, match="plain vision transformer, give a timm name such as"):
            Dinomaly(backbone, levels=2, image_size=224)
    with pytest.raises(AnomnbError, match="multiples of 16"):
        Dinomaly(**{**TINY, "image_size": 100})
    with pytest.raises(AnomnbError, match="multiples of 14 such as 392×392"):
        Dinomaly(image_size=390)
    for levels in (0, 3, 14, 2.0):
        with pytest.raises(AnomnbError, match="even number from 2 to the 12 blocks"):
            Dinomaly(levels=levels)
    for kw in (dict(dropout=1), dict(dropout=-0.1), dict(lr=0)):
        with pytest.raises(AnomnbError, match=next(iter(kw))):
            Dinomaly(**TINY, **kw)
    with pytest.raises(AnomnbError, match="not fitted"):
        Dinomaly(**TINY)(torch.rand(1, 3, 64, 64))
    with pytest.raises(AnomnbError, match="lower the learning rate"):
        fit(lr=1e30)
