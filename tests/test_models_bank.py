"""The coreset against the plain greedy loop, where rounding, ties and duplicates could part them."""
import numpy as np
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.models.bank import BankAccumulator, coreset, project


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


def test_ties_go_to_the_lowest_index_and_duplicates_end_it():
    x = np.random.default_rng(0).integers(0, 3, (2000, 4)).astype(np.float32)
    found = coreset(x, 300).tolist()
    assert found == greedy(x, 300) and len(found) == len(np.unique(x, axis=0))
    assert coreset(np.ones((600, 5), np.float32), 10).tolist() == [0]


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
    assert radius(both.finish()) <= 2*2*radius(whole.finish()) and len(both.rows[0]) == len(whole.rows[0])


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
