"Reverse Distillation: form of its parts, map and loss against the paper's formulas, as a learner, saved, exported, and on bad input"
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
from anomnb.models.backbones import Backbone
from anomnb.models.decoders import Block
from anomnb.models.reverse_distillation import ReverseDistillation, ReverseDistillationNet, form_of

pytestmark = pytest.mark.filterwarnings("ignore:backbone .* has random weights")
TINY = dict(backbone="resnet18", weights="random", image_size=64, blocks=1)
GOOD = [draw_good(0, "reverse", i, 96) for i in range(8)]
ODD = [draw_good(0, "parity", 0, 96), draw_good(0, "parity", 1, 96), draw_defect(0, "chip", 3, 0, 96)[0]]


def fit(images=GOOD, epochs=3, engine={}, **kw):
    return Engine(quiet=True, num_workers=0, batch_size=4, max_epochs=epochs, **engine).fit(ReverseDistillation(**{**TINY, **kw}), images, calibrate=False)


@pytest.fixture(scope="module")
def fitted():
    return fit()


def pairs(model, x):
    "What the teacher sees and what is drawn, float64"
    with torch.no_grad():
        seen = model.eval().features(x)
        return [(a.double().numpy(), b.double().numpy()) for a, b in zip(seen, model.net.drawn(seen))]


def cosine(a, b, axis):
    return (a*b).sum(axis)/np.sqrt((a*a).sum(axis)*(b*b).sum(axis))


