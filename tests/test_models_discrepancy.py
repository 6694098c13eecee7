"Distances and joins against naive loops, the hardest places, networks that have learned nothing"
import numpy as np
import pytest
import timm
import torch
from torch import nn

from anomnb.core.errors import AnomnbError
from anomnb.models.discrepancy import (
    check_places,
    cosine_map,
    flat_cosine,
    half_square_map,
    hard_flat_cosine,
    hard_mean,
    join_maps,
    scale_gradient,
    untrained_copy,
)


def pair(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)


def naive_cosine(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return np.array([[[1 - a[i, :, y, x] @ b[i, :, y, x]/np.linalg.norm(a[i, :, y, x])/np.linalg.norm(b[i, :, y, x])
                       for x in range(a.shape[3])] for y in range(a.shape[2])] for i in range(a.shape[0])])


def naive_stretch(m, height, width):
    "Bilinear with half-pixel centres, one pixel at a time"
    m, (h, w) = m.numpy().astype(float), m.shape
    out = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            v, u = (min(max((p + 0.5)*n/big - 0.5, 0), n - 1) for p, n, big in ((y, h, height), (x, w, width)))
            j, i = int(v), int(u)
            k, l = min(j + 1, h - 1), min(i + 1, w - 1)
            top, low = (m[r, i]*(1 - u + i) + m[r, l]*(u - i) for r in (j, k))
            out[y, x] = top*(1 - v + j) + low*(v - j)
    return out


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (3, 64, 4, 1)])
def test_distances_are_naive(shape):
    a, b = pair(*shape)
    for f in (cosine_map, half_square_map):  # float32 sums of up to 64 products
        np.testing.assert_allclose(f(a, b), naive_cosine(a, b), atol=2e-6)
    flat = [1 - float(x @ y/x.norm()/y.norm()) for x, y in zip(a.double().flatten(1), b.double().flatten(1))]
    np.testing.assert_allclose(flat_cosine(a, b), flat, atol=2e-6)


def test_distances_know_directions_alone():
    a, b = pair(2, 9, 4, 4)
    strength = torch.rand(2, 1, 4, 4) + 0.1
    for f in (cosine_map, half_square_map):
        assert torch.allclose(f(a*strength, b*7), f(a, b), atol=1e-6) and float(f(a, a).max()) < 1e-6
        assert torch.allclose(f(a, -a), torch.full((2, 4, 4), 2.), atol=1e-6)
    assert torch.isfinite(half_square_map(torch.zeros_like(a), b)).all() and torch.isfinite(cosine_map(torch.zeros_like(a), b)).all()


@pytest.mark.parametrize("mode,join", [("product", np.prod), ("sum", np.sum), ("mean", np.mean)])
def test_joins_are_naive(mode, join):
    maps = [torch.rand(2, 8, 6), torch.rand(2, 4, 3), torch.rand(2, 2, 2)]
    expected = [join([naive_stretch(m[i], 19, 13) for m in maps], axis=0) for i in range(2)]
    np.testing.assert_allclose(join_maps(maps, (19, 13), mode), expected, atol=1e-5)


def test_a_join_of_one_level_stretches_it():
    m = torch.rand(1, 5, 7)
    assert torch.equal(join_maps([m], (5, 7), "sum"), m) and torch.equal(join_maps([m], (5, 7), "product"), m)
    with pytest.raises(AnomnbError, match="did you mean 'product'"):
        join_maps([m], (5, 7), "produkt")


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 4001])
@pytest.mark.parametrize("quantile", [0, 0.25, 0.5, 0.9, 0.999, 1])
def test_hard_mean_is_the_mean_above_the_quantile(n, quantile):
    d = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert abs(hard_mean(d, quantile) - d[d >= np.quantile(d.numpy(), quantile) - 1e-12].mean()) < 1e-12


def test_hard_mean_pulls_at_the_hardest_alone():
    d = torch.rand(2000, requires_grad=True)
    hard_mean(d, 0.99).backward()
    assert set(d.grad.nonzero().flatten().tolist()) == set(d.topk(20).indices.tolist())
    with pytest.raises(AnomnbError, match="from 0 to 1"):
        hard_mean(d, -0.1)


@pytest.mark.parametrize("easy", [0, 0.5, 0.9, 1])
def test_easy_places_pull_less(easy):
    a, b = pair(3, 6, 5, 4)
    grads = []
    for f in (flat_cosine, lambda a, b: hard_flat_cosine(a, b, easy, 0.1)):
        x = b.clone().requires_grad_()
        loss = f(a, x).mean()
        loss.backward()
        grads.append((float(loss.detach()), x.grad))
    d = torch.from_numpy(naive_cosine(a, b))
    hard = d >= d.flatten().sort(descending=True)[0][max(int(60*(1 - easy)), 1) - 1]
    assert grads[0][0] == grads[1][0] and hard.sum() == max(int(60*(1 - easy)), 1)
    torch.testing.assert_close(grads[1][1], grads[0][1]*torch.where(hard, 1., 0.1)[:, None].float(), atol=1e-8, rtol=1e-5)


def test_scaled_gradients_leave_values():
    x = torch.randn(50, requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.square().sum().backward()
    assert torch.equal(y, x) and torch.allclose(x.grad, 0.5*x.detach())


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "test_vit"])
def test_nothing_of_the_teacher_is_left(name):
    teacher = timm.create_model(name, num_classes=0).eval()
    for p in teacher.parameters():
        nn.init.constant_(p, 0.123)
    before = torch.get_rng_state()
    a, b, c = untrained_copy(teacher, 3), untrained_copy(teacher, 3), untrained_copy(teacher, 4)
    assert torch.equal(before, torch.get_rng_state()) and a.training and not teacher.training
    for (k, t), x, y in zip(teacher.named_parameters(), a.parameters(), b.parameters()):
        assert x.requires_grad and torch.equal(x, y) and not (x == t).any(), k
    weights = [(x, z) for x, z in zip(a.parameters(), c.parameters()) if x.ndim > 1]
    assert all(not torch.equal(x, z) for x, z in weights)
    shape = (1, 3, *getattr(teacher, "pretrained_cfg", {}).get("input_size", (3, 64, 64))[1:])
    assert torch.isfinite(a.eval()(torch.rand(shape))).all()


def test_running_statistics_begin_anew():
    net = nn.BatchNorm2d(3)
    net(torch.rand(4, 3, 5, 5)*9 + 5)
    new = untrained_copy(net)
    assert torch.equal(new.running_mean, torch.zeros(3)) and torch.equal(new.running_var, torch.ones(3)) and new.num_batches_tracked == 0


def test_places_of_a_norm():
    for shape in ((2, 5, 1, 1), (1, 5, 1, 2), (1, 5, 2, 1)):
        check_places(torch.rand(shape), 33)
    with pytest.raises(AnomnbError, match="two images or more, or image_size of at least 33"):
        check_places(torch.rand(1, 5, 1, 1), 33)
