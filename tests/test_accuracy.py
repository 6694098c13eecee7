"""Accuracy on real images, where they are: what `anomnb_benchmark road` must reach on hazelnut_toy."""
import pytest

from anomnb.engine.benchmark import METRICS, accuracy_rows
from anomnb.models.padim import Padim
from anomnb.models.patchcore import Patchcore


@pytest.mark.parametrize("name, cls, kw", [("padim", Padim, {}), ("patchcore", Patchcore, dict(coreset_ratio=0.01))])
def test_hazelnut_reaches_what_is_stated(needs_data, needs_weights, name, cls, kw):
    needs_data("hazelnut_toy")
    rows = accuracy_rows("hazelnut_toy", name, cls(backbone="resnet18", weights=str(needs_weights()), **kw))
    assert len(rows) == len(METRICS) and all(r.reached for r in rows), "\n".join(map(str, rows))