def test_map_is_the_blurred_sum_of_the_levels(fitted):
    total = 0
    for a, b in pairs(fitted, unit(ODD)):
        d = torch.from_numpy(1 - cosine(a, b, 1))[:, None]
        total = total + F.interpolate(d, size=(64, 64), mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = [ndimage.gaussian_filter(m, 4.0, mode="mirror") for m in total]
    with torch.inference_mode():
        raw = fitted(unit(ODD))
    np.testing.assert_allclose(raw.map, expected, atol=1e-5)
    assert torch.equal(raw.score, raw.map.flatten(1).max(1).values)


@pytest.mark.parametrize("loss", ["flat", "mean"])
def test_losses(loss):
    model = ReverseDistillation(**TINY, loss=loss).build().eval()
    x, whole = unit(ODD), {"flat": lambda a: a.reshape(len(a), -1), "mean": lambda a: a}[loss]
    with torch.no_grad():
        found = float(model.loss(model.features(x), None))
    assert abs(found - sum((1 - cosine(whole(a), whole(b), 1)).mean() for a, b in pairs(model, x))) < 1e-5


@pytest.mark.parametrize("step", ["", "down", "up"])
@pytest.mark.parametrize("middle", [0, 3])
def test_a_block_is_its_two_roads_added(step, middle):
    block = Block(6, 4, step, middle).eval()
    x = torch.rand(2, 6, 8, 10)
    assert torch.equal(block(x), F.relu(block.body(x) + block.beside(x)))
    assert {"": (8, 10), "down": (4, 5), "up": (16, 20)}[step] == block(x).shape[-2:]
    convs = [m for m in block.body if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [m.kernel_size[0] for m in convs] == ([1, 2 if step == "up" else 3, 1] if middle else [2 if step == "up" else 3, 3])
    assert isinstance(Block(6, 6).beside, nn.Identity) and not isinstance(Block(6, 6, "down").beside, nn.Identity)


def test_the_published_form():
    with torch.device("meta"):
        teacher = Backbone("wide_resnet50_2", strides=(4, 8, 16), weights="random")
        net = ReverseDistillationNet(teacher, *form_of("wide_resnet50_2", 3))
    middles = [[m.body[0].out_channels for m in s] for s in (net.bottleneck.embed, *net.decoder)]
    assert middles == [[1024]*3, [512]*3, [256]*4, [128]*6]
    assert net.bottleneck.embed[0].body[0].in_channels == 3*1024 and net.bottleneck.embed[-1].body[-2].out_channels == 2048
    assert [[tuple(c.weight.shape[:2]) for c in f.modules() if isinstance(c, nn.Conv2d)] for f in net.bottleneck.fuse] == [
        [(512, 256), (1024, 512)], [(1024, 512)], []]
    assert all(isinstance(o, nn.Identity) for o in net.last)
    (group,) = ReverseDistillation(**TINY).build().configure_optimizers().param_groups
    assert (group["lr"], group["betas"]) == (0.005, (0.5, 0.999))
    model = ReverseDistillation()
    assert (model.trainer_defaults, model.batch_size, model.keep, model.patience) == (dict(max_epochs=200), 16, "last", None)


@pytest.mark.parametrize("backbone,layers", [("resnet18", None), ("resnet18", ["layer2", "layer3"]), ("resnet50", None),
                                             ("tf_efficientnet_lite0", None), ("convnext_atto", None), ("vgg11", None)])
@pytest.mark.parametrize("size", [(64, 96), (48, 80)])
def test_teachers_of_all_kinds(backbone, layers, size):
    model = ReverseDistillation(backbone=backbone, layers=layers, weights="random", image_size=size, blocks=1).build().eval()
    with torch.no_grad():
        seen = model.features(torch.rand(1, 3, 64, 64))
        drawn = model.net.drawn(seen)
    assert [a.shape for a in seen] == [b.shape for b in drawn]
    negative = any((a < 0).any() for a in seen)
    assert not negative or all((b < 0).any() for b in drawn)


def test_any_batch_and_odd_sizes(fitted):
    with torch.inference_mode():
        whole = fitted(unit(ODD))
        for i, o in enumerate(ODD):
            alone = fitted(unit([o]))
            assert (whole.map[i] - alone.map[0]).abs().max() <= 1e-5*whole.map.max()
        for size in ((50, 90), (33, 47), (64, 17)):
            assert fitted.net(torch.rand(2, 3, *size)).map.shape == (2, *size)


def test_the_decoder_learns_and_the_teacher_does_not():
    model = ReverseDistillation(**TINY).build().train()
    teacher = {k: v.clone() for k, v in model.net.backbone.state_dict().items()}
    assert model.net.bottleneck.training and not any(m.training for m in model.net.backbone.modules())
    with torch.no_grad():
        x = model.features(unit(GOOD))
    optimiser, losses = model.configure_optimizers(), []
    for _ in range(12):
        losses.append(model.loss(x, None))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    heads = [p for o in (model.net.bottleneck, model.net.decoder) for p in o.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)
    assert {id(p) for g in optimiser.param_groups for p in g["params"]} == {id(p) for p in heads}
    assert all(torch.equal(v, teacher[k]) for k, v in model.net.backbone.state_dict().items())
    assert float(losses[-1].detach()) < 0.6*float(losses[0].detach())


def test_one_seed_one_decoder(fitted):
    again, other = fit(), fit(seed=1)
    assert all(torch.equal(x, y) for x, y in zip(fitted.state_dict().values(), again.state_dict().values()))
    first = lambda m: m.net.decoder[0][0].body[0].weight
    assert not torch.equal(first(other), first(again))


def test_bad_input():
    with pytest.raises(AnomnbError, match="image_size of at least 33"):
        fit(GOOD[:1], image_size=32)
    assert fit(GOOD[:2], image_size=32, epochs=1).fitted
    for blocks in (0, [2, 2], "two", [1, 1, 1, 1.5], True):
        with pytest.raises(AnomnbError, match="or 4 of them"):
            ReverseDistillation(backbone="resnet18", blocks=blocks)
    with pytest.raises(AnomnbError, match="strides \\[4, 16\\]"):
        ReverseDistillation(backbone="resnet18", layers=["layer1", "layer3"])
    with pytest.raises(AnomnbError, match="did you mean 'mean'"):
        ReverseDistillation(loss="meam")
    with pytest.raises(AnomnbError, match="at least 17"):
        fit(image_size=16)(torch.rand(1, 3, 16, 16))
