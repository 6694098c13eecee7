"Moments against numpy, in shards, in any order, out again, and on bad input"
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.models.moments import Moments, mahalanobis, whiten


def features(n=40, p=7, d=5, mean=0., spread=1., seed=0, dtype=torch.float64):
    g = np.random.default_rng(seed)
    return torch.from_numpy(mean + spread*np.einsum("npd,pde->npe", g.normal(size=(n, p, d)), g.normal(size=(p, d, d)))).to(dtype)


def cov(m, shrinkage=0.):
    return torch.cat([c for _, c in m.covariance(shrinkage)])


def oracle(x):
    return torch.from_numpy(np.stack([np.cov(x[:, p].double().T.numpy()) for p in range(x.shape[1])]))


def close(a, b, tol=1e-6): # beside the size of each covariance, as an entry near zero has no digits of its own
    assert a.shape == b.shape
    size = b.abs().amax((1, 2), keepdim=True) if b.ndim == 3 else b.abs().amax(1, keepdim=True)
    assert ((a - b).abs()/size).max() < tol


@pytest.mark.parametrize("mean,spread,dtype", [(0, 1, torch.float64), (1e4, 1e-1, torch.float64),
                                               (3, 1, torch.float32), (100, 1, torch.float32)])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_is_numpy(mean, spread, dtype, batch):
    x = features(mean=mean, spread=spread, dtype=dtype)
    m = Moments(7, 5)
    for part in x.split(batch): m.update(part)
    close(cov(m), oracle(x), 1e-9)
    close(m.mean(), x.double().mean(0), 1e-12)


def test_any_shards_any_order():
    x = features(n=61, mean=50)
    whole = Moments(7, 5).update(x)
    for seed in range(10):
        g = np.random.default_rng(seed)
        parts = np.array_split(g.permutation(61), np.sort(g.integers(0, 62, g.integers(1, 9)))) # some are empty
        shards = []
        for part in parts:
            m = Moments(7, 5)
            for o in np.array_split(part, 3): m.update(x[torch.from_numpy(o)])
            shards.append(m)
        joined = Moments(7, 5)
        for m in shards: joined.merge(m)
        assert joined.n == 61
        close(cov(joined), cov(whole), 1e-9)


def test_blocks_change_nothing(monkeypatch):
    from anomnb.models import moments
    x, whole = features(), Moments(7, 5).update(features())
    plain = moments._blocks
    monkeypatch.setattr(moments, "_blocks", lambda p, d: plain(p, d, 2*d*d))
    m = Moments(7, 5).update(x[:20]).merge(Moments(7, 5).update(x[20:]))
    slices = [s for s, _ in m.covariance()]
    assert [(s.start, s.stop) for s in slices] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    close(cov(m), cov(whole), 1e-9)


def test_subtract():
    x = features(n=50, mean=20)
    m = Moments(7, 5).update(x).subtract(x[10:30])
    rest = torch.cat([x[:10], x[30:]])
    assert m.n == 30
    close(cov(m), oracle(rest), 1e-9)
    close(m.mean(), rest.mean(0), 1e-12)
    m.subtract(rest)
    assert m.n == 0 and not m.state()["scatter"].any()
    with pytest.raises(AnomnbError, match="can't be taken out of 0"): m.subtract(x[:1])


def test_state_goes_on():
    x = features()
    m = Moments(7, 5).update(x[:20])
    state = {k: v.clone() for k, v in m.state().items()}
    again = Moments.from_state(state).update(x[20:])
    m.update(x[20:])
    assert again.n == m.n == 40 and torch.equal(cov(again), cov(m)) and int(state["n"]) == 20
    with pytest.raises(AnomnbError, match="scatter missing"): Moments.from_state(dict(n=1, mean=state["mean"]))
    with pytest.raises(AnomnbError, match="not of one state"): Moments.from_state({**state, "mean": state["mean"][:, :2]})


def test_layout_of_the_input_does_not_matter():
    x = features(dtype=torch.float32)
    strided = x.permute(0, 2, 1).contiguous().mT
    assert torch.equal(cov(Moments(7, 5).update(strided)), cov(Moments(7, 5).update(x)))
    before = x.clone()
    Moments(7, 5).update(x)
    assert torch.equal(before, x)


def test_memory_is_the_result_and_a_block():
    m = Moments(64, 8).update(features(4, 64, 8))
    before = sum(v.nbytes for v in m.state().values())
    for i in range(20): m.update(features(4, 64, 8, seed=i))
    assert sum(v.nbytes for v in m.state().values()) == before == 8 + 8*64*8 + 8*64*8*8


def test_mahalanobis_is_the_definition():
    x = features(dtype=torch.float32, mean=5)
    m = Moments(7, 5).update(x)
    d = mahalanobis(x, m.mean().float(), m.factors(0.01))
    y, inv = (x.double() - m.mean()).numpy(), np.linalg.inv(cov(m, 0.01).numpy())
    np.testing.assert_allclose(d, np.sqrt(np.einsum("npd,pde,npe->np", y, inv, y)), rtol=1e-5)
    assert d.shape == (40, 7) and d.dtype == torch.float32


def test_factor_is_lower_and_inverse():
    c = oracle(features()) + 0.01*torch.eye(5)
    f = whiten(c)
    assert f.dtype == torch.float32 and torch.equal(f, f.tril())
    torch.testing.assert_close(f.double() @ c @ f.double().mT, torch.eye(5).double().expand_as(c), atol=1e-4, rtol=0)


def test_bad_input():
    m = Moments(7, 5)
    with pytest.raises(AnomnbError, match="no image yet"): m.mean()
    with pytest.raises(AnomnbError, match="two images or more, not 0"): next(m.covariance())
    with pytest.raises(AnomnbError, match=r"shape \(4, 5\) where \(n, 7, 5\)"): m.update(torch.zeros(4, 5))
    with pytest.raises(AnomnbError, match="where"): m.update(torch.zeros(4, 5, 7))
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = features()
        x[3, 2, 1] = bad
        with pytest.raises(AnomnbError, match="NaN or infinity"): m.update(x)
    assert m.n == 0 and not m.state()["mean"].any() and m.update(torch.zeros(0, 7, 5)).n == 0
    with pytest.raises(AnomnbError, match="can't join"): m.merge(Moments(7, 4))
    with pytest.raises(AnomnbError, match="raise the shrinkage"): whiten(torch.zeros(2, 3, 3, dtype=torch.float64))
    few = Moments(7, 5).update(features(n=3)) # fewer images than dims: the shrinkage makes it positive
    assert torch.isfinite(few.factors(0.01)).all()
