"""The coreset against the plain greedy loop, where rounding, ties and duplicates could part them."""
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.models import farthest
from anomnb.models.bank import BankAccumulator, coreset, project
from anomnb.models.farthest import FarthestFirst, eager_order
from anomnb.models.nearest import BankIndex


def greedy(x, k, start=0):
    x, picked = x.astype(np.float64), [start]
    d = np.square(x - x[start]).sum(1)
    while len(picked) < k and d.max() > 0:
        picked.append(int(d.argmax()))
        d = np.minimum(d, np.square(x - x[picked[-1]]).sum(1))
    return picked


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offset", [0, 50, 1000])
def test_the_order_is_that_of_the_plain_loop(seed, offset):
    g = np.random.default_rng(seed)
    x = (g.standard_normal((3000, 6)) @ g.standard_normal((6, 40)) + offset).astype(np.float32)
    start = int(g.integers(3000))
    assert coreset(x, 400, start).tolist() == greedy(x, 400, start)


@pytest.mark.parametrize("band, cells", [(16, 2**18), (64, 2**10), (300, 2**14)])
@pytest.mark.parametrize("kind", ["correlated", "whole numbers", "copies", "far from zero"])
def test_bands_of_any_size_give_the_same_order(monkeypatch, band, cells, kind):
    monkeypatch.setattr(farthest, "BAND", band)
    monkeypatch.setattr(farthest, "CELLS", cells)
    g = np.random.default_rng(band)
    x = g.standard_normal((4000, 5)) @ g.standard_normal((5, 24)) + (1000 if kind == "far from zero" else 0)
    if kind == "whole numbers": x = x.round()
    if kind == "copies": x = x[g.integers(0, 400, 4000)]
    x = x.astype(np.float32)
    assert coreset(x, 350).tolist() == greedy(x, 350)


def test_copies_end_the_selection():
    x = np.repeat(np.random.default_rng(2).normal(size=(40, 6)).astype(np.float32), 300, axis=0)
    assert len(coreset(x, 100)) == 40 and coreset(x, 100).tolist() == greedy(x, 100)
    assert eager_order(torch.from_numpy(x), 100) == greedy(x, 100)


@pytest.mark.parametrize("kind", ["correlated", "copies", "flat"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_index_is_exact(kind, k, dtype):
    g = torch.Generator().manual_seed(k)
    bank = torch.randn(3000, 9, generator=g) @ torch.randn(9, 48, generator=g) + 0.1*torch.randn(3000, 48, generator=g) + 3
    if kind == "copies": bank = bank[torch.randint(0, 150, (3000,), generator=g)]
    if kind == "flat": bank = bank[:1].expand(3000, -1).clone()
    q = torch.cat([bank[:100], bank[100:200] + 0.01*torch.randn(100, 48, generator=g), 5*torch.randn(100, 48, generator=g)])
    true = (q.double()[:, None] - bank.double()).square().sum(2).sqrt().topk(k, 1, largest=False)[0]
    found, rows = BankIndex(bank, dtype=dtype)(q, k)
    assert (found - true).abs().max() <= 1e-5*true.max().clamp_min(1) and (found[:100, 0] == 0).all()
    assert torch.allclose((bank[rows] - q[:, None]).square().sum(2).sqrt(), found, atol=1e-5)
    assert all(len(set(r)) == k for r in rows.tolist())


def test_ties_go_to_the_lowest_index_and_duplicates_end_it():
    x = np.random.default_rng(0).integers(0, 3, (2000, 4)).astype(np.float32)
    found = coreset(x, 300).tolist()
    assert found == greedy(x, 300) and len(found) == len(np.unique(x, axis=0))
    assert coreset(np.ones((600, 5), np.float32), 10).tolist() == [0]


def test_copies_of_what_is_taken_are_not_followed():
    x = np.repeat(np.random.default_rng(3).normal(size=(200, 6)).astype(np.float32), 100, axis=0)
    few, followed = FarthestFirst(x, 300), []
    few.take(0)
    for _ in range(199):
        row, far = few.farthest()
        followed.append(len(few.rows))
        few.take(row)
    assert far > 0 == few.farthest()[1] and max(followed) <= 2*farthest.BAND + 100 < len(x)


def test_one_row_all_rows_and_none():
    x = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)
    assert coreset(x, 1, 7).tolist() == [7] and sorted(coreset(x, 300)) == list(range(300)) and coreset(x[:1], 1).tolist() == [0]
    for k in (0, 301):
        with pytest.raises(AnomnbError, match="can't be taken"):
            coreset(x, k)


def test_shards_stay_within_the_bound():
    x = torch.randn(5000, 20, generator=torch.Generator().manual_seed(0))
    radius = lambda bank: torch.cdist(x, bank).amin(1).max()  # noqa: E731
    whole, parts = BankAccumulator(0.05), [BankAccumulator(0.05, total=5000) for _ in range(2)]
    whole.update(x)
    for part, rows in zip(parts, x.chunk(2)):
        part.update(rows)
        part._reduce(part.keep)
    both = parts[0].merge(parts[1])
    assert radius(both.finish()) <= 2*2*radius(whole.finish()) and len(both.rows) == len(whole.rows)


def test_the_projection_is_one_for_all_shards():
    x = torch.randn(50, 300)
    assert torch.equal(project(x)[10:20], project(x[10:20])) or torch.allclose(project(x)[10:20], project(x[10:20]), atol=1e-5)
    assert project(x).shape == (50, 128) and project(x[:, :100]) is not None and project(x[:, :100]).shape == (50, 100)


def test_state_goes_on():
    a = BankAccumulator(0.1)
    a.update(torch.randn(200, 8))
    b = BankAccumulator(0.1).set_state(a.state())
    more = torch.randn(100, 8)
    a.update(more)
    b.update(more)
    assert torch.equal(a.finish(), b.finish())
