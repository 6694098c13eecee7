"""PatchCore where its data or its arguments are at the edge of what makes sense."""
import numpy as np
import onnx
import pytest
import torch

from anomnb.core.errors import AnomnbError
from anomnb.engine.engine import Engine
from anomnb.export.onnx import to_onnx
from anomnb.models.bank import BankAccumulator
from anomnb.models.farthest import FarthestFirst
from anomnb.models.nearest import BankSearch, nearest_rows
from anomnb.models.patchcore import Patchcore

TINY = dict(backbone="resnet18", weights="random", image_size=64)


def images(n, size=64, seed=0):
    g = np.random.default_rng(seed)
    return [g.integers(0, 255, (size, size, 3), dtype=np.uint8) for _ in range(n)]


def fit(data, **kw):
    return Engine(quiet=True).fit(Patchcore(**{**TINY, **kw}), data, calibrate=False)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), "a tenth"])
def test_ratios_that_make_no_sense(ratio):
    with pytest.raises(AnomnbError, match="coreset_ratio"):
        Patchcore(**TINY, coreset_ratio=ratio)


def test_a_ratio_of_one_keeps_every_patch():
    model = fit(images(2), coreset_ratio=1)
    assert len(model.net.bank) == 2*model.rows_per_image()


def test_one_image_is_enough():
    model = fit(images(1), coreset_ratio=0.5)
    assert len(model.net.bank) == model.rows_per_image()//2 and torch.isfinite(model(torch.rand(1, 3, 64, 64)).score).all()


def test_maps_of_three_by_three():
    model = fit(images(6, 24), image_size=24, coreset_ratio=0.5)
    assert model.grid() == (3, 3) and model(torch.rand(2, 3, 24, 24)).map.shape == (2, 24, 24)


def test_images_that_are_all_the_same():
    same = images(1)*6
    model = fit(same, coreset_ratio=0.9)
    assert len(model.net.bank) <= model.rows_per_image()
    with pytest.raises(AnomnbError, match="num_neighbors=9 but the bank has"):
        fit([np.zeros((24, 24, 3), np.uint8)]*3, image_size=24, coreset_ratio=0.1)


def test_more_neighbours_than_rows():
    with pytest.raises(AnomnbError, match="num_neighbors=9 but the bank has 1 rows"):
        fit(images(1), coreset_ratio=0.001)
    with pytest.raises(AnomnbError, match="bank of 4 rows"):
        BankSearch()(torch.rand(2, 3), torch.rand(4, 3), 5)


def test_stored_in_half_precision():
    full, half = (fit(images(4), coreset_ratio=0.2, storage=s) for s in ("float32", "float16"))
    assert half.accumulator.store.dtype == torch.float16 and half.net.bank.dtype == torch.float32
    x = torch.rand(3, 3, 64, 64)
    a, b = full(x).score, half(x).score
    assert (a - b).abs().max() < 0.1*a.abs().max()
    assert half.memory(100, 1)[1] < full.memory(100, 1)[1]


def test_memory_is_what_was_promised():
    data, needs = images(24), Engine(quiet=True, batch_size=2).estimate(Patchcore(**TINY, coreset_ratio=0.05), images(24))
    room = needs.least_bytes + (needs.wanted_bytes - needs.least_bytes)//3
    model = Engine(quiet=True, batch_size=2, max_memory=room).fit(Patchcore(**TINY, coreset_ratio=0.05), data, calibrate=False)
    assert model.accumulator.reductions > 1 and len(model.net.bank) == round(0.05*24*model.rows_per_image())
    assert needs.finish_seconds > 0


def test_rows_are_refused_where_they_can_not_join():
    a = BankAccumulator(0.5)
    a.update(torch.rand(10, 8))
    for bad in (torch.rand(10, 9), torch.full((10, 8), torch.nan), torch.full((10, 8), torch.inf)):
        with pytest.raises(AnomnbError):
            a.copy().update(bad)
    assert a.held == 10


def test_a_search_follows_its_bank():
    g = torch.Generator().manual_seed(0)
    bank, q, search = torch.randn(2000, 32, generator=g), torch.randn(100, 32, generator=g), BankSearch()
    for _ in range(3):
        assert torch.allclose(search(q, bank)[0], nearest_rows(q, bank)[0], atol=1e-5)
        bank = bank*2 + 1
    bank.copy_(torch.randn(2000, 32, generator=g))
    assert torch.allclose(search(q, bank)[0], nearest_rows(q, bank)[0], atol=1e-5)
    with torch.inference_mode():
        moved = bank.clone()
        assert torch.allclose(search(q, moved, 3)[0], nearest_rows(q, moved, 3)[0], atol=1e-5)


def test_a_selection_ends_where_nothing_is_left():
    greedy = FarthestFirst(np.ones((500, 4), np.float32), 3)
    greedy.take(0)
    assert greedy.farthest()[1] == 0


def test_an_exported_graph_holds_the_plain_tiled_search(tmp_path):
    model = fit(images(20), coreset_ratio=0.9)
    assert len(model.net.bank) > 1000
    model(torch.rand(2, 3, 64, 64))  # arranges the bank
    assert model.net.search.index is not None
    graph = onnx.load(str(to_onnx(model, tmp_path/"m.onnx"))).graph
    kinds = {n.op_type for n in graph.node}
    assert "NonZero" not in kinds and {"TopK"} <= kinds
