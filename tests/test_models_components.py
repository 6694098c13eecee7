"PCA against numpy: rows, scatter and sketch, in shards, out again, on bad input; a sketch's stated error against the true one"
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.models.components import PCA, coordinates, pca_memory, remainder, residual
from anomnb.models.scatter import Rows, Scatter, Sketch


def rows(n=60, dims=20, mean=0., falling=0.85, seed=0, dtype=torch.float64):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, dims))*falling**np.arange(dims) @ np.linalg.qr(np.random.default_rng(99).normal(size=(dims, dims)))[0]
    return torch.from_numpy(x + mean).to(dtype)


def oracle(x):
    y = x.double().numpy() - x.double().numpy().mean(0)
    _, s, vt = np.linalg.svd(y, full_matrices=False)
    return y, s**2/(len(x) - 1), vt


def agrees(space, x, k, tol=1e-9):
    "Values, what is not kept, and the projector"
    _, values, vt = oracle(x)
    assert space.basis.shape == (x.shape[1], k) and space.basis.dtype == space.mean.dtype == torch.float32 and space.values.dtype == torch.float64
    np.testing.assert_allclose(space.values, values[:k], rtol=tol, atol=tol*values[0])
    np.testing.assert_allclose(space.rest, values[k:].sum(), rtol=1e-6, atol=tol*values[0])
    np.testing.assert_allclose(space.basis @ space.basis.T, vt[:k].T @ vt[:k], atol=2e-6)
    np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(k), atol=1e-6)
    np.testing.assert_allclose(space.mean, x.double().mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n,dims", [(7, 30), (29, 30), (30, 30), (31, 30), (400, 30), (2, 5), (300, 150)])
@pytest.mark.parametrize("batch", [1, 16, 500])
def test_is_numpy(n, dims, batch):
    x, p = rows(n, dims, mean=50), PCA(dims)
    for o in x.split(batch):
        p.update(o)
    assert p.n == n and isinstance(p.held, Rows if n < dims else Scatter)
    k = min(6, n - 1, dims)
    agrees(p.finish(components=k), x, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_sums_are_float64_whatever_comes(dtype):
    for n in (20, 200):
        x = rows(n, 40, mean=20, dtype=dtype)
        agrees(PCA(40).update(x[:9]).update(x[9:]).finish(components=8), x, 8, 1e-8)


def test_any_shards_any_order():
    x = rows(90, 40, mean=30)
    for seed in range(12):
        g = np.random.default_rng(seed)
        parts = np.array_split(g.permutation(90), np.sort(g.integers(0, 91, g.integers(1, 6)))) # some are empty, some rows, some scatter
        joined = PCA(40)
        for part in parts:
            joined.merge(PCA(40).update(x[torch.from_numpy(part)]))
        assert joined.n == 90
        agrees(joined.finish(components=10), x, 10)


def test_merge_of_every_two_forms():
    x = rows(300, 60)
    def of(kind, x): return PCA(60, None if kind != "sketch" else 60_000).update(x[:50]).update(x[50:])
    sizes = dict(rows=40, scatter=130, sketch=130)
    for a in sizes:
        for b in sizes:
            one, two = x[:sizes[a]], x[150:150 + sizes[b]]
            p, q = of(a, one), of(b, two)
            before = {k: v.clone() for k, v in q.state().items()}
            s = p.merge(q).finish()
            both = torch.cat([one, two])
            error = torch.linalg.matrix_norm(torch.cov(both.T) - (s.basis.double()*s.values) @ s.basis.double().T, 2)
            assert p.n == len(both) and error <= s.error + 1e-6 and (s.error > 0) == ("sketch" in (a, b))
            np.testing.assert_allclose(s.values.sum() + s.rest, torch.cov(both.T).trace(), rtol=1e-9)
            assert all(torch.equal(v, q.state()[k]) for k, v in before.items())  # the other is as it was


def test_subtract():
    for n, dims in ((40, 64), (400, 64)):
        x = rows(n, dims, mean=10, dtype=torch.float32)
        p = PCA(dims).update(x).subtract(x[5:15])
        rest = torch.cat([x[:5], x[15:]])
        agrees(p.finish(components=9), rest, 9, 1e-8)
        assert p.n == n - 10
        p.subtract(rest)
        assert p.n == 0
        agrees(p.update(x).finish(components=9), x, 9)


def test_rows_go_out_by_nearest_match_once_each():
    x = rows(10, 64, dtype=torch.float32)
    noisy = x[[3, 3, 7]]*(1 + 1e-6)
    p = PCA(64).update(torch.cat([x, x[3:4]]))  # row 3 came twice and goes twice
    agrees(p.subtract(noisy).finish(components=5), x[[0, 1, 2, 4, 5, 6, 8, 9]], 5, 1e-8)
    for known in (8, 80):
        p = PCA(64).update(rows(known, 64))
        before = p.finish().values
        with pytest.raises(AnomnbError, match="not added before"):
            p.subtract(rows(1, 64, seed=5)*100)
        assert torch.equal(p.finish().values, before)
    with pytest.raises(AnomnbError, match="81 rows can't be taken out of 80"):
        p.subtract(rows(81, 64))


@pytest.mark.parametrize("n,max_bytes", [(0, None), (30, None), (200, None), (200, 60_000)])
def test_state_and_copy_go_on(n, max_bytes):
    x, more = rows(n, 64), rows(100, 64, seed=3)
    p = PCA(64, max_bytes).update(x)
    again, copied = PCA(64, max_bytes).set_state({k: v.clone() for k, v in p.state().items()}), p.copy()
    assert all(isinstance(v, torch.Tensor) for v in p.state().values())
    if n and not max_bytes:
        again.subtract(x[:10]).update(x[:10])
    again.update(more), p.update(more)
    assert copied.n == n and again.n == p.n == n + 100
    torch.testing.assert_close(again.finish().values, p.finish().values, rtol=1e-9, atol=1e-12)
    assert copied.update(more).n == n + 100 and torch.equal(copied.finish().values, p.finish().values)


def test_fewest_axes_for_the_variance():
    for n in (30, 300):
        x = rows(n, 50)
        _, values, _ = oracle(x)
        for part in (1e-9, 0.3, 0.9, 0.97, 0.999):
            s = PCA(50).update(x).finish(variance=part)
            k = len(s.values)
            assert values[:k].sum() >= part*values.sum() > values[:k - 1].sum()
        assert len(PCA(50).update(x).finish(variance=1).values) == len(PCA(50).update(x).finish().values) == min(n - 1, 50)


def test_axes_that_hardly_vary_stay_orthogonal():
    x = rows(20, 200, falling=0.2)
    s = PCA(200).update(x).finish()
    assert 8 < len(s.values) < 19 and s.values[-1] < 1e-9*s.values[0]
    np.testing.assert_allclose(s.basis.T @ s.basis, np.eye(len(s.values)), atol=1e-6)


def test_the_same_rows_give_the_same_axes():
    x = rows(40, 64, dtype=torch.float32)
    one, other = PCA(64).update(x).finish(components=5), PCA(64).update(x.flip(0)[:20]).update(x.flip(0)[20:]).finish(components=5)
    torch.testing.assert_close(one.basis, other.basis, atol=1e-6, rtol=0)
    big = PCA(64, 10**9)
    big.held = big._sums("cpu")  # the scatter of few rows, against their Gram matrix
    torch.testing.assert_close(big.update(x).finish(components=5).basis, one.basis, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [0., 0.1, 1/3, 1e6])
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_equal_rows_have_no_axis(value, n):
    for dtype in (torch.float32, torch.float64):
        p = PCA(12)
        for _ in range(n):
            p.update(torch.full((1, 12), value, dtype=dtype))
        s = p.finish(variance=0.97)
        assert s.basis.shape == (12, 0) and len(s.values) == 0 and s.rest <= 1e-12*max(value, 1)**2
        far = residual(s.mean + 1, s.mean, s.basis)
        assert far == pytest.approx(12, rel=1e-6)
        with pytest.raises(AnomnbError, match="varies in 0 directions"):
            p.finish(components=1)


def test_bad_input():
    p = PCA(4)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = rows(5, 4)
        x[3, 1] = bad
        with pytest.raises(AnomnbError, match="row 3 of 5 holds NaN or infinity"):
            p.update(x)
    with pytest.raises(AnomnbError, match=r"shape \(2, 3\) where \(n, 4\)"):
        p.update(torch.zeros(2, 3))
    with pytest.raises(AnomnbError, match="wanted"):
        p.update(torch.zeros(4))
    with pytest.raises(AnomnbError, match="no rows yet"):
        p.finish()
    assert p.n == 0 and p.update(torch.zeros(0, 4)).n == 0 and p.update(np.ones((3, 4), np.int64)).n == 3
    assert p.update(torch.full((1, 4), 60000.).half().repeat(9, 1)).n == 12  # its sum is beyond float16
    for kw, words in ((dict(variance=0), "above 0"), (dict(variance=-1), "above 0"), (dict(variance=1.01), "at most 1"), (dict(variance="much"), "at most 1"),
                      (dict(variance=float("nan")), "at most 1"), (dict(components=0), "at least 1"), (dict(components=2.0), "whole number"),
                      (dict(components=True), "whole number"), (dict(variance=0.9, components=2), "not both"), (dict(components=5), "directions: give more")):
        with pytest.raises(AnomnbError, match=words):
            p.finish(**kw)
    with pytest.raises(AnomnbError, match="can't join"):
        p.merge(PCA(5))
    with pytest.raises(AnomnbError, match="no state of PCA: it has n"):
        p.set_state(dict(n=torch.tensor(1)))
    with pytest.raises(AnomnbError, match="rows of 6 numbers where 4"):
        p.set_state(PCA(6).update(torch.zeros(2, 6)).state())
    with pytest.raises(AnomnbError, match="dims=0"):
        PCA(0)


@pytest.mark.parametrize("seed", range(6))
def test_the_stated_error_bounds_the_true_one(seed):
    g = np.random.default_rng(seed)
    dims, n = int(g.integers(80, 200)), int(g.integers(200, 600))
    x = torch.from_numpy(g.normal(size=(n, dims))*np.arange(1, dims + 1)**-g.uniform(0, 2) + g.normal(size=dims)*10)
    p = PCA(dims, max_bytes=pca_memory(n, dims)[0]*2)
    for o in x.split(int(g.integers(1, 100))):
        p.update(o)
    assert isinstance(p.held, Sketch)
    s, cov = p.finish(), torch.cov(x.T)
    V = s.basis.double()
    sketched, size = (V*s.values) @ V.T, p.held.size
    true = torch.linalg.matrix_norm(cov - sketched, 2)
    falling = torch.linalg.eigvalsh(cov).flip(0)
    best = min(float(falling[k:].sum())/(size + 1 - k) for k in range(size))  # Ghashami et al. 2016, theorem 1.1
    assert 0 < true <= s.error*(1 + 1e-6) <= best*(1 + 1e-5)
    assert torch.linalg.eigvalsh(cov - sketched).min() > -1e-5*falling[0]  # never too much
    np.testing.assert_allclose(s.values.sum() + s.rest, cov.trace(), rtol=1e-9)
    few = p.finish(components=5)
    left = torch.trace(cov) - torch.trace(few.basis.double().T @ cov @ few.basis.double())
    assert float(falling[5:].sum()) - 1e-6 <= left <= few.rest*(1 + 1e-6)  # `rest` is what is left at most
    torch.testing.assert_close(s.mean, x.mean(0).float())


def test_a_sketch_of_few_directions_is_exact():
    x = rows(500, 100, falling=0.01)[:, :] @ torch.eye(100).double()
    p = PCA(100, max_bytes=60_000)
    for o in x.split(50):
        p.update(o)
    assert isinstance(p.held, Sketch) and p.finish().error < 1e-12
    agrees(p.finish(components=3), x, 3, 1e-8)


def test_a_sketch_says_what_it_can_not():
    p = PCA(100, max_bytes=60_000).update(rows(300, 100, falling=1.))
    with pytest.raises(AnomnbError, match="can't be taken out of a sketch"):
        p.subtract(rows(1, 100))
    with pytest.warns(UserWarning, match="97.0% were asked for: allow more memory"):
        p.finish(variance=0.97)


def test_memory_is_bounded():
    for dims, n in ((64, 1000), (300, 1000), (1000, 3000)):
        least, wanted = pca_memory(n, dims)
        for limit in (least, 2*least, wanted):
            p = PCA(dims, limit)
            for i in range(4):
                p.update(rows(n//4, dims, seed=i, dtype=torch.float32))
                assert sum(v.nbytes for v in p.state().values()) <= limit
        assert isinstance(p.held, Scatter)
        with pytest.raises(AnomnbError, match="is too little for rows of .* allow at least"):
            PCA(dims, least//2).update(rows(n, dims))
    assert pca_memory(320, 16384) == (8*32*16384 + 160*64, 320*16384*12)
    assert pca_memory(10**6, 16)[0] == pca_memory(10**6, 16)[1] == 40*256


def test_input_is_left_alone_and_not_kept():
    x = rows(10, 64, dtype=torch.float32)
    before, p = x.clone(), PCA(64).update(x)
    assert torch.equal(before, x)
    x.zero_()
    agrees(p.finish(components=3), before, 3)
    strided = before.T.contiguous().T
    assert torch.equal(PCA(64).update(strided).finish().values, PCA(64).update(before).finish().values)


def test_residual_is_the_definition():
    x = rows(50, 30, mean=4, dtype=torch.float32)
    s = PCA(30).update(x).finish(components=6)
    y, _, vt = oracle(x)
    left = y - y @ vt[:6].T @ vt[:6]
    np.testing.assert_allclose(residual(x, s.mean, s.basis), np.square(left).sum(1), rtol=1e-4)
    np.testing.assert_allclose(remainder(x, s.mean, s.basis), left, atol=1e-5)
    np.testing.assert_allclose(coordinates(x, s.mean, s.basis).var(0, unbiased=True), s.values, rtol=1e-4)
    assert residual(x.view(5, 10, 30), s.mean, s.basis).shape == (5, 10)
